"""Docstrings of rmfx as Sphinx wants them: they are written for people who read the code."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from typing import Any, get_type_hints

from sphinx.util.typing import stringify_annotation

from . import api

_CODE = re.compile(r"`([^`]+)`")
_SECTION = re.compile(r"(Args|Attributes|Example|Examples|Raises|Returns|Yields):")
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")
_INITIAL = re.compile(r"(^\s*|: )([A-Za-z0-9])\.(?=\s|$)")


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's way to load an extension."""
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon, which has 500
    app.connect("autodoc-process-docstring", split_lines)
    resolve_names()
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def to_rst(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event for a docstring, which is changed in place before napoleon reads it."""
    lines[:] = as_rst(lines)
    if inspect.isclass(value):
        lines[:] = with_types(lines, types_of(value))


def split_lines(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """After napoleon, which leaves several lines in one: types go in by counting lines."""
    lines[:] = "\n".join(lines).split("\n")


def types_of(value: type) -> dict[str, str]:
    """The types of a class's attributes, as Sphinx links them."""
    try:
        hints: dict[str, Any] = get_type_hints(value)
    except NameError:  # a name that is imported for type checkers alone
        return {}
    return {name: stringify_annotation(hint) for name, hint in hints.items()}


def with_types(lines: list[str], types: dict[str, str]) -> list[str]:
    """The lines with the types of attributes, which docstrings do not repeat, one at a time.

    >>> with_types(["Attributes:", "    a, b: numbers,", "        two."], {"a": "int"})
    ['Attributes:', '    a (int): numbers,', '        two.', '    b: numbers,', '        two.']
    """
    made: list[str] = []
    entries: list[list[str]] = []  # of one entry of the section, as often as it has names
    inside = False
    for line in lines:
        entry = _ENTRY.fullmatch(line) if inside else None
        if entry or (line.strip() and not line.startswith(" ")):
            made += [part for lines_of_one in entries for part in lines_of_one]
            entries = []
        if entry:
            for name in entry[1].split(", "):
                shown = f" ({types[name]})" if name in types else ""
                entries.append([f"    {name}{shown}: {entry[2]}"])
        elif entries:
            for lines_of_one in entries:
                lines_of_one.append(line)
        else:
            made.append(line)
        if line.strip() and not line.startswith(" "):
            inside = line == "Attributes:"
    return made + [part for lines_of_one in entries for part in lines_of_one]


def as_rst(lines: list[str]) -> list[str]:
    r"""The lines with what is meant in the words of reStructuredText.

    Code in `single` marks is a link where it is a public name; code that stands indented behind a
    paragraph is a block; |x| is no substitution, and `T.` at a beginning numbers nothing.

    >>> as_rst(["T. of |x| in `act(x)`:", "", "    x = 1", "", "Args:", "    x: `rmfx.report`."])
    ... # doctest: +NORMALIZE_WHITESPACE
    ['T\\. of \\|x\\| in ``act(x)``:', '', '::', '', '    x = 1', '', 'Args:',
     '    x: :py:obj:`rmfx.report <rmfx.report>`.']
    """
    made: list[str] = []
    inside = example = False  # a section; a block of code
    for line in lines:
        flush = bool(line.strip()) and not line.startswith(" ")
        if flush:
            inside, example = _SECTION.fullmatch(line) is not None, False
        elif line.strip() and not inside and not example and made and not made[-1].strip():
            made += ["::", ""]
            example = True
        is_code = example or line.lstrip().startswith((">>>", "..."))
        made.append(line if is_code else _marked(line))
    return made


def _marked(line: str) -> str:
    """A line of prose."""
    parts = _CODE.split(line)  # prose and code in turns
    prose = [_INITIAL.sub(r"\1\2\\.", part.replace("|", "\\|")) for part in parts[::2]]
    code = [_linked(part) for part in parts[1::2]]
    return "".join(a + b for a, b in zip(prose, [*code, ""], strict=True))


def _linked(code: str) -> str:
    name = code.removesuffix("()")
    aim = public_names().get(name)
    return f":py:obj:`{code} <{aim}>`" if aim else f"``{code}``"


def resolve_names() -> None:
    """Give functions that a decorator has made the types which their own module knows by name."""
    for path in public_names().values():
        module, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        if inspect.isfunction(value) and "ForwardRef" in str(value.__annotations__):
            known = vars(importlib.import_module(value.__module__))
            value.__annotations__ = get_type_hints(value, known)
            inspect.unwrap(value).__annotations__ = value.__annotations__


@cache
def public_names() -> dict[str, str]:
    """Where public names stand, by what docstrings call them."""
    found: dict[str, str] = {}
    for module in reversed(api.MODULES):  # of two of one name that of `rmfx` itself is meant
        for name in api.names_of(importlib.import_module(module)):
            found[name] = found[f"{module}.{name}"] = f"{module}.{name}"
    return found
