"""What a network costs: multiply-adds, parameters, linear layers, additions of two tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ._affine import CONVS
from ._dialect import ADDS, SUBS
from ._errors import ShapeError
from ._graph import positions
from .frontend import trace


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass.

    Attributes:
        macs: multiply-adds of convolutions and Linear layers.
        parameters: numbers in the parameters.
        layers: convolutions and Linear layers, counted per call.
        adds: additions and subtractions of two tensors that depend on the input.
    """

    macs: int
    parameters: int
    layers: int
    adds: int


def count(model: nn.Module | Any, example_inputs: Any) -> Cost:
    """Count the cost of a model on example inputs.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode.
        example_inputs: a tensor or a tuple of arguments.

    Raises:
        ShapeError: no example inputs were given, or the model does not run on them.

    Example:
        >>> import torch
        >>> from rmfx import cost
        >>> cost.count(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1)), torch.zeros(1, 3, 4, 4)).macs
        384
    """
    if example_inputs is None:
        raise ShapeError("counting multiply-adds needs example inputs")
    gm = trace(model, example_inputs)
    macs = layers = adds = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in (*ADDS, *SUBS):
            tensors = [n for n in node.all_input_nodes if n.op != "get_attr"]
            adds += len(tensors) == 2 and not any(n.meta.get("number") for n in tensors)
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if isinstance(module, CONVS):
            weight = cast("Tensor", module.weight)
            macs += weight.numel() * (positions(node.meta.get("shape"), weight.dim() - 2) or 0)
            layers += 1
    return Cost(macs, sum(p.numel() for p in gm.parameters()), layers, adds)
