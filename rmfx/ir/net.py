"""A working copy of a graph on which rules act, and the guards that all rules share.

The dialect: layers are `call_module` nodes. While rules run, a layer may be *virtual*: an
`AffineConv` or a finished module that `Net.set` puts under a target. Only `Net.finish`
makes modules out of them and copies what was left untouched, so weights are cast and copied once
and the caller's model is never written to.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from torch import fx, nn

from rmfx.errors import WeightError, fault
from rmfx.modules.copies import computed_tensors
from rmfx.report import META_KEY, REWRITES_KEY, Report

from .callees import Callees
from .conditions import Condition, put_conditions, put_inputs_first
from .converted import ConvertedModule, as_tree, copied_value, copy_graph
from .demands import Demands
from .elements import Virtual
from .facts import Inference
from .memo import succeed
from .nodes import data_input, must_stay, reads_among_writes
from .notes import OF_VALUE, ORIGIN, forget, notes_of, set_shape, shape_of, why_frozen
from .open_sizes import OpenSizes
from .own_types import OwnTypes
from .ranks import BY_RANK, assumed_ranks, demand_assumed, ignores_rank


class Analysis(Protocol):
    """What is found out about a net's values on demand, and kept while rules rewrite it."""

    def succeed(self, node: fx.Node, other: fx.Node) -> None:
        """Take note that a node holds another one's value from now on."""


A = TypeVar("A", bound=Analysis)


