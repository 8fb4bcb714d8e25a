"""Removal of residual connections: add(f(x), s(x)) becomes a plain chain with the same output.

    add(f(x), s(x)) = ∇ ∘ (f_k ⊕ s_k) ∘ … ∘ (f_1 ⊕ s_1) ∘ Δ

where every s_i is an identity except one, which holds the shortcut's linear map, and every
f_i ⊕ s_i is one ordinary layer. Δ is merged into the first layer ("reserving" in RMNet, arXiv
2111.00687, section 3) and ∇ into the last ("merging"). Two non-linear branches are the same with
two chains.

Where the branch combines other tensors (a gate, a concatenation, a sum that stays), those meet the
carry with ones, nothing or zeros; what others read of a value inside the branch is a slice of it.

Forms handled: `+`, `+=`, `-`, `torch.add(alpha=)`, `add_`, with constant factors on either side;
branches of convolutions, Linear, batch norm, scales, paddings, crops, average pools, pointwise
activations, products, concatenations and splits in any order; shortcuts that are the identity or
any chain of linear layers; sums of several branches, nested and shared forks.

Refused, each with its reason: an add that broadcasts; operands without a common source; an
operation on every path of a branch that mixes positions or channels by numbers that depend on the
data, or by a maximum; branches whose sizes agree for some inputs only; values that in-place
operations share; layers that are shared, tied, hooked or parametrized.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx, nn

from rmfx._activation import Blockwise, Interval, way_of
from rmfx._affine import AffineConv
from rmfx._alignment import may_reorder
from rmfx._batches import check_batches
from rmfx._columns import Column, Layer, Linear, Normalised, Plan, Pointwise, Shared, Sided, build
from rmfx._digits import EXACTNESS
from rmfx._dynamo import find_lifted
from rmfx._errors import OptionError, Refusal, RefusedError, RmfxError
from rmfx._graph import Net, Shape, Virtual, put_in_order
from rmfx._layers import read_join
from rmfx._linked import linked
from rmfx._moments import Moments
from rmfx._names import module_path
from rmfx._plan import plans
from rmfx._policy import Policy, check_policy, reason_to_keep
from rmfx._range import Ranges, check_range
from rmfx._rewrite import apply_rule
from rmfx._rows import expense_of, row_of_match, row_of_refusal, with_expense
from rmfx._sides import call_again, combine, tap
from rmfx._site import Site, find_sites
from rmfx._state import undisturbed
from rmfx._strategy import (
    AUTO,
    Settled,
    allowed_ways,
    is_large,
    settle,
)
from rmfx._tracing import BAKED, OWN_GRADIENT
from rmfx._verification import checked
from rmfx.frontend import canonicalise_again, trace
from rmfx.report import META_KEY, Report, SiteReport

from .batch_norm import fold
from .calibration import identity_norm, measure
from .linear import LinearRule
from .noop import NoopRule


@dataclass(frozen=True, eq=False)
class Match:
    """A site, its chosen arrangement, and the row it will have in the report."""

    site: Site
    settled: Settled
    row: SiteReport


Option = tuple[Site, Settled]
Arrange = Callable[[Site], list[Plan] | Refusal]


class ResidualRule:
    """Rewrite one join as a plain chain.

    Attributes:
        rows: what was done, by the name of the join.
        made: the nodes that rewrites have put into the graph.
        widened: the nodes whose place a combination with other tensors took, carry included.
    """

    def __init__(
        self,
        ranges: Ranges,
        *,
        allowed: Collection[str] = AUTO,
        fold_batch_norm: bool = True,
        moments: dict[str, Moments] | None = None,
        arrange: Arrange = plans,
        policy: Policy = "all",
    ) -> None:
        self._ranges = ranges
        self._allowed = allowed
        self._arrange = arrange
        self._policy = policy
        self._fold = fold_batch_norm
        self._moments = moments or {}
        self.rows: dict[str, SiteReport] = {}
        self.made: set[fx.Node] = set()
        self.widened: set[str] = set()

    def match(self, net: Net, node: fx.Node) -> Match | Refusal | None:
        sites = find_sites(net, node, keep_norms=not self._fold)
        if sites is None or isinstance(sites, Refusal):
            return sites
        found = [option for site in sites for option in self._options(site)]
        options = [option for option in found if not isinstance(option, Refusal)]
        if not options:
            return next(option for option in found if isinstance(option, Refusal))
        (site, settled), *others = sorted(options, key=self._dearness)
        row = row_of_match(net, site, settled, _old(site, settled))
        row = replace(row, layout=_compared(settled, [other for _, other in others]))
        return reason_to_keep(self._policy, net, site, row) or Match(site, settled, row)

    def _dearness(self, option: Option) -> tuple[bool, float]:
        settled = option[1]
        return is_large(settled, self._allowed), settled.plan.work

    def _options(self, site: Site) -> Iterator[Option | Refusal]:
        """Every way to rewrite a site."""
        found = self._arrange(site)
        if isinstance(found, Refusal):
            yield found
            return
        for plan in found:
            settled = settle(plan, self._ranges, self._allowed, site.dtype)
            yield settled if isinstance(settled, Refusal) else (site, settled)

    def rewrite(self, net: Net, node: fx.Node, match: Match) -> None:
        site, columns = match.site, match.settled.plan.columns
        layers = build(columns)
        if isinstance(layers, Refusal):  # the plan was made with the same laws
            raise RmfxError(f"{node.name}: a planned layer cannot be built: {layers.reason}")
        old, row = _old(site, match.settled), match.row
        labels = [_label(site, column, i) for i, column in enumerate(columns)]
        net.bake(site.nodes)
        net.fix_channels(site.fork, site.dims)
        again = {c.layer.node for c in columns if isinstance(c, Shared)}
        net.release(n for n in old if n not in again)
        new = self._put_columns(net, match, layers, labels, set(old))
        self._take_place(net, site, old, new, labels)
        if may_reorder([step for column in columns for step in column.steps]):
            # The last node stands where the join stood; what followed it may be replaced by now.
            put_in_order(site.fork, new[-1].next)
        self.rows[row.join] = with_expense(row, expense_of(net, new, site.dims))

    def _put_columns(
        self,
        net: Net,
        match: Match,
        layers: Sequence[Layer],
        labels: Sequence[tuple[str, fx.Node]],
        old: set[fx.Node],
    ) -> list[fx.Node]:
        """The nodes of the chain, as early as they can stand."""
        site, columns = match.site, match.settled.plan.columns
        new: list[fx.Node] = []
        widths = (site.channels, 0)
        slices: dict[fx.Node, fx.Node] = {}
        for column, layer, (target, like) in zip(columns, layers, labels, strict=True):
            source = new[-1] if new else site.fork
            is_last = column is columns[-1]
            last_read = column.lateral.node if isinstance(column, Sided) else source
            behind = site.join.prev if is_last else max(source, last_read)
            with net.graph.inserting_before(behind.next):
                if isinstance(column, Sided):
                    lateral = column.lateral.reading(slices)
                    made = combine(net, lateral, source, column.block, widths, site.dims)
                    self.widened.add(like.name)
                elif isinstance(column, Shared):
                    made = call_again(net, column.layer, source, sum(widths))
                else:
                    made = net.put(self._make(net, site, layer), source, target, like)
            widths = _widths_behind(net, column, widths, site.dims)
            _note_shape(site, column, source, made, sum(widths) if not is_last else widths[0])
            for value, block in column.taps:
                slices |= self._tap(net, site, made, value, (block, widths), old)
            new.append(made)
        return new

    def _tap(
        self,
        net: Net,
        site: Site,
        wide: fx.Node,
        value: fx.Node,
        place: tuple[int, tuple[int, int]],
        old: set[fx.Node],
    ) -> dict[fx.Node, fx.Node]:
        """Let others read an old value's block of a wide one; returns where they read it now."""
        block, widths = place
        channels = (0, widths[0]) if block == 0 else (widths[0], sum(widths))
        readers = [user for user in value.users if user not in old]
        slices = tap(net, wide, value, channels, sum(widths), readers, site.dims)
        self.made.update(slices.values())
        if value in net.values:
            net.values[slices[value]] = net.values[value]
        return slices

    def _make(self, net: Net, site: Site, layer: AffineConv | Column) -> Virtual | nn.Module:
        """What is to stand at a column's node."""
        if isinstance(layer, AffineConv):
            return Virtual(layer, site.dtype, site.device)
        if isinstance(layer, Pointwise):
            whole = Blockwise(layer.blocks, site.dims)
            if way_of(whole.blocks) == "identity":
                return whole.to_module(site.dtype, site.device)
            return Virtual(whole, site.dtype, site.device)
        if not isinstance(layer, Normalised):
            raise TypeError(f"a {type(layer).__name__} column is no module")
        moments = self._moments.get(net.values.get(site.fork, ""))
        return identity_norm(layer.main.module, layer.carried, moments, layer.runs)

    def _take_place(
        self,
        net: Net,
        site: Site,
        old: list[fx.Node],
        new: list[fx.Node],
        labels: list[tuple[str, fx.Node]],
    ) -> None:
        """Put the new nodes in the place of the old ones, under their names."""
        known = self._ranges.known(site.join)
        if known is not None:
            self._ranges.set(new[-1], known)
        last = _in_type_of(site.join, new[-1])
        site.join.replace_all_uses_with(last)
        for node in reversed(old):
            net.values.pop(node, None)
            self.made.discard(node)
            net.graph.erase_node(node)
        for node, (_, like) in zip(new, labels, strict=True):
            if like in old and like is not site.join:
                node.name = like.name
        if site.join.name not in self.widened:
            net.values[last] = site.join.name
        self.made.update(new)


