"""Generated code that looks up modules once.

torch.fx writes `self.stages.0.blocks.1.conv(x)` for a call. Each dot is a search of `nn.Module` in
Python, up to a microsecond, and a deep network of small layers spends a tenth of its time there.
Here modules on the way to several others are looked up once and kept in local variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

Path = tuple[str, ...]

# What a line assigns, if it begins with an attribute of the module: self.a, getattr(self.a, "0").b
_LOOKUP = re.compile(
    r"^(?P<to>\w+(?: : [^=]+)? = )(?P<path>(?:getattr\()*self(?:\.\w+|, \"[^\"]*\"\))+)"
)
_STEP = re.compile(r"\.(\w+)|, \"([^\"]*)\"\)")


def share_lookups(body: Sequence[str]) -> list[str]:
    """The body of a generated function, with the modules that it passes several times first.

    Args:
        body: pieces of source code, as torch.fx hands them to a transformer of its code.
    """
    paths = dict.fromkeys(_path(found) for line in body if (found := _LOOKUP.match(line)))
    taken = {word for line in body for word in re.findall(r"(?<![.\w])\w+", line)}
    names: dict[Path, str] = {}
    first = []
    for path in _forks(paths):
        name = re.sub(r"\W|^(?=\d)", "_", "_".join(path))
        while name in taken:
            name += "_"
        first.append(f"{name} = {_written(path, names)}\n")
        names[path] = name
        taken.add(name)
    return [*first, *(_LOOKUP.sub(lambda found: _rewritten(found, names), line) for line in body)]


def _path(found: re.Match[str]) -> Path:
    return tuple(name or other for name, other in _STEP.findall(found["path"]))


def _forks(paths: Iterable[Path]) -> Iterator[Path]:
    """Where paths part, outer ones first."""
    onward: dict[Path, set[str]] = {}
    for path in paths:
        for i in range(1, len(path)):
            onward.setdefault(path[:i], set()).add(path[i])
    yield from (path for path, steps in onward.items() if len(steps) > 1)


def _rewritten(found: re.Match[str], names: dict[Path, str]) -> str:
    return found["to"] + _written(_path(found), names)


def _written(path: Path, names: dict[Path, str]) -> str:
    """How a module is looked up from the nearest one that has a name."""
    known = next((i for i in range(len(path), 0, -1) if path[:i] in names), 0)
    text = names[path[:known]] if known else "self"
    for name in path[known:]:
        text = f"{text}.{name}" if name.isidentifier() else f'getattr({text}, "{name}")'
    return text
