"""The keys under which things are noted of nodes have their names in one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import fx

from rmfx.ir import notes

ROOT = Path(__file__).resolve().parents[2]
FILES = [p for f in ("rmfx", "passes") for p in (ROOT / f).rglob("*.py") if p.name != "notes.py"]
KEYS = {value for name, value in vars(notes).items() if name.isupper() and isinstance(value, str)}


def spelled_out(code: str) -> set[object]:
    """The keys that code looks up in some `.meta` by their text."""
    found: set[object] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Subscript):
            holder, keys = node.value, [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            holder, keys = node.func.value, node.args[:1]
        elif isinstance(node, ast.Compare):
            holder, keys = node.comparators[0], [node.left]
        else:
            continue
        if isinstance(holder, ast.Attribute) and holder.attr == "meta":
            found |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return found & KEYS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_spells_out_a_key(path: Path) -> None:
    assert not spelled_out(path.read_text())


@pytest.mark.parametrize(
    "code",
    ["x.meta['shape']", "'frozen' in y.x.meta", "f'{x.meta.get(\"dtype\")}'", "x.meta.pop('val')"],
)
def test_a_key_that_is_spelled_out_is_found(code: str) -> None:
    assert spelled_out(code)


def test_what_is_not_known_any_more_is_not_noted() -> None:
    x = fx.Graph().placeholder("x")
    notes.set_shape(x, (2, None))
    assert (notes.shape_of(x), notes.notes_of(x, *notes.OF_VALUE)) == (
        (2, None),
        {"shape": (2, None)},
    )
    notes.set_shape(x, None)
    assert (notes.shape_of(x, ()), x.meta) == ((), {})
