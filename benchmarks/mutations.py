"""The mutation check: breaks the compiler in one place at a time and shows which test notices.

Each mutant is one textual edit to a copy of the sources in a temporary folder; its test files then
run there, each up to its first failure. A mutant that no test notices has survived: exit code 1.
The same code tells of an edit whose text no longer occurs exactly once in its file, and of tests
that fail without any edit. The working tree is never touched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _common import Limit, parser, show
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("rmfx", "passes", "tests", "benchmarks", "pyproject.toml", "setup.cfg", "README.md")


@dataclass(frozen=True)
class Mutant:
    """One deliberate mistake.

    Attributes:
        name: what is broken.
        file: source file, relative to the repository.
        old: text that occurs exactly once in the file.
        new: what replaces it.
        tests: test files of which at least one should notice, relative to the repository.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FUZZ = "tests/testing/test_random_networks.py"
MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "Dirac tap: always the kernel's first",
        "rmfx/algebra/affine.py",
        "torch.tensor([(t * d - own + new) // step for t in range(k)]",
        "torch.tensor([(t * d) // step for t in range(k)]",
        ("tests/algebra/test_affine.py", FUZZ),
    ),
    Mutant(
        "merge: the inner layer's bias is lost",
        "rmfx/algebra/laws.py",
        "bias = bias + sum_of_taps(outer, inner.bias)",
        "bias = bias + 0 * sum_of_taps(outer, inner.bias)",
        ("tests/algebra/test_affine.py", FUZZ),
    ),
    Mutant(
        "carry's sign test: every range is taken to pass the activation unchanged",
        "rmfx/algebra/activation.py",
        "return begin <= low and high <= end",
        "return True",
        ("tests/algebra/test_activation.py", FUZZ),
    ),
    Mutant(
        "range analysis: negative weights on x >= 0 are forgotten",
        "rmfx/analysis/ranges.py",
        "least = torch.where(weight.amin(1) < 0, -INF, bias)",
        "least = bias",
        ("tests/analysis/test_ranges.py",),
    ),
    Mutant(
        "range analysis: zero padding is forgotten",
        "rmfx/analysis/ranges.py",
        "    if layer.pads:\n",
        "    if layer is None:\n",
        ("tests/analysis/test_ranges.py",),
    ),
)


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


def apply(mutant: Mutant, folder: Path) -> None:
    """Makes the edit in `folder`.

    Raises:
        ValueError: the old text does not occur exactly once.
    """
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.old)} places like: {mutant.old}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def first_failure(folder: Path, test: str, timeout: float) -> str | None:
    """Runs the file `test` in `folder`; the first test that fails, or None if all pass.

    Raises:
        ValueError: pytest could not run the file, or took longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += ["--hypothesis-seed=0", test]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{test} took more than {timeout:g} s") from error
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not found:
        raise ValueError(f"pytest could not run {test}:\n{done.stdout[-2000:]}{done.stderr}")
    return found.group(1)


def check_copy(folder: Path) -> None:
    """Makes sure the copy is what a test imports, not an installed rmfx.

    Raises:
        ValueError: it is not.
    """
    command = [sys.executable, "-c", "import rmfx.passes; print(rmfx.passes.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if not Path(done.stdout.strip()).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the copy is not what gets imported: {done.stdout}{done.stderr}")


def check_unbroken(mutants: Sequence[Mutant], timeout: float) -> None:
    """Makes sure that all tests pass as long as nothing is broken.

    Raises:
        ValueError: one does not.
    """
    with copied_sources() as folder:
        check_copy(folder)
        for test in sorted({test for mutant in mutants for test in mutant.tests}):
            failure = first_failure(folder, test, timeout)
            if failure:
                raise ValueError(f"{failure} fails although nothing is broken")


def noticed_by(mutant: Mutant, timeout: float) -> list[str]:
    """The first failing test of each file that notices the mutant."""
    with copied_sources() as folder:
        apply(mutant, folder)
        failures = [first_failure(folder, test, timeout) for test in mutant.tests]
    return [failure for failure in failures if failure]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a mutant survives or the check itself cannot run."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--only", default="", help="mutants whose name contains this")
    options_parser.add_argument("--timeout", type=float, default=600, help="seconds per test file")
    options = options_parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    rows, survivors = [], 0
    try:
        check_unbroken(chosen, options.timeout)
        for mutant in tqdm(chosen, desc="mutants", leave=False):
            found = noticed_by(mutant, options.timeout)
            survivors += not found
            text = "\n".join(found) or "NOTHING"
            rows.append({"broken": mutant.name, "file": mutant.file, "noticed by": text})
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return show(rows, [Limit("survivors", survivors, 0)], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
