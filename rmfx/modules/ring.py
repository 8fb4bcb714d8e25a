"""The vector that layers draw their weights from, and how: recurrent parameter generators.

Of the T numbers that layers need, each element of a ring of n gives ⌊T/n⌋ or ⌈T/n⌉: an index holds
0 … n−1 as often as it fits into T and T mod n of them once more, in one random order of which each
layer takes the next part. Signs are random.

Order and signs are not stored. They are made again from a seed in the state of the ring, by the raw
numbers of Philox, which stay the same from one version of numpy to the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

Part = tuple[str, int, tuple[int, ...]]  # of a ring: whose path, from where on, and the shape
F = TypeVar("F", bound=Callable[..., Any])


def _constant_for_compilers(function: F) -> F:
    """As `torch.compiler.assume_constant_result` does, which would load the compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Ring(nn.Module):
    """The numbers that layers share.

    Anything that works on a parameter works on `numbers`: a parametrization, pruning, quantisation.

    Attributes:
        numbers: [n], trained.
        total: T, how many numbers the layers need together.
        seed: of the order and of the signs. It and `layout` are buffers, so that they are saved,
            and that data parallel training hands them to every process.
        layout: a digest of which layer draws which part.
    """

    seed: Tensor
    layout: Tensor

    def __init__(self, numbers: Tensor, total: int, seed: int, parts: Sequence[Part] = ()) -> None:
        super().__init__()
        self.numbers = nn.Parameter(numbers)
        self.total = total
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("layout", torch.tensor(_digest(parts)))
        self._plans: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._planned = str(seed)
        self._read: tuple[Tensor, int] | None = None

    def forward(self, start: int, stop: int) -> Tensor:
        """Some of the T numbers."""
        if not torch.compiler.is_compiling():
            self._follow_seed()
        index, sign = self._plan(self._planned, self.numbers.device)
        numbers: Tensor = self.numbers.index_select(0, index[start:stop]) * sign[start:stop]
        return numbers

    # Compilers take the plan for a constant; that of another seed has another name.
    @_constant_for_compilers
    def _plan(self, seed: str, device: torch.device) -> tuple[Tensor, Tensor]:
        self._follow_seed()
        if device not in self._plans:
            with _ordinary_tensors():
                made = plan(self.total, self.numbers.numel(), int(self._planned))
                self._plans[device] = (made[0].to(device), made[1].to(device))
        return self._plans[device]

    def _follow_seed(self) -> None:
        """Take note of a seed that was loaded, or came from another process."""
        if type(self.seed) is not Tensor or self.seed.is_meta:  # a tracer's, which has no value
            return
        if not self.seed.is_inference():  # a look at the value would wait for the device
            now = self.seed._version
            if self._read is not None and self._read[0] is self.seed and self._read[1] == now:
                return
            self._read = (self.seed, now)
        found = str(int(self.seed))
        if found != self._planned:
            self._plans, self._planned = {}, found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Keep what there is, and say why, where other layers draw, or in another order."""
        found = state_dict.get(f"{prefix}layout")
        if found is not None and not torch.equal(found.to(self.layout), self.layout):
            *_, errors = lists
            errors.append(
                f"other layers draw from {prefix.rstrip('.')}, or other parts of it, than in the "
                "model whose state this is"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        self._follow_seed()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_plans": {}, "_read": None}
        if "numbers" in state:  # torch's pruning puts there what it computed, which has no copy
            state["numbers"] = self.numbers.detach()
        return state

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.numbers.numel()} for {self.total}, seed={int(self.seed)}"


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Whatever is being traced, and in whichever mode, tensors that can be kept."""
    with unset_fake_temporarily(), torch.inference_mode(False), torch.device("cpu"):
        yield


def _digest(parts: Sequence[Part]) -> int:
    text = json.dumps([(path, start, list(shape)) for path, start, shape in parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class Rings(nn.ModuleDict):
    """The rings of a model, by name; as the last layer of an nn.Sequential it changes nothing."""

    def forward(self, x: Any) -> Any:
        """What it is given."""
        return x


def plan(total: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which element of a ring stands at each of `total` places, and with which sign.

    Returns:
        Indices below `size`, int32 [total], each used as often as any other or once more; and
        signs, int8 [total].
    """
    draw = np.random.Philox(key=seed).random_raw
    once_more = np.argsort(draw(size), kind="stable")[: total % size]
    index = np.concatenate([np.tile(np.arange(size), total // size), once_more])
    index = index[np.argsort(draw(total), kind="stable")]
    sign = np.where(draw(total) >> np.uint64(63), np.int8(-1), np.int8(1))
    return torch.from_numpy(index.astype(np.int32)), torch.from_numpy(sign)


class FromRing(nn.Module):
    """A parametrization: the weight of one layer.

    Args:
        ring: that it draws from.
        start: which of its numbers is the first.
        shape: of the weight.
    """

    def __init__(self, ring: Ring, start: int, shape: Sequence[int]) -> None:
        super().__init__()
        # Not a child of this module: it would stand in the state of every layer.
        self._ring = (ring,)
        self.start = start
        self.shape = tuple(shape)

    @property
    def ring(self) -> Ring:
        """That it draws from."""
        return self._ring[0]

    def forward(self, scale: Tensor) -> Tensor:
        """The weight, for the scale of the layer."""
        numbers: Tensor = self.ring(self.start, self.start + math.prod(self.shape))
        return scale.detach() * numbers.view(self.shape)  # which training leaves as it is
