"""Example inputs from files, and whether they fit a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rmfx.files.example_inputs import as_types, load_inputs, takes
from rmfx.files.tensors import LoadError

pytestmark = pytest.mark.oldest
IDS, MASK = torch.tensor([[3, 1, 2]]), torch.tensor([[True, True, False]])
F32, F16, I64 = torch.float32, torch.float16, torch.int64


class Masked(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor | None = None) -> Tensor:
        return ids * mask


class Open(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


def as_npz(path: Path, ids: Tensor, mask: Tensor) -> None:
    np.savez(path, mask=mask.numpy(), ids=ids.numpy())


def as_numbered(path: Path, ids: Tensor, mask: Tensor) -> None:
    np.savez_compressed(path, ids.numpy(), mask.numpy())


def big_endian(path: Path, ids: Tensor, mask: Tensor) -> None:
    np.savez(path, ids=ids.numpy().astype(">i8"), mask=mask.numpy())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.pt", lambda path, ids, mask: torch.save((ids, mask), path)),
        ("x.pt", lambda path, ids, mask: torch.save([ids, mask], path)),
        ("x.pt", lambda path, ids, mask: torch.save({"mask": mask, "ids": ids}, path)),
        ("x.safetensors", lambda path, ids, mask: save_file({"mask": mask, "ids": ids}, path)),
        ("x.npz", as_npz),
        ("x.npz", as_numbered),
        ("x.npz", big_endian),
    ],
)
def test_every_kind_of_file_gives_the_arguments_in_order(
    name: str, write: Callable[[Path, Tensor, Tensor], None], tmp_path: Path
) -> None:
    write(tmp_path / name, IDS, MASK)
    ids, mask = load_inputs(tmp_path / name, Masked())
    assert (ids.dtype, mask.dtype) == (I64, torch.bool)
    assert torch.equal(ids, IDS)
    assert torch.equal(mask, MASK)


def test_more_than_ten_arrays_keep_their_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", *[np.full(1, i) for i in range(12)])
    assert [int(x) for x in load_inputs(tmp_path / "x.npz", Open())] == list(range(12))


def test_a_parameter_is_an_ordinary_tensor_here(tmp_path: Path) -> None:
    torch.save(nn.Parameter(torch.ones(2)), tmp_path / "x.pt")
    (x,) = load_inputs(tmp_path / "x.pt", nn.ReLU())
    assert type(x) is Tensor
    assert not x.requires_grad


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from a file ran')",)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"ids": IDS}, "lacks 'mask'; the network takes ids, mask, \\[scale\\]"),
        ({"ids": IDS, "scale": IDS}, "lacks 'mask'"),
        ({"ids": IDS, "mask": MASK, "extra": IDS}, "holds 'extra', where the network takes ids"),
        ({0: IDS, 1: MASK}, "holds 0, 1, where the network takes ids"),
        ([IDS], "holds 1 tensor, where the network takes ids"),
        ([IDS] * 4, "holds 4 tensors, where"),
        ([], "holds 0 tensors, where"),
        ({}, "holds 0 tensors, where"),
        ({"ids": "text"}, "ids is a str, no tensor"),
        ([IDS, 3], "number 2 is an int, no tensor"),
        ({"ids": [IDS]}, "ids is a list, no tensor"),
        ("text", "holds a str; store a tensor"),
        (3.0, "holds a float; store a tensor"),
        ([IDS, torch.zeros(0, 3)], "number 2 is empty"),
        ([IDS, torch.tensor([float("nan")])], "number 2 holds NaN or Inf"),
        ([IDS, torch.eye(2).to_sparse()], "number 2 is sparse, quantised or without numbers"),
        ([IDS, torch.zeros(2, device="meta")], "number 2 is sparse, quantised or without numbers"),
        ({"ids": _Attack()}, "only tensors are read, never code"),
        (nn.ReLU(), r"holds torch\.nn\.\S+\.ReLU, which is no tensor .*save tensors alone"),
    ],
)
def test_what_does_not_fit_is_told(held: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(held, path)
    with pytest.raises(LoadError, match=message) as caught:
        load_inputs(path, Masked())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["pt", "npz", "safetensors"])
def test_damaged_and_missing_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    with pytest.raises(LoadError, match=rf"x\.{suffix} cannot be read: No such file"):
        load_inputs(path, nn.ReLU())
    path.write_bytes(b"")
    with pytest.raises(LoadError, match=rf"x\.{suffix} is empty"):
        load_inputs(path, nn.ReLU())
    foreign = (b"abc", b"hello", b"<html>", b"error: not found", b"\x00\x01\xff" * 40)
    for content in (*foreign, b"PK\x03\x04 not really", b"\x80\x02"):
        path.write_bytes(content)
        is_foreign = suffix == "pt" and content in foreign
        told = "no file of torch.save$" if is_foreign else "damaged"
        with pytest.raises(LoadError, match=rf"x\.{suffix} is {told}"):
            load_inputs(path, nn.ReLU())


def test_objects_in_arrays_are_not_read(tmp_path: Path) -> None:
    for found, told in ((np.array([{}], dtype=object), "Python objects"), (np.array(["a"]), "<U1")):
        np.savez(tmp_path / "x.npz", x=found)
        with pytest.raises(LoadError, match=rf"x\.npz: x holds {told}; store numbers"):
            load_inputs(tmp_path / "x.npz", nn.ReLU())


def test_how_many_inputs_a_network_takes() -> None:
    assert [takes(Masked(), n) for n in range(5)] == [False, False, True, True, False]
    assert [takes(Open(), n) for n in range(3)] == [True, True, True]
    exported = torch.export.export(Masked(), (IDS, MASK)).module()
    assert takes(exported, 2)
    assert not takes(exported, 1)


def test_numbers_get_the_type_of_the_weights_and_indices_keep_theirs() -> None:
    x = torch.rand(2, dtype=torch.float64)
    made = as_types((x, IDS), (), F32)
    assert [y.dtype for y in made] == [F32, I64]
    assert [y.dtype for y in as_types((x, IDS), (F16,), F32)] == [F16, F16]
    assert [y.dtype for y in as_types((x, IDS), (F16, torch.int8), F32)] == [F16, torch.int8]


@pytest.mark.parametrize(
    ("x", "to"),
    [
        (torch.tensor([0.5]), I64),
        (torch.tensor([300]), torch.uint8),
        (torch.tensor([2]), torch.bool),
        (torch.tensor([1e9]), F16),
        (torch.tensor([1j]), F32),
    ],
)
def test_a_type_that_cannot_hold_the_numbers_is_refused(x: Tensor, to: torch.dtype) -> None:
    with pytest.raises(LoadError, match=r"input 1 holds .* numbers that .* cannot hold"):
        as_types((x,), (to,), F32)