def _in_type_of(join: fx.Node, value: fx.Node) -> fx.Node:
    """The value in the type of the join, where autocast lets it add values of two types."""
    types = {n.meta["dtype"][0] for n in join.all_input_nodes if "dtype" in n.meta}
    if len(types) < 2:
        return value
    with join.graph.inserting_before(join):
        cast = join.graph.call_method("to", (value, join.meta["dtype"][0]))
    cast.meta = dict(join.meta)
    value.meta.pop("dtype", None)  # that of the join, which a layer under autocast does not give
    return cast


def _old(site: Site, settled: Settled) -> list[fx.Node]:
    """The nodes that go, in the order of the graph."""
    return [n for n in sorted(dict.fromkeys(site.nodes)) if n not in settled.plan.kept]


def _compared(chosen: Settled, others: Sequence[Settled]) -> str:
    """The layout of an arrangement, beside the next best that has another one."""
    plan = chosen.plan
    other = next((o.plan for o in others if o.plan.layout != plan.layout), None)
    if other is None or not plan.work:
        return plan.layout
    return f"{plan.layout} ({other.layout}: {other.work / plan.work:.2f} times the multiply-adds)"


def _label(site: Site, column: Column, index: int) -> tuple[str, fx.Node]:
    """Module path for a column's layer, and the node whose name and place it takes."""
    nodes = [n for step in column.steps for n in step.nodes if n.op == "call_module"]
    if isinstance(column, Sided):
        return "", column.lateral.node
    if isinstance(column, Shared):
        return "", column.layer.node
    if nodes:
        return str(nodes[0].target), nodes[0]
    place = module_path(site.join)
    role = "duplicate" if index == 0 else "merge"
    return (f"{place}.{role}" if place else f"{site.join.name}_{role}"), site.join


