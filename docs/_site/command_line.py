"""The page about the command, from its own parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmfx.cli.arguments import make_parser

from .files import write_page

INTRO = """\
# The command line

Made from the command's own parser: `rmfx COMMAND --help` prints the same.
[Convert a network](../convert.md) and the other tasks show commands at work.

Exit codes: 0 done, 1 not possible (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""


def write(made: Path) -> None:
    """Write the page."""
    write_page(made / "command_line.md", page())


def page() -> str:
    """The page in Markdown."""
    parser = make_parser()
    parts = [INTRO, f"```text\n{_usage(parser)}```\n", _prose(parser.description)]
    parts += [_prose(parser.epilog), *_options(parser)]
    commands = _subcommands(parser)
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    parts.append("| command | what it does |\n|---|---|")
    parts += [f"| [`rmfx {name}`](#rmfx-{name}) | {_cell(helps[name])} |" for name in helps]
    parts.append("")
    for name in helps:
        command = commands.choices[name]
        parts += [
            f"## rmfx {name}\n",
            _prose(command.description or f"{helps[name].capitalize()}."),
        ]
        parts += [f"```text\n{_usage(command)}```\n", *_options(command)]
        if command.epilog and "\n" in command.epilog:  # laid out by hand
            parts.append(f"```text\n{command.epilog.strip()}\n```\n")
        elif command.epilog:
            parts.append(_prose(command.epilog))
    return "\n".join(parts).rstrip() + "\n"


def _subcommands(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[Any]:
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return found


def _usage(parser: argparse.ArgumentParser) -> str:
    """The usage, as wide as code on the page is, whatever the terminal is."""
    kept = parser.formatter_class
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=76)
    try:
        return parser.format_usage()
    finally:
        parser.formatter_class = kept


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A list of definitions: positional arguments first, then options as they are added."""
    shown = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    for action in sorted(shown, key=lambda a: bool(a.option_strings)):
        takes = _metavar(action)
        names = [f"`{name}{' ' if takes else ''}{takes}`" for name in action.option_strings]
        yield f"{', '.join(names) or f'`{takes}`'}"
        yield f": {_help(parser, action)}\n"


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    if action.metavar is not None:
        return action.metavar + (" ..." if action.nargs == "+" else "")
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    if action.required and action.option_strings:
        text += " (required)"
    return _prose(text).strip()


def _prose(text: str | None) -> str:
    """Plain text as Markdown: nothing of it is markup."""
    safe = (text or "").replace("\\", "\\\\")
    for mark in "*_`[]<>":
        safe = safe.replace(mark, f"\\{mark}")
    return safe + "\n"


def _cell(text: str) -> str:
    return _prose(text).strip().replace("|", "\\|")
