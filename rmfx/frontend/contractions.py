"""Products of tensors, however they are written, as sums over named dimensions.

    x @ W    mm    bmm    mv    dot    inner    tensordot    einsum    bilinear    multi_dot
    addmm    baddbmm    addmv        β·b + α·(x @ W)

Each is the sum of products over the dimensions that the result has not, as `einsum` writes it. Here
every call becomes that: operands with a label for each dimension, and the labels of the result.
Dimensions before those that a call names are counted from the last one, as they meet by
broadcasting. Functions, methods and operators of a name are one; what a row needs to know of an
operand is its number of dimensions alone.
"""

from __future__ import annotations

import operator
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rmfx.ir.kinds import aten, overloads

from .calls import arguments_of

Labels = tuple[str, ...]
LETTERS = string.ascii_uppercase + string.ascii_lowercase
SUMMED = "summed"  # the label of a dimension that has one size in all operands
Rank = Callable[[fx.Node], int]


@dataclass(frozen=True)
class Contraction:
    """A sum of products of tensors over the dimensions that the result has not.

    Attributes:
        operands: the tensors, with a label for each dimension.
        result: the labels of the result's dimensions.
        added: what is added to the product, if anything.
        alpha, beta: factors of the product and of what is added.
        even: whether dimensions of one label have one size, so that none is spread out.
    """

    operands: tuple[tuple[fx.Node, Labels], ...]
    result: Labels
    added: Any = None
    alpha: float = 1
    beta: float = 1
    even: bool = False


Reader = Callable[[fx.Node, Rank], Contraction | None]


def leading(count: int) -> Labels:
    """Labels of dimensions that are counted from the last one, as they meet by broadcasting."""
    return tuple(f"leading {place}" for place in range(count, 0, -1))


# ---- the calls ----------------------------------------------------------------------------------
def _matmul(a: fx.Node, b: fx.Node, ranks: tuple[int, int], **options: Any) -> Contraction:
    more = [leading(rank - 2) for rank in ranks]
    rows, columns = ("row",)[: ranks[0] - 1], ("column",)[: ranks[1] - 1]
    operands = ((a, (*more[0], *rows, SUMMED)), (b, (*more[1], SUMMED, *columns)))
    return Contraction(operands, (*max(more, key=len), *rows, *columns), **options)


def _product(names: str, ranks: tuple[int, int] | None = None) -> Reader:
    """Of two tensors, of any number of dimensions each, or of those that the call asks for."""

    def read(node: fx.Node, rank: Rank) -> Contraction | None:
        tensors = _tensors(node, *names.split())
        if tensors is None:
            return None
        a, b = tensors
        return _matmul(a, b, ranks or (rank(a), rank(b)), even=ranks is not None)

    return read


def _added_product(names: str, ranks: tuple[int, int]) -> Reader:
    def read(node: fx.Node, rank: Rank) -> Contraction | None:
        factors = {key: node.kwargs.get(key, 1) for key in ("alpha", "beta")}
        tensors = _tensors(node, *names.split(), options=("alpha", "beta"))
        if tensors is None or not all(type(n) in (int, float) for n in factors.values()):
            return None
        added, a, b = tensors
        return _matmul(a, b, ranks, added=added, even=True, **factors)

    return read


def _inner(node: fx.Node, rank: Rank) -> Contraction | None:
    tensors = _tensors(node, "input", "other")
    if tensors is None:
        return None
    kept = [tuple(f"{i} of {side}" for i in range(rank(x) - 1)) for side, x in enumerate(tensors)]
    operands = ((x, (*own, SUMMED)) for x, own in zip(tensors, kept, strict=True))
    return Contraction(tuple(operands), (*kept[0], *kept[1]))


def _tensordot(node: fx.Node, rank: Rank) -> Contraction | None:
    names: tuple[str, ...] = ("a", "b", "dims")
    if node.target is aten.tensordot.default:
        names = ("input", "other", "dims_self", "dims_other")
    given = arguments_of(node, *names)
    tensors = _tensors(node, *names[:2], options=names[2:])
    dims = [given.get(name, 2) for name in names[2:]]
    over = dims if len(dims) == 2 else dims[0]
    if isinstance(over, int):
        over = ([*range(-over, 0)], [*range(over)])
    if tensors is None or not isinstance(over, (list, tuple)) or len(over) != 2:
        return None
    sides = [[one] if isinstance(one, int) else one for one in over]
    lists = all(isinstance(side, (list, tuple)) for side in sides)
    if not lists or not all(isinstance(i, int) for side in sides for i in side):
        return None
    labels = [[f"{i} of {side}" for i in range(rank(x))] for side, x in enumerate(tensors)]
    for own, side in zip(labels, sides, strict=True):
        if not all(-len(own) <= dim < len(own) for dim in side):
            return None
        for place, dim in enumerate(side):
            own[dim] = f"summed {place}"
    kept = [label for own in labels for label in own if not label.startswith(SUMMED)]
    operands = ((x, tuple(own)) for x, own in zip(tensors, labels, strict=True))
    return Contraction(tuple(operands), tuple(kept))


