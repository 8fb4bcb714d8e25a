"""Merging of parallel linear branches: f(x) + g(x) and [f(x); g(x)] are one layer each.

    f(x) + g(x)   = plus(f, g)(x)      kernels on a common window, added
    [f(x); g(x)]  = stack(f, g)(x)     kernels on a common window, one below the other

Forms handled: a sum of any number of branches from one fork, nested as well, of convolutions of any
kernel, grouped, depthwise, 1xk, Linear, batch norm, identities, constant scales, average pools and
sequences of them: the branches of RepVGG, MobileOne, DBB and ACNet, y = s·BN(conv(x)) + a·x
(ResConv, arXiv 2011.14356), layer scale. Concatenations along channels of such branches, where the
one layer costs no more multiply-adds. Nothing is made wider: that is what `remove_residuals` does
for branches with activations.

Refused, each with its reason: a branch that is not linear; branches of different stride or size; a
sequence with a border between its layers (the second pads with zeros what the first would fill with
its bias); a value inside a branch that is read elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rmfx._affine import AffineConv
from rmfx._algebra import chain as compose_chain
from rmfx._algebra import stack
from rmfx._columns import Plan
from rmfx._errors import Refusal, fault
from rmfx._graph import Net, Virtual
from rmfx._layers import input_of, is_tensor_node, read_affine
from rmfx._plan import merge
from rmfx._policy import Policy, check_policy
from rmfx._range import Ranges
from rmfx._rewrite import apply_rule
from rmfx._site import Site, weight_types
from rmfx._state import undisturbed
from rmfx._verification import checked
from rmfx.frontend import trace

from .batch_norm import fold
from .linear import LinearRule, affine_at
from .noop import NoopRule
from .residual import ResidualRule, check_strict, finish, joins_of


def as_one_layer(site: Site) -> list[Plan] | Refusal:
    """The one arrangement that widens nothing."""
    plan = merge(site)
    return plan if isinstance(plan, Refusal) else [plan]


@dataclass(frozen=True, eq=False)
class Stack:
    """A concatenation of linear branches.

    Attributes:
        fork: the value they start from.
        nodes: all their layers, in the order of the graph.
        layer: what they amount to.
    """

    fork: fx.Node
    nodes: list[fx.Node]
    layer: Virtual


class ConcatenationRule:
    """Merge linear branches that end in one concatenation along channels."""

    def __init__(self) -> None:
        self.made: set[fx.Node] = set()

    def match(self, net: Net, node: fx.Node) -> Stack | Refusal | None:
        if node.target is not torch.cat or node.meta.get("frozen") or len(node.args) != 2:
            return None
        if not isinstance(node.args[0], (list, tuple)):  # parts of a split, say
            return None
        operands = list(node.args[0])
        if not all(is_tensor_node(net, x) for x in operands):
            return None
        paths = [_linear_path(net, x, node) for x in operands]
        shared = set(paths[0]).intersection(*paths[1:])
        if not shared:
            return Refusal("the parts have no common source, or not all are linear from there on")
        fork = max(shared)
        branches = [path[: path.index(fork)][::-1] for path in paths]
        nodes = sorted({n for branch in branches for n in branch})
        kinds, dims = weight_types(net, nodes), {affine_at(net, n).dims for n in nodes}
        if len(kinds) != 1 or len(dims) != 1:
            return None
        layer = _stacked(net, node, fork, branches, dims.pop())
        if isinstance(layer, Refusal):
            return layer
        before = sum(affine_at(net, n).weight.numel() for n in nodes)
        if layer.weight.numel() > before:
            return Refusal("one layer would cost more multiply-adds", by_choice=True)
        return Stack(fork, nodes, Virtual(layer, *kinds.pop()))

    def rewrite(self, net: Net, node: fx.Node, match: Stack) -> None:
        first = next((n for n in match.nodes if n.op == "call_module"), node)
        target, name = str(first.target) if first is not node else node.name, first.name
        net.bake(match.nodes)
        net.fix_channels(match.fork, match.layer.layer.dims)
        net.release(match.nodes)
        with net.graph.inserting_before(node):
            made = net.put(match.layer, match.fork, target, node)
        made.meta |= {key: node.meta[key] for key in ("shape", "dtype") if key in node.meta}
        node.replace_all_uses_with(made)
        net.values.pop(node, None)
        for old in (node, *reversed(match.nodes)):
            net.graph.erase_node(old)
        made.name = name
        self.made.add(made)


def _linear_path(net: Net, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """The node and what lies behind it for as long as all is linear and read nowhere else."""
    path = [node]
    while True:
        here = path[-1]
        before = input_of(here)
        alone = set(here.users) == {reader}
        if before is None or not alone or isinstance(read_affine(net, here), Refusal):
            return path
        reader = here
        path.append(before)


def _stacked(
    net: Net, node: fx.Node, fork: fx.Node, branches: list[list[fx.Node]], dims: int
) -> AffineConv | Refusal:
    """The branches as one layer, if they are concatenated along the channels."""
    rank, channels = net.rank(node.all_input_nodes[0]), net.channels(fork, dims)
    if rank is None or channels is None:
        return net.without_channels(fork)
    if node.args[1] not in ((1, 1 - rank) if dims else (rank - 1, -1)):
        return Refusal("a concatenation along another dimension than the channels")
    layers = []
    for branch in branches:
        identity = AffineConv.identity(channels, dims)
        layer = compose_chain([affine_at(net, n) for n in branch] or [identity])
        if isinstance(layer, Refusal):
            return layer.at(*(n.name for n in branch))
        layers.append(layer)
    return stack(*layers)


def apply_to_joins(net: Net, rule: ResidualRule) -> tuple[set[fx.Node], dict[fx.Node, Refusal]]:
    """Apply a rule to every sum, and merge concatenations, until nothing is left to do.

    Returns:
        The nodes that were made, and what was refused.
    """
    concatenations = ConcatenationRule()
    for _ in range(len(net.graph.nodes) + 1):  # each round merges one concatenation at least
        _, refusals = apply_rule(net, rule)
        more, _ = apply_rule(net, concatenations)
        if not more:
            return rule.made | concatenations.made, refusals
    raise fault("merge_branches", "it finds something to merge for ever")


@undisturbed
def merge_branches(
    model: nn.Module | Any,
    example_inputs: Any = None,
    *,
    strict: bool = False,
    policy: Policy = "all",
    verify: bool = True,
) -> fx.GraphModule:
    """Merge every sum of parallel linear branches into one layer, and such concatenations.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments; see `remove_residuals`.
        strict: raise at the first sum that is refused.
        policy: which sums to merge of those that can be: "all"; "profitable", those whose
            multiply-adds and traffic to memory become less (needs example inputs); a function
            that is given the site's row (`rmfx.SiteReport`, with expected costs) and answers; or
            an `rmfx.MeasuredPolicy`, which times each site.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A new module that computes the same; `rmfx.report` tells what became of every sum.

    Raises:
        RefusedError: a sum was refused and `strict` was set.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv3 = torch.nn.Conv2d(4, 4, 3, padding=1)
        ...         self.conv1 = torch.nn.Conv2d(4, 4, 1)
        ...     def forward(self, x):
        ...         return self.conv3(x) + self.conv1(x) + x
        >>> merged = rmfx.merge_branches(Block().eval())
        >>> list(merged.children())
        [Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))]
    """
    check_policy(policy)
    net = Net(trace(model, example_inputs))
    apply_rule(net, NoopRule())
    fold(net)
    joins = joins_of(net)
    sums = ResidualRule(Ranges(net), arrange=as_one_layer, policy=policy)
    made, refusals = apply_to_joins(net, sums)
    check_strict("merge_branches", refusals, strict=strict)
    apply_rule(net, LinearRule(concerns=made.__contains__))
    merged = finish(net, sums, refusals, joins)
    return checked(
        "merge_branches", model, net.source, merged, example_inputs, wanted=verify, reports=True
    )
