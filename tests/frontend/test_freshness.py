"""What a snapshot sees, in every mode and of every kind of tensor, and what it keeps alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from rmfx.frontend import freshness
from rmfx.frontend.freshness import SAMPLES, Snapshot, weights_are_fresh

LOOKING = ("sampled", "checked")


def bits(tensor: Tensor) -> Any:
    """The bytes of a dense tensor's memory, to write to behind torch's back."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy()


TENSORS: dict[str, Callable[[], Tensor]] = {
    "large": lambda: torch.randn(64, 64, 3, 3),
    "tiny": lambda: torch.randn(3),
    "without dimensions": lambda: torch.tensor(2.5),
    "float64": lambda: torch.randn(40, 7, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(300).bfloat16(),
    "float16": lambda: torch.randn(300).half(),
    "float8": lambda: torch.randn(300).to(torch.float8_e4m3fn),
    "int64": lambda: torch.arange(200),
    "bool": lambda: torch.rand(130) > 0.5,
    "complex64": lambda: torch.randn(100, dtype=torch.complex64),
    "complex128": lambda: torch.randn(100, dtype=torch.complex128),
    "uint4": lambda: torch.empty(100, dtype=torch.uint4),
    "channels last": lambda: torch.randn(8, 6, 5, 4).to(memory_format=torch.channels_last),
    "a transposed view": lambda: torch.randn(30, 20).t(),
    "a view in the middle": lambda: torch.randn(40, 20)[3:30],
    "on no whole address": lambda: torch.frombuffer(bytearray(4001), dtype=torch.float32, offset=1),
    "a parameter": lambda: nn.Parameter(torch.randn(9, 9)),
}


@pytest.mark.parametrize("mode", LOOKING)
@pytest.mark.parametrize("kind", TENSORS)
def test_writes_that_are_not_counted_are_seen_in_every_kind_of_tensor(kind: str, mode: Any) -> None:
    torch.manual_seed(0)
    tensor = TENSORS[kind]()
    others = [torch.randn(2), torch.empty(0), torch.empty(3, device="meta")]
    snapshot = Snapshot([*others, tensor], mode=mode)
    version = tensor._version
    assert snapshot.holds([*others, tensor])
    assert snapshot.holds([*others, tensor.detach()])  # another name of the same memory
    bits(tensor)[...] ^= 1  # the smallest difference that there is, of each byte
    assert tensor._version == version
    assert not snapshot.holds([*others, tensor])
    bits(tensor)[...] ^= 1
    assert snapshot.holds([*others, tensor])


@pytest.mark.parametrize("mode", LOOKING)
@pytest.mark.parametrize("places", [(8, 4, 1, 1), (1, 4, 7, 7)])
def test_an_expanded_tensor_is_read_where_it_lies(places: tuple[int, ...], mode: Any) -> None:
    base = torch.randn(1, 4, 1, 1)
    tensor = base.expand(places)
    snapshot = Snapshot([tensor], mode=mode)
    base.numpy()[...] += 1
    assert not snapshot.holds([tensor])


@pytest.mark.parametrize("mode", LOOKING)
def test_bit_patterns_are_compared(mode: Any) -> None:
    tensor = torch.tensor([0.0, float("nan"), 1.0])
    snapshot = Snapshot([tensor], mode=mode)
    assert snapshot.holds([tensor])  # NaN is itself
    tensor.numpy()[0] = -0.0
    assert not snapshot.holds([tensor])


@pytest.mark.parametrize("mode", LOOKING)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 36864, 2_359_296])
def test_a_write_to_a_thirty_second_part_in_one_piece_is_seen(size: int, mode: Any) -> None:
    tensor = torch.zeros(size)
    snapshot = Snapshot([tensor], mode=mode)
    length = -(-size // 32) + 1
    for start in range(0, max(1, size - length), max(1, size // 50)):
        tensor.numpy()[start : start + length] = 1
        assert not snapshot.holds([tensor])
        tensor.numpy()[start : start + length] = 0
    assert snapshot.holds([tensor])


def test_samples_lie_in_every_row_and_column_of_a_kernel() -> None:
    """At equal distances they could all be of one tap."""
    for shape in ((64, 64, 3, 3), (128, 128, 3, 3), (512, 128, 1, 1), (96, 1, 3, 3)):
        positions = freshness.sampled_positions(int(np.prod(shape)))
        assert len(set(positions.tolist())) == SAMPLES
        assert positions.max() < np.prod(shape)
        for index, size in zip(np.unravel_index(positions, shape), shape, strict=True):
            assert len(set(index.tolist())) >= min(size, 24)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.__setitem__(4321, w[4321] + 1),
        lambda w: w.__setitem__(slice(None), w[::-1].copy()),
        lambda w: w.__setitem__([7, 70], w[[70, 7]]),
        lambda w: w.__setitem__([7, 70], -w[[7, 70]]),
        lambda w: w.__setitem__([0, 1, 4096, 4097], -w[[0, 1, 4096, 4097]]),
    ],
    ids=["one value", "reversed", "two exchanged", "two negated", "four negated"],
)
def test_a_checksum_sees_exchanges_and_signs(write: Callable[[Any], None]) -> None:
    tensor = torch.randn(10000)
    snapshot = Snapshot([tensor], mode="checked")
    write(tensor.numpy())
    assert not snapshot.holds([tensor])


@pytest.mark.parametrize("mode", LOOKING)
def test_ordinary_writes_and_other_memory_are_seen_whatever_the_values(mode: Any) -> None:
    tensor = torch.randn(1000)
    snapshot = Snapshot([tensor], mode=mode)
    assert not snapshot.holds([tensor.clone()])
    sampled = set(freshness.sampled_positions(1000).tolist())
    tensor[next(i for i in range(1000) if i not in sampled)] += 1  # counted, and not sampled
    assert not snapshot.holds([tensor])


def test_an_address_that_was_given_away_again_is_not_the_same_memory() -> None:
    reused = False
    for size in (144, 2304, 36864, 589824, 1327104):
        sampled = set(freshness.sampled_positions(size).tolist())
        index = next(i for i in range(size) if i not in sampled)
        tensors = [nn.Parameter(torch.randn(size), False) for _ in range(3)]
        snapshots = [(tensor.data_ptr(), Snapshot([tensor])) for tensor in tensors]
        for _ in range(20):
            for tensor, (address, snapshot) in zip(tensors, snapshots, strict=True):
                other = tensor.data.clone()
                other.numpy()[index] += 1
                tensor.data = other
                del other
                reused |= tensor.data_ptr() == address
                assert not snapshot.holds([tensor])
    if not reused:
        pytest.skip("here no address was given away again")


def test_shapes_strides_and_types_that_nobody_guards_are_compared() -> None:
    tensor = nn.Parameter(torch.randn(6, 6), False)
    for change in (
        lambda data: data.t(),
        lambda data: data.view(4, 9),
        lambda data: data.view(torch.int32),
    ):
        data = tensor.data
        snapshot = Snapshot([tensor], unguarded=[0])
        other = nn.Parameter(change(data), False)
        assert not snapshot.holds([other])
        assert snapshot.holds([tensor])


@pytest.mark.parametrize("mode", ["sampled", "checked", "frozen"])
def test_numbers_are_compared_by_their_value_in_every_mode(mode: Any) -> None:
    weight = torch.randn(3)
    for value in (1.5, float("nan"), 0.0, 7, True):
        snapshot = Snapshot([torch.tensor(value), weight], numbers=[0], mode=mode)
        assert snapshot.holds([torch.tensor(value), weight])
        assert not snapshot.holds([torch.tensor(0.25), weight])
    assert not Snapshot([torch.tensor(0.0)], numbers=[0], mode=mode).holds([torch.tensor(-0.0)])


def test_frozen_looks_at_nothing() -> None:
    tensor = torch.randn(3)
    snapshot = Snapshot([tensor], mode="frozen")
    assert snapshot.holds([tensor.mul_(2)])


def test_tensors_of_inference_mode_are_told_by_their_values() -> None:
    with torch.inference_mode():
        tensor = torch.randn(100)
    counted = torch.randn(2)
    snapshot = Snapshot([tensor, counted], mode="checked")
    assert snapshot.holds([tensor, counted])
    tensor.numpy()[5] += 1
    assert not snapshot.holds([tensor, counted])


@pytest.mark.parametrize("mode", ["sampled", "checked", "frozen"])
def test_a_snapshot_keeps_nothing_alive_and_forbids_no_swap(mode: Any) -> None:
    tensor = nn.Parameter(torch.randn(500, 500), False)
    snapshot = Snapshot([tensor], mode=mode)
    assert not weakref.getweakrefs(tensor)
    torch.utils.swap_tensors(tensor, nn.Parameter(torch.randn(500, 500), False))
    assert snapshot.holds([tensor]) is (mode == "frozen")
    memory = StorageWeakRef(tensor.untyped_storage())
    again = Snapshot([tensor], mode=mode)
    assert again.holds([tensor])
    del tensor
    gc.collect()
    assert memory.expired()


def test_the_operator_knows_what_was_baked_under_its_key() -> None:
    weights = [torch.randn(2000), torch.arange(5)]
    key = freshness.remember(Snapshot(weights))
    assert weights_are_fresh(weights, key).item() is True
    assert weights_are_fresh(weights, key + 1000).item() is False
    weights[1].numpy()[3] = 0
    assert weights_are_fresh(weights, key).item() is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", LOOKING)
def test_tensors_of_another_device_are_fetched_once_for_each_width(mode: Any) -> None:
    tensors = [torch.randn(64, 8, 3, 3, device="cuda"), torch.randn(5, device="cuda").half()]
    tensors.append(torch.randn(4, 4, 3, 3, device="cuda").to(memory_format=torch.channels_last))
    snapshot = Snapshot(tensors, mode=mode)
    assert snapshot.holds(tensors)
    for tensor in tensors:
        tensor.data.mul_(1.5)
        assert not snapshot.holds(tensors)
        snapshot = Snapshot(tensors, mode=mode)
