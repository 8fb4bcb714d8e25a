"""Which filters go: from how much each matters to a network that costs no more than the target.

uniform  every family loses the same share, of each family what matters least
global   whatever matters least for what it costs goes, wherever it is, but of each family a
         share stays: a global order without such a floor starves the layers of a plain chain
search   a few filters at a time, always where the loss of importance is least for what is
         saved at the widths reached so far
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from rmfx.errors import OptionError
from rmfx.options import is_whole

from .families import Family, Meter, Widths

Counts = dict[Family, int]  # filters that stay
Multiple = SupportsIndex | Callable[[int], int]  # how many filters runtimes compute at once
HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Demand:
    """What is asked for.

    Attributes:
        meter: what a part costs.
        budget: what the network may cost.
        multiple: of which each family's filters should be one, where it had as many; or a
            function that gives it for so many filters.
        floor: the share of each family that stays.
        fixed: what the rest of the network costs, whose channels all stay.
    """

    meter: Meter
    budget: float
    multiple: Multiple
    floor: float
    fixed: float = 0.0

    def cost(self, widths: Widths, keep: Tensor) -> float:
        """What a network costs of which some labels stay."""
        return self.fixed + widths.cost(keep, self.meter)

    def multiple_of(self, family: Family) -> int:
        """Of which a family's filters should be one.

        Raises:
            OptionError: the function gives no such number.
        """
        total = len(family.members)
        found = self.multiple(total) if callable(self.multiple) else self.multiple
        if not is_whole(found) or operator.index(found) < 1:
            raise OptionError(f"multiple gives {found!r} for {total} filters: return 1 or more")
        return operator.index(found)

    def kept(self, family: Family, wanted: float) -> int:
        """Filters of a family that stay where a share is wanted."""
        total = len(family.members)
        least = max(1, math.ceil(self.floor * total))
        return self.rounded(family, max(least, round(wanted * total)))

    def rounded(self, family: Family, count: int) -> int:
        """So many filters of a family, or as many more as the multiple wants."""
        multiple = self.multiple_of(family)
        return min(len(family.members), -(-count // multiple) * multiple)


def allocate(name: str, widths: Widths, scores: Tensor, demand: Demand) -> Tensor:
    """Labels to keep, (labels,) booleans.

    Raises:
        OptionError: the target cannot be reached.
    """
    ranking = _Ranking(widths, scores, demand)
    _check_reachable(ranking, demand)
    if demand.cost(widths, widths.everything()) <= demand.budget:
        return widths.everything()
    rules = {"uniform": _uniform, "global": _global, "search": _search}
    return rules[name](ranking, demand)


class _Ranking:
    """The filters of each family, the most important first.

    Attributes:
        widths, scores, demand: as given.
        orders: places of each family's labels, in that order.
    """

    def __init__(self, widths: Widths, scores: Tensor, demand: Demand) -> None:
        self.widths, self.scores, self.demand = widths, scores, demand
        self.orders = {
            f: f.members[scores[f.members].argsort(descending=True, stable=True)]
            for f in widths.families
        }

    def best(self, counts: Counts) -> Tensor:
        """The first of each family, and what else must stay so that no layer is empty."""
        keep = torch.zeros(len(self.widths.roots), dtype=torch.bool)
        for family, count in counts.items():
            keep[self.orders[family][:count]] = True
        return self.spared(keep)

    def spared(self, keep: Tensor) -> Tensor:
        """With what must stay so that no layer is empty, in whole multiples again."""
        before = keep.clone()
        keep = spare(self.widths, self.scores, keep)
        if torch.equal(keep, before):
            return keep
        for family, order in self.orders.items():
            count = int(keep[order].sum())
            more = self.demand.rounded(family, count) - count
            keep[order[~keep[order]][:more]] = True
        return keep

    def fits(self, counts: Counts, demand: Demand) -> bool:
        """Whether what is left costs no more than allowed."""
        return demand.cost(self.widths, self.best(counts)) <= demand.budget


def _check_reachable(ranking: _Ranking, demand: Demand) -> None:
    widths = ranking.widths
    smallest = ranking.best({f: demand.kept(f, 0) for f in widths.families})
    least = demand.cost(widths, smallest)
    if least > demand.budget:
        whole = demand.cost(widths, widths.everything())
        shares = (math.floor(1e4 * demand.budget / whole), math.ceil(1e4 * least / whole))
        raise OptionError(
            f"a budget of {demand.budget:.6g}, {shares[0] / 1e4:.4f} of what the network costs, "
            f"cannot be reached: with the filters that must stay it still costs {least:.6g}, "
            f"{shares[1] / 1e4:.4f} of that; lower the "
            f"floor or the multiple, protect fewer layers, or ask for less{_held(widths)}"
        )


def _held(widths: Widths) -> str:
    """Which operations keep filters in the network, for a message."""
    held = [f"{node.name}: {reason}" for node, reason in widths.channels.holders.items()]
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return f"; filters are held by {'; '.join(held[:3])}{more}" if held else ""


def spare(widths: Widths, scores: Tensor, keep: Tensor) -> Tensor:
    """Let the best label stay wherever all would go that a layer or a slice has."""
    for places in widths.together:
        if not bool(keep[places].any()):
            keep[places[scores[places].argmax()]] = True
    return keep


def _halved(ranking: _Ranking, demand: Demand, form: Callable[[float], Counts]) -> Tensor:
    """The most that fits: form(0) is the smallest network, form(1) the whole one."""
    low, high = 0.0, 1.0
    found = form(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        counts = form(middle)
        if ranking.fits(counts, demand):
            low, found = middle, counts
        else:
            high = middle
    return ranking.best(_filled(ranking, demand, found))


def _filled(ranking: _Ranking, demand: Demand, counts: Counts) -> Counts:
    """Where rounding left some of the budget: a step more for families that have the least."""
    for family in sorted(counts, key=lambda f: counts[f] / len(f.members)):
        count = counts[family] + demand.multiple_of(family)
        more = counts | {family: min(len(family.members), count)}
        if ranking.fits(more, demand):
            counts = more
    return counts


def _uniform(ranking: _Ranking, demand: Demand) -> Tensor:
    def form(share: float) -> Counts:
        return {f: demand.kept(f, share) for f in ranking.widths.families}

    return _halved(ranking, demand, form)


def _global(ranking: _Ranking, demand: Demand) -> Tensor:
    worth = ranking.scores / _savings(ranking.widths, demand.meter).clamp(min=1e-30)
    order = worth.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))

    def form(share: float) -> Counts:
        stays = rank >= round((1 - share) * len(order))
        return {
            f: demand.kept(f, float(stays[f.members].to(torch.float64).mean()))
            for f in ranking.widths.families
        }

    return _halved(ranking, demand, form)


def _savings(widths: Widths, meter: Meter) -> Tensor:
    """What each label's filters cost in the whole network: the same for a family."""
    whole = widths.cost(widths.everything(), meter)
    found = torch.zeros(len(widths.roots), dtype=torch.float64)
    for family in widths.families:
        keep = widths.everything()
        half = family.members[: max(1, len(family.members) // 2)]
        keep[half] = False
        found[family.members] = (whole - widths.cost(keep, meter)) / len(half)
    return found


def _search(ranking: _Ranking, demand: Demand) -> Tensor:
    search = _Search(ranking, demand)
    stale: Collection[Family] = ranking.widths.families
    while demand.cost(ranking.widths, search.keep) > demand.budget:
        stale = search.step(stale)
    return search.keep


class _Search:
    """Families that lose a few filters at a time.

    What a step saves depends on the widths of the layers that the family meets, so after each step
    only families that meet the same layers are looked at anew.

    Attributes:
        keep: labels that are left, (labels,) booleans.
    """

    def __init__(self, ranking: _Ranking, demand: Demand) -> None:
        self._ranking, self._widths, self._demand = ranking, ranking.widths, demand
        self._counts = {family: len(family.members) for family in self._widths.families}
        self._prices: dict[Family, float] = {}
        self.keep = self._widths.everything()

    def step(self, stale: Collection[Family]) -> Collection[Family]:
        """The cheapest step; stale: families whose prices have to be found. Returns the next ones.

        Raises:
            OptionError: no step saves anything.
        """
        self._prices |= {family: self._price(family) for family in stale}
        family = min(self._prices, key=self._prices.__getitem__, default=None)
        if family is None or self._prices[family] == math.inf:
            raise OptionError("no filter that may still go saves anything; lower the floor")
        self._counts[family] = self._next(family)
        self.keep = self._without(family, self._counts[family])
        return self._widths.beside[family]

    def _next(self, family: Family) -> int:
        """Filters of a family that are left after a step."""
        count, total = self._counts[family], len(family.members)
        fewer = self._demand.kept(family, (count - max(1, count // 16)) / total)
        if fewer >= count:
            multiple = self._demand.multiple_of(family)
            fewer = max(self._demand.kept(family, 0), count - multiple)
        return min(fewer, count)

    def _without(self, family: Family, count: int) -> Tensor:
        keep = self.keep.clone()
        keep[self._ranking.orders[family][count:]] = False
        return self._ranking.spared(keep)

    def _price(self, family: Family) -> float:
        """Importance lost for each unit of cost that a step saves; infinite if it saves nothing."""
        count, fewer = self._counts[family], self._next(family)
        forms = (self.keep, self._without(family, fewer))
        parts, meter = self._widths.parts_of[family], self._demand.meter
        before, after = (self._widths.cost(keep, meter, parts) for keep in forms)
        lost = float(self._ranking.scores[self._ranking.orders[family][fewer:count]].sum())
        return lost / (before - after) if before > after else math.inf
