"""The page: what it says, how large it is, and how it is asked for."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import torch
from builders import chain, conv, image, ready
from page_samples import deep, made, network
from torch import nn

import rmfx.cli.page
from rmfx.cli import main
from rmfx.cli.page import page
from rmfx.conversion import convert
from rmfx.latency import Network, measure_latency
from rmfx.timing import runtimes
from rmfx.timing.speed import Settings

pytest.importorskip("igraph")


def test_the_page_says_what_was_done() -> None:
    text = made()
    assert "1 of 2 residual connections removed, 1 of 1 sums of parallel branches merged" in text
    assert "GroupNorm divides by statistics" in text
    assert "gain: the largest factor, up or down, on its way" in text
    assert text.count("<tr data-status=") == 3
    assert len(re.findall(r'class="node add"', text)) == 3 + 1  # before, and the one that stays
    assert 'class="node carry"' in text
    assert "Conv2d 4 + 4" in text
    assert "<svg" in text
    addresses = set(re.findall(r"https?://[^/\"]+", text))
    assert addresses <= {"http://www.w3.org"}  # the names of SVG; nothing is loaded


def test_names_are_escaped() -> None:
    text = made("<script>alert(1)</script>")
    assert "<script>alert" not in text


def test_equal_conversions_make_equal_pages() -> None:
    texts = set()
    for _ in range(2):
        torch.manual_seed(0)  # the page tells how far the forms differ, by rounding
        texts.add(made())
    assert len(texts) == 1


def test_a_network_without_additions_has_no_table() -> None:
    x = image(dtype=torch.float32)
    model = ready(chain(conv(), nn.ReLU()), torch.float32)
    text = page(convert(model, x), (x,), "plain")
    assert "there is no residual connection to remove" in text
    assert '<table id="sites">' not in text


def test_latencies_are_drawn_and_their_machine_named() -> None:
    x = image(1, 4, 12, 12, dtype=torch.float32)
    model = network()
    settings = Settings(runtimes=("eager",), batches=(1,), rounds=2, seconds=0.001)
    latency = measure_latency([Network("n", model, (x,))], settings)
    text = page(convert(model, x), (x,), "timed", latency)
    assert "latency, eager, batch 1" in text
    assert "threads" in text
    assert "latency, eager, batch 1, too few rounds" in text


def test_short_graphs_stay_whole_and_long_ones_are_folded() -> None:
    assert "<details" not in made()
    assert len(re.findall("<details>", deep())) > 2
    assert "additions 7 → 0" in deep()


def test_a_page_of_resnet152_would_stay_below_a_megabyte() -> None:
    """By its 673 boxes: the page of a smaller network has as many bytes for each."""
    boxes = len(re.findall('class="node', deep()))
    assert len(deep().encode()) / boxes < 1_000_000 / 673


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    arguments = ["report", "torchvision:resnet18", "--input-shape", "1,3,32,32"]
    assert main([*arguments, "--html", str(path)]) == 0
    told, shown = capsys.readouterr().out, html.unescape(path.read_text(encoding="utf-8"))
    for text in (told, shown):
        assert "8 of 8 residual connections removed" in text
        assert "torchvision:resnet18, random weights, input (1, 3, 32, 32)." in text
        assert "erified on random inputs of 1x3x32x32" in text
        assert "he result is a chain" in text
        assert "atch norm is folded in both forms" in text
    assert re.search(rf"^Wrote {path} \(\d+\.\d kB\)\.$", told, re.MULTILINE)


@pytest.mark.slow
def test_a_page_is_not_begun_where_no_runtime_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = runtimes.Runtime(runtimes.run_in_openvino, ("no_such_package",))
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", absent)
    path, digits = tmp_path / "report.html", ("rmfx.models:DigitsNet", "--input-shape=1,1,28,28")
    asked = ["report", *digits, "--html", str(path)]
    assert main([*asked, "--runtimes=openvino"]) == 1
    line = "no runtime is left to measure in: no_such_package not installed (pip install no_such_"
    assert line in capsys.readouterr().err
    assert not path.exists()
    assert main([*asked, "--runtimes=openvino,eager"]) == 0
    assert "\nopenvino left out: no_such_package not installed" in capsys.readouterr().out


def test_the_page_says_what_was_not_verified_and_not_folded() -> None:
    x = image(1, 4, 12, 12, dtype=torch.float32)
    text = page(convert(network(), x, fold_batch_norm=False), (x,), "kept")
    assert "atch norm is folded" not in text
    assert "The result is no chain (rmfx.is_plain): " in text
    unverified = page(convert(network(), x, verify=False), (x,), "kept")
    assert "Not verified: verify=False." in unverified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "page.pdf"], "must end in .html"),
        (["--runtimes", "eager"], "needs --html"),
    ],
)
def test_wrong_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "torchvision:resnet18", *options])
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rmfx.cli.page, "PACKAGES", ("igraph", "no_such_package"))
    with pytest.raises(rmfx.RmfxError, match=r"needs no_such_package: pip install no_such_package"):
        made()
