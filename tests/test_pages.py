"""The pages for people who work on rmfx run as they stand, and print what they say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", ["one_block.md", "writing_a_pass.md"])
def test_the_page_runs_and_prints_what_it_says(page: str) -> None:
    names: dict[str, Any] = {"__name__": page}
    printed = expected = ""
    for kind, text in BLOCK.findall((DOCS / page).read_text()):
        if kind == "text":
            expected += text
            assert printed == expected
            continue
        assert printed == expected  # what a block prints stands behind it
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(text, page, "exec"), names)
        printed += output.getvalue()
    assert printed == expected != ""
