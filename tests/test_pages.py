"""README.md and the pages of docs/: their code runs, and what they point at is there."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import Block, fenced_blocks

from rmfx.cli.arguments import make_parser

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
OTHERS = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
# Pages whose code runs in tests of their own, which look at what it leaves behind.
ELSEWHERE = {
    "bounds_and_stages.md": "integration/test_chains.py",
    "finn.md": "integration/test_finn.py",
    "hls4ml.md": "integration/test_hls4ml.py",
    "spiking.md": "integration/test_spiking.py",
    "training.md": "test_training_docs.py",
}
# Pages that show all that their code prints. On others a block of text shows what the block of code
# right before it prints, and what has none behind it may print what it likes.
WHOLE = ("one_block.md", "writing_a_pass.md")
# What code may import without saying so: what rmfx needs, and what the tests have.
GIVEN = {"hypothesis", "numpy", "rmfx", "torch", *sys.stdlib_module_names}
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")


def named(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in pages]


def with_code() -> list[Any]:
    """The pages that run here; those that need further packages again once they are there."""
    found = []
    for page in PAGES:
        blocks = [block for block in fenced_blocks(page) if block.kind == "python"]
        if blocks and page.name not in ELSEWHERE:
            marks = [pytest.mark.bench, pytest.mark.slow] if blocks[-1].needs else []
            found.append(pytest.param(page, id=page.name, marks=marks))
    return found


@pytest.mark.filterwarnings(
    "ignore:Input Tensor 0",  # captum's
    "ignore:Setting forward, backward hooks",  # captum's
)
@pytest.mark.parametrize("page", with_code())
def test_code_runs_and_prints_what_stands_behind_it(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = fenced_blocks(page)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.kind != "python":
            continue
        for package in block.needs:
            pytest.importorskip(package)
        printed = output_of(block, page, names)
        if following is not None and following.kind == "text":
            assert printed == following.text
        elif page.name in WHOLE:
            assert printed == ""


def output_of(block: Block, page: Path, names: dict[str, Any]) -> str:
    """What a block prints; it goes on where the one before ends. Errors name the page's line."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    return output.getvalue()


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("matplotlib", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = DOCS / "tour.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    names: dict[str, Any] = {"__name__": notebook.stem}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            block = Block("python", "".join(cell["source"]), 0, ())
            printed = output_of(block, Path(f"cell {number} of {notebook.name}"), names)
            kept = [output for output in cell["outputs"] if output["output_type"] == "stream"]
            assert bool(printed) == bool(kept)  # numbers differ between machines
    names["plt"].close("all")


@pytest.mark.parametrize("page", named([page for page in PAGES if page.name in ELSEWHERE]))
def test_what_does_not_run_here_runs_elsewhere(page: Path) -> None:
    assert f'"{page.name}"' in (ROOT / "tests" / ELSEWHERE[page.name]).read_text()


@pytest.mark.parametrize("page", named(PAGES))
def test_code_says_which_packages_it_needs(page: Path) -> None:
    for block in fenced_blocks(page):
        if block.kind == "python":
            nodes = list(ast.walk(ast.parse(block.text)))
            used = {x.name for node in nodes if isinstance(node, ast.Import) for x in node.names}
            used |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
            if "rmfx.attribution" in used:
                used.add("captum")
            assert {name.partition(".")[0] for name in used} - GIVEN <= set(block.needs)


def test_a_block_knows_what_comments_above_it_say(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\na\n```\n<!-- needs: x, y -->\n\n```text\n```\nz\n```sh\nb\n```\n")
    assert fenced_blocks(page) == [
        Block("python", "a\n", 1, ()),
        Block("text", "", 6, ("x", "y")),
        Block("sh", "b\n", 9, ("x", "y")),
    ]


def commands_of(page: Path) -> list[str]:
    """Lines of shell that begin with `rmfx`, and such code in the text that names a model."""
    shells = [block.text for block in fenced_blocks(page) if block.kind == "sh"]
    lines = "".join(shells).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("rmfx ")] + re.findall(
        r"`(rmfx \w+ \w[\w.]*:[^`]*)`", page.read_text()
    )


@pytest.mark.parametrize("page", named([p for p in [*PAGES, *OTHERS[:3]] if commands_of(p)]))
def test_the_command_takes_what_pages_give_it(page: Path) -> None:
    for line in commands_of(page):
        arguments = shlex.split(line, comments=True)[1:]
        assert make_parser().parse_args(arguments).command == arguments[0]


@pytest.mark.parametrize("page", named([*PAGES, *OTHERS[:3]]))
def test_files_that_pages_name_are_there(page: Path) -> None:
    """Scripts and tests in commands, with what is run of them."""
    text = page.read_text()
    for name in re.findall(r"(?:python|pytest)(?: -\S+)* ((?:benchmarks|tests)/[\w/.]+)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:benchmarks|docs|passes|rmfx|tests)/[\w/]+\.(?:py|md))`", text):
        assert (ROOT / name).exists(), name


def anchors_of(page: Path) -> set[str]:
    """What a link may end in: headings, as code hosts (and the site) make anchors of them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        found.add(words.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", named([*PAGES, *OTHERS]))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.is_relative_to(ROOT), target
        assert aim.exists(), target
        assert not anchor or anchor in anchors_of(aim), target


def test_every_page_is_found_from_readme_or_index() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in (ROOT / "README.md", DOCS / "index.md")
        for target in LINK.findall(page.read_text())
    }
    assert set(PAGES[1:]) - linked == set()


def test_coverage_is_what_the_benchmark_has_found() -> None:
    """The figures of docs/claims.md, as benchmarks/results/zoo.md has them."""
    summary = (ROOT / "benchmarks" / "results" / "zoo.md").read_text().split("\n\n")[2]
    claims = " ".join((DOCS / "claims.md").read_text().split())
    figures = re.findall(r"[\d.]+", summary.partition("Multiply-adds")[0])
    (found,) = re.findall(r"## Coverage (.*?) Multiply-adds", claims)
    assert re.findall(r"[\d.]+", found) == figures
    for ratio in re.findall(r"\d+\.\d\d", summary.partition("Multiply-adds")[2]):
        assert ratio in claims
    readme = (ROOT / "README.md").read_text()
    assert f"[{figures[0]} networks]" in readme
