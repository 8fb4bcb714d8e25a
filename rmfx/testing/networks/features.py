"""The features of a drawn network, by name: what a test of a generator can count."""

from __future__ import annotations

from collections.abc import Iterator

from .counted import Place
from .digits import TYPES
from .join_features import SITES
from .joins import Recall, Save
from .layer_features import LAYERS
from .node import Nodes
from .unusual_features import UNUSUAL

_TABLES = (LAYERS, SITES, UNUSUAL)
_SAYS = {
    kind: tuple(table.says[kind] for table in _TABLES if kind in table.says)
    for kind in {kind for table in _TABLES for kind in table.says}
}
_OF_WHOLE_NETWORKS = (
    *(f"{kind} output" for kind in ("tensor", "tuple", "list", "dict", "nested")),
    *(f"{name} network" for name in TYPES),
    *("batch 1", "odd size", "several inputs"),
    *("intermediate returned", "inner value used outside its site"),
)
# Everything that `NetworkSpec.features` may say.
FEATURES = frozenset(_OF_WHOLE_NETWORKS).union(*(table.names for table in _TABLES))


def chain_features(nodes: Nodes, depth: int) -> Iterator[str]:
    """The features of a chain and of all chains inside it; `depth` counts the joins around it."""
    around = (None, *nodes, None)
    for previous, node, following in zip(around, nodes, around[2:], strict=False):
        place = Place(previous, following, depth)
        for says in _SAYS.get(type(node), ()):  # of a kind in no table nothing is said
            yield from says(node, place)
        for chain in node.chains:
            yield from chain_features(chain, depth + 1)


def saved_names(nodes: Nodes, depth: int) -> Iterator[str]:
    """The names of values that are saved inside a join."""
    for node in nodes:
        if isinstance(node, Save) and depth:
            yield node.name
        for chain in node.chains:
            yield from saved_names(chain, depth + 1)


def recalled_names(nodes: Nodes) -> Iterator[str]:
    """The names of saved values that are read again."""
    for node in nodes:
        if isinstance(node, Recall):
            yield node.name
        for chain in node.chains:
            yield from recalled_names(chain)
