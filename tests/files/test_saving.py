"""Files appear whole and checked, or not at all."""

from __future__ import annotations

import importlib.util
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

import rmfx
from rmfx.errors import OptionError
from rmfx.files.formats import FORMATS
from rmfx.files.saving import (
    SaveError,
    VerificationError,
    check_output,
    save,
)
from rmfx.files.trials import relative_error

pytestmark = pytest.mark.oldest

IMAGE = (torch.zeros(1, 3, 8, 8),)


def make_net(dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(4), nn.Flatten(), nn.Linear(256, 5))
    return fx.symbolic_trace(net.eval().to(dtype))


class Reshape(nn.Module):
    """Takes batches of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 192) * 2


class Pair(nn.Module):
    """Two inputs, a dict of two outputs."""

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": a + b, "product": a * b}


def test_written_program_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    gm = make_net()
    saved = save(gm, tmp_path / "net.pt2", IMAGE)
    assert saved.free_batch
    assert saved.error == 0
    assert saved.size == (tmp_path / "net.pt2").stat().st_size
    program = torch.export.load(saved.path).module()
    x = torch.randn(7, 3, 8, 8)
    assert torch.equal(program(x), gm(x))
    assert os.listdir(tmp_path) == ["net.pt2"]


def test_written_onnx_file_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    gm = make_net()
    saved = save(gm, tmp_path / "net.onnx", IMAGE)
    assert saved.free_batch
    assert saved.error < 1e-6
    session = onnxruntime.InferenceSession(saved.path, providers=["CPUExecutionProvider"])
    x = torch.randn(7, 3, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(gm(x), torch.from_numpy(found)) < 1e-6
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_a_network_for_one_batch_size_is_written_for_that_size(tmp_path: Path) -> None:
    inputs = (torch.zeros(2, 3, 8, 8),)
    saved = save(fx.symbolic_trace(Reshape()), tmp_path / "net.pt2", inputs)
    assert not saved.free_batch
    assert saved.runs == 3


ANY, UP_TO_64 = Dim.AUTO, Dim("batch", min=1, max=64)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize(
    ("free", "told", "others"),
    [
        ({}, "(2, 3, 8, 8)", []),
        ({0: ANY}, "(any, 3, 8, 8)", [(1, 3, 8, 8)]),
        ({0: UP_TO_64}, "(n, 3, 8, 8) with n <= 64", [(1, 3, 8, 8), (64, 3, 8, 8)]),
        ({0: ANY, 2: ANY, 3: ANY}, "(any, 3, any, any)", [(1, 3, 9, 12), (5, 3, 8, 7)]),
        ({2: ANY}, "(2, 3, any, 8)", [(2, 3, 5, 8)]),
    ],
)
def test_sizes_that_are_free_in_a_program_stay_so(
    free: dict[int, Any], told: str, others: list[tuple[int, ...]], suffix: str, tmp_path: Path
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(4)).eval()
    inputs = (torch.zeros(2, 3, 8, 8),)
    program = torch.export.export(model, inputs, dynamic_shapes=(free,))
    gm = rmfx.remove_residuals(program, inputs)
    for given in ({"reference": program}, {"source": program}):
        saved = save(gm, tmp_path / f"net{suffix}", inputs, **given)
        # Which torch before 2.11 adds to what it was told.
        assert saved.inputs.removesuffix(" with conditions that it checks itself") == told
        assert saved.free_batch == told.startswith("(any")
    network = FORMATS[suffix].read(saved.path)
    for shape in others:
        x = torch.randn(shape)
        assert relative_error(model(x), network(x)) < 1e-6


class EachWay(nn.Module):
    """Adds a map to itself with height and width exchanged, and joins it with a second one."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x + x.mT, y], 1)


