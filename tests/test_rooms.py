"""Rooms import downwards: no file imports one of a room that stands beside or above its own."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a room may import those on earlier lines, and its own files.
STOREYS = (
    ("choices", "compatibility", "errors", "interval", "table", "verified", "words"),
    ("models", "modules", "options", "report"),
    ("algebra", "files"),
    ("ir", "timing"),
    ("analysis", "frontend", "training"),
    ("data", "oracle", "ordinary"),
    ("plain", "testing"),
    ("attribution", "pruning"),
    ("rules",),
    ("removal",),
    ("cost",),
    ("passes",),
    ("backend", "conversion", "fuzz"),
    ("demo", "latency"),
    ("cli",),
    ("__init__", "__main__"),
)

NAMES_ON_DEMAND = "rmfx"  # the public names; each is imported when it is first asked for


def modules() -> dict[str, Path]:
    """All modules by their dotted names."""
    found = {}
    for folder, prefix in ((ROOT / "rmfx", "rmfx"), (ROOT / "passes", "rmfx.passes")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    """The folder or file below rmfx/ that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """The modules of this project that one imports, and whether it does so as it is loaded."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(parent if node.level else []), *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in names]
        else:
            continue
        for name in names:
            if name in MODULES and name != module:
                yield name, node in tree.body


def diagram() -> str:
    """The rooms from the roof down, each with the first line of its docstring."""
    lines = []
    for storey in reversed(STOREYS):
        for room in storey:
            name = "rmfx" if room == "__init__" else f"rmfx.{room}"
            text = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
            lines.append(f"{room:<12}{text.splitlines()[0]}".rstrip())
        lines.append("")
    return "\n".join(lines)


def test_the_diagram_is_that_of_the_code() -> None:
    assert f"```text\n{diagram()}```\n" in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_room_has_its_storey() -> None:
    assert sorted(sum(STOREYS, ())) == sorted({room_of(module) for module in MODULES})


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_downwards(module: str) -> None:
    storeys = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}
    own = room_of(module)
    upwards = [
        name
        for name, _ in imports(module)
        if room_of(name) != own and storeys[room_of(name)] >= storeys[own]
    ]
    assert not upwards


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) == "passes"])
def test_passes_are_leaves(module: str) -> None:
    assert not [name for name, _ in imports(module) if name.startswith("rmfx.passes.")]


def test_no_file_imports_itself_through_others() -> None:
    graph = {module: {name for name, _ in imports(module)} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_function_imports_a_file_of_this_project(module: str) -> None:
    late = {name for name, at_once in imports(module) if not at_once}
    assert module == NAMES_ON_DEMAND or not late
