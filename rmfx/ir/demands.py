"""What a network demands of its inputs: what its graph did, and what rewrites add to that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import fx

from .conditions import AGAIN, Condition, demand_sizes, take_conditions
from .ranks import demand_ranks


class Demands:
    """The demands on the inputs of a graph, which it then no longer holds.

    Args:
        graph: of which they are taken.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._inputs = graph.find_nodes(op="placeholder")
        self._given = take_conditions(graph)
        self._sizes: dict[str, dict[int, int]] = {}
        self._added: dict[Condition, None] = {}

    def add(self, conditions: Iterable[Condition]) -> None:
        """Demand what conditions on the inputs say; equal ones are demanded once."""
        self._added.update(dict.fromkeys(conditions))

    def fix(self, name: str, sizes: Mapping[int, int]) -> None:
        """Demand sizes of the input of some name, by dimension."""
        self._sizes.setdefault(name, {}).update(sizes)

    def write(self, rank_of: Callable[[fx.Node], int | None], *, by_rank: bool) -> fx.Graph:
        """All of them as a graph with the same inputs.

        Args:
            rank_of: the number of dimensions of an input.
            by_rank: whether these are demanded, too.
        """
        ranks = {x.name: rank_of(x) for x in self._inputs}
        places = dict(zip(self._inputs, self._given.find_nodes(op="placeholder"), strict=True))
        for x, place in places.items():
            sizes, rank = self._sizes.get(x.name), ranks[x.name]
            if sizes is not None and rank is not None:
                texts = [f"{n} channels" if d == 1 else f"size {n}" for d, n in sizes.items()]
                message = f"the network was converted for {' and '.join(texts)}; {AGAIN}"
                demand_sizes(self._given, place, [sizes.get(dim) for dim in range(rank)], message)
        if by_rank:
            demand_ranks(self._given, ranks)
        for condition in self._added:
            condition.write(self._given, places)
        return self._given
