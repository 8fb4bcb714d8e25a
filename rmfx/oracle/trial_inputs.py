"""Inputs for which nobody converted a network: fresh values, and other sizes than the example's.

Sizes are given as tuples (batch, *space), where -1 stands for the example's. Which dimensions of an
input are space is a guess that the original may reject by failing: all behind the channels, or all
between the batch and the last one, as tokens and channels-last images have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rmfx.files.trials import numbers_like
from rmfx.interval import Interval

Sizes = tuple[int, ...]
Inputs = tuple[Any, ...]
SAME = -1
LARGE = 1 << 14  # positions (batch and space) beyond which an example is not run whole
ODD = 17  # what is called small, beside larger sizes
GROWTH, SPARE = 4, 1 << 9  # an example of n positions stands for at most 4 n + 512
MULTIPLES = (1, 2, 4, 8, 16, 32)  # strides that networks have
FURTHER = ((2, 3, 5), (3, 3, 2), (5, 2, 3), (7, 4, 6))


@dataclass(frozen=True)
class Example:
    """Example inputs, and what may be given in their place.

    Attributes:
        inputs: the example.
        fixed: positions of inputs whose values must stay, such as weights.
        input_range: of all others, if they have one.
        last: whether channels are taken to be the last dimension.
    """

    inputs: Inputs
    fixed: frozenset[int] = frozenset()
    input_range: Interval | None = None
    last: bool = False

    @property
    def sizes(self) -> Sizes:
        """Batch and spatial sizes of the input that has the most dimensions, of several the least.

        Empty where no input has any.
        """
        found = [(x.shape[0], *self._space(x)) for x in self._open() if x.dim()]
        return min(found, key=lambda sizes: (-len(sizes), sizes), default=())

    def _space(self, x: Tensor) -> Sizes:
        return tuple(x.shape[1:-1] if self.last else x.shape[2:])

    def _open(self) -> list[Tensor]:
        parts = [x for i, x in enumerate(self.inputs) if i not in self.fixed]
        return [x for x in pytree.tree_leaves(parts) if isinstance(x, Tensor)]

    def resized(self, sizes: Sizes, seed: int) -> Inputs:
        """Fresh inputs of other sizes, of which `SAME` are those of the example."""
        generator = torch.Generator().manual_seed(seed)

        def fresh(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return self._fresh(x, self._shape(x, sizes), generator)

        return tuple(
            x if i in self.fixed else pytree.tree_map(fresh, x) for i, x in enumerate(self.inputs)
        )

    def _shape(self, x: Tensor, sizes: Sizes) -> Sizes:
        shape, own = list(x.shape), self.sizes
        if shape and shape[0] == own[0] and sizes[0] != SAME:
            shape[0] = sizes[0]
        first = 1 if self.last else 2
        for axis in range(len(self._space(x))):
            size, example = sizes[axis + 1], own[axis + 1]
            if size == SAME or not example:
                continue
            # An input of twice the resolution keeps it.
            whole, rest = divmod(shape[first + axis], example)
            shape[first + axis] = size if rest or not whole else size * whole
        return tuple(shape)

    def _fresh(self, x: Tensor, shape: Sizes, generator: torch.Generator) -> Tensor:
        count = math.prod(shape)
        if x.is_floating_point():
            return numbers_like(x, shape, self.input_range, generator)
        if x.is_complex():
            return torch.randn(shape, dtype=torch.cfloat, generator=generator).to(x.device, x.dtype)
        if not x.numel():
            return x.new_zeros(shape)
        picked = torch.randint(x.numel(), (count,), generator=generator).to(x.device)
        return x.flatten()[picked].reshape(shape)


def candidates(example: Example, *, further: bool) -> Iterator[list[Sizes]]:
    """Sizes to run at; of each list the first that both networks take is enough.

    They are the example's, twice, another batch at other sizes, and 1, everywhere or, of large
    examples, along one axis at a time; then more if `further` ones are wanted, as they are not of a
    network whose parameters alone take long to read.
    """
    batch, *space = example.sizes or (1,)
    same = (SAME,) * len(space)
    few, other = min(batch, 2), 3 if batch != 3 else 2
    most = GROWTH * batch * math.prod(space) + SPARE
    others = [sizes for sizes in _other_sizes(space) if other * math.prod(sizes) <= most]
    ones = (1,) * len(space)
    if batch * math.prod(space) <= LARGE:
        few_positions = [sizes for sizes in others if math.prod(sizes) <= 2 * LARGE]
        yield from [[(SAME, *same)]] * 2  # a second call tells what was kept of the first
        yield [*((other, *sizes) for sizes in few_positions), (other, *same), (1, *same)]
        yield [(1, *ones)]
        if further and space:
            yield from ([(few, *s)] for s in dict.fromkeys(f[: len(space)] for f in FURTHER))
        return
    yield from _of_large(space, others, few, 2 if batch != 2 else 3)
    if further or len(space) < 2:
        yield [(1, *ones)]


def _of_large(
    space: Sequence[int], others: Sequence[Sizes], few: int, other: int
) -> Iterator[list[Sizes]]:
    """The same for an example that is too large to be run whole."""
    same = (SAME,) * len(space)
    if len(space) < 2:
        yield [(few, *same), (SAME, *same)]
        yield [*((other, *sizes) for sizes in others), (few % 2 + 1, *same)]
        return
    ones = (1,) * len(space)
    first, *rest = ([_strip(axis, one) for one in (ones, *others)] for axis in range(len(space)))
    yield [*((few, *strip) for strip in first[1:]), (few, *same), (SAME, *same)]
    for strips in rest:
        yield [*((other, *strip) for strip in strips), (few % 2 + 1, *same)]


def _strip(axis: int, sizes: Sizes) -> Sizes:
    """Sizes of which one is the example's."""
    return (*sizes[:axis], SAME, *sizes[axis + 1 :])


def _other_sizes(space: Sequence[int]) -> list[Sizes]:
    """Sizes that differ from the example's and from one another, the odd and small ones first.

    Behind them multiples of powers of two, which networks with strides may demand, and sizes like
    the example's, for networks that fail on smaller ones or on images that are not square.
    """
    found = [
        tuple(m * _coprime(-(-_small(n) // m) + 2 * i, n) for i, n in enumerate(space))
        for m in MULTIPLES
    ]
    found += [tuple(_coprime(n // part + 2 * i, n) for i, n in enumerate(space)) for part in (2, 1)]
    square = _coprime(max(map(_small, space), default=1), math.prod(space))
    return list(dict.fromkeys([*found, (square,) * len(space), (32 * 3,) * len(space)]))


def _small(n: int) -> int:
    """A size that is cheap beside n, and larger than the kernels of a network that takes n."""
    return min(n + 1, ODD)


def _coprime(least: int, n: int) -> int:
    """The smallest odd number from `least` on that has no factor in common with n, nor is n."""
    found = least | 1
    while math.gcd(found, n) > 1 or found == n:
        found += 2
    return found
