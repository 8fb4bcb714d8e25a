"""Completion of the command in shells, as scripts made from its parser by shtab."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from rmfx.errors import install_command

SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("FILE", "OUT", "MODEL")  # how metavars of files begin; a model may be one


class PrintCompletion(argparse.Action):
    """Prints the script of a shell and ends the command, as `--version` does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            shtab = importlib.import_module("shtab")
        except ModuleNotFoundError:
            parser.exit(1, f"rmfx: completion needs shtab: {install_command(['shtab'])}\n")
        _mark_files(parser, shtab.FILE)
        sys.stdout.write(shtab.complete(parser, shell=values) + "\n")
        parser.exit()


def _mark_files(parser: argparse.ArgumentParser, mark: object) -> None:
    """Tell shtab which arguments are files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_files(command, mark)
        elif str(action.metavar).startswith(_FILES):
            vars(action)["complete"] = mark