# ---- the report ---------------------------------------------------------------------------------


def _widths_behind(net: Net, column: Column, widths: tuple[int, int], dims: int) -> tuple[int, int]:
    """Channels of both blocks behind a column."""
    if isinstance(column, Linear):
        return column.main.out_channels, column.carry.out_channels
    if not isinstance(column, Sided):
        return widths
    added = column.lateral.added_channels(net, dims)
    main, carry = widths
    return (main + added, carry) if column.block == 0 else (main, carry + added)


def _note_shape(site: Site, column: Column, source: fx.Node, made: fx.Node, width: int) -> None:
    """The shape of a column's node, where that of its input is known."""
    shape: Shape | None = source.meta.get("shape")
    if shape is not None and not isinstance(column, (Sided, Shared)):
        layer = column.main if isinstance(column, Linear) else None
        own = layer or AffineConv.identity(width, site.dims)
        made.meta["shape"] = _shape_after(own, shape, width)
    made.meta["dtype"] = (site.dtype, site.device)


def _shape_after(layer: AffineConv, shape: Shape, width: int) -> Shape:
    if not layer.dims:
        return (*shape[:-1], width)
    size = (
        None if n is None else (n + a) // s
        for n, a, s in zip(shape[2:], layer.growth, layer.stride, strict=True)
    )
    return (shape[0], width, *size)


