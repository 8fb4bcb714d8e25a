"""Every kind of bad input: its exit code, one line with cause and way out, nothing touched."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rmfx.cli import commands, main
from rmfx.files import loading


# ---- models -------------------------------------------------------------------------------------
class Net(nn.Module):
    """One residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.first(x)))  # type: ignore[no-any-return]


class Trained(Net):
    """One that never leaves training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))  # type: ignore[no-any-return]

    def eval(self) -> Trained:
        return self


class Indexed(nn.Module):
    """Takes indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return x + self.layer(x)  # type: ignore[no-any-return]


class Packed(nn.Conv2d):
    """What torch's own quantised layers have."""

    _packed_params = 0


class Leaving(Net):
    """Ends the process where it is run."""

    def forward(self, x: Tensor) -> Tensor:
        sys.exit("no licence")


class Locked(Net):
    """Holds what nobody can copy."""

    def __deepcopy__(self, memo: object) -> Locked:
        raise TypeError("cannot pickle a lock")


def raises() -> nn.Module:
    raise ValueError("no such layer\nand more")


def leaves() -> nn.Module:
    sys.exit("no licence")


def gives_nothing() -> None:
    return None


def with_arguments(depth: int) -> nn.Module:
    return Net()


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


def terminated() -> nn.Module:
    os.kill(os.getpid(), signal.SIGTERM)
    return Net()


def not_finite() -> nn.Module:
    model = Net()
    nn.init.constant_(model.first.weight, float("nan"))
    return model


def without_values() -> nn.Module:
    return Net().to("meta")


def packed() -> nn.Module:
    return nn.Sequential(Packed(1, 2, 3))


def lazy() -> nn.Module:
    return nn.LazyLinear(4)


def half() -> nn.Module:
    return Net().half()


NUMBER = 3
MODEL = Trained().train()


# ---- data ---------------------------------------------------------------------------------------
def no_batches() -> list[Tensor]:
    return []


def one_tensor() -> Tensor:
    return torch.zeros(3, 1, 8, 8)


def words() -> list[tuple[str, str]]:
    return [("a", "b")]


def not_pairs() -> list[Tensor]:
    return [torch.zeros(2, 1, 8, 8)]


def wide() -> list[Tensor]:
    return [torch.zeros(2, 3, 8, 8)]


def holes() -> list[Tensor]:
    return [torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), float("nan"))]


def ends_badly() -> Iterator[Tensor]:
    yield torch.zeros(1, 1, 8, 8)
    raise RuntimeError("no more data")


