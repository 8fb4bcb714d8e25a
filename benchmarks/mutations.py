"""The mutation check: breaks the compiler in one place at a time and shows which test notices.

Each mutant is one textual edit to a copy of the sources in a temporary folder; its test files then
run there, each up to its first failure. A mutant that no test notices has survived: exit code 1.
The same code tells of an edit whose text no longer occurs exactly once in its file, and of tests
that fail without any edit. The working tree is never touched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from _common import Limit, parser, show
from _copies import check_copy, copied_sources, edit, first_failure
from tqdm import tqdm


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
        "rmfx/algebra/laws.py",
        "start = (new - own) // step",
        "start = 0",
        ("tests/algebra/test_affine.py", FUZZ),
    ),
    Mutant(
        "merge: the inner layer's bias is lost",
        "rmfx/algebra/products.py",
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
        edit(folder, mutant.file, mutant.old, mutant.new)
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
