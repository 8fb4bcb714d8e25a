"""Puts causes of wrong numbers back, one at a time, and shows what notices them.

Each cause was found by attacking the compiler, and is mended. Here it is put back into a copy of
the sources, as an edit of a few lines, and looked for in three ways:

- `verify`: the network on which it showed is converted as a user would; the verification of the
  verb, or `rmfx.verify` where there was nothing to verify yet, raises;
- a test: one of its test files fails;
- the fuzzer: a random network fails, of at most `--examples`.

Limits: every cause is noticed by at least one of the three, and at least 12 by `verify`. The
samples themselves must pass as long as nothing is put back. Exit code 1 if one does not hold.
`--out` writes the table into a file, too. The working tree is never touched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _causes import CAUSES, Cause
from _common import Limit, parser, show
from _copies import check_copy, copied_sources, edit, first_failure, run_there
from tabulate import tabulate
from tqdm import tqdm

BY_VERIFY = 12
VERIFICATION_FAILED = 3
FUZZ = """
import json, sys
from rmfx.fuzz import fuzz
options = json.loads(sys.argv[1])
report = fuzz("remove_residuals", **options)
print(json.dumps([report.examples, report.failure and report.failure.kind]))
"""

Row = dict[str, Any]


def run_sample(cause: Cause, folder: Path, timeout: float) -> int:
    """The exit code of the network that shows a cause, in a copy of the sources."""
    script = str(folder / "benchmarks" / "_causes.py")
    return run_there(folder, ["-W", "ignore", script, cause.name], timeout).returncode


def fuzz_finds(cause: Cause, folder: Path, examples: int, timeout: float) -> str:
    """After how many random networks the fuzzer fails, "" if it does not."""
    options = json.dumps({"examples": examples, "seed": 1, **cause.fuzz})
    done = run_there(folder, ["-W", "ignore", "-c", FUZZ, options], timeout)
    if done.returncode:
        return f"raises: {done.stderr.strip().splitlines()[-1][:80]}"
    tried, kind = json.loads(done.stdout.strip().splitlines()[-1])
    return f"network {tried}: {kind}" if kind else ""


def row_of(cause: Cause, examples: int, timeout: float) -> Row:
    """What notices one cause."""
    with copied_sources() as folder:
        check_copy(folder)
        for file, old, new in cause.edits:
            edit(folder, file, old, new)
        by_verify = run_sample(cause, folder, timeout) == VERIFICATION_FAILED
        failures = [first_failure(folder, test, timeout) for test in cause.tests]
        found = fuzz_finds(cause, folder, examples, timeout) if examples else "not run"
    test = next((failure for failure in failures if failure), "")
    return {
        "cause": cause.cause,
        "mended in": ", ".join(dict.fromkeys(Path(file).name for file, *_ in cause.edits)),
        "silent": "yes" if cause.silent else "no",
        "verify": "notices" if by_verify else "",
        "test": test,
        "fuzzer": found,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--only", default="", help="causes whose name contains this")
    options_parser.add_argument(
        "--examples", type=int, default=60, help="networks of the fuzzer for each; 0 for none"
    )
    options_parser.add_argument("--timeout", type=float, default=1800, help="seconds per command")
    options_parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = options_parser.parse_args(arguments)
    chosen = [cause for cause in CAUSES if options.only in cause.name]
    with copied_sources() as folder:
        broken = [c.name for c in chosen if run_sample(c, folder, options.timeout) == 3]
    if broken:
        print(f"these fail though nothing is put back: {', '.join(broken)}", file=sys.stderr)
        return 1
    rows = [
        row_of(cause, options.examples, options.timeout)
        for cause in tqdm(chosen, desc="causes", leave=False)
    ]
    if options.out:
        table = tabulate(rows, headers="keys", tablefmt="github")
        options.out.write_text(f"{HEAD}\n{table}\n", encoding="utf-8")
    unnoticed = [row for row in rows if not (row["verify"] or row["test"] or _finds(row))]
    missed = sum(not row["verify"] for row in rows)
    limits = [
        Limit("causes that nothing notices", len(unnoticed), 0),
        Limit("causes that verify does not notice", missed, max(0, len(CAUSES) - BY_VERIFY)),
    ]
    return show(rows, limits, as_json=options.json)


HEAD = """# Causes of wrong numbers, put back one at a time

Made by `python benchmarks/causes.py --out benchmarks/results/causes.md`. `mended in`: the files
whose mechanism is put out of order. `silent`: whether the cause gave wrong numbers without an error
before it was mended.
"""


def _finds(row: Row) -> bool:
    return str(row["fuzzer"]).startswith("network")


if __name__ == "__main__":
    sys.exit(main())
