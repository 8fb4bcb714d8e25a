"""Which sizes of its inputs an exported program leaves free."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

_VALUE = "val"  # where torch.export keeps what a node gives, in tensors without numbers
LETTERS = "nmkpqrstuvw"  # for sizes that cannot just be called any
_SIZE = re.compile(r"\b[a-z]\w*\b")
_TOLD_BY_SHAPES = re.compile(r"L\S+ == \S+|L\S+ (<=|>=) \d+")
_LEAST = 2  # what torch notes as the lowest size where it means any
Size = int | torch.SymInt


def shapes_of(program: ExportedProgram) -> list[tuple[Size, ...]]:
    """The shapes of the tensors that a program takes, free sizes as symbols."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    values = [nodes[name].meta.get(_VALUE) for name in program.graph_signature.user_inputs]
    return [tuple(value.shape) for value in values if isinstance(value, Tensor)]


def free_sizes(program: ExportedProgram) -> list[list[int]]:
    """The dimensions of each input in which a program takes several sizes."""
    return [[d for d, n in enumerate(x) if not isinstance(n, int)] for x in shapes_of(program)]


def left_to_torch(
    inputs: Sequence[Tensor], free: Sequence[Sequence[int]]
) -> tuple[dict[int, object], ...]:
    """What lets `torch.export` find out which of some sizes may be free; it takes 1 for fixed."""
    return tuple(
        {d: Dim.AUTO for d in dims if x.shape[d] > 1} for x, dims in zip(inputs, free, strict=True)
    )


def free_batch(program: ExportedProgram) -> str | None:
    """The symbol of the batch, where the first size of all inputs is one that is free."""
    first = {str(x[0]) if x and not isinstance(x[0], int) else None for x in shapes_of(program)}
    symbol = first.pop() if len(first) == 1 else None
    return symbol if symbol is not None and symbol.isidentifier() else None


def takes_any_batch(program: ExportedProgram) -> bool:
    """Whether the batch may be any number."""
    symbol = free_batch(program)
    limited = any(".size()[0]" in guard for guard in _guards(program))
    return symbol is not None and symbol not in _limits(program) and not limited


def described_shapes(program: ExportedProgram) -> str:
    """The shapes that a program takes, in words.

    `(any, 3, 16, 16)`, or `(n, 3, m, m) with n <= 64`: a letter stands for a size that is limited,
    or is there more than once.
    """
    shapes, limits = shapes_of(program), _limits(program)
    counts = Counter(name for x in shapes for n in x for name in _symbols(n))
    plain = {name for name, count in counts.items() if count == 1 and name not in limits}
    named = [name for name in counts if name not in plain or _inside(name, shapes)]
    letters = dict(zip(named, LETTERS, strict=False))

    def told(n: Size) -> str:
        if str(n) in plain and str(n) not in letters:
            return "any"
        return _SIZE.sub(lambda match: letters.get(match[0], match[0]), str(n))

    text = " and ".join(f"({', '.join(map(told, x))}{',' * (len(x) == 1)})" for x in shapes)
    bounds = [_bounds(letters.get(s, s), *limits[s]) for s in counts if s in limits]
    if _guards(program):
        bounds.append("conditions that it checks itself")
    return f"{text} with {' and '.join(bounds)}" if bounds else text


def _symbols(n: Size) -> list[str]:
    """The free sizes of which one is made."""
    return [] if isinstance(n, int) else _SIZE.findall(str(n))


def _inside(name: str, shapes: Sequence[Sequence[Size]]) -> bool:
    """Whether a free size is part of another, as n is of 2*n."""
    return any(name in _symbols(n) and str(n) != name for x in shapes for n in x)


def _limits(program: ExportedProgram) -> dict[str, tuple[float, float]]:
    """The lowest and highest value of the sizes that may not have any."""
    found = {}
    for symbol, limits in program.range_constraints.items():
        low, high = float(limits.lower), float(limits.upper)
        bounds = (low if low > _LEAST else 0, high if high < 2**62 else math.inf)
        if bounds != (0, math.inf):
            found[str(symbol)] = bounds
    return found


def _bounds(name: str, low: float, high: float) -> str:
    lowest = f"{low:g} <= " if low else ""
    highest = f" <= {high:g}" if high < math.inf else ""
    return f"{lowest}{name}{highest}"


def _guards(program: ExportedProgram) -> list[str]:
    """The conditions of a program that shapes and limits do not tell."""
    guards = getattr(program, "_guards_code", None) or ()
    return [guard for guard in guards if not _TOLD_BY_SHAPES.fullmatch(guard)]
