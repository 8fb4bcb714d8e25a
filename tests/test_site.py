"""What the site has besides the pages of docs/ is made from the code, and nothing is left out."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from _site import api, command_line, gallery, mirrored

import rmfx
from rmfx.cli.arguments import make_parser

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def test_every_network_of_the_zoo_stands_in_one_group_of_the_gallery() -> None:
    rows = gallery.records()
    page = gallery.page(rows).partition("## Why additions stay")[0]
    shown = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert sorted(shown) == sorted(row["network"] for row in rows)
    assert len(rows) > 100


def test_the_gallery_says_what_the_records_say() -> None:
    rows = [row for row in gallery.records() if row["network"] in ("resnet18", "dla34")]
    page = gallery.page(rows)
    assert page.index("## Chains") < page.index("`resnet18`") < page.index("## In part")
    assert re.search(r"^\| `resnet18` \| 8 of 8 \| 1\.\d\d \| 1\.\d\d \|$", page, re.M)
    assert re.search(r"^\| `dla34` \| 8 of 12 \| .* \| 4 max pool \|$", page, re.M)
    assert "MaxPool2d" in page.partition("## Why additions stay")[2]


def test_the_page_about_the_command_has_every_option() -> None:
    page = command_line.page()
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    sections = dict(zip(commands.choices, page.split("\n## ")[1:], strict=True))
    for name, command in commands.choices.items():
        assert sections[name].startswith(f"rmfx {name}\n")
        for action in command._actions:
            for option in action.option_strings or [str(action.metavar)]:
                assert re.search(rf"`{re.escape(option)}[` ]", sections[name]), (name, option)


@pytest.mark.parametrize("name", api.MODULES)
def test_the_api_has_every_public_name(name: str) -> None:
    if name == "rmfx.attribution":
        pytest.importorskip("captum")
    module = sys.modules.get(name) or __import__(name, fromlist=["x"])
    shown = set(re.findall(rf"^\.\. auto\w+:: {re.escape(name)}\.(\w+)$", api.page(name), re.M))
    assert shown == set(getattr(module, "__all__", shown)) - {"cost"} != set()


def test_modules_in_the_api_are_those_that_rmfx_has() -> None:
    assert {f"rmfx.{name}" for name in rmfx._FOLDERS} - set(api.MODULES) == {
        *("rmfx.frontend", "rmfx.passes"),  # whose public names are those of rmfx
    }


def test_links_out_of_docs_lead_to_the_copies_on_the_site() -> None:
    page = DOCS / "studies.md"
    given = (
        "[a](../benchmarks/results/zoo.md#limits) [b](rings.md) [c](https://x.org/y.md)\n"
        "![d](../benchmarks/results/rings.svg) [e](../CONTRIBUTING.md)\n"
        "```text\n[f](../CONTRIBUTING.md)\n```\n"
    )
    assert mirrored.relinked(given, page) == (
        "[a](made/results/zoo.md#limits) [b](rings.md) [c](https://x.org/y.md)\n"
        "![d](../benchmarks/results/rings.svg) [e](made/contributing.md)\n"
        "```text\n[f](../CONTRIBUTING.md)\n```\n"
    )
    copy = mirrored.MADE / "contributing.md"
    made = mirrored.relinked("[x](docs/one_block.md)", ROOT / "CONTRIBUTING.md", copy)
    assert made == "[x](../one_block.md)"


@pytest.mark.parametrize("path", sorted(DOCS.glob("drawings/*.svg")), ids=lambda path: path.name)
def test_drawings_are_shown_and_can_be_read(path: Path) -> None:
    """On a ground of their own, in letters of 12 px or more, no wider than a telephone."""
    assert any(f"(drawings/{path.name})" in page.read_text() for page in DOCS.glob("*.md"))
    root = ElementTree.parse(path).getroot()
    assert int(root.attrib["width"]) <= 358
    assert root.findtext("{*}title")
    style = str(root.findtext("{*}style"))
    assert min(map(int, re.findall(r"(\d+)px", style))) >= 12
    assert "prefers-color-scheme: dark" in style
    assert root.find("{*}rect[@class='back']") is not None


def test_docstrings_become_what_sphinx_reads() -> None:
    pytest.importorskip("sphinx")
    from _site.docstrings import as_rst, with_types

    given = ["T. of |x| in `act(x)`:", "", "    x = 1", "", "Args:", "    x: see `rmfx.report`."]
    assert as_rst(given) == [
        *(r"T\. of \|x\| in ``act(x)``:", "", "::", "", "    x = 1", "", "Args:"),
        "    x: see :py:obj:`rmfx.report <rmfx.report>`.",
    ]
    attributes = ["Attributes:", "    a, b: numbers,", "        two."]
    assert with_types(attributes, {"a": "int"}) == [
        *(
            "Attributes:",
            "    a (int): numbers,",
            "        two.",
            "    b: numbers,",
            "        two.",
        ),
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("captum", "furo", "myst_parser", "sphinx_autodoc_typehints"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "site")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "made" / "gallery.html").is_file()
