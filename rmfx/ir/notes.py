"""What is noted of a node's value, and how long that holds."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

OWN_GRADIENT = "own_gradient"  # where a gradient is not that of what is computed
Shape = tuple[int | None, ...]
ORIGIN = ("nn_module_stack", "source", "stack_trace")  # metadata: where a node comes from
NOTED = ("val", "example_value", "tensor_meta")  # by exporting, by Dynamo and by torch.fx
WRITTEN = "written"  # tensors of the model behind the node may be written to
GUARDED = "guarded"  # the sizes noted are those of every call: others are refused


def noted(node: fx.Node) -> Any:
    """What exporting or Dynamo noted of a value, None if nothing."""
    return node.meta.get("val", node.meta.get("example_value"))


def shape_of(node: fx.Node) -> Any:
    """The shape of a value, None where nobody noted it."""
    return node.meta.get("shape", getattr(node.meta.get("val"), "shape", None))


def sizes_of_every_call(node: fx.Node) -> tuple[Any, ...] | None:
    """Sizes of a value, a number or a SymInt each, None where inputs of other sizes may come."""
    value = noted(node) if GUARDED in node.meta else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def without_notes(node: fx.Node, *others: str) -> dict[str, Any]:
    """The metadata of a node for one that holds another value."""
    return {key: value for key, value in node.meta.items() if key not in (*NOTED, *others)}


def forget(node: fx.Node) -> None:
    """Drop what was noted of a value that is another one now."""
    for key in NOTED:
        node.meta.pop(key, None)


def with_channels(shape: Shape, channels: int, dims: int) -> Shape:
    """A shape with other channels, for layers of `dims` spatial dimensions."""
    return (shape[0], channels, *shape[2:]) if dims else (*shape[:-1], channels)


def positions(shape: Shape | None, dims: int) -> int | None:
    """Pixels or tokens in a batch, for layers of `dims` spatial dimensions."""
    if shape is None or any(n is None for n in shape):
        return None
    sizes = [int(n) for n in shape if n is not None]
    return math.prod(sizes[:1] + sizes[2:] if dims else sizes[:-1])
