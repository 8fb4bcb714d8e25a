"""Where code stands, without the folders of the machine that it stands on.

What is saved or reported goes to other people. So a file of code is named relative to the working
directory, or to the package that it belongs to; one that is in neither by its name alone.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from pathlib import PurePath, PureWindowsPath

import torch
from torch import fx

from rmfx.errors import first_line

_STACK = "stack_trace"
_FRAME = re.compile(r'File "([^"]+)"')
_INSTALLED = ("site-packages", "dist-packages")
_FILES = (torch.__file__, os.path.dirname(__file__))
_OWN = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in _FILES)
_PYTHON = os.path.dirname(os.path.abspath(os.__file__)) + os.sep


def short_path(path: str) -> str:
    """A file of code as reports name it.

    >>> short_path("/home/somebody/env/lib/site-packages/nets/block.py")
    'nets/block.py'
    >>> short_path("/home/somebody/block.py"), short_path("<stdin>")
    ('block.py', '<stdin>')
    """
    return _shortened(path, working_folder(), tuple(sys.path))


def working_folder() -> str:
    """The working directory, "" where it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


@functools.lru_cache(maxsize=1024)  # every node of a trace asks
def _shortened(path: str, here: str, searched: tuple[str, ...]) -> str:
    file = PureWindowsPath(path) if PureWindowsPath(path).is_absolute() else PurePath(path)
    if not file.is_absolute():
        return path
    for i in reversed(range(len(file.parts) - 1)):
        if file.parts[i] in _INSTALLED:
            return PurePath(*file.parts[i + 1 :]).as_posix()
    innermost = sorted(map(PurePath, searched), key=lambda folder: -len(folder.parts))
    for folder in (PurePath(here), *innermost):
        # Everything is relative to the root, which says nothing of a package.
        if len(folder.parts) > 1 and folder.is_absolute() and file.is_relative_to(folder):
            return file.relative_to(folder).as_posix()
    return file.name


def line_of_caller(error: BaseException) -> str:
    """The last line on the way to an error that is neither torch's, Python's nor rmfx's.

    Returns:
        For example "nets/block.py, line 7"; empty where there is none.
    """
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    own = [at for at in frames if _is_of_caller(at[0])]
    return f"{short_path(own[-1][0])}, line {own[-1][1]}" if own else ""


def at_line(error: BaseException) -> str:
    """The end of a sentence on where an error arose, for example ", at nets/block.py, line 7"."""
    where = line_of_caller(error)
    return where and f", at {where}"


def described(error: BaseException) -> str:
    """An error of the caller's own code: its class, its first line, and where it arose."""
    return f"{type(error).__name__}: {first_line(error)}{at_line(error)}"


def _is_of_caller(path: str) -> bool:
    if path.startswith(("<", *_OWN)):
        return False
    return not path.startswith(_PYTHON) or any(name in path for name in _INSTALLED)


def shorten_stacks(gm: fx.GraphModule) -> None:
    """Name files as reports do in what a graph, and those inside, tell of where nodes come from."""
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if isinstance(stack := node.meta.get(_STACK), str):
                node.meta[_STACK] = _FRAME.sub(_short_frame, stack)


def _short_frame(frame: re.Match[str]) -> str:
    return f'File "{short_path(frame[1])}"'
