"""Pages of the repository that stand outside docs/: copied, with links that fit the site.

A page of docs/ links to them as a code host wants it, by their path in the repository. On the site
they stand in docs/made/, and links are rewritten as a page is read. Code of a page is left alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .files import DOCS, RESULTS, ROOT, write_page

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MADE = DOCS / "made"
# Pages that are made of something else than Markdown; a code host leads to what they are made of.
SHOWN = {
    ROOT / "rmfx" / "cli" / "arguments.py": MADE / "command_line.md",
    ROOT / "rmfx" / "__init__.py": MADE / "api" / "rmfx.rst",
    RESULTS / "zoo.json": MADE / "gallery.md",
}
RESULTS_INTRO = """\
# Results

The tables that benchmarks write, as they stand in the repository.
[Benchmarks](../benchmarks.md) says how each is made.
"""
_LINK = re.compile(r"(!?\[[^\]\n]*(?:\n[^\]\n]*)?\]\()([^()\s]+)(\))")
_FENCE = re.compile(r"(^```.*?^```[ \t]*$)", re.M | re.S)


def copies() -> dict[Path, Path]:
    """Every page that is copied, with the place of the copy."""
    found = {page: MADE / "results" / page.name for page in sorted(RESULTS.glob("*.md"))}
    found[ROOT / "benchmarks" / "README.md"] = MADE / "benchmarks.md"
    found[ROOT / "CONTRIBUTING.md"] = MADE / "contributing.md"
    found[ROOT / "CHANGELOG.md"] = MADE / "changelog.md"
    return found


def write(made: Path) -> None:
    """Write all copies, and a page that lists results; plots are read where they are."""
    for page, copy in copies().items():
        write_page(made / copy.relative_to(MADE), relinked(page.read_text(), page, copy))
    names = "\n".join(page.stem for page in sorted(RESULTS.glob("*.md")))
    toctree = f"```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    write_page(made / "results" / "index.md", f"{RESULTS_INTRO}\n{toctree}")


def relinked(text: str, page: Path, copy: Path | None = None) -> str:
    """The text of a page with links that hold where the copy stands, and lead to other copies."""
    places = copies() | SHOWN
    folder = (copy or page).parent

    def move(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        aim = Path(os.path.normpath(page.parent / path))
        aim = places.get(aim, aim)
        return f"{before}{os.path.relpath(aim, folder)}{mark}{anchor}{after}"

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(move, part) for part in parts)


def follow(app: Sphinx, name: str, content: list[str]) -> None:
    """Sphinx's event for a page that was read."""
    page = DOCS / f"{name}.md"
    if not page.is_relative_to(MADE) and page.is_file():
        content[0] = relinked(content[0], page)
