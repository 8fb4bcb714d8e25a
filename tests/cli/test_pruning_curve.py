"""`rmfx prune`: sizes, their worth on data, the file and the plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rmfx
from rmfx.cli import main
from rmfx.cli.pruning_curve import pruning_curve
from rmfx.demo import load_digits, load_model

MODEL = "rmfx.demo:load_model"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a function that gives the digits of the demo, in a module of its own."""
    code = "from rmfx.demo import load_digits\n\n\ndef digits():\n"
    code += "    return [[part[::8] for part in load_digits()]]\n"
    code += "\n\ndef nothing():\n    return []\n\n\ndef broken():\n    raise ValueError('no')\n"
    (tmp_path / "digits_of_test.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "digits_of_test:digits"


@pytest.mark.slow
def test_the_worth_of_each_size_is_what_the_networks_give() -> None:
    model, (images, labels) = load_model(), (part[::4] for part in load_digits())
    batch = (images, labels)
    curve = pruning_curve(
        model, (images[:1],), (0.4, 0.8), data=[batch], loss=F.cross_entropy, importance="taylor"
    )
    assert [point.target for point in curve.points] == [1.0, 0.8, 0.4]
    for point, network in zip(curve.points, (model, *curve.networks), strict=True):
        with torch.no_grad():
            output = network(images)
        assert point.accuracy == pytest.approx(float((output.argmax(1) == labels).float().mean()))
        assert point.loss == pytest.approx(float(F.cross_entropy(output, labels)))
        assert point.macs == rmfx.cost.count(network, images[:1]).macs
    accuracies = [point.accuracy or 0.0 for point in curve.points]
    assert accuracies[0] > 0.9
    assert accuracies[1] > accuracies[2]


def test_table_and_plot(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "curve.svg"
    given = ["prune", MODEL, "--input-shape", "1,1,8,8", "--target", "0.8,0.5", "--data", data]
    assert main([*given, "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "accuracy" in text
    assert "filters" in text
    assert text.splitlines()[1] == "Filters at a target of 0.5:"
    assert f"\nWrote {plot} (" in text
    assert "accuracy in %" in plot.read_text()
    assert main([*given, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["target"] for point in points] == [1.0, 0.8, 0.5]


def test_the_file_is_the_pruned_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "small.pt2"
    given = ["prune", MODEL, "--input-shape", "1,1,8,8", "--target", "0.5", "-o", str(output)]
    assert main([*given, "--protect", "conv*", "--allocation", "global"]) == 0
    text = capsys.readouterr().out
    assert "left" in text
    assert "Filters at" not in text
    assert "for inputs (any, 1, 8, 8))." in text
    x = torch.randn(2, 1, 8, 8)
    whole = rmfx.cost.count(load_model(), x).macs
    small: Any = torch.export.load(output)
    assert rmfx.cost.count(small, x).macs <= 0.5 * whole
    assert small.module()(x).shape == load_model()(x).shape


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "2"], 2, "not a list of shares"),
        (["--target", "0.5,0.4", "-o", "x.pt2"], 2, "one --target"),
        (["--target", "0.5", "-o", "x.txt"], 2, "must end in"),
        (["--target", "0.5", "--plot", "x.svg"], 2, "needs --data"),
        (["--target", "0.5", "--importance", "taylor"], 2, "needs --data"),
        (["--target", "0.5", "--data", "digits_of_test:nothing"], 1, "must give batches"),
        (["--target", "0.5", "--data", "digits_of_test:broken"], 1, "raised ValueError: no"),
        (["--target", "0.5", "--data", "digits_of_test:digit"], 1, "there is no 'digit'"),
        (["--target", "0.5", "--data", "digits"], 2, "is no name like package.module:function"),
        (["--target", "0.0001"], 1, "of that; give a larger --target\n"),
        (
            ["--target", "0.0001", "--multiple", "4", "--protect", "conv*"],
            *(1, "give a larger --target or a smaller --multiple or fewer layers to --protect\n"),
        ),
    ],
)
def test_bad_arguments(
    data: str, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["prune", MODEL, "--input-shape", "1,1,8,8", *arguments])
    except SystemExit as exit_:
        found = exit_.code  # type: ignore[assignment]
    assert found == code
    assert message in capsys.readouterr().err
