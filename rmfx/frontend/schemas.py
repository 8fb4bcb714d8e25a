"""What operators write to, share memory with and draw at random, as their schemas tell it.

A schema names every argument that is written to, alone or in a list, at any place or by keyword,
and says whether the value lies in the memory of an argument. What none tells stands here, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from rmfx.ir.functions import PASSING_THROUGH, SHARING

Nodes = tuple[fx.Node, ...]
MODES = ("training", "train", "use_input_stats")


@dataclass(frozen=True)
class Effects:
    """What a call does.

    Attributes:
        writes: values whose memory it writes to.
        aliases: values in whose memory its own value may lie.
        owned: tensors of the called module that it writes to.
        draws: whether its value is drawn at random, or left as it was found in memory.
        unknown: why nothing is known of it, if so; it then may write to all that it reads.
    """

    writes: Nodes = ()
    aliases: Nodes = ()
    owned: tuple[Tensor, ...] = ()
    draws: bool = False
    unknown: str | None = None


def of_overloads(node: fx.Node, overloads: Iterable[OpOverload]) -> Effects:
    """What those of an operator's overloads do that can take a call; all, if none seems to."""
    every = [(op, by_schema(node, op._schema)) for op in overloads]
    fitting = [(op, given) for op, given in every if _takes(op._schema, node, given)]
    found = [of_overload(node, op, given) for op, given in fitting or every]
    return Effects(
        unique(n for one in found for n in one.writes),
        unique(n for one in found for n in one.aliases),
        draws=any(one.draws for one in found),
    )


def by_schema(node: fx.Node, schema: Any) -> dict[str, Any]:
    """Arguments by the names of a schema; torch's functions say `input` for `self`."""
    names = [a.name for a in schema.arguments]
    by_place = [a.name for a in schema.arguments if not a.kwarg_only]
    given = dict(zip(by_place, node.args, strict=False))
    for name, value in node.kwargs.items():
        other = {"input": "self", "self": "input"}.get(name, name)
        given[other if name not in names and other in names else name] = value
    return given


def _takes(schema: Any, node: fx.Node, given: Mapping[str, Any]) -> bool:
    """Whether an overload has a place for every argument of a call, and no place left empty."""
    places = [a for a in schema.arguments if not a.kwarg_only]
    known = {a.name for a in schema.arguments}
    complete = all(a.name in given or a.has_default_value() for a in schema.arguments)
    return complete and len(node.args) <= len(places) and set(given) <= known


def of_overload(node: fx.Node, op: OpOverload, given: Mapping[str, Any]) -> Effects:
    """What an operator does, given its arguments by their names."""
    schema = op._schema
    shared = [a for a in schema.arguments if a.alias_info is not None]
    written = [a for a in shared if a.alias_info is not None and a.alias_info.is_write]
    writes = [n for a in written for n in _written(node, a, given)]
    returned = any(r.alias_info is not None for r in schema.returns)
    aliases = [n for a in shared if returned for n in nodes_in(given.get(a.name))]
    name = op._opname
    if (name in PASSING_THROUGH or _is_foreign_composite(op)) and not returned:
        aliases = node.all_input_nodes
    if name in SHARING:
        aliases = node.all_input_nodes
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    hidden = hidden_writes({**defaults, **given})
    return Effects(unique((*writes, *hidden)), unique(aliases), draws=draws(op, given))


def _written(node: fx.Node, argument: Any, given: Mapping[str, Any]) -> Iterator[fx.Node]:
    """What a call gives for an argument that is written to; all it reads if that is unclear."""
    if argument.name in given:
        yield from nodes_in(given[argument.name])
    elif not argument.kwarg_only and not argument.has_default_value():
        yield from node.all_input_nodes


def _is_foreign_composite(op: OpOverload) -> bool:
    """Whether an operator is made of others by a library that nobody holds to its schema."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return op.namespace not in ("aten", "prims", "torchvision") and op.has_kernel_for_dispatch_key(
        composite
    )


def hidden_writes(given: Mapping[str, Any]) -> Nodes:
    """Statistics in training mode and embeddings of a largest norm, which no schema tells."""
    found: list[fx.Node] = []
    modes = [given[name] for name in MODES if name in given]
    if modes and modes[0] not in (False, None):
        found += nodes_in((given.get("running_mean"), given.get("running_var")))
    if given.get("max_norm") is not None:
        found += nodes_in(given.get("weight"))
    return tuple(found)


def draws(op: OpOverload, given: Mapping[str, Any]) -> bool:
    """Whether an operator's value is drawn at random, or left as it was found in memory.

    Args:
        given: its arguments by their names in its schema.
    """
    arguments = {a.name: a for a in op._schema.arguments}
    if "empty" in op._opname:
        return True
    if torch.Tag.nondeterministic_seeded not in op.tags and "generator" not in arguments:
        return False
    switches: dict[str, tuple[Any, ...]] = {**dict.fromkeys(MODES, (False,)), "dropout_p": (0,)}
    for name in switches.keys() & arguments.keys():
        a = arguments[name]
        value = given.get(name, a.default_value if a.has_default_value() else None)
        if not isinstance(value, fx.Node) and value in switches[name]:
            return False
    return True


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes in an argument, however deep in lists."""
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def unique(nodes: Iterable[fx.Node]) -> Nodes:
    """Nodes in order, each once."""
    return tuple(dict.fromkeys(nodes))