class Net:
    """A graph under rewriting.

    Args:
        gm: the graph.
        may_copy: whether a call of a layer that others share may get a copy of its own.

    Attributes:
        graph: a private copy of the source's graph.
        resized: whether a value has other channels than it had.
        rewrites: how often each rule has rewritten something, those of nets before it as well.
    """

    def __init__(self, gm: fx.GraphModule, *, may_copy: bool = False) -> None:
        self.source = gm
        self.graph = copy_graph(gm)
        before = dict(zip(self.graph.nodes, gm.graph.nodes, strict=True))
        self._demands = Demands(self.graph)
        self.demand = self._demands.add
        self._before = {node.name: before[node] for node in self.graph.nodes}
        self._callees = Callees(gm, self.graph, may_copy=may_copy)
        self.module = self._callees.module
        self.replacement = self._callees.replacement
        self.callee = self._callees.callee
        self.attribute = self._callees.attribute
        self.constant = self._callees.constant
        self.guard = self._callees.guard
        self._of_source = frozenset(self._before)
        self._reads = reads_among_writes(self.graph)
        self._values = {n: n.name for n in self.graph.nodes}  # whose of the source's each holds
        # A target freed by a rewrite keeps its module out of the result, its name is reused.
        self._names = set(self._callees.modules) | {n for n, _ in gm.named_parameters()}
        self._inference = Inference(self._callees, self.is_open)
        self.rank = self._inference.rank
        self.channels = self._inference.channels
        self.facts = self._inference
        self.without_channels = self._inference.without_channels
        self.dtype = self._inference.dtype
        self.is_real = self._inference.is_real
        self.has_own_type = OwnTypes(self._callees)
        self._analyses: dict[type[Analysis], Analysis] = {}
        self._open = OpenSizes(gm)
        self.resized = False
        self.rewrites: Counter[str] = Counter(gm.meta.get(REWRITES_KEY))

    # ---- reading ----------------------------------------------------------------------------

    def is_of_source(self, name: str) -> bool:
        """Whether a node of the source has that name."""
        return name in self._of_source

    def stands_for(self, node: fx.Node) -> str | None:
        """The name of the source's node whose value a node holds, None if it holds another one."""
        return self._values.get(node)

    def misread(self) -> fx.Node | None:
        """A value that is written to and has got a reader among other writes than its own."""
        if not self._reads:
            return None
        now = reads_among_writes(self.graph)
        return next(
            (n for n, places in now.items() if not places <= self._reads.get(n, places)), None
        )

    def places(self) -> dict[str, str]:
        """The names of the nodes that hold values of the source, by the names of its nodes."""
        return {name: node.name for node, name in self._values.items() if not node._erased}

    def is_open(self, node: fx.Node, dim: int) -> bool:
        """Whether a size that was noted of a value is another one at other sizes of the inputs.

        Args:
            dim: of the size, counted from the front.
        """
        name = self.stands_for(node)
        return name is not None and self._open(name, dim)

    def is_sure(self, node: fx.Node, dim: int) -> bool:
        """Whether a size that was noted of a value is proven to be that of every call."""
        name = self.stands_for(node)
        return name is not None and not (
            self._open(name, dim) or self._open.sizes_of_inputs(name, dim)
        )

    def analysis(self, kind: type[A], make: Callable[[], A]) -> A:
        """What an analysis has found out about this net: made once and kept."""
        found = self._analyses.get(kind)
        if found is None:
            found = self._analyses[kind] = make()
        return found  # type: ignore[return-value]

    def fix_channels(self, node: fx.Node, dims: int) -> None:
        """Take note that weights are about to be made for a value's number of channels.

        Where no layer fixes it, the result then demands the sizes of its inputs that do.
        """
        name, rank = self.stands_for(node), self.rank(node)
        if name is not None and rank is not None:
            axis = 1 if dims else rank - 1
            for x, sizes in self._open.sizes_of_inputs(name, axis).items():
                self._demands.fix(x, sizes)

    def fix_sizes(self) -> None:
        """Take note that the result will hold for inputs of the example's sizes only."""
        for x in self.graph.find_nodes(op="placeholder"):
            shape = shape_of(x, ())
            sizes = {dim: size for dim, size in enumerate(shape) if dim > 1 and size is not None}
            self._demands.fix(x.name, sizes)

    # ---- writing ----------------------------------------------------------------------------

    def put(self, layer: Virtual | nn.Module, source: fx.Node, name: str, like: fx.Node) -> fx.Node:
        """Insert a call of a new layer, reading `source`, at the graph's insert point.

        Args:
            name: module path to use, made unique if taken.
            like: node whose place in the source code the new node inherits.
        """
        target = self.claim(name, layer)
        node = self.graph.create_node("call_module", target, (source,))
        node.meta = notes_of(like, *ORIGIN)
        return node

    def claim(self, name: str, layer: Virtual | nn.Module) -> str:
        """Give a layer a target: the name, made unique if taken."""
        target = self._unique(name)
        self._callees.virtual[target] = layer
        return target

    def set(self, node: fx.Node, layer: Virtual | nn.Module) -> None:
        """Let a call_module node call another layer."""
        self._callees.virtual[str(node.target)] = layer

    def make_stand_for(self, node: fx.Node, name: str | None) -> None:
        """Take note that a node holds the value of the source's node of that name, or of none."""
        self._values.pop(node, None)
        if name is not None:
            self._values[node] = name

    def release(self, nodes: Iterable[fx.Node]) -> None:
        """Free the targets of call_module nodes that are about to be erased."""
        for node in nodes:
            if node.op != "call_module":
                continue
            if self._callees.release(str(node.target)):
                self._names.discard(str(node.target))

    def replace(self, node: fx.Node, value: fx.Node) -> None:
        """Let the readers of a node read another value, and erase the node."""
        node.replace_all_uses_with(value)
        self.release([node])
        self.graph.erase_node(node)

    def drop(self, node: fx.Node, value: fx.Node) -> None:
        """Erase a node that does nothing to a value, whatever the number of its dimensions."""
        self._before.pop(self.stands_for(node) or "", None)
        self.replace(node, value)

    def merge(
        self,
        first: fx.Node,
        second: fx.Node,
        layer: Virtual,
        conditions: Iterable[Condition],
    ) -> None:
        """Let one node do the work of `second` after `first`; it keeps the first one's place.

        The conv's name is kept where a batch norm or a scale is merged with a conv.

        Args:
            conditions: on the inputs, for which both are linear layers.
        """
        self.demand(conditions)
        self.fix_channels(data_input(first), layer.layer.dims)
        named = first if self._callees.weights(first) >= self._callees.weights(second) else second
        modules = [n for n in (named, first, second) if n.op == "call_module"]
        target = str(modules[0].target) if modules else first.name
        name, like, source = named.name, named.meta, data_input(first)
        second.replace_all_uses_with(first)
        shape = notes_of(second, *OF_VALUE)
        self.release([first, second])
        self.graph.erase_node(second)
        first.op, first.target, first.name = "call_module", self._unique(target), name
        first.args, first.kwargs = (source,), {}
        self.set(first, layer)
        first.meta = {**like, **shape}
        for known in (self._inference, *self._analyses.values()):
            known.succeed(first, second)
        succeed(self._values, first, second)

    def resize(self, node: fx.Node, axis: int, channels: int) -> None:
        """Take note that a node's value has other channels now: what tracing noted is no more."""
        self.resized = True
        forget(node)
        if shape_of(node) is not None:
            shape = list(shape_of(node))
            shape[axis] = channels
            set_shape(node, tuple(shape))
        self._inference.resize(node, channels)

    def _unique(self, name: str) -> str:
        candidate, i = name, 1
        while candidate in self._names or hasattr(fx.GraphModule, candidate):
            candidate, i = f"{name}_{i}", i + 1
        self._names.add(candidate)
        return candidate

    # ---- the result -------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove dead code."""
        self.graph.eliminate_dead_code(is_impure_node=must_stay)

    def finish(self, meta: Mapping[str, object] | None = None) -> fx.GraphModule:
        """The new module: dead code removed, virtual layers made, the rest copied.

        Raises:
            WeightError: a computed weight is not finite in its dtype.
        """
        self.sweep()
        if (misread := self.misread()) is not None:
            raise fault(misread.name, "a rule lets it be read behind a write to it, or before one")
        rewritten = list(self._rewritten())
        assumed = assumed_ranks(self.graph, self.rank, self._inference.layer)
        memo: dict[int, object] = {}
        root: dict[str, object] = {}
        for node in list(self.graph.nodes):
            if node.op not in ("call_module", "get_attr") or node.target in root:
                continue
            target = str(node.target)
            if node.op == "get_attr":
                root[target] = copied_value(
                    self.attribute(node), memo, written=why_frozen(node) is not None
                )
            elif target in self._callees.virtual:
                self._materialise(node, root)
            else:
                module = self._callees.modules[target]
                memo.update(computed_tensors(module))
                root[target] = copy.deepcopy(module, memo)
        put_inputs_first(self.graph)
        by_rank = not all(self._ignores_rank(node, root) for node in rewritten)
        by_rank = by_rank or bool(self.source.meta.get(BY_RANK))
        if by_rank:
            demand_assumed(self.graph, assumed)
        conditions = self._demands.write(self.rank, by_rank=by_rank)
        put_conditions(conditions, self.graph)
        gm = ConvertedModule(as_tree(root), self.graph, type(self.source).__name__)
        gm.graph.lint()
        gm.meta = {**self.source.meta, **self._carried_report(), **(meta or {})}
        gm.meta[REWRITES_KEY] = dict(self.rewrites)
        if not any(p.requires_grad for p in self.source.parameters()):
            gm.requires_grad_(False)
        return gm.eval()

    def _carried_report(self) -> dict[str, object]:
        """The report of an earlier pass, whose joins may stand elsewhere now, or nowhere."""
        before = self.source.meta.get(META_KEY)
        if not isinstance(before, Report):
            return {}
        where = self.places()
        rows = (replace(row, node=where.get(row.node or "")) for row in before.rows)
        return {META_KEY: replace(before, rows=tuple(rows))}

    def _rewritten(self) -> Iterator[fx.Node]:
        """Nodes that are new or another call than before, and those of the source they replace.

        Where channels have gone, it is all of them: what is read of a value has changed, too.
        """
        held = set()
        for node in self.graph.nodes:
            old = self._before.get(self.stands_for(node) or "")
            same = old is not None and (old.op, old.target) == (node.op, node.target)
            if self.resized or not same or node.target in self._callees.virtual:
                yield node
            elif old is not None:
                held.add(old)
        yield from (old for old in self._before.values() if old not in held)

    def _ignores_rank(self, node: fx.Node, root: Mapping[str, object]) -> bool:
        of_source = node.graph is self.source.graph
        module: Any = None
        if node.op == "call_module":
            target = str(node.target)
            module = self.source.get_submodule(target) if of_source else root[target]
        constants = {n: self.attribute(n) for n in node.all_input_nodes if n.op == "get_attr"}
        return ignores_rank(node, module, constants)

    def _materialise(self, node: fx.Node, root: dict[str, object]) -> None:
        target = str(node.target)
        layer = self._callees.virtual.pop(target)
        if isinstance(layer, nn.Module):
            root[target] = layer
            return
        try:
            *pads, root[target] = layer.modules()
        except WeightError as error:
            raise WeightError(f"{node.name}: {error}") from None
        for pad in pads:
            name = self._unique(f"{target}_pad")
            root[name] = pad
            with self.graph.inserting_before(node):
                before = self.graph.create_node("call_module", name, (data_input(node),))
            node.args = (before,)
