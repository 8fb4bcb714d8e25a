"""Inputs on the command line: files, shapes, types and data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rmfx.cli import main


class Embedded(nn.Module):
    """Takes indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).mean(1)
        return x + self.last(torch.relu(self.first(x)))  # type: ignore[no-any-return]


class Weighted(Embedded):
    """Takes indices, and which of them count."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = (self.table(ids) * mask.unsqueeze(-1)).mean(1)
        return x + self.last(torch.relu(self.first(x)))  # type: ignore[no-any-return]


class Root(nn.Module):
    """Gives numbers for inputs above 3 only, as random ones never are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) / torch.sqrt(x.amin((1, 2, 3), keepdim=True) - 3)
        return x + torch.relu(self.branch(x))


def sentences() -> list[tuple[Tensor, Tensor]]:
    return [(torch.arange(10).remainder(9).view(2, 5) + i, torch.tensor([0, 3])) for i in (0, -1)]


def words() -> list[Tensor]:
    return [inputs.clamp(min=0) for inputs, _ in sentences()]


def marked() -> list[tuple[Tensor, Tensor]]:
    return [(ids, ids > 0) for ids in words()]


def pictures() -> list[Tensor]:
    return [torch.rand(2, 3, 6, 6, dtype=torch.float64) + 3.5]


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(ids, torch.tensor([0, 3])) for ids in words()]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models of this file are named `nets:NAME`; the current folder holds files of inputs."""
    monkeypatch.setitem(sys.modules, "nets", sys.modules[__name__])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    ids, x = torch.tensor([[3, 1, 8], [0, 2, 7]]), torch.rand(1, 3, 6, 6) + 3.5
    torch.save(ids, "ids.pt")
    save_file({"mask": torch.ones(2, 3), "ids": ids}, "both.safetensors")
    np.savez("x.npz", x.double().numpy())


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    """The one line of a command that must fail."""
    try:
        found: object = main(arguments)
    except SystemExit as error:
        found = error.code
    assert found == code
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.strip().splitlines()
    assert len(lines) == 1 or code == 2
    return lines[-1]


# ---- inputs that convert ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("Embedded", ("--inputs", "ids.pt")),
        ("Embedded", ("--input-shape", "2,5", "--input-dtype", "int64")),
        ("Embedded", ("--input-shape", "2,5", "--input-dtype", "int32")),
        ("Weighted", ("--inputs", "both.safetensors")),
        (
            "Weighted",
            ("--input-shape=2,3", "--input-shape=2,3", "--input-dtype=int64", "--input-dtype=bool"),
        ),
        ("Root", ("--inputs", "x.npz")),
    ],
)
def test_a_network_converts_with_its_inputs(
    model: str, inputs: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    reported = ran(capsys, "report", f"nets:{model}", *inputs)["report"]
    assert reported["removed"] == 1
    assert reported["verification"]["joins"]
    found = ran(capsys, "convert", f"nets:{model}", *inputs, "-o", "net.pt2")
    assert found["output"]["free_batch"]
    assert found["cost"]["after"]["adds"] == 0
    torch.manual_seed(0)
    original, program = globals()[model]().eval(), torch.export.load("net.pt2").module()
    trial = {
        "Embedded": (torch.randint(9, (4, found_length(inputs)), dtype=found_type(inputs)),),
        "Weighted": (torch.randint(9, (4, 3)), torch.tensor([[1, 0, 1]] * 4).to(mask_type(inputs))),
        "Root": (torch.rand(4, 3, 6, 6) + 3.25,),
    }[model]
    torch.testing.assert_close(program(*trial), original(*trial))


def found_length(inputs: tuple[str, ...]) -> int:
    return 3 if "ids.pt" in inputs else 5


def found_type(inputs: tuple[str, ...]) -> torch.dtype:
    return torch.int32 if "int32" in inputs else torch.int64


def mask_type(inputs: tuple[str, ...]) -> torch.dtype:
    return torch.bool if "--input-dtype=bool" in inputs else torch.float32


def test_inputs_come_in_the_type_of_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    found = ran(
        capsys, "convert", "nets:Root", "--inputs=x.npz", "--dtype=float64", "-o", "net.pt2"
    )
    assert found["output"]["error"] < 1e-10
    message = refused(capsys, "report", "nets:Root", "--inputs=x.npz", "--input-dtype=int64")
    assert "input 1 holds float64 numbers that int64 cannot hold" in message


def test_the_other_commands_take_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--runtimes=eager", "--batch=1,3", "--rounds=1")
    rows = ran(capsys, "bench", "nets:Root", "--inputs=x.npz", *asked)["rows"]
    assert [row["failure"] for row in rows] == ["", ""]
    points = ran(capsys, "prune", "nets:Embedded", "--inputs=ids.pt", "--target=0.8")["points"]
    assert points[1]["macs"] <= 0.8 * points[0]["macs"]


# ---- data as inputs -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "data", "shape"),
    [
        ("Embedded", "words", [2, 5]),
        ("Embedded", "labelled", [2, 5]),
        ("Weighted", "marked", [2, 5]),
        ("Root", "pictures", [2, 3, 6, 6]),
    ],
)
def test_the_first_batch_serves_as_example(
    model: str, data: str, shape: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", f"nets:{model}", "--calibration", f"nets:{data}"]) == 0
    text = capsys.readouterr().out
    assert f"({', '.join(map(str, shape))})" in text
    assert f"from the first batch of nets:{data}." in text
    assert "1 of 1 residual connections removed" in text
    assert "not verified" not in text


def test_the_data_of_pruning_serve_as_example(capsys: pytest.CaptureFixture[str]) -> None:
    found = ran(capsys, "prune", "nets:Embedded", "--data=nets:labelled", "--target=0.8")
    assert found["points"][1]["loss"] is not None


def test_a_shape_goes_before_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--input-shape=1,3,5,5", "--calibration=nets:pictures")
    assert main(["report", "nets:Root", *asked]) == 0
    assert "input (1, 3, 5, 5)." in capsys.readouterr().out


# ---- what does not fit --------------------------------------------------------------------------
def test_random_inputs_without_numbers_name_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("nets:Root", "--input-shape=1,3,6,6")
    assert "--inputs FILE" in refused(capsys, "convert", *asked, "-o", "net.pt2")
    assert main(["report", *asked]) == 0
    text = capsys.readouterr().out
    assert "not verified: the original gives no finite values" in text
    assert "Give inputs of the kind that the network is made for, with --inputs FILE." in text
    bench = ("bench", *asked, "--runtimes=eager", "--batch=1", "--rounds=1")
    assert main([*bench]) == 1
    assert "--inputs FILE" in capsys.readouterr().err
    assert not Path("net.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Embedded", "--input-shape=2,5"), "--input-dtype (int64 for indices), or --inputs FILE"),
        (("Embedded", "--inputs=none.pt"), "none.pt cannot be read: No such file"),
        (("Embedded", "--inputs=x.npz"), "x.npz must hold what it takes; --input-dtype gives"),
        (("Embedded", "--inputs=both.safetensors"), "holds 'mask', where the network takes ids"),
        (("Weighted", "--inputs=ids.pt"), "holds 1 tensor, where the network takes ids, mask"),
        (("Root", "--calibration=nets:words"), "the first batch of nets:words must hold what"),
        (("Weighted", "--calibration=nets:words"), "nets:words() must give batches of inputs"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, *rest = arguments
    assert message in refused(capsys, "report", f"nets:{model}", *rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--inputs=x.npy",), "'x.npy' must end in .pt or .npz or .safetensors"),
        (("--inputs=x.npz", "--input-shape=1,3,6,6"), "not allowed with argument"),
        (("--input-dtype=int64",), "argument --input-dtype: give --inputs FILE, or"),
        (("--inputs=x.npz", "--input-dtype=text"), "invalid choice: 'text'"),
        (
            ("--input-shape=1,3,6,6", "--input-dtype=int64", "--input-dtype=bool"),
            "2 types for 1 inputs",
        ),
        (("--inputs=x.npz", "--input-range", "-1", "0"), "x.npz holds numbers from"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "report", "nets:Root", *arguments, code=2)


def test_help_does_not_load_torch() -> None:
    code = """
import sys
from rmfx.cli import main
for command in ([], ["report"], ["convert"], ["prune"], ["bench"]):
    try:
        main([*command, "--help"])
    except SystemExit:
        pass
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