# ---- the verb -----------------------------------------------------------------------------------


@undisturbed
def remove_residuals(
    model: nn.Module | Any,
    example_inputs: Any = None,
    *,
    strict: bool = False,
    fold_batch_norm: bool = True,
    activation: str | Collection[str] = "auto",
    input_range: Interval | None = None,
    calibration: Iterable[Any] | None = None,
    differentiable: bool = False,
    policy: Policy = "all",
    verify: bool = True,
) -> fx.GraphModule:
    """Rewrite every residual connection that can be removed exactly.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments. They give shapes (for multiply-adds in the
            report, and for some layers the only proof that a rewrite is exact) and let
            `torch.export` take over where symbolic tracing fails. Sizes are not baked in. Without
            them nothing is verified, the inputs of convolutions are taken to have a batch
            dimension, and the symbolic trace is believed: code that asks whether it got a tensor
            (`isinstance`, `str(x.device)`), `.data` assigned during the call, and state that shows
            only at the third call or later are not seen.
        strict: raise at the first site that is refused.
        fold_batch_norm: fold batch norm into the convs around it. With False batch norms inside a
            branch stay, with an identity batch norm on the carry, so that the result can be trained
            further (the form of RMNet, arXiv 2111.00687); the branch's last one is always folded.
        activation: how a carry may pass an activation: the strategies allowed, of which the first
            that works is used, in the order "identity", "scale", "per-channel", "odd-pair",
            "shift", "double-relu", "masked". "auto" is all but "odd-pair", which costs channels,
            "shift", which costs rounding and needs `calibration`, and "double-relu", which costs
            layers. "relu" is those that need the network's own activations and ReLU only: no PReLU,
            no clamp with bounds per channel and no mask is added ("identity", "scale", "odd-pair",
            "shift", "double-relu"). As whoever asks for that quantises, a way with a gain of at
            most 16 comes first there. No way is used that the type has no digits for.
        input_range: (low, high) of every input value, if known: it can prove that a carry passes
            an activation unchanged. Values outside it may give wrong results.
        calibration: batches (a tensor or a tuple of arguments each), on which the statistics of the
            identity batch norms are measured (with `fold_batch_norm=False`), and how large values
            are (for "shift").
        differentiable: compute the new weights inside the graph, from the model's own parameters,
            which the result shares: gradients reach them, and every change of theirs counts. Each
            call then pays for that computation. Excludes `fold_batch_norm=False`. The result, or a
            copy of it, may be cast to another type. What puts other tensors in the place of the
            model's own (a cast of the model itself, `load_state_dict(assign=True)`) calls for
            another conversion.
        policy: which sites to rewrite of those that can be: "all"; "profitable", those whose
            multiply-adds and traffic to memory become less (needs example inputs); a function
            that is given the site's row (`rmfx.SiteReport`, with expected costs) and answers; or
            an `rmfx.MeasuredPolicy`, which times each site.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A new module with the same inputs and outputs; `rmfx.report` tells what was done.

    Raises:
        RefusedError: a site was refused and `strict` was set.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv1 = torch.nn.Conv2d(4, 4, 3, padding=1)
        ...         self.conv2 = torch.nn.Conv2d(4, 4, 3, padding=1)
        ...     def forward(self, x):
        ...         return x + self.conv2(torch.relu(self.conv1(x)))
        >>> plain = rmfx.remove_residuals(Block().eval())
        >>> [type(m).__name__ for m in plain.children()]
        ['Conv2d', 'PReLU', 'Conv2d']
    """
    allowed = allowed_ways(activation)
    check_range(input_range)
    check_policy(policy)
    source = trace(model, example_inputs, fold=not differentiable)
    batches = _Batches(calibration) if calibration is not None else None
    if differentiable:
        if not fold_batch_norm:
            raise OptionError("differentiable=True needs fold_batch_norm=True")
        if OWN_GRADIENT in source.meta:
            raise OptionError(
                f"{source.meta[OWN_GRADIENT]}: here the code switches gradients off, or has one of "
                "its own, which differentiable=True would lose; convert without it"
            )
        if BAKED in source.meta:
            raise OptionError(
                f"{source.meta[BAKED]}: the code computes with a parameter that it takes out of a "
                "list or a dict, so a trace holds the result of today, which differentiable=True "
                "may not bake; read it as an attribute (self.weight), or export the model first"
            )
        rewrite = partial(
            _convert,
            strict=strict,
            allowed=allowed,
            input_range=input_range,
            weights_vary=True,
            policy=policy,
        )

        def convert(generic: fx.GraphModule) -> fx.GraphModule:
            canonicalise_again(generic)
            return rewrite(generic)

        lifted = find_lifted(model) if isinstance(model, fx.GraphModule) else ()
        converted = linked(source, convert, lifted)
        if verify and example_inputs is not None:
            source = trace(model, example_inputs)  # whose names the report has
    else:
        converted = _convert(
            source,
            strict=strict,
            allowed=allowed,
            input_range=input_range,
            fold_batch_norm=fold_batch_norm,
            calibration=batches,
            policy=policy,
        )
    return checked(
        "remove_residuals",
        model,
        source,
        converted,
        example_inputs,
        wanted=verify,
        input_range=input_range,
        batches=batches.first if batches is not None and _is_calibrated(converted) else (),
        reports=True,
    )


