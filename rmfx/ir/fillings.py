"""Tensors that hold one number everywhere: zeros, ones and the like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .kinds import aten, overloads
from .notes import gives_number, kind_read, why_frozen
from .numbers import shape_read

COPIES = (torch.clone, aten.clone.default, aten.detach.default, "clone", "detach", "contiguous")


@dataclass(frozen=True)
class Filling:
    """A tensor of one number.

    Attributes:
        number: what it holds.
        like: the value whose sizes it has, None where they are given one by one.
        sizes: these; empty otherwise.
    """

    number: float
    like: fx.Node | None
    sizes: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Kind:
    """A way to make such a tensor.

    Attributes:
        number: what it holds, None where the last argument tells.
        place: of the argument that tells the sizes.
        is_like: whether that is a value of such sizes.
    """

    number: float | None
    place: int
    is_like: bool


def _kinds() -> dict[Any, _Kind]:
    found: dict[Any, _Kind] = {}
    for name, number in (("zeros", 0.0), ("ones", 1.0), ("full", None)):
        of_size, like, new = name, f"{name}_like", f"new_{name}"
        for target in (getattr(torch, of_size), *overloads(of_size)):
            found[target] = _Kind(number, 0, is_like=False)
        for target in (getattr(torch, like), *overloads(like)):
            found[target] = _Kind(number, 0, is_like=True)
        for target in (new, *overloads(new)):
            found[target] = _Kind(number, 1, is_like=False)
    return found


KINDS = _kinds()
NUMBERS = (torch.tensor, torch.scalar_tensor, *overloads("scalar_tensor"))
NAMES = {"size": "size", "fill_value": "number", "input": "input", "self": "input"}


def filling(node: fx.Node) -> Filling | None:
    """What a node gives if that is one number everywhere, for finite inputs; None of others."""
    node = original(node)
    found = None if why_frozen(node) else _asked_for(node)
    number = None if found is None else _in_type(found.number, node)
    return None if found is None or number is None else replace(found, number=number)


def _in_type(number: float, node: fx.Node) -> float | None:
    """The number that a tensor holds which was made of one, None where that is not known.

    That is 1 of 3 as a truth value, and another 0.1 in float32 than in float64.
    """
    kind = kind_read(node)
    if kind is None:
        return number if number in (0, 1) else None  # which every type holds
    held = torch.tensor(number, dtype=kind[0], device="cpu").item()
    return float(held) if isinstance(held, (bool, float)) else held if type(held) is int else None


def _asked_for(node: fx.Node) -> Filling | None:
    """What a node is to give, as its arguments say."""
    if node.target in NUMBERS and node.args and type(node.args[0]) in (int, float):
        return Filling(node.args[0], None)  # type: ignore[arg-type]
    kind = KINDS.get(node.target)
    if kind is None:
        return None
    given: list[Any] = [*node.args]
    by_name = {NAMES[k]: v for k, v in node.kwargs.items() if k in NAMES}
    if not given and "input" in by_name:
        given.append(by_name["input"])
    if len(given) == kind.place and "size" in by_name:
        given.append(by_name["size"])
    number: Any = kind.number
    if number is None:
        if "number" not in by_name and len(given) != kind.place + 2:
            return None
        number = by_name["number"] if "number" in by_name else given.pop()
    if type(number) not in (int, float) or len(given) <= kind.place:
        return None
    return _of(number, given[kind.place :], is_like=kind.is_like)


def original(node: fx.Node) -> fx.Node:
    """What a node is a copy of, itself if it is none."""
    while node.target in COPIES and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _of(number: float, given: list[Any], *, is_like: bool) -> Filling | None:
    sizes: Any = given[0] if len(given) == 1 else given
    if is_like:
        return Filling(number, sizes, ()) if isinstance(sizes, fx.Node) else None
    if isinstance(sizes, fx.Node):
        like = shape_read(sizes)  # else it is a number, or a tuple that was computed
        return None if like is None else Filling(number, like)
    sizes = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes,)
    numbers = all(type(n) is int or (isinstance(n, fx.Node) and gives_number(n)) for n in sizes)
    return Filling(number, None, sizes) if numbers else None
