"""Whether tensors still hold the values that were baked into others.

A snapshot of tensors is small, keeps none of them alive and refers to none of them (a weak
reference to a parameter would forbid `torch.utils.swap_tensors`). It holds up to three witnesses:

1. Facts: version counter, address, and whether the memory is still there, known by a weak reference
   to the storage: an address alone may be given to another tensor. These see every ordinary write
   and every replaced tensor or memory, but no write that passes by the counter: fused optimisers,
   collectives, statistics that a forward moves, other processes, numpy.
2. A sample, `weights="sampled"`: up to 64 values of each tensor, one from each 64th part of it,
   compared bit by bit. It sees whatever such a write does to whole tensors. It can miss one that
   leaves all 64 values of every tensor as they were: a few single values, less than 1/32 of a
   tensor in one piece, a training step so small that nearly all values are rounded back.
3. Checksums, `weights="checked"`: the CRC-32 of all bytes of each tensor. It sees every write to
   one value, and misses any other with a probability of 2^-32.

With `weights="frozen"` there is no witness at all.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import count
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Mode = Literal["sampled", "checked", "frozen"]
MODES: tuple[Mode, ...] = get_args(Mode)
SAMPLES = 64  # values of each tensor
GOLDEN = 0.6180339887498949  # its multiples fall into no regular pattern
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
Bits = tuple[bytes, ...]


class Snapshot:
    """What tensors were like at one moment.

    Args:
        tensors: strided, in the order in which `holds` will be given them.
        numbers: positions of those that are made anew for every call, so that only their value
            tells; they are compared in every mode.
        unguarded: positions of those whose type, shape and strides nobody else compares.
        mode: the witnesses, see above.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        numbers: Iterable[int] = (),
        unguarded: Iterable[int] = (),
        mode: Mode = "sampled",
    ) -> None:
        self._numbers = sorted(numbers)
        given = range(0) if mode == "frozen" else range(len(tensors))
        self._weights = [i for i in given if i not in self._numbers]
        self._unguarded = sorted(set(unguarded).intersection(self._weights))
        weights = [tensors[i] for i in self._weights]
        # Values after facts: a write between the two is seen at the next call.
        self._facts = self._facts_of(tensors, weights)
        self._held_weakly = {StorageWeakRef(t.untyped_storage()) for t in weights}
        self._storages = [storage.cdata for storage in self._held_weakly]
        self._reader = _Sampler(weights) if mode == "sampled" else _Checksums()
        self._bits = self._reader.read(weights)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors, or other names of the same memory, hold the values they had."""
        weights = list(map(tensors.__getitem__, self._weights))
        return (
            self._facts == self._facts_of(tensors, weights)
            and not any(map(torch.UntypedStorage._expired, self._storages))
            and self._bits == self._reader.read(weights)
        )

    def _facts_of(self, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Any]:
        unguarded = [tensors[i] for i in self._unguarded]
        return [
            [_number(tensors[i]) for i in self._numbers],
            _versions(weights),
            list(map(Tensor.data_ptr, weights)),
            [(t.dtype, t.shape, t.stride()) for t in unguarded],
        ]


def _number(tensor: Tensor) -> str:
    return repr(tensor.item())  # unlike the number it tells -0.0 from 0.0, and NaN is NaN


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # some were made in inference mode, where nothing is counted
        return [None if t.is_inference() else t._version for t in tensors]


# ---- samples ------------------------------------------------------------------------------------
class _Sampler:
    """Reads the same up to 64 values of each tensor, all in one go.

    Values in the memory of the CPU are read at their addresses, which is safe while the facts hold
    and costs a tenth of what views of the tensors cost; views would keep the memory alive, too.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        near: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        self._far: list[int] = []
        for i, tensor in enumerate(tensors):
            if not _has_values(tensor):
                continue
            if tensor.device.type == "cpu" and tensor.data_ptr() % tensor.itemsize == 0:
                near[tensor.itemsize].append(_addresses(tensor))
            else:
                self._far.append(i)
        self._near = [_Gather(width, np.concatenate(found)) for width, found in near.items()]

    def read(self, tensors: Sequence[Tensor]) -> Bits:
        far = _together(_flat(tensors[i], step=True) for i in self._far)
        return (*(gather.read() for gather in self._near), *far)


