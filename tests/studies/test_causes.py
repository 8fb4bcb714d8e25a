"""Faults that are put into copies of the sources: their places are still there."""

from __future__ import annotations

from pathlib import Path

import pytest
from _causes import CAUSES
from mutations import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
EDITS = [
    *((cause.name, file, old) for cause in CAUSES for file, old, _ in cause.edits),
    *((mutant.name, mutant.file, mutant.old) for mutant in MUTANTS),
]
TESTS = {test.partition("::")[0] for fault in (*CAUSES, *MUTANTS) for test in fault.tests}


@pytest.mark.parametrize(("name", "file", "old"), EDITS)
def test_what_an_edit_replaces_stands_once(name: str, file: str, old: str) -> None:
    assert (ROOT / file).read_text().count(old) == 1, name


@pytest.mark.parametrize("test", sorted(TESTS))
def test_the_tests_that_are_to_notice_are_there(test: str) -> None:
    assert (ROOT / test).exists()