def test_sizes_that_must_agree_have_one_name(tmp_path: Path) -> None:
    inputs = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8))
    free = ({0: ANY, 2: ANY, 3: ANY}, {0: ANY, 1: ANY, 2: ANY, 3: ANY})
    program = torch.export.export(EachWay(), inputs, dynamic_shapes=free)
    gm = rmfx.remove_residuals(program, inputs)
    saved = save(gm, tmp_path / "net.pt2", inputs, reference=program)
    assert saved.inputs == "(n, 3, m, m) and (n, any, m, m)"
    assert saved.free_batch


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    inputs = (torch.zeros(2, 3), torch.zeros(2, 3))
    saved = save(fx.symbolic_trace(Pair()), tmp_path / "net.pt2", inputs)
    assert saved.free_batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_keep_their_own_tolerance(dtype: torch.dtype, tmp_path: Path) -> None:
    inputs = (torch.zeros(1, 3, 8, 8, dtype=dtype),)
    saved = save(make_net(dtype), tmp_path / "net.pt2", inputs)
    assert (
        saved.tolerance == {torch.float64: 1e-10, torch.bfloat16: 0.2, torch.float16: 0.05}[dtype]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_onnx_is_for_float32_only(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.raises(SaveError, match="float32"):
        save(make_net(dtype), tmp_path / "net.onnx", (torch.zeros(1, 3, 8, 8, dtype=dtype),))


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "net.pt2"
    place.write_bytes(b"old")
    save(make_net(), place, IMAGE)
    assert place.stat().st_size > 3
    assert os.listdir(tmp_path) == ["net.pt2"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "real.pt2", tmp_path / "link.pt2"
    target.write_bytes(b"old")
    link.symlink_to(target)
    save(make_net(), link, IMAGE)
    assert link.is_symlink()
    assert target.stat().st_size > 3


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    place = tmp_path / "net.pt2"
    for mode in (0o600, 0o640):
        place.touch()
        place.chmod(mode)
        save(make_net(), place, IMAGE)
        assert place.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf"), "0.1"])
def test_a_tolerance_is_a_number_above_0(tolerance: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="tolerance="):
        save(make_net(), tmp_path / "net.pt2", IMAGE, tolerance=tolerance)
    assert os.listdir(tmp_path) == []


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    save(make_net(), tmp_path / "net.pt2", IMAGE)
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_write_leaves_nothing(
    fault: type[BaseException] | BaseException,
    existing: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_half(path: Path, data: object) -> None:
        with path.open("wb") as file:
            file.write(b"half")
        raise fault

    place = tmp_path / "net.pt2"
    if existing:
        place.write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises((KeyboardInterrupt, SaveError)):
        save(make_net(), place, IMAGE)
    assert os.listdir(tmp_path) == ["net.pt2"] * existing
    assert not existing or place.read_bytes() == b"old"


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    place = tmp_path / "net.pt2"
    with pytest.raises(VerificationError, match="differs from the original"):
        save(make_net(), place, IMAGE, reference=make_net())
    assert os.listdir(tmp_path) == []


def test_an_original_that_gives_nan_cannot_be_compared(tmp_path: Path) -> None:
    gm = make_net()
    gm.get_parameter("3.bias").data.fill_(float("nan"))
    with pytest.raises(VerificationError, match="NaN"):
        save(gm, tmp_path / "net.pt2", IMAGE)
    assert os.listdir(tmp_path) == []


class Root(nn.Module):
    """Gives numbers for positive inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x) + 1


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_network_for_some_inputs_is_checked_on_those(suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    gm, inputs = fx.symbolic_trace(Root()), (torch.rand(2, 3) + 0.5,)
    with pytest.raises(VerificationError, match="--inputs FILE"):
        save(gm, tmp_path / f"net{suffix}", (torch.zeros(2, 3),))
    saved = save(gm, tmp_path / f"net{suffix}", inputs)
    assert saved.free_batch
    assert saved.runs == 4
    with pytest.raises(VerificationError, match="differs from the original"):
        save(gm, tmp_path / f"net{suffix}", inputs, reference=fx.symbolic_trace(nn.ReLU()))


def test_a_difference_on_the_example_alone_is_found(tmp_path: Path) -> None:
    example = torch.full((2, 3), 50.0)  # far from what is drawn at random
    with pytest.raises(VerificationError, match="differs from the original"):
        save(fx.symbolic_trace(nn.ReLU6()), tmp_path / "n.pt2", (example,), reference=nn.ReLU())


def test_a_file_names_no_folders_and_holds_no_data(tmp_path: Path) -> None:
    example = torch.full((2, 192), 7.25)
    for gm, inputs in ((make_net(), IMAGE), (fx.symbolic_trace(Reshape()), (example,))):
        save(gm, tmp_path / "net.pt2", inputs)
        with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
            (entry,) = (name for name in archive.namelist() if name.endswith("model.json"))
            text = archive.read(entry).decode()
        files = re.findall(r'File \\"([^"]+)\\"', text)
        assert all(not Path(file).is_absolute() for file in files), files
        assert os.path.dirname(torch.__file__) not in text
        assert os.getcwd() not in text
        program = torch.export.load(tmp_path / "net.pt2")
        assert program.example_inputs is not None
        assert not any(bool((x == 7.25).any()) for x in program.example_inputs[0])


def test_a_network_that_cannot_be_exported_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(SaveError, match="cannot export the network: no such operator"):
        save(make_net(), tmp_path / "net.pt2", IMAGE)


def test_places_that_cannot_be_written_are_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").touch()
    for name, message in [
        ("net.pth", "must end in .pt2 or .onnx"),
        ("folder.pt2", "exists and is not a file"),
        ("no/such/folder/net.pt2", "cannot be written: No such file or directory"),
        ("file/net.pt2", "cannot be written: Not a directory"),
    ]:
        with pytest.raises(SaveError, match=message):
            check_output(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.pt2"]


def test_a_read_only_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.pt2").touch()
    (tmp_path / "net.pt2").chmod(0o444)  # which would not keep the superuser from writing
    with pytest.raises(SaveError, match="read-only"):
        check_output(tmp_path / "net.pt2")
    (tmp_path / "net.pt2").chmod(0o644)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(SaveError, match="read-only"):
        check_output(tmp_path / "net.pt2")


def test_missing_onnx_packages_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SaveError, match="pip install onnx onnxscript onnxruntime"):
        check_output(tmp_path / "net.onnx")
