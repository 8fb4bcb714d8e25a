"""What does nothing at inference goes: f(x) = x.

Forms handled: `nn.Identity`; dropout of every kind in eval mode; `clone` and `detach`, as methods
and as functions; `torchvision.ops.stochastic_depth(training=False)`; x + 0, 0 + x, x − 0, x·1 and
1·x with a literal integer.

Refused: modules with hooks, which somebody listens to; values that an in-place operation shares,
where a copy is what keeps them apart. Left alone: `clone` with a memory format, on which a later
view may depend; sums and products of what may hold no floating numbers, whose type they change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmfx.errors import Refusal
from rmfx.ir.kinds import NO_OP_CALLS, NO_OP_METHODS, NO_OPS, is_a
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import why_frozen

STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"
NEUTRAL: dict[Any, int] = {torch.add: 0, torch.sub: 0, torch.mul: 1}


class NoopRule:
    """Let the readers of a no-op read its input.

    Args:
        keep_detach: leave `detach`, which stops gradients.
    """

    def __init__(self, *, keep_detach: bool = False) -> None:
        self._keep_detach = keep_detach

    def match(self, net: Net, node: fx.Node) -> fx.Node | Refusal | None:
        source = input_of(node)
        if self._keep_detach and "detach" in str(node.target):
            return None
        if source is None or not does_nothing(net, node):
            return None
        # A copy of a value that is written to later is not a no-op.
        frozen = why_frozen(node) or why_frozen(source)
        if frozen:
            return Refusal(frozen)
        return net.guard(node) or source

    def rewrite(self, net: Net, node: fx.Node, match: fx.Node) -> None:
        net.drop(node, match)


def does_nothing(net: Net, node: fx.Node) -> bool:
    """Whether a node gives the one value that it reads, at inference."""
    source = input_of(node)
    if source is None:
        return False
    if node.op == "call_module":
        return is_a(net.module(node), NO_OPS)
    if node.op == "call_method":
        return node.target in NO_OP_METHODS and not node.kwargs
    if node.op != "call_function":
        return False
    if node.target in NO_OP_CALLS:
        return not node.kwargs  # memory_format=… puts values where a view expects them
    if node.target in NEUTRAL:
        return _is_neutral(node, source) and net.is_real(source)  # of truth values 1 makes numbers
    training = node.kwargs.get("training", node.args[3] if len(node.args) > 3 else True)
    return getattr(node.target, "__module__", None) == STOCHASTIC_DEPTH and training is False


def _is_neutral(node: fx.Node, source: fx.Node) -> bool:
    """x + 0, 0 + x, x − 0, x·1, 1·x with a literal integer, which leaves floating types alone."""
    if node.kwargs or len(node.args) != 2:
        return False
    commutes = node.target is not torch.sub
    constant = node.args[1] if node.args[0] is source else node.args[0] if commutes else None
    return type(constant) is int and constant == NEUTRAL[node.target]
