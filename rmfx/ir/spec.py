"""The dialect as a check: what every graph that rules see must be like, a law and its message each.

Frontends make such graphs, and a rule that meets one leaves one behind. The tests and `rmfx fuzz`
look after each rule (`enforced`), so that a rule that breaks a law is named itself, and not the one
that stumbles over it later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import fx

from rmfx.errors import fault

from .functions import is_in_place
from .kinds import ARITHMETIC, CONCATENATIONS, SELECTIONS
from .net import Net
from .notes import gives_container, gives_number, shape_of, why_frozen

Law = tuple[str, Callable[[Net, fx.Node], bool]]


def _is_canonical(table: dict[object, object], node: fx.Node) -> bool:
    """Whether an operation that has a form in the dialect is called in that form."""
    own = table.get(node.target, node.target) is node.target
    # A number times a list is Python's own, as is an operation whose options the dialect has not.
    return own or bool(node.kwargs) or any(isinstance(a, (list, tuple)) for a in node.args)


def _writes_by_itself(node: fx.Node) -> bool:
    """Whether a call has a name that says it writes in place."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return is_in_place(name.partition(".")[0])


def _is_shape(shape: object) -> bool:
    return isinstance(shape, tuple) and all(n is None or isinstance(n, int) for n in shape)


def _keeps(node: fx.Node) -> bool:
    """Whether a node is no operation, or rules leave it alone: the dialect says nothing of it."""
    if node.op not in ("call_function", "call_method"):
        return True  # a module may have any path, as "mul"
    skipped = any(gives_container(n) for n in node.all_input_nodes)
    return bool(why_frozen(node) or gives_number(node) or skipped)


LAWS: tuple[Law, ...] = (
    (
        "calls a module that is not there",
        lambda net, node: node.op != "call_module" or net.callee(node) is not None,
    ),
    (
        "reads a node that stands behind it or is gone",
        lambda net, node: all(n < node and not n._erased for n in node.all_input_nodes),
    ),
    (
        "is arithmetic in another form than torch.add, sub, mul, div or neg",
        lambda net, node: _keeps(node) or _is_canonical(ARITHMETIC, node),
    ),
    (
        "is a choice in another form than torch.maximum, minimum or where",
        lambda net, node: _keeps(node) or _is_canonical(SELECTIONS, node),
    ),
    (
        "concatenates in another form than torch.cat(tensors, dim)",
        lambda net, node: (
            _keeps(node)
            or node.target not in CONCATENATIONS
            or (len(node.args) == 2 and not node.kwargs)
        ),
    ),
    (
        "writes in place and is not marked frozen",
        lambda net, node: _keeps(node) or not _writes_by_itself(node),
    ),
    (
        "has a shape that is no tuple of numbers",
        lambda net, node: shape_of(node) is None or _is_shape(shape_of(node)),
    ),
    (
        "stands for a value that the source has not",
        lambda net, node: (name := net.stands_for(node)) is None or net.is_of_source(name),
    ),
)


def check(net: Net, after: str) -> None:
    """Raise InternalError at the first node that breaks a law.

    Args:
        after: what has been done to the net.
    """
    for node in net.graph.nodes:
        for message, holds in LAWS:
            if not holds(net, node):
                raise fault(f"{after} left {node.name}", f"it {message}")
    if (misread := net.misread()) is not None:
        raise fault(f"{after} left {misread.name}", "it is written to and read among other writes")


_is_enforced: ContextVar[bool] = ContextVar("rmfx_dialect_is_enforced", default=False)


@contextmanager
def enforced() -> Iterator[None]:
    """Let every net be checked as it is made and after each rule, in this thread."""
    token = _is_enforced.set(True)
    try:
        yield
    finally:
        _is_enforced.reset(token)


def check_if_enforced(net: Net, after: str) -> None:
    """Check a net where somebody has asked for it."""
    if _is_enforced.get():
        check(net, after)