class _Batches:
    """Calibration data, gone through once, of which the first batch is kept."""

    def __init__(self, data: Iterable[Any]) -> None:
        check_batches("calibration", data, pairs=False)
        self._data = data
        self.first: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            self.first = self.first or [batch]
            yield batch


def _is_calibrated(converted: fx.GraphModule) -> bool:
    """Whether a network holds for values like those of the calibration data only."""
    rows = converted.meta[META_KEY].rows
    return any(row.exactness == EXACTNESS[-1] for row in rows)


def _convert(
    source: fx.GraphModule,
    *,
    strict: bool,
    allowed: Collection[str],
    input_range: Interval | None,
    fold_batch_norm: bool = True,
    calibration: Iterable[Any] | None = None,
    weights_vary: bool = False,
    policy: Policy = "all",
) -> fx.GraphModule:
    """The passes in their order, on a graph in the dialect."""
    measured = None
    if calibration is not None:
        measured = measure(source, calibration, extremes="shift" in allowed)
    net = Net(source)
    joins = joins_of(net)
    # No-ops first: a dropout at the end of a branch would be one more layer to pass.
    apply_rule(net, NoopRule(keep_detach=weights_vary))
    # Batch norm next: what is folded needs no column, and no identity batch norm on the carry.
    if fold_batch_norm:
        fold(net)
    rule = ResidualRule(
        Ranges(
            net,
            input_range,
            weights_vary=weights_vary,
            measured=measured.extremes if measured else None,
        ),
        allowed=allowed,
        fold_batch_norm=fold_batch_norm,
        moments=measured.moments if measured else None,
        policy=policy,
    )
    _, refusals = apply_rule(net, rule)
    check_strict("remove_residuals", refusals, strict=strict)
    # Last, where it is cheaper: a Δ or ∇ that stands alone merges with the layer next to its site.
    apply_rule(net, LinearRule(keep_norms=not fold_batch_norm, concerns=rule.made.__contains__))
    return finish(net, rule, refusals, joins)


def joins_of(net: Net) -> list[str]:
    """The names of the nodes that add two tensors, in order."""
    return [node.name for node in net.graph.nodes if read_join(net, node) is not None]


def check_strict(verb: str, refusals: Mapping[fx.Node, Refusal], *, strict: bool) -> None:
    """Raise RefusedError at the first refusal that is not a choice, if `strict`."""
    for node, refusal in refusals.items():
        if strict and not refusal.by_choice:
            raise RefusedError(f"{verb}: the add {node.name} cannot be removed: {refusal}")


def finish(
    net: Net, rule: ResidualRule, refusals: Mapping[fx.Node, Refusal], joins: Sequence[str]
) -> fx.GraphModule:
    """The new module, with a report on the joins."""
    refused = {
        node.name: row_of_refusal(node, refusal, whole=node.name not in rule.widened)
        for node, refusal in refusals.items()
    }
    net.sweep()
    where = {name: node.name for node, name in net.values.items() if not node._erased}
    rows = {**refused, **{n: replace(r, node=where.get(n)) for n, r in rule.rows.items()}}
    report = Report(tuple(rows[name] for name in joins if name in rows))
    return net.finish({META_KEY: report})
