"""A working copy of a graph on which rules act, and the guards that all rules share.

The dialect: layers are `call_module` nodes. While rules run, a layer may be *virtual*: an
`AffineConv` or a finished module that stands under a target in `Net.virtual`. Only `Net.finish`
makes modules out of them and copies what was left untouched, so weights are cast and copied once
and the caller's model is never written to.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ._activation import Blockwise
from ._affine import AffineConv, is_finite
from ._code import share_lookups
from ._conditions import AGAIN, demand_sizes, put_conditions, take_conditions
from ._dialect import attribute, has_hooks, must_stay, replaced_method
from ._errors import Refusal, RmfxError, WeightError, fault
from ._infer import Inference, succeed
from ._kinds import is_ordinary
from ._meta import forget
from ._probes import OpenSizes
from ._ranks import BY_RANK, demand_ranks, ignores_rank
from ._sizes import Condition, Sizes, conditions_of
from .report import META_KEY, Report

Shape = tuple[int | None, ...]
CodeTransformer = Callable[[list[str]], list[str]]
ORIGIN = ("nn_module_stack", "source", "stack_trace")  # metadata: where a node comes from


@dataclass(frozen=True, eq=False)
class Virtual:
    """A layer that has no module yet."""

    layer: AffineConv | Blockwise
    dtype: torch.dtype
    device: torch.device


class ConvertedModule(fx.GraphModule):
    """What passes make: a GraphModule whose copies keep its metadata.

    torch's own keeps the metadata when it is copied, but not when it is pickled.
    Its code looks up modules less often, which shows in networks of many small layers.
    """

    def recompile(self) -> fx.graph.PythonCode:
        """Writes the code of the graph anew."""
        with self.graph.on_generate_code(_then_share_lookups):
            return super().recompile()

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments = super().__reduce__()
        meta = {key: value for key, value in self.meta.items() if key.startswith("rmfx_")}
        return _restore, (make, arguments, meta)


def _then_share_lookups(transformed: CodeTransformer | None) -> CodeTransformer:
    return lambda body: share_lookups(transformed(body) if transformed else body)


def _restore(
    make: Callable[..., fx.GraphModule],
    arguments: tuple[Any, ...],
    meta: dict[str, Any],
) -> ConvertedModule:
    plain = make(*arguments)
    gm = ConvertedModule(plain, plain.graph, type(plain).__name__)
    gm.training = plain.training
    gm.meta.update(meta)
    return gm


def copy_graph(gm: fx.GraphModule) -> fx.Graph:
    """A graph of its own for the same module; nodes keep their names and metadata."""
    graph = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, places, return_output_node=True)
    if isinstance(output, tuple):
        value, node = output
        graph.output(value, getattr(node, "type", None)).meta = copy.copy(node.meta)
    for node in graph.nodes:
        if isinstance(node.type, str):  # torch 2.13 cannot pickle them
            node.type = None
    graph.set_codegen(gm.graph._codegen)
    return graph


class Net:
    """A graph under rewriting.

    Attributes:
        graph: a private copy of the source's graph.
        virtual: target -> layer or module that is to stand there.
        values: node -> name of the source's node whose value it holds, where it holds one.
        resized: whether a value has other channels than it had.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.source = gm
        self.graph = copy_graph(gm)
        before = dict(zip(self.graph.nodes, gm.graph.nodes, strict=True))
        self._given = take_conditions(self.graph)
        self._before = {node.name: before[node] for node in self.graph.nodes}
        self.virtual: dict[str, Virtual | nn.Module] = {}
        self.values: dict[fx.Node, str] = {n: n.name for n in self.graph.nodes}
        self._modules = dict(gm.named_modules(remove_duplicate=False))
        # A target freed by a rewrite keeps its module out of the result, its name is reused.
        self._names = set(self._modules) | {n for n, _ in gm.named_parameters()}
        self._sites: Counter[int] = Counter()
        self._owners: dict[int, set[int]] = {}
        for node in self.graph.nodes:
            self._count(node)
        self._inference = Inference(self)
        self.rank = self._inference.rank
        self.channels = self._inference.channels
        self.without_channels = self._inference.without_channels
        self.dtype = self._inference.dtype
        self.sizes = Sizes(self)
        self._open = OpenSizes(gm)
        self._sizes_of_inputs: dict[str, dict[int, int]] = {}
        self._conditions: dict[Condition, None] = {}
        self.resized = False

    def _count(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self._modules.get(str(node.target))
            if module is not None:
                self._sites[id(module)] += 1
                for p in module.parameters():
                    self._owners.setdefault(id(p), set()).add(id(module))
        elif node.op == "get_attr":
            value = self.attribute(node)
            self._owners.setdefault(id(value), set()).add(id(node))

    # ---- reading ----------------------------------------------------------------------------

    def module(self, node: fx.Node) -> nn.Module | None:
        """The existing module that a node calls, None for other nodes and for virtual layers."""
        if node.op != "call_module" or node.target in self.virtual:
            return None
        return self._modules.get(str(node.target))

    def replacement(self, node: fx.Node) -> Virtual | nn.Module | None:
        """What a rule has put under the node's target, if anything."""
        return self.virtual.get(str(node.target)) if node.op == "call_module" else None

    def is_open(self, node: fx.Node, dim: int) -> bool:
        """Whether a size that was noted of a value is another one at other sizes of the inputs.

        Args:
            dim: of the size, counted from the front.
        """
        name = self.values.get(node)
        return name is not None and self._open(name, dim)

    def attribute(self, node: fx.Node) -> object:
        """The value behind a get_attr node."""
        return attribute(self.source, node)

    def guard(self, node: fx.Node) -> Refusal | None:
        """Why the module of a call_module node must stay as it is, if it must.

        Its weights may be baked into another layer only if nothing else looks at them.
        """
        module = self.module(node)
        if module is None:
            return None
        name = str(node.target)
        if has_hooks(module):
            return Refusal(f"module {name} has hooks; remove them first", (node.name,))
        if (method := replaced_method(module)) is not None:
            return Refusal(f"module {name} has a {method} method of its own", (node.name,))
        if parametrize.is_parametrized(module):
            return Refusal(
                f"module {name} is parametrized; call "
                "torch.nn.utils.parametrize.remove_parametrizations first",
                (node.name,),
            )
        if next(module.parameters(), None) is not None:
            if self._sites[id(module)] > 1:
                return Refusal(
                    f"module {name} is called {self._sites[id(module)]} times; give each call its "
                    "own copy of the module",
                    (node.name,),
                )
            if any(len(self._owners[id(p)]) > 1 for p in module.parameters()):
                return Refusal(
                    f"a parameter of module {name} is also used elsewhere; give each use its own",
                    (node.name,),
                )
        return None

    def is_touched(self, module: nn.Module) -> bool:
        """Whether hooks or parametrizations change what a module does."""
        if has_hooks(module) or parametrize.is_parametrized(module):
            return True
        return replaced_method(module) is not None

    def bake(self, nodes: Iterable[fx.Node]) -> None:
        """Take note that nodes are about to become parts of other layers.

        The result then demands the input sizes for which they are linear, and operands alike.
        """
        for node in nodes:
            found = conditions_of(self, node)
            if not isinstance(found, Refusal):
                self._conditions.update(dict.fromkeys(found))

    def fix_channels(self, node: fx.Node, dims: int) -> None:
        """Take note that weights are about to be made for a value's number of channels.

        Where no layer fixes it, the result then demands the sizes of its inputs that do.
        """
        name, rank = self.values.get(node), self.rank(node)
        if name is not None and rank is not None:
            axis = 1 if dims else rank - 1
            for x, sizes in self._open.sizes_of_inputs(name, axis).items():
                self._sizes_of_inputs.setdefault(x, {}).update(sizes)

    # ---- writing ----------------------------------------------------------------------------

    def put(self, layer: Virtual | nn.Module, source: fx.Node, name: str, like: fx.Node) -> fx.Node:
        """Insert a call of a new layer, reading `source`, at the graph's insert point.

        Args:
            name: module path to use, made unique if taken.
            like: node whose place in the source code the new node inherits.
        """
        target = self.claim(name, layer)
        node = self.graph.create_node("call_module", target, (source,))
        node.meta = {k: like.meta[k] for k in ORIGIN if k in like.meta}
        return node

    def claim(self, name: str, layer: Virtual | nn.Module) -> str:
        """Give a layer a target: the name, made unique if taken."""
        target = self._unique(name)
        self.virtual[target] = layer
        return target

    def release(self, nodes: Iterable[fx.Node]) -> None:
        """Free the targets of call_module nodes that are about to be erased."""
        for node in nodes:
            if node.op != "call_module":
                continue
            target = str(node.target)
            self.virtual.pop(target, None)
            module = self._modules.get(target)
            if module is None or self._sites[id(module)] == 1:
                self._names.discard(target)
                self._modules.pop(target, None)
            elif module is not None:
                self._sites[id(module)] -= 1

    def replace(self, node: fx.Node, value: fx.Node) -> None:
        """Let the readers of a node read another value, and erase the node."""
        node.replace_all_uses_with(value)
        self.release([node])
        self.graph.erase_node(node)

    def drop(self, node: fx.Node, value: fx.Node) -> None:
        """Erase a node that does nothing to a value, whatever the number of its dimensions."""
        self._before.pop(self.values.get(node, ""), None)
        self.replace(node, value)

    def merge(self, first: fx.Node, second: fx.Node, layer: Virtual) -> None:
        """Let one node do the work of `second` after `first`; it keeps the first one's place.

        The conv's name is kept where a batch norm or a scale is merged with a conv.
        """
        self.bake([first, second])
        self.fix_channels(data_input(first), layer.layer.dims)
        named = first if self._weights(first) >= self._weights(second) else second
        modules = [n for n in (named, first, second) if n.op == "call_module"]
        target = str(modules[0].target) if modules else first.name
        name, like, source = named.name, named.meta, data_input(first)
        second.replace_all_uses_with(first)
        shape: dict[str, Any] = {k: second.meta[k] for k in ("shape", "dtype") if k in second.meta}
        self.release([first, second])
        self.graph.erase_node(second)
        first.op, first.target, first.name = "call_module", self._unique(target), name
        first.args, first.kwargs = (source,), {}
        self.virtual[str(first.target)] = layer
        first.meta = {**like, **shape}
        for known in (self._inference, self.sizes):
            known.succeed(first, second)
        succeed(self.values, first, second)

    def resize(self, node: fx.Node, axis: int, channels: int) -> None:
        """Take note that a node's value has other channels now: what tracing noted is no more."""
        self.resized = True
        forget(node)
        if "shape" in node.meta:
            shape = list(node.meta["shape"])
            shape[axis] = channels
            node.meta["shape"] = tuple(shape)
        self._inference.resize(node, channels)

    def _weights(self, node: fx.Node) -> int:
        made, module = self.replacement(node), self.module(node)
        if isinstance(made, Virtual):
            return made.layer.weight.numel() if isinstance(made.layer, AffineConv) else 0
        return sum(p.numel() for p in module.parameters()) if module is not None else 0

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
        rewritten = list(self._rewritten())
        memo: dict[int, object] = {}
        root: dict[str, object] = {}
        for node in list(self.graph.nodes):
            if node.op not in ("call_module", "get_attr") or node.target in root:
                continue
            target = str(node.target)
            if node.op == "get_attr":
                root[target] = _copied(self.attribute(node), memo, written="frozen" in node.meta)
            elif target in self.virtual:
                self._materialise(node, root)
            else:
                module = self._modules[target]
                memo.update(computed_tensors(module))
                root[target] = copy.deepcopy(module, memo)
        by_rank = not all(self._ignores_rank(node, root) for node in rewritten)
        put_conditions(self._all_conditions(by_rank), self.graph)
        gm = ConvertedModule(_tree(root), self.graph, type(self.source).__name__)
        gm.graph.lint()
        gm.meta = {**self.source.meta, **self._carried_report(), **(meta or {})}
        if not any(p.requires_grad for p in self.source.parameters()):
            gm.requires_grad_(False)
        return gm.eval()

    def _carried_report(self) -> dict[str, object]:
        """The report of an earlier pass, whose joins may stand elsewhere now, or nowhere."""
        before = self.source.meta.get(META_KEY)
        if not isinstance(before, Report):
            return {}
        where = {name: node.name for node, name in self.values.items() if not node._erased}
        rows = (replace(row, node=where.get(row.node or "")) for row in before.rows)
        return {META_KEY: replace(before, rows=tuple(rows))}

    def _rewritten(self) -> Iterator[fx.Node]:
        """Nodes that are new or another call than before, and those of the source they replace.

        Where channels have gone, it is all of them: what is read of a value has changed, too.
        """
        held = set()
        for node in self.graph.nodes:
            old = self._before.get(self.values.get(node, ""))
            same = old is not None and (old.op, old.target) == (node.op, node.target)
            if self.resized or not same or node.target in self.virtual:
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

    def _all_conditions(self, by_rank: bool) -> fx.Graph:
        """The conditions of the source, and those that the rewrites have added."""
        inputs = self.graph.find_nodes(op="placeholder")
        places = dict(zip(inputs, self._given.find_nodes(op="placeholder"), strict=True))
        for x, place in places.items():
            sizes, rank = self._sizes_of_inputs.get(x.name), self.rank(x)
            if sizes is not None and rank is not None:
                texts = [f"{n} channels" if d == 1 else f"size {n}" for d, n in sizes.items()]
                message = f"the network was converted for {' and '.join(texts)}; {AGAIN}"
                whole = [sizes.get(dim) for dim in range(rank)]
                demand_sizes(self._given, place, whole, message)
        if by_rank or self.source.meta.get(BY_RANK):
            demand_ranks(self._given, {node.name: self.rank(node) for node in inputs})
        for condition in self._conditions:
            condition.write(self._given, places)
        return self._given

    def _materialise(self, node: fx.Node, root: dict[str, object]) -> None:
        target = str(node.target)
        layer = self.virtual.pop(target)
        if isinstance(layer, nn.Module):
            root[target] = layer
            return
        if isinstance(layer.layer, Blockwise):
            root[target] = layer.layer.to_module(layer.dtype, layer.device)
            return
        try:
            *pads, conv = layer.layer.to_modules(layer.dtype, layer.device)
        except WeightError as error:
            raise WeightError(f"{node.name}: {error}") from None
        root[target] = conv
        for pad in pads:
            name = self._unique(f"{target}_pad")
            root[name] = pad
            with self.graph.inserting_before(node):
                before = self.graph.create_node("call_module", name, (data_input(node),))
            node.args = (before,)


def _tree(parts: Mapping[str, object]) -> nn.Module:
    """Modules and tensors by their paths as a tree, of which torch.fx takes them in graph order.

    Of a mapping it would take them by the depth of their paths, and again in graph order after
    pickling: the order of parameters, by which optimisers know them, would change.
    """
    tree = nn.Module()
    for target in sorted(parts, key=lambda path: path.count(".")):
        attach(tree, target, parts[target])
    return tree


def attach(root: nn.Module, target: str, value: object) -> None:
    """Put a module or tensor at a path, through modules made on the way."""
    *path, name = target.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root._modules[step]  # type: ignore[assignment]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


def computed_tensors(module: nn.Module) -> dict[int, object]:
    """Copies of tensors that deepcopy cannot copy: results of a computation, as in weight_norm."""
    return {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _copied(value: Any, memo: dict[int, object], *, written: bool) -> Any:
    """A copy of what a graph reads; of tensors one that a recorder of operators can follow.

    Args:
        written: whether the graph may write to it: then copies share memory as their originals do.
    """
    if type(value) is not Tensor or (written and value.is_leaf):
        return copy.deepcopy(value, memo)
    return memo.setdefault(id(value), value.detach().clone().requires_grad_(value.requires_grad))


def between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """The nodes of a graph behind one and before another one.

    Raises:
        InternalError: the other one does not come behind the first.
    """
    node = start.next
    while node is not end:
        if node.op == "root":  # where the graph ends, and begins again
            raise fault(end.name, f"it does not stand behind {start.name}")
        yield node
        node = node.next


def put_in_order(start: fx.Node, end: fx.Node) -> None:
    """Move the nodes between two others that stand before one that they read behind the rest.

    Raises:
        RmfxError: some nodes read each other.
    """
    waiting = list(between(start, end))
    unplaced, last = set(waiting), start
    while waiting:
        behind = []
        for node in waiting:
            if not unplaced.isdisjoint(node.all_input_nodes):
                behind.append(node)
                continue
            if last.next is not node:
                last.append(node)
            last = node
            unplaced.discard(node)
        if len(behind) == len(waiting):
            raise RmfxError(f"{behind[0].name}: a rewrite has made a cycle")
        waiting = behind


def data_input(node: fx.Node) -> fx.Node:
    """The first tensor a node reads that is not a constant of the model."""
    return next(n for n in node.all_input_nodes if n.op != "get_attr" and not n.meta.get("number"))


def with_channels(shape: Shape, channels: int, dims: int) -> Shape:
    """A shape with other channels, for layers of `dims` spatial dimensions."""
    return (shape[0], channels, *shape[2:]) if dims else (*shape[:-1], channels)


def positions(shape: Shape | None, dims: int) -> int | None:
    """Pixels or tokens in a batch, for layers of `dims` spatial dimensions."""
    if shape is None or any(n is None for n in shape):
        return None
    sizes = [int(n) for n in shape if n is not None]
    return math.prod(sizes[:1] + sizes[2:] if dims else sizes[:-1])


def check_weight(name: str, value: Tensor) -> None:
    """Raise WeightError unless `value` can be computed with."""
    if is_lazy(value):
        raise WeightError(f"{name}: the weight is not initialised; run the model once first")
    if value.is_meta:
        raise WeightError(
            f"{name}: the weight is on the meta device and has no values; load the weights first"
        )
    if not is_ordinary(value):
        return  # it stays as it is, in a layer that stays as it is
    if value.is_complex():
        raise WeightError(f"{name}: complex weights ({value.dtype}) are not supported")
    if value.is_quantized:
        raise WeightError(f"{name}: quantized weights are not supported; convert before quantising")
    if value.is_floating_point() and not is_finite(value):
        raise WeightError(f"{name}: the weight holds NaN or Inf; repair or reload the checkpoint")
