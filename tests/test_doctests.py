"""Every example in a docstring of rmfx and rmfx.passes runs.

pytest's own `--doctest-modules` would import the folder passes/ under a second name.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import rmfx.passes


def module_names() -> Iterator[str]:
    for package in (rmfx, rmfx.passes):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield found.name


@pytest.mark.parametrize("name", ["rmfx", "rmfx.passes", *sorted(set(module_names()))])
def test_examples_run(name: str) -> None:
    if name == "rmfx.attribution":
        pytest.importorskip("captum", reason="pip install 'rmfx[attribution]'")
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0