# ---- files --------------------------------------------------------------------------------------
class Code:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def _halved(path: Path, name: str) -> None:
    content = path.read_bytes()
    path.with_name(name).write_bytes(content[: len(content) // 2])


def _of_another_version(path: Path, name: str) -> None:
    with zipfile.ZipFile(path) as own, zipfile.ZipFile(path.with_name(name), "w") as other:
        for entry in own.namelist():
            content = own.read(entry)
            if entry.endswith("models/model.json"):
                program = json.loads(content)
                program["schema_version"] = {"major": 99, "minor": 0}
                content = json.dumps(program).encode()
            other.writestr(entry, content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files."""
    place = tmp_path_factory.mktemp("bad")
    for name in ("text.npz", "text.pt", "text.pt2", "text.safetensors", "net.onnx", "net.py"):
        (place / name).write_text("hello")
    for name in ("empty.pt", "empty.pt2"):
        (place / name).touch()
    for name in ("folder", "folder.pt", "folder.pt2", "folder.npz", "folder.json", "folder.svg"):
        (place / name).mkdir()
    (place / "broken.py").write_text("def net(:\n")
    (place / "needy.py").write_text("import not_there\n")
    (place / "leaving.py").write_text("import sys\n\nsys.exit(3)\n")
    x = np.zeros((1, 1, 8, 8), np.float32)
    np.savez(place / "good.npz", x)
    np.savez(place / "two.npz", x, x)
    np.savez(place / "holes.npz", x * np.nan)
    np.savez(place / "objects.npz", np.array([{}], dtype=object))
    np.savez(place / "words.npz", np.array(["a"]))
    _halved(place / "good.npz", "cut.npz")
    state = Net().state_dict()
    save_file(state, place / "weights.safetensors")
    torch.save(state, place / "weights.pt")
    torch.save({"other": torch.zeros(3)}, place / "keys.pt")
    torch.save({name: torch.zeros(3) for name in state}, place / "shapes.pt")
    torch.save([1, 2], place / "list.pt")
    (place / "code.pt").write_bytes(pickle.dumps({"first.weight": Code()}))
    _halved(place / "weights.pt", "cut.pt")
    program = torch.export.export(Net().eval(), (torch.zeros(2, 1, 8, 8),))
    torch.export.save(program, place / "net.pt2")
    _halved(place / "net.pt2", "cut.pt2")
    _of_another_version(place / "net.pt2", "other.pt2")
    (place / "kept.pt2").write_text("kept")
    (place / "kept.html").write_text("kept")
    (place / "read_only.pt2").write_text("kept")
    (place / "read_only.pt2").chmod(0o444)
    (place / "loop.pt2").symlink_to("loop.pt2")
    return place


def held(place: Path) -> dict[str, tuple[int, int, object]]:
    """All that can be seen of the files of a folder."""
    found = {}
    for path in place.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found


# ---- kinds --------------------------------------------------------------------------------------
Patch = Callable[[pytest.MonkeyPatch], None]


class Bad(NamedTuple):
    """A command line, its exit code, and what its line says, cause and way out."""

    line: str
    code: int
    told: tuple[str, ...]
    patch: Patch = lambda monkeypatch: None


def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)


def _raising(owner: object, name: str, error: BaseException) -> Patch:
    def fail(*_: object, **__: object) -> object:
        raise error

    return lambda monkeypatch: monkeypatch.setattr(owner, name, fail)


FULL = OSError(28, "No space left on device")
S = "--input-shape=1,1,8,8"
NET = f"nets:Net {S}"
SHAPES = "--input-shape: "
FITS = "give its --input-shape and --input-dtype"
BAD = {
    # names of models
    "misspelt architecture": Bad("report torchvision:resnet19", 1, ("did you mean resnet18",)),
    "no source": Bad("report resnet18", 1, ("did you mean torchvision:resnet18?",), without_timm),
    "missing package": Bad("report timm:resnet18", 1, ("pip install timm",), without_timm),
    "no such module": Bad("report nothing:net", 1, ("no module 'nothing'",)),
    "relative module": Bad("report ..:net", 1, ("write package.module:name",)),
    "no such factory": Bad("report nets:Nett", 1, ("there is no 'Nett'; did you mean Net?",)),
    "file of code": Bad("report net.py", 1, ("write net:factory",)),
    "syntax error": Bad("report broken:net", 1, ("SyntaxError", "broken.py, line 1")),
    "module needs another": Bad("report needy:net", 1, ("No module named 'not_there'",)),
    "module that exits": Bad("report leaving:net", 1, ("SystemExit: 3, at leaving.py, line 3",)),
    "folder as model": Bad("report folder", 1, ("is a folder: write torchvision:NAME",)),
    "onnx as model": Bad("report net.onnx", 1, ("written, not read; name the model",)),
    "weights as model": Bad("report weights.pt", 1, ("give the file to --weights",)),
    # factories and what they give
    "factory raises": Bad(f"report nets:raises {S}", 1, ("raised ValueError: no such layer, at",)),
    "factory exits": Bad(f"report nets:leaves {S}", 1, ("raised SystemExit: no licence, at",)),
    "factory gives None": Bad(f"report nets:gives_nothing {S}", 1, ("not a torch.nn.Module",)),
    "factory needs arguments": Bad(f"report nets:with_arguments {S}", 1, ("argument: 'depth'",)),
    "not a factory": Bad(f"report nets:NUMBER {S}", 1, ("neither a module nor a function",)),
    "model that cannot be copied": Bad(f"report nets:Locked {S}", 1, ("let it hold nothing but",)),
    "model that exits": Bad(f"report nets:Leaving {S}", 1, ("SystemExit: no licence",)),
    "NaN weights": Bad(f"report nets:not_finite {S}", 1, ("first.weight", "repair or reload")),
    "training mode": Bad(f"report nets:MODEL {S}", 1, ("norm (BatchNorm2d)", "model.eval()")),
    "meta tensors": Bad(f"report nets:without_values {S}", 1, ("meta", "load the weights first")),
    "quantised layers": Bad(f"report nets:packed {S}", 1, ("quantise the result",)),
    "lazy layers": Bad(f"report nets:lazy {S}", 1, ("run the model once",)),
    "half precision in bench": Bad(f"bench nets:half {S}", 1, ("in float32 only",)),
    # programs
    "no such program": Bad("report absent.pt2", 1, ("there is no file absent.pt2",)),
    "folder as program": Bad("report folder.pt2", 1, ("is a folder, not a file of",)),
    "text as program": Bad("report text.pt2", 1, ("is damaged, no exported program",)),
    "empty program": Bad("report empty.pt2", 1, ("empty.pt2 is empty",)),
    "damaged program": Bad("report cut.pt2", 1, ("cut.pt2 is damaged",)),
    "program of another version": Bad("report other.pt2", 1, ("another version of torch",)),
    "weights for a program": Bad("report net.pt2 --weights weights.pt", 1, ("already",)),
    "two shapes for a program": Bad(
        "report net.pt2 --input-shape=2,1,8,8 --input-shape=2,1,8,8", 1, ("2 shapes were given",)
    ),
    "shape for a program": Bad(
        "report net.pt2 --input-shape=2,1,9,9", 1, ("(2, 1, 8, 8); --input-shape must fit",)
    ),
    # weights
    "no weights": Bad("report nets:Net --weights absent.pt", 1, ("cannot be read: No such file",)),
    "nameless weights": Bad("report nets:Net --weights=", 2, ("--weights: the name of a file",)),
    "text as weights": Bad("report nets:Net --weights text.pt", 1, ("no file of torch.save",)),
    "damaged weights": Bad("report nets:Net --weights cut.pt", 1, ("cut.pt is damaged",)),
    "damaged safetensors": Bad("report nets:Net --weights text.safetensors", 1, ("is damaged",)),
    "other keys": Bad("report nets:Net --weights keys.pt", 1, ("4 missing keys", "unexpected key")),
    "other shapes": Bad("report nets:Net --weights shapes.pt", 1, ("4 wrong shapes",)),
    "pickled code": Bad("report nets:Net --weights code.pt", 1, ("only tensors are read, never",)),
    "folder as weights": Bad("report nets:Net --weights folder.pt", 1, ("Is a directory",)),
    # shapes and types
    "shape that does not fit": Bad("report nets:Net --input-shape=1,3,8,8", 1, (FITS,)),
    "too many dimensions": Bad("report nets:Net --input-shape=1,1,8,8,8", 1, (FITS,)),
    "size 0": Bad("report nets:Net --input-shape=1,0,8", 2, (SHAPES, "sizes like 1,3,224,224")),
    "negative size": Bad("report nets:Net --input-shape=-1,1", 2, (SHAPES, "sizes like 1,3,224")),
    "words as shape": Bad("report nets:Net --input-shape=a,b", 2, (SHAPES, "sizes like 1,3,224")),
    "size beyond memory": Bad(
        "report nets:Net --input-shape=1,1,99999999,99999999", 1, ("memory",)
    ),
    "size beyond numbers": Bad(
        f"report nets:Net --input-shape=1,{10**22}", 2, (SHAPES, "more than a tensor can hold")
    ),
    "no shape": Bad("convert nets:Net -o out.pt2", 2, ("give --inputs FILE, or give --input-sh",)),
    "type nobody knows": Bad(f"report {NET} --dtype int8", 2, ("--dtype: invalid choice",)),
    "whole numbers for floats": Bad(f"report {NET} --input-dtype int64", 1, (FITS, "of int64")),
    "floats for indices": Bad("report nets:Indexed --input-shape=2,3", 1, ("int64 for indices",)),
    "two types for one": Bad(
        f"report {NET} --input-dtype int64 --input-dtype bool", 2, ("2 types for 1 inputs",)
    ),
    # inputs
    "no inputs": Bad("report nets:Net --inputs absent.npz", 1, ("cannot be read: No such file",)),
    "inputs of another kind": Bad("report nets:Net --inputs good.txt", 2, ("end in .pt or .npz",)),
    "text as inputs": Bad("report nets:Net --inputs text.npz", 1, ("damaged or no .npz file",)),
    "damaged inputs": Bad("report nets:Net --inputs cut.npz", 1, ("damaged or no .npz file",)),
    "objects as inputs": Bad(
        "report nets:Net --inputs objects.npz", 1, ("objects; store numbers",)
    ),
    "words as inputs": Bad("report nets:Net --inputs words.npz", 1, ("<U1; store numbers",)),
    "numbers as inputs": Bad("report nets:Net --inputs list.pt", 1, ("is an int, no tensor",)),
    "too many inputs": Bad(
        "report nets:Net --inputs two.npz", 1, ("2 tensors, where the network",)
    ),
    "NaN inputs": Bad("report nets:Net --inputs holes.npz", 1, ("number 1 holds NaN or Inf",)),
    "names of inputs": Bad("report nets:Net --inputs weights.pt", 1, ("name the tensors like",)),
    "folder as inputs": Bad("report nets:Net --inputs folder.npz", 1, ("Is a directory",)),
    "inputs and shape": Bad(f"report {NET} --inputs good.npz", 2, ("not allowed with argument",)),
    # numbers
    "reversed range": Bad(f"report {NET} --input-range 1 0", 2, ("the lower one first",)),
    "NaN in a range": Bad(f"report {NET} --input-range nan 1", 2, ("two finite numbers",)),
    "words as range": Bad(f"report {NET} --input-range a b", 2, ("--input-range: invalid float",)),
    "range against the inputs": Bad(
        "report nets:Net --inputs good.npz --input-range 1 2", 2, ("good.npz holds numbers from",)
    ),
    **{
        f"tolerance {text} of {command}": Bad(
            f"{command} {NET} --tolerance={text}", 2, ("--tolerance:", "not a number, 0 or above")
        )
        for command in ("convert -o out.pt2", "bench")
        for text in ("-1", "nan", "inf", "many")
    },
    "tolerance 0": Bad(
        f"convert {NET} -o out.pt2 --tolerance 0", 1, ("differs from the original by", "at most 0")
    ),
    "no tolerance": Bad(f"convert {NET} -o out.pt2 --tolerance", 2, ("expected one argument",)),
    "share above 1": Bad(f"prune {NET} --target 2", 2, ("shares like 0.75,0.5",)),
    "no rounds": Bad(f"bench {NET} --rounds 0", 2, ("not a whole number above 0",)),
    "runtime nobody knows": Bad(f"bench {NET} --runtimes abacus", 2, ("choose from eager",)),
    # options
    "no command": Bad("", 2, ("required: COMMAND",)),
    "command nobody knows": Bad("explode", 2, ("invalid choice: 'explode'",)),
    **{
        f"option nobody knows of {line}": Bad(
            f"{line} --frob", 2, ("unrecognized arguments: --frob",)
        )
        for line in ("demo", "models", "doctor", "fuzz", f"report {NET}", f"bench {NET}")
    },
    "option of another command": Bad(
        f"report {NET} -o out.pt2", 2, ("unrecognized arguments: -o",)
    ),
    "one more argument": Bad("models net", 2, ("unrecognized arguments: net",)),
    "runtimes without a page": Bad(f"report {NET} --runtimes=eager", 2, ("needs --html",)),
    "file of several targets": Bad(
        f"prune {NET} --target .5,.2 -o out.pt2", 2, ("give one --target",)
    ),
    "plot without data": Bad(f"prune {NET} --target .5 --plot out.svg", 2, ("needs --data",)),
    "shell nobody knows": Bad("--print-completion=dos", 2, ("invalid choice: 'dos'",)),
    "completion without shtab": Bad(
        "--print-completion=bash",
        1,
        ("pip install shtab",),
        lambda monkeypatch: monkeypatch.setitem(sys.modules, "shtab", None),
    ),
    # data
    "no data": Bad("report nets:Net --calibration nets:gives_nothing", 1, ("pass a list of",)),
    "no batches": Bad(
        "report nets:Net --calibration nets:no_batches", 1, ("must give batches of",)
    ),
    "a tensor as data": Bad("report nets:Net --calibration nets:one_tensor", 1, ("is a tensor;",)),
    "words as data": Bad(
        "report nets:Net --calibration nets:words", 1, ("tensors that the model",)
    ),
    "NaN in data": Bad(
        "report nets:Net --calibration nets:holes", 1, ("batch 2 holds NaN or Inf",)
    ),
    "data that do not fit": Bad(
        "report nets:Net --calibration nets:wide", 1, ("must hold what it",)
    ),
    "data that end badly": Bad(
        "report nets:Net --calibration nets:ends_badly", 1, ("no more data",)
    ),
    "a model as data": Bad(
        "report nets:Net --calibration nets:half",
        *(1, ("gives a Net, a model; name a function that gives a list of batches of inputs",)),
    ),
    "a model as pairs": Bad(
        "prune nets:Net --target .5 --data nets:Net", 1, ("list of batches of (inputs, classes)",)
    ),
    "data that are none": Bad("report nets:Net --calibration nets:NUMBER", 1, ("not a function",)),
    "no name of data": Bad("report nets:Net --calibration nets", 2, ("package.module:function",)),
    "no pairs": Bad("prune nets:Net --target .5 --data nets:not_pairs", 1, ("pairs of (inputs,",)),
    # the fuzzer's pass
    "pass nobody knows": Bad("fuzz --pass nothing", 2, ("choose from remove_residuals",)),
    "pass with a syntax error": Bad("fuzz --pass broken:f", 2, ("SyntaxError: invalid syntax",)),
    "pass whose module exits": Bad("fuzz --pass leaving:f", 2, ("raised SystemExit: 3",)),
    # outputs
    "folder as output": Bad(f"convert {NET} -o folder.pt2", 1, ("exists and is not a file",)),
    "read-only output": Bad(f"convert {NET} -o read_only.pt2", 1, ("is read-only; name another",)),
    "output without a folder": Bad(
        f"convert {NET} -o no/out.pt2", 1, ("No such file or directory",)
    ),
    "file as the output's folder": Bad(
        f"convert {NET} -o text.pt/out.pt2", 1, ("Not a directory",)
    ),
    "other extension": Bad(f"convert {NET} -o out.pth", 2, ("must end in .pt2 or .onnx",)),
    "no name of an output": Bad(f"convert {NET} --output=", 2, ("must end in .pt2 or .onnx",)),
    "too long a name": Bad(f"convert {NET} -o {'x' * 300}.pt2", 1, ("File name too long",)),
    "link to itself": Bad(f"convert {NET} -o loop.pt2", 1, ("levels of symbolic links",)),
    "folder for measurements": Bad(f"bench {NET} -o folder.json", 1, ("is not a file",)),
    "folder for a plot": Bad(f"bench {NET} --plot folder.svg", 1, ("is not a file",)),
    "page of another kind": Bad(f"report {NET} --html page.txt", 2, ("must end in .html or .htm",)),
    # the machine
    "not enough memory": Bad(
        f"report {NET}",
        1,
        ("not enough memory (no more); give smaller inputs",),
        _raising(commands, "convert", torch.OutOfMemoryError("no more")),
    ),
    "not enough memory for Python": Bad(
        f"report {NET}",
        1,
        ("give smaller inputs",),
        _raising(loading, "copied_model", MemoryError()),
    ),
    "full disk": Bad(
        f"convert {NET} -o kept.pt2",
        1,
        ("kept.pt2 cannot be written: No space left on device",),
        _raising(Path, "write_bytes", FULL),
    ),
    "full disk for a page": Bad(
        f"report {NET} --html kept.html",
        1,
        ("kept.html cannot be written: No space left on device",),
        _raising(commands, "page", FULL),
    ),
    "interrupted": Bad(f"report nets:interrupted {S}", 130, ("rmfx: interrupted",)),
    "interrupted while it writes": Bad(
        f"convert {NET} -o kept.pt2",
        130,
        ("rmfx: interrupted",),
        _raising(Path, "write_bytes", KeyboardInterrupt()),
    ),
    "terminated": Bad(f"report nets:terminated {S}", 130, ("rmfx: interrupted",)),
    # with JSON
    "JSON of wrong usage": Bad(f"report {NET} --json --frob", 2, ("unrecognized arguments",)),
    "JSON of what cannot be done": Bad(f"report nets:not_finite {S} --json", 1, ("repair or",)),
}


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nets", sys.modules[__name__])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(folder)


def code_of(line: str) -> object:
    try:
        return main(line.split())
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_told_in_one_line_and_nothing_is_touched(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = BAD[kind]
    before, state = held(folder), {name: x.clone() for name, x in MODEL.state_dict().items()}
    with monkeypatch.context() as patched:
        bad.patch(patched)
        code = code_of(bad.line)
    output = capfd.readouterr()
    *usage, line = output.err.splitlines()
    assert (code, output.out) == (bad.code, "")
    assert all(words in line for words in bad.told), line
    if bad.code == 2:
        command = bad.line.split()[:1] if bad.line[:2] not in ("", "ex", "--") else []
        name = " ".join(["rmfx", *command])
        assert usage[0].startswith(f"usage: {name} [-h]")
        assert all(more.startswith("  ") for more in usage[1:])
        assert line.startswith(f"{name}: error: ")
    else:
        assert not usage
        assert line.startswith("rmfx: ")
        assert "fault of rmfx" not in line
    assert held(folder) == before
    assert MODEL.training
    assert all(torch.equal(x, state[name]) for name, x in MODEL.state_dict().items())


# ---- stdout -------------------------------------------------------------------------------------
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_behind_stdout_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["models"]) == 1
    assert capfd.readouterr().err == "rmfx: stdout cannot be written: No space left on device\n"


def test_a_reader_that_has_left_is_no_error_to_tell(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["models", "--json"]) == 1
    assert capfd.readouterr().err == ""


# ---- files that are replaced --------------------------------------------------------------------
def test_a_replaced_file_keeps_its_mode_and_a_link_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("private.html").touch(mode=0o600)
    Path("link.html").symlink_to("private.html")
    Path("new.html").symlink_to("target.html")
    monkeypatch.setattr(commands, "page", lambda *_: "a page")
    for name in ("link.html", "new.html"):
        assert main(["report", "nets:Net", S, "--html", name]) == 0
        assert Path(name).is_symlink()
        assert Path(name).read_text() == "a page"
    assert Path("private.html").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir()) == ["link.html", "new.html", "private.html", "target.html"]


# ---- completion ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("rmfx re", "report"),
        ("rmfx report --input-s", "--input-shape"),
        ("rmfx report nets:Net --policy pro", "profitable"),
        ("rmfx convert net.o", "net.onnx"),
    ],
)
def test_bash_completes_the_command(
    typed: str, completed: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    pytest.importorskip("shtab")
    assert code_of("--print-completion=bash") == 0
    script = capsys.readouterr().out
    words = typed.split()
    script += f"""
COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; COMP_LINE="{typed}"; COMP_POINT={len(typed)}
$(complete -p rmfx | sed 's/.*-F \\([^ ]*\\).*/\\1/') rmfx "{words[-1]}" "{words[-2]}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert completed in done.stdout.split()


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert code_of(f"--print-completion={shell}") == 0
    assert "report" in capsys.readouterr().out
