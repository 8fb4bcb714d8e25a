"""A random network as plain data, and the module that is built of it."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import chain_features, recalled_names, saved_names
from .node import Chain, Node, Nodes, Tied


@dataclass(frozen=True, repr=False)
class NetworkSpec:
    """A whole network as data; its `repr` is an expression that gives the same spec back.

    Attributes:
        shapes: the shape of every input, with the batch.
        body: the chain that the first input runs through.
        output: "tensor", "tuple", "list", "dict" or "nested".
        returned: the names of saved values that are returned as well.
        dtype: the type of weights and inputs.
    """

    shapes: tuple[tuple[int, ...], ...]
    body: Nodes
    output: str = "tensor"
    returned: tuple[str, ...] = ()
    dtype: str = "float64"

    __repr__ = Node.__repr__

    def build(self, seed: int = 0) -> Network:
        """The network in eval mode and its type, with random weights and batch norm statistics."""
        _hear_padding_warning()
        with torch.random.fork_rng(devices=[]):  # layers draw initial weights from the global one
            network = (Network, _PairNetwork, _TripleNetwork)[len(self.shapes) - 1](self)
        _randomise_weights(network.to(getattr(torch, self.dtype)).eval(), seed)
        random_statistics(network, seed)
        settle(network)
        return network

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs, wide enough to reach both bounds of a ReLU6."""
        generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, self.dtype)
        return tuple(
            (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for shape in self.shapes
        )

    def features(self) -> frozenset[str]:
        """Which of `FEATURES` occur in the network."""
        found = {f"{self.output} output"}
        if self.dtype != "float64":
            found.add(f"{self.dtype} network")
        if any(shape[0] == 1 for shape in self.shapes):
            found.add("batch 1")
        if any(size % 2 for shape in self.shapes for size in shape[2:]):
            found.add("odd size")
        if len(self.shapes) > 1:
            found.add("several inputs")
        if self.returned:
            found.add("intermediate returned")
        found.update(chain_features(self.body, depth=0))
        inner = set(saved_names(self.body, depth=0))
        if inner & {*self.returned, *recalled_names(self.body)}:
            found.add("inner value used outside its site")
        return frozenset(found)


class Network(nn.Module):
    """The module of a `NetworkSpec`; subclasses take two and three inputs."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.body = Chain(spec.body, {})

    def forward(self, x: Tensor) -> Any:
        """Run the network and arrange its output as the spec says."""
        return self.run(x)

    def run(self, *inputs: Tensor) -> Any:
        """The output for any number of inputs; `forward` names them, for tracers to see."""
        saved = {f"input{i}": value for i, value in enumerate(inputs) if i > 0}
        result = self.body(inputs[0], saved)
        extra = [saved[name] for name in self.spec.returned]
        if self.spec.output == "tuple":
            return (result, *extra)
        if self.spec.output == "list":
            return [*extra, result]
        if self.spec.output == "dict":
            return {"out": result, **dict(zip(self.spec.returned, extra, strict=True))}
        if self.spec.output == "nested":
            return {"out": (result, {"extra": extra})}
        return result


class _PairNetwork(Network):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.run(x, y)


class _TripleNetwork(Network):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.run(x, y, z)


@functools.cache
def _hear_padding_warning() -> None:
    """Torch warns once in a process that padding="same" copies for even kernels: have it said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.conv1d(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), padding="same")


def _randomise_weights(network: nn.Module, seed: int) -> None:
    """Weights that keep the scale of what passes, so that no branch hides behind its shortcut."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            fan_in = max(1, math.prod(parameter.shape[1:]))
            parameter.data.copy_(values * math.sqrt(1.5 / fan_in))
        else:
            parameter.data.copy_(values * 0.5)


def settle(network: nn.Module) -> None:
    """What comes after random values: buffers share memory, some slopes lie near a number."""
    for layer in network.modules():
        if isinstance(layer, Tied):
            layer.tie()
        around = getattr(layer, "around", None)
        if isinstance(layer, nn.PReLU) and around is not None:
            near = torch.linspace(-1e-3, 1e-3, layer.weight.numel(), dtype=torch.float64)
            layer.weight.data.copy_(around + near)


def random_statistics(module: nn.Module, seed: int) -> nn.Module:
    """Give every batch norm random statistics, weight and bias, and every PReLU random slopes.

    A fresh batch norm (mean 0, variance 1, weight 1, bias 0) is the identity up to eps, so a pass
    that forgets it entirely goes unnoticed. Here the weight has magnitude 0.5 to 1.5 and is
    negative for one channel in four, bias and mean are -1 to 1, the variance is 0.3 to 3; slopes
    are -0.5 to 1.5.

    Args:
        module: changed in place, whatever its dtype and device.
        seed: equal seeds give equal values.

    Returns:
        The module.

    >>> bn = random_statistics(nn.BatchNorm2d(8), seed=0)
    >>> bool((bn.running_var >= 0.3).all() and (bn.weight.abs() >= 0.5).all())
    True
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return low + (high - low) * values

    for layer in module.modules():
        if isinstance(layer, nn.PReLU):
            layer.weight.data.copy_(uniform(layer.weight, -0.5, 1.5))
        if not isinstance(layer, nn.modules.batchnorm._NormBase):  # instance norms, too
            continue
        if layer.affine:
            sign = torch.where(uniform(layer.weight, 0, 1) < 0.25, -1.0, 1.0)
            layer.weight.data.copy_(sign * uniform(layer.weight, 0.5, 1.5))
            layer.bias.data.copy_(uniform(layer.bias, -1, 1))
        if layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.copy_(uniform(layer.running_mean, -1, 1))
            layer.running_var.copy_(uniform(layer.running_var, 0.3, 3))
    return module
