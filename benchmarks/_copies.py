"""A copy of the sources in which something is broken, and what is run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("rmfx", "passes", "tests", "benchmarks", "pyproject.toml", "setup.cfg", "README.md")


@contextmanager
def copied_sources() -> Iterator[Path]:
    """A temporary folder from which rmfx and rmfx.passes import; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rmfx-mutation-") as name:
        folder = Path(name)
        for entry in COPIED:
            source = ROOT / entry
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
                shutil.copytree(source, folder / entry, ignore=ignore)
            elif source.exists():
                shutil.copy(source, folder / entry)
        # setup.cfg maps the folder passes/ to rmfx.passes; here a link does.
        (folder / "rmfx" / "passes").symlink_to("../passes")
        yield folder


def edit(folder: Path, file: str, old: str, new: str) -> None:
    """Puts a text in place of another in a file of the copy.

    Raises:
        ValueError: the old text does not occur exactly once.
    """
    path = folder / file
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} places like: {old}")
    path.write_text(text.replace(old, new), encoding="utf-8")


def run_there(
    folder: Path, arguments: Sequence[str], timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments in the copy, which is what it imports.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check_copy(folder: Path) -> None:
    """Makes sure the copy is what a test imports, not an installed rmfx.

    Raises:
        ValueError: it is not.
    """
    done = run_there(folder, ["-c", "import rmfx.passes; print(rmfx.passes.__file__)"])
    if not Path(done.stdout.strip()).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the copy is not what gets imported: {done.stdout}{done.stderr}")


def first_failure(folder: Path, test: str, timeout: float) -> str | None:
    """Runs the file `test` in `folder`; the first test that fails, or None if all pass.

    Raises:
        ValueError: pytest could not run the file, or took longer than `timeout` seconds.
    """
    options = ["-x", "-q", "-rfE", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    try:
        done = run_there(folder, ["-m", "pytest", *options, test], timeout)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{test} took more than {timeout:g} s") from error
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not found:
        raise ValueError(f"pytest could not run {test}:\n{done.stdout[-2000:]}{done.stderr}")
    return found.group(1)