def _bilinear(node: fx.Node, rank: Rank) -> Contraction | None:
    tensors = _tensors(node, "input1", "input2", "weight", options=("bias",))
    if tensors is None:
        return None
    before = leading(min(rank(x) for x in tensors[:2]) - 1)  # they have as many
    operands = zip(tensors, ((*before, "i"), (*before, "j"), ("o", "i", "j")), strict=True)
    bias = arguments_of(node, "input1", "input2", "weight", "bias").get("bias")
    return Contraction((*operands,), (*before, "o"), bias, even=True)


def _multi_dot(node: fx.Node, rank: Rank) -> Contraction | None:
    tensors = node.args[0] if node.target is not torch.chain_matmul else node.args
    if not isinstance(tensors, (list, tuple)) or len(tensors) < 2 or node.kwargs:
        return None
    nodes = [x for x in tensors if isinstance(x, fx.Node)]
    if len(nodes) < len(tensors):
        return None
    labels: list[Labels] = [(f"{i}", f"{i + 1}") for i in range(len(nodes))]
    labels[0] = labels[0][2 - rank(nodes[0]) :]
    labels[-1] = labels[-1][: rank(nodes[-1])]
    kept = (*labels[0][:-1], *labels[-1][1:])
    return Contraction(tuple(zip(nodes, labels, strict=True)), kept)


def _tensors(
    node: fx.Node, *names: str, options: tuple[str, ...] = ()
) -> tuple[fx.Node, ...] | None:
    """The tensors that a call is given, by names, None where some are none or there is more."""
    given = arguments_of(node, *names, *(name for name in options if name not in node.kwargs))
    tensors = tuple(x for x in map(given.get, names) if isinstance(x, fx.Node))
    more = {name for name, value in given.items() if (name, value) != ("out", None)}
    is_more = more - {*names, *options} or len(node.args) > len(names) + len(options)
    return tensors if len(tensors) == len(names) and not is_more else None


# ---- einsum -------------------------------------------------------------------------------------
def _einsum(node: fx.Node, rank: Rank) -> Contraction | None:
    if node.kwargs or len(node.args) < 2:
        return None
    equation, *rest = node.args
    if not isinstance(equation, str):
        equation, rest = _written(node.args)
    elif len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        rest = [*rest[0]]
    operands = [x for x in rest if isinstance(x, fx.Node)]
    terms, arrow, result = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    if not len(parts) == len(operands) == len(rest):
        return None
    labels = [
        _spelt(part, rank(x) if "." in part else 0) for part, x in zip(parts, operands, strict=True)
    ]
    leads = [tuple(label for label in own if label.startswith("leading")) for own in labels]
    before = max(leads, key=len)
    if not arrow:  # what stands once, in the order of the alphabet
        counts = Counter(terms.replace(".", "").replace(",", ""))
        result = "..." + "".join(sorted(label for label, count in counts.items() if count == 1))
    kept = _split(result, before)
    return Contraction(tuple(zip(operands, labels, strict=True)), kept)


def _spelt(part: str, rank: int) -> Labels:
    named = len(part.replace("...", ""))
    return _split(part, leading(rank - named) if "..." in part else ())


def _split(part: str, before: Labels) -> Labels:
    first, dots, last = part.partition("...")
    return (*first, *(before if dots else ()), *last)


def _written(args: Sequence[Any]) -> tuple[str, list[Any]]:
    """`einsum(x, [0, 1], w, [2, 1], [0, 2])` with letters, capital ones first, as torch has it."""
    operands, lists = [*args[: len(args) // 2 * 2 : 2]], [*args[1::2]]
    result = args[-1:] if len(args) % 2 else ()

    def word(labels: Any) -> str:
        return "".join("..." if i is ... else LETTERS[i] for i in labels)

    terms = ",".join(map(word, lists))
    return (f"{terms}->{word(result[0])}" if result else terms), operands


# ---- the table ----------------------------------------------------------------------------------
def _forms(*names: str) -> Iterator[Any]:
    """What a graph may call for operations of some names."""
    for name in names:
        functions = (getattr(owner, name, None) for owner in (torch, torch.linalg, F))
        yield from (function for function in functions if function is not None)
        yield from ([name] if hasattr(Tensor, name) else [])
        yield from overloads(name)


CONTRACTIONS: dict[Any, Reader] = {
    form: reader
    for names, reader in (
        ("matmul linalg_matmul", _product("input other")),
        ("mm", _product("input mat2", (2, 2))),
        ("bmm", _product("input mat2", (3, 3))),
        ("mv", _product("input vec", (2, 1))),
        ("addmm", _added_product("input mat1 mat2", (2, 2))),
        ("baddbmm", _added_product("input batch1 batch2", (3, 3))),
        ("addmv", _added_product("input mat vec", (2, 1))),
        ("inner", _inner),
        ("tensordot", _tensordot),
        ("einsum", _einsum),
        ("bilinear", _bilinear),
        ("multi_dot linalg_multi_dot chain_matmul", _multi_dot),
    )
    for form in _forms(*names.split())
}
CONTRACTIONS[operator.matmul] = CONTRACTIONS[torch.matmul]
