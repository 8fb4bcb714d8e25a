"""The rule that rewrites one join as a plain chain, and its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from rmfx.analysis.multiply_adds import Expense, expense_of
from rmfx.analysis.ranges import Ranges
from rmfx.data.moments import Moments
from rmfx.errors import Refusal, RefusedError, RmfxError, fault
from rmfx.frontend.tracing import trace
from rmfx.ir.driver import apply_rule
from rmfx.ir.joins import read_join
from rmfx.ir.net import Net
from rmfx.ir.nodes import between, put_in_order
from rmfx.ir.notes import set_type, type_of
from rmfx.ir.reading import demands_of
from rmfx.report import HELD_KEY, META_KEY, HeldReport, Report, SiteReport
from rmfx.rules.concatenation import ConcatenationRule
from rmfx.table import numbered
from rmfx.words import MERGED

from .additions import told_apart, why_not_opened
from .alignment import may_reorder
from .assembly import Plan, build
from .column import Column, Label, Spot
from .columns import Shared
from .own_weights import with_one_path
from .plan import merge, plans
from .policy import Policy, reason_to_keep
from .rows import row_of_match, row_of_refusal, with_expense
from .side_tensors import Share, tap
from .site import Site, find_sites
from .strategy import AUTO, Settled, settle

Option = tuple[Site, Settled, Sequence[Plan]]  # and every plan of the site
Arrange = Callable[[Site], list[Plan] | Refusal]


@dataclass(frozen=True, eq=False)
class Match:
    """A site, its chosen arrangement, and the row it will have in the report."""

    site: Site
    settled: Settled
    row: SiteReport


class ResidualRule:
    """Rewrite one join as a plain chain.

    Attributes:
        rows: what was done, by the name of the join.
        made: the nodes that rewrites have put into the graph.
        widened: the nodes whose place a combination with other tensors took, carry included.
        nested: whether a site had another one inside, which had been rewritten before.
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
        self.nested = False
        self._made_at: dict[str, set[fx.Node]] = {}  # what stands for a site, by its join

    def match(self, net: Net, node: fx.Node) -> Match | Refusal | None:
        sites = find_sites(net, node, keep_norms=not self._fold)
        if sites is None or isinstance(sites, Refusal):
            return sites
        found = [option for site in sites for option in self._options(site)]
        options = [option for option in found if not isinstance(option, Refusal)]
        if not options:
            return next(option for option in found if isinstance(option, Refusal))
        site, settled, plans_of_site = min(options, key=lambda option: option[1].price)
        row = row_of_match(net, site, settled, _old(site, settled))
        row = replace(row, alternative=_alternative(settled.plan, plans_of_site))
        kept = why_not_opened(net, node, row, site.dims)
        kept = kept or reason_to_keep(self._policy, net, site, row, self._both_forms)
        return kept or Match(site, settled, row)

    def _both_forms(
        self, alone: fx.GraphModule, inputs: tuple[Tensor, ...]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """A site cut out of its network, as it is and rewritten."""
        source = trace(alone, inputs)
        net = Net(source)
        apply_rule(
            net, ResidualRule(Ranges(net), fold_batch_norm=self._fold, arrange=self._arrange)
        )
        return Net(source).finish(), net.finish()

    def _options(self, site: Site) -> Iterator[Option | Refusal]:
        """Every way to rewrite a site."""
        found = self._arrange(site)
        if isinstance(found, Refusal):
            yield found
            return
        best = math.inf
        for plan in found:
            if plan.price >= best:  # a code only adds to it
                return
            whole = plan.with_weights()
            if isinstance(whole, Refusal):
                yield whole.at(site.join.name)
                continue
            settled = settle(whole, self._ranges, self._allowed, site.dtype)
            if isinstance(settled, Refusal):
                yield settled
                continue
            best = min(best, settled.price)
            yield site, settled, found

    def rewrite(self, net: Net, node: fx.Node, match: Match) -> None:
        site, columns = match.site, build(match.settled.plan)
        if isinstance(columns, Refusal):  # the plan was made with the same laws
            raise RmfxError(f"{node.name}: a planned layer cannot be built: {columns.reason}")
        old, row = _old(site, match.settled), match.row
        self.nested = self.nested or not self.made.isdisjoint(old)
        labels = [column.label(site, i) for i, column in enumerate(columns)]
        net.demand(demands_of(net, site.nodes))
        net.fix_channels(site.fork, site.dims)
        if site.fixed:
            net.fix_sizes()
        again = {c.layer.node for c in columns if isinstance(c, Shared)}
        net.release(n for n in old if n not in again)
        beside: list[fx.Node] = []
        new = self._put_columns(net, site, columns, labels, set(old), beside)
        self._take_place(net, site, old, new, labels)
        if may_reorder([step for column in columns for step in column.steps]):
            # The last node stands where the join stood; what followed it may be replaced by now.
            put_in_order(site.fork, new[-1].next)
        used = [n for n in beside if n.users]
        self.rows[row.join] = with_expense(row, expense_of(net, [*used, *new]))
        self._made_at[row.join] = {*new}

    def count_in(self, nodes: Collection[fx.Node], difference: Expense) -> None:
        """Count in the row of a site what merging some of its nodes with others has changed."""
        for join, made in self._made_at.items():
            if not made.isdisjoint(nodes):
                row = self.rows[join]
                after = Expense(row.macs_after, row.moved_after, row.params_after or 0)
                if MERGED not in row.layout:
                    row = replace(row, layout=f"{row.layout}, {MERGED}")
                self.rows[join] = with_expense(row, after + difference)
                return

    def _put_columns(
        self,
        net: Net,
        site: Site,
        columns: Sequence[Column],
        labels: Sequence[Label],
        old: set[fx.Node],
        beside: list[fx.Node],
    ) -> list[fx.Node]:
        """The nodes of the chain, as early as they can stand; what stands beside it is noted."""
        new: list[fx.Node] = []
        widths = (site.channels, 0)
        slices: dict[fx.Node, fx.Node] = {}
        moments = self._moments.get(net.stands_for(site.fork) or "")
        for column, label in zip(columns, labels, strict=True):
            source = new[-1] if new else site.fork
            behind = max(source, column.combination or source)
            behind = site.join.prev if column is columns[-1] else behind
            with net.graph.inserting_before(behind.next):
                made = column.put(Spot(net, site, source, widths, label, slices, moments))
            beside += between(behind, made)
            set_type(made, (site.dtype, site.device))
            if column.combination is not None:
                self.widened.add(column.combination.name)
            widths = column.widths_behind(widths, site.dims)
            for value, block in column.taps:
                share = Share(block, widths, column.runs)
                slices |= self._tap(net, site, made, value, share, old)
                beside.append(slices[value])
            new.append(made)
        return new

    def _tap(
        self,
        net: Net,
        site: Site,
        wide: fx.Node,
        value: fx.Node,
        share: Share,
        old: set[fx.Node],
    ) -> dict[fx.Node, fx.Node]:
        """Let others read an old value's block of a wide one; returns where they read it now."""
        readers = [user for user in value.users if user not in old]
        slices = tap(net, wide, value, share, readers, site.dims)
        self.made.update(slices.values())
        net.make_stand_for(slices[value], net.stands_for(value))
        return slices

    def _take_place(
        self,
        net: Net,
        site: Site,
        old: list[fx.Node],
        new: list[fx.Node],
        labels: list[Label],
    ) -> None:
        """Put the new nodes in the place of the old ones, under their names."""
        known = self._ranges.known(site.join)
        if known is not None:
            self._ranges.set(new[-1], known)
        last = _in_type_of(site.join, new[-1])
        site.join.replace_all_uses_with(last)
        for node in reversed(old):
            self.made.discard(node)
            net.graph.erase_node(node)
        for node, (_, like) in zip(new, labels, strict=True):
            if like in old and like is not site.join:
                node.name = like.name
        if site.join.name not in self.widened:
            net.make_stand_for(last, site.join.name)
        self.made.update(new)


def _in_type_of(join: fx.Node, value: fx.Node) -> fx.Node:
    """The value in the type of the join, where autocast lets it add values of two types."""
    types = {type_of(n)[0] for n in join.all_input_nodes if type_of(n) is not None}
    if len(types) < 2:
        return value
    with join.graph.inserting_before(join):
        cast = join.graph.call_method("to", (value, type_of(join)[0]))
    cast.meta = dict(join.meta)
    set_type(value, None)  # that of the join, which a layer under autocast does not give
    return cast


def _old(site: Site, settled: Settled) -> list[fx.Node]:
    """The nodes that go, in the order of the graph."""
    return [n for n in sorted(dict.fromkeys(site.nodes)) if n not in settled.plan.kept]


def _alternative(plan: Plan, others: Sequence[Plan]) -> str:
    """The next best arrangement that has another layout, and what it would cost."""
    other = next((o for o in others if o.place != plan.place), None)
    return f"{other.place}: {other.work / plan.work:.2f}" if other and plan.work else ""


def joins_of(net: Net) -> list[str]:
    """The names of the nodes that add two tensors, in order."""
    return [node.name for node in net.graph.nodes if read_join(node) is not None]


def check_strict(verb: str, refusals: Mapping[fx.Node, Refusal], *, strict: bool) -> None:
    """Raise RefusedError at the first residual connection that is refused, if `strict`."""
    for node, refusal in refusals.items():
        if strict and not refusal.by_choice and not refusal.apart:
            raise RefusedError(f"{verb}: the add {node.name} cannot be removed: {refusal}")


def finish(
    net: Net,
    rule: ResidualRule,
    refusals: Mapping[fx.Node, Refusal],
    joins: Sequence[str],
    copied: Iterable[HeldReport] = (),
) -> fx.GraphModule:
    """The new module, with a report on the joins.

    Args:
        copied: layers that share weights in the source, and not in the result.
    """
    held = (*net.source.meta.get(HELD_KEY, ()), *copied)
    refusals = told_apart(net, refusals)
    refused = {
        node.name: row_of_refusal(net, node, refusal, whole=node.name not in rule.widened)
        for node, refusal in refusals.items()
    }
    net.sweep()
    where = net.places()
    rows = {**refused, **{n: replace(r, node=where.get(n)) for n, r in rule.rows.items()}}
    report = Report(numbered(rows[name] for name in joins if name in rows), held=held)
    gm = net.finish({META_KEY: report, HELD_KEY: held})
    with_one_path(gm)
    return gm


def as_one_layer(site: Site) -> list[Plan] | Refusal:
    """The one arrangement that widens nothing."""
    plan = merge(site)
    return plan if isinstance(plan, Refusal) else [plan]


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
