"""Inputs on which networks are compared, and how far two outputs are from each other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmfx.errors import VerificationError, WeightError
from rmfx.interval import Interval

# Two orders of magnitude above the rounding of one operation: depth adds up, and another order of
# summation is no error. A wrong layer is far above it.
HALVES = (torch.float16, torch.bfloat16)
_TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}


@dataclass(frozen=True)
class Trials:
    """Inputs of the shapes and types of others: of random numbers, or taken from samples.

    Attributes:
        inputs: the others; what is no floating-point number (indices, masks) keeps its value, since
            any other one might not be valid.
        input_range: of the numbers, as `numbers_like` has it.
        samples: batches whose rows alone are taken, if there are any.
    """

    inputs: Sequence[Tensor]
    input_range: Interval | None = None
    samples: Sequence[Sequence[Tensor]] = ()

    def draw(self, batch: int | None = None, seed: int = 0) -> list[Tensor]:
        """Inputs of a batch size, that of the others if None."""
        if self.samples:
            rows = self.samples[seed % len(self.samples)]
            return [_tiled(x, batch or y.shape[0]) for x, y in zip(rows, self.inputs, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        return [self._like(x, batch, generator) for x in self.inputs]

    def own(self, batch: int | None = None) -> Iterator[list[Tensor]]:
        """The rows of the others themselves, again and again; nothing where zeros tell a shape."""
        low, high = self.input_range or (-math.inf, math.inf)
        numbers = [x for x in self.inputs if x.is_floating_point()]
        inside = all(bool(((low <= x) & (x <= high)).all()) for x in numbers)
        if not self.samples and inside and any(bool(x.any()) for x in numbers):
            yield [_tiled(x, batch or x.shape[0]) if x.ndim else x for x in self.inputs]

    def run(
        self, network: Callable[..., Any], batch: int | None = None, seed: int = 0
    ) -> tuple[list[Tensor], Any]:
        """Inputs for which a network gives numbers, and what it gives.

        They are drawn, or the others' own where it gives no numbers on those.

        Raises:
            VerificationError: it gives NaN or Inf on all.
        """
        for trial in (self.draw(batch, seed), *self.own(batch)):
            output = network(*copies(trial))
            if all(x.isfinite().all() for x in tensors_of(output) if x.is_floating_point()):
                return trial, output
        raise VerificationError(
            "the original gives NaN or Inf on random inputs, so nothing can be compared; give it"
            " inputs of the kind that it is made for (on the command line: --inputs FILE)"
        )

    def _like(self, x: Tensor, batch: int | None, generator: torch.Generator) -> Tensor:
        shape = (batch or x.shape[0], *x.shape[1:]) if x.ndim else ()
        if not x.is_floating_point():
            return _tiled(x, shape[0]) if x.ndim else x
        return numbers_like(x, shape, self.input_range, generator)


def copies(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs for a network that may write to them."""
    return [x.clone() for x in inputs]


@contextlib.contextmanager
def state_kept(*functions: Callable[..., Any]) -> Iterator[None]:
    """Put back what networks, which run in the block, write to their buffers.

    Raises:
        WeightError: a network has written to a parameter, of which there is no copy.
    """
    networks = [f for f in functions if isinstance(f, nn.Module)]
    own = (tensor for network in networks for tensor in network.buffers())
    buffers = [x for x in {id(x): x for x in own}.values() if not x.is_inference()]
    before = [(buffer, buffer._version, buffer.detach().clone()) for buffer in buffers]
    named = (pair for network in networks for pair in network.named_parameters())
    versions = [(name, p, p._version) for name, p in named if not p.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, held in before:
                if buffer._version != version:
                    buffer.copy_(held)
    for name, parameter, version in versions:
        if parameter._version != version:
            raise WeightError(f"the network writes to its parameter {name} when it is called")


def numbers_like(
    x: Tensor, shape: Sequence[int], input_range: Interval | None, generator: torch.Generator
) -> Tensor:
    """Random floating-point numbers of a tensor's type, on its device.

    Args:
        x: the tensor.
        shape: of the numbers.
        input_range: they are uniform in it; where it has no end they are normally distributed.
        generator: of the numbers.
    """
    low, high = input_range or (-math.inf, math.inf)
    if math.isfinite(low) and math.isfinite(high):
        made = torch.rand(shape, generator=generator) * (high - low) + low
    else:
        made = torch.randn(shape, generator=generator)
    return made.to(x.device, x.dtype).clamp(low, high)


def _tiled(x: Tensor, batch: int) -> Tensor:
    """The rows of a tensor again and again, so many of them."""
    return torch.cat([x] * -(-batch // max(x.shape[0], 1)))[:batch]


def doubled(x: Tensor, dims: Sequence[int]) -> Tensor:
    """A tensor with itself behind it, in some dimensions."""
    return x.repeat([2 if d in dims else 1 for d in range(x.ndim)]) if dims else x


def relative_error(expected: object, found: object) -> float:
    """The largest max |found - expected| / max |expected| over all tensors of two outputs.

    Infinite where number, shapes or types of the tensors differ, or a number is not finite.
    """
    wanted, given = tensors_of(expected), tensors_of(found)
    if len(wanted) != len(given):
        return float("inf")
    return max((_tensor_error(a, b) for a, b in zip(wanted, given, strict=True)), default=0.0)


def _tensor_error(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    a, b = expected.detach().double(), found.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    difference, scale = float((a - b).abs().max()), float(a.abs().max())
    return difference / scale if scale else difference


def tensors_of(output: object) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def default_tolerance(inputs: Sequence[Tensor]) -> float:
    """The relative error to accept, by the coarsest type of the inputs: 1e-4 in float32."""
    return max((_TOLERANCES.get(x.dtype, 0.0) for x in inputs), default=0.0) or 1e-4