def _has_values(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and not tensor.is_meta


class _Gather:
    """Reads values of one width at known addresses."""

    def __init__(self, width: int, addresses: NDArray[np.int64]) -> None:
        self._first = int(addresses.min())
        self._places = (addresses - self._first) // width
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (self._first, True),
            "shape": (int(self._places.max()) + 1,),
            "typestr": f"<{'c' if width == 16 else 'u'}{width}",
        }

    def read(self) -> bytes:
        """Their bytes; the memory must be there."""
        return np.asarray(self).take(self._places).tobytes()


def _addresses(tensor: Tensor) -> NDArray[np.int64]:
    """Where a tensor's sample lies."""
    shape, strides = tuple(tensor.shape) or (1,), tensor.stride() or (1,)
    index = np.array(np.unravel_index(sampled_positions(tensor.numel()), shape))
    found: NDArray[np.int64] = tensor.data_ptr() + np.array(strides) @ index * tensor.itemsize
    return found


def sampled_positions(size: int) -> NDArray[np.int64]:
    """All of a few positions; of many one in each 64th part, at another place in each.

    At equal distances they could all lie in one row or column of a kernel.
    """
    if size <= SAMPLES:
        return np.arange(size)
    parts = np.arange(SAMPLES)
    return ((parts + parts * GOLDEN % 1) * (size / SAMPLES)).astype(np.int64)


# ---- all bytes ----------------------------------------------------------------------------------
class _Checksums:
    """Reads everything."""

    def read(self, tensors: Sequence[Tensor]) -> Bits:
        tensors = [t for t in tensors if _has_values(t)]
        near = [t for t in tensors if t.device.type == "cpu"]
        far = _together(_flat(t) for t in tensors if t.device.type != "cpu")
        memories: list[bytes | memoryview] = [*map(_bytes, near), *far]
        return tuple(zlib.crc32(memory).to_bytes(4, "little") for memory in memories)


def _bytes(tensor: Tensor) -> memoryview:
    memory: Any = _flat(tensor).view(torch.uint8).numpy()
    return memoryview(memory)


def _flat(tensor: Tensor, *, step: bool = False) -> Tensor:
    """The values of a tensor as bit patterns in one dimension.

    Args:
        tensor: strided.
        step: whether to take a sample at equal distances.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(WORDS[tensor.itemsize])
    return flat[:: max(1, len(flat) // SAMPLES)] if step else flat


def _together(flat: Iterable[Tensor]) -> list[bytes]:
    """The bytes of tensors of another device, fetched in one go for each device and width."""
    alike: dict[Hashable, list[Tensor]] = defaultdict(list)
    for tensor in flat:
        alike[tensor.device, tensor.dtype].append(tensor)
    return [torch.cat(found).cpu().numpy().tobytes() for found in alike.values()]


# ---- in a graph ---------------------------------------------------------------------------------
_BAKED: dict[int, Snapshot] = {}
_KEYS = count()


def remember(snapshot: Snapshot) -> int:
    """A key under which the operator finds a snapshot, however the graph is compiled further."""
    key = next(_KEYS)
    _BAKED[key] = snapshot
    return key


@torch.library.custom_op("rmfx::weights_are_fresh", mutates_args=())
def weights_are_fresh(weights: Sequence[Tensor], key: int) -> Tensor:
    """Whether the weights are those that were baked under a key; a boolean without dimensions."""
    known = _BAKED.get(key)
    return torch.tensor(known is not None and known.holds(weights))


@weights_are_fresh.register_fake
def _(weights: Sequence[Tensor], key: int) -> Tensor:
    return torch.empty((), dtype=torch.bool)
