"""The page: what it says, what it draws, and that a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Apply, Residual, basic_branch, chain, conv, conv_bn, image, ready
from torch import nn

import rmfx.cli.page
from rmfx.cli import main
from rmfx.cli.page import Drawing, draw, page
from rmfx.conversion import convert
from rmfx.latency import Network, measure_latency
from rmfx.timing.speed import Settings

pytest.importorskip("igraph")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def network() -> Any:
    refused = Residual(chain(conv(), nn.GroupNorm(2, 4), conv()))
    branches = Residual(basic_branch()), nn.ReLU(), Residual(conv_bn()), refused
    return ready(chain(conv_bn(), nn.ReLU(), *branches), torch.float32)


def made(title: str = "a network") -> str:
    x = image(1, 4, 12, 12, dtype=torch.float32)
    return page(convert(network(), x), (x,), title)


def drawing(model: nn.Module) -> Drawing:
    x = image()
    gm = rmfx.trace(model, x)
    return draw(gm, {row.node: row for row in rmfx.cost.nodes(gm, x)}, {})


def test_the_page_says_what_was_done() -> None:
    text = made()
    assert "2 of 3 residual connections are removed, 1 cannot be removed exactly" in text
    assert "GroupNorm divides by statistics" in text
    assert "gain: the largest factor, up or down, on its way" in text
    assert text.count('<tr><td class=""') == 3
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
    assert made() == made()


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


def test_nodes_do_not_overlap_and_edges_run_down() -> None:
    model = ready(
        Apply(lambda m, x: m.c(m.a(x) + m.b(x)) + x, a=conv(), b=basic_branch(), c=conv())
    )
    check_places(found := drawing(model))
    assert sum(line.skip for line in found.lines) == 2  # x, and the short branch
    wide = [Apply(lambda m, x: m.a(x) + m.b(x) + m.c(x) + m.d(x) + m.e(x) + x) for _ in range(4)]
    for block in wide:
        for name in "abcde":
            setattr(block, name, conv())
    check_places(drawing(ready(chain(*wide))))


def check_places(found: Drawing) -> None:
    places = [(box.x, box.y) for box in found.boxes]
    for i, (x, y) in enumerate(places):
        assert all(abs(x - u) >= 128 or abs(y - v) >= 20 for u, v in places[:i])
        assert 0 <= x <= found.width - 128
        assert 0 <= y <= found.height - 20
    for line in found.lines:
        heights = [float(point.split(",")[1]) for point in line.points.split()]
        assert heights == sorted(heights)
        assert len(set(heights)) == len(heights)


def test_a_deep_network_is_drawn() -> None:
    model = ready(chain(*(Residual(conv()) for _ in range(150))))
    assert len(drawing(model).boxes) == 302


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    arguments = ["report", "torchvision:resnet18", "--input-shape", "1,3,32,32"]
    assert main([*arguments, "--html", str(path)]) == 0
    assert "8 of 8 residual connections removed" in capsys.readouterr().out
    assert "8 of 8 residual connections are removed" in path.read_text(encoding="utf-8")


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


def browse(path: Path, *options: str) -> str:
    """What headless Chromium makes of a page, after its scripts have run."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *options,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_the_page_and_sorts_its_table(tmp_path: Path) -> None:
    sorts = """<script>
      const errors = []; addEventListener("error", event => errors.push(event.message));
      addEventListener("load", () => {
        document.querySelectorAll("#sites th")[1].click();
        const rows = [...document.querySelectorAll("#sites tbody tr")];
        const wide = document.documentElement.scrollWidth > innerWidth;
        const boxes = [...document.querySelectorAll(".node rect")];
        const drawn = boxes.filter(box => box.getBoundingClientRect().width > 50).length;
        const done = rows.map(row => row.cells[1].textContent);
        document.title = JSON.stringify([done, wide, drawn, errors]);
      });
    </script>"""
    path = tmp_path / "page.html"
    path.write_text(made().replace("</body>", f"{sorts}</body>"), encoding="utf-8")
    for size in ("1200,900", "400,800"):  # a desk and a phone
        seen = browse(path, f"--window-size={size}", "--dump-dom")
        title = re.search(r"<title>(.*?)</title>", seen)
        assert title is not None
        nodes = len(re.findall(r'class="node', seen))
        assert title[1] == f'[["refused","removed","removed"],false,{nodes},[]]'
