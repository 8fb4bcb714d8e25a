"""Pages about the public names, written for autodoc: what a page holds is asked of the code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from .files import write_page

# Public modules, and the names of those that do not list them themselves.
MODULES: dict[str, tuple[str, ...]] = {
    "rmfx": (),
    "rmfx.cost": (),
    "rmfx.testing": (),
    "rmfx.training": (
        *("Distillation", "Slimming", "freeze_carries", "gradual_targets", "thaw_carries"),
    ),
    "rmfx.fuzz": (),
    "rmfx.models": (),
    "rmfx.attribution": ("LRP",),
}
# What public functions raise or give back besides, which nobody imports.
PARTS: dict[str, tuple[str, ...]] = {
    "rmfx": (
        "rmfx.report.HeldReport",
        "rmfx.report.Timing",
        "rmfx.passes.layer.LayerRow",
        "rmfx.passes.pruning.FamilyReport",
        "rmfx.passes.reserve.ReserveRow",
        "rmfx.passes.sites.SiteChoice",
        "rmfx.errors.Refusal",
        "rmfx.files.saving.SaveError",
        "rmfx.timing.speed.LatencyError",
    ),
    "rmfx.fuzz": ("rmfx.testing.case.Case", "rmfx.testing.compare.NoNumbersError"),
}
INDEX = """\
API
===

Public names, from their docstrings. What stands in one line or two each is in :doc:`/functions`.

.. toctree::
   :maxdepth: 1

"""
TITLES = ("Functions", "Classes", "Errors", "Values")


def write(made: Path) -> None:
    """Write a page for each module, and an index."""
    for name in MODULES:
        write_page(made / "api" / f"{name}.rst", page(name))
    write_page(made / "api" / "index.rst", INDEX + "".join(f"   {name}\n" for name in MODULES))


def names_of(module: ModuleType) -> tuple[str, ...]:
    """Its public names; of `rmfx` without modules, which have pages of their own."""
    names = MODULES[module.__name__] or tuple(module.__all__)
    return tuple(name for name in names if not inspect.ismodule(getattr(module, name)))


def page(name: str) -> str:
    """A page in reStructuredText, whose directives autodoc follows."""
    parts = [f"{name}\n{'=' * len(name)}\n"]
    module = importlib.import_module(name)
    parts.append(f".. automodule:: {name}\n")
    kinds: dict[str, list[str]] = {title: [] for title in TITLES}
    for public in names_of(module):
        kinds[_kind(getattr(module, public))].append(public)
    for title in TITLES:
        if kinds[title]:
            parts += [f"{title}\n{'-' * len(title)}\n"]
            paths = [f"{name}.{public}" for public in kinds[title]]
            parts += [line for path in paths for line in _directive(path, title)]
    if name in PARTS:
        parts.append("What comes with them\n--------------------\n")
        parts += [line for path in PARTS[name] for line in _directive(path, _kind(_found(path)))]
    return "\n".join(parts)


def _kind(value: Any) -> str:
    if inspect.isclass(value):
        return "Errors" if issubclass(value, BaseException) else "Classes"
    return "Functions" if callable(value) else "Values"


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _directive(path: str, title: str) -> Iterator[str]:
    kind = {"Functions": "function", "Classes": "class", "Errors": "exception", "Values": "data"}
    yield f".. auto{kind[title]}:: {path}"
    if title == "Classes":
        yield "   :members:"
    yield ""
