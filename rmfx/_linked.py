"""Weights as functions of the original parameters, so that gradients reach them.

A pass computes new weights from old ones with ordinary tensor operators. `linked` runs it once and
writes down those operators; the result computes its weights in the graph, from the parameters as
they are at every call. Nothing is baked, so nothing can be stale.

The pass takes decisions as it goes, and none of them may rest on the values of today's weights (a
bias that happens to be zero, a range that only they prove). So it runs on a copy with random
weights, in which nothing is special.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._activation import ChannelPReLU, MaskedActivation, channel_prelu
from ._affine import CONV_FUNCTIONS, CONVS
from ._calls import BATCH_NORMS
from ._dialect import attribute
from ._dynamo import Lifted
from ._errors import RmfxError
from ._graph import ConvertedModule

aten = torch.ops.aten
PRELUS = (nn.PReLU, ChannelPReLU)
# Operators whose result is their input, as far as values and gradients go.
TRANSPARENT = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run as a graph over some named tensors."""

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._memory: dict[tuple[object, ...], fx.Node] = {}
        self._storage: dict[fx.Node, set[int]] = {}  # of what a node reads and gives
        self._given: dict[fx.Node, set[int]] = {}  # of what it gives or writes
        self._copies: set[int] = set()  # tensors that deepcopy has made of nobody knows which
        self._alive: list[Tensor] = []
        self._tensors = dict(sources)
        self.sources: dict[str, fx.Node] = {}
        for name, tensor in sources.items():
            if id(tensor) not in self._nodes:  # tied weights are one
                self._note(tensor, self.graph.get_attr(name))
            self.sources[name] = self._nodes[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func in TRANSPARENT:
            self._note(result, self.node(tensors[0]))
            return result
        if func is aten.set_.source_Storage_storage_offset:  # how deepcopy fills a buffer
            del self._nodes[id(result)]
            self._copies.add(id(result))
            self._alive.append(result)
            return result
        results = pytree.tree_leaves(result)
        if not any(isinstance(t, Tensor) for t in results):
            return result  # a number, with which the pass decides something
        arguments = pytree.tree_map_only(Tensor, self.node, (args, kwargs))
        call = self.graph.call_function(func, *arguments)
        self._given[call] = {_storage(t) for t in results if isinstance(t, Tensor)}
        self._storage[call] = self._given[call] | {_storage(t) for t in tensors}
        if isinstance(result, Tensor):
            self._note(result, call)
        else:
            for i, tensor in enumerate(result):
                self._note(tensor, self.graph.call_function(_item, (call, i)))
        return result

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._memory[_place(tensor)] = node
        self._storage.setdefault(node, set()).add(_storage(tensor))
        self._alive.append(tensor)  # an id is a tensor's own for as long as it lives

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that holds a tensor; one made elsewhere is a constant."""
        found = self._nodes.get(id(tensor))
        if found is None and not tensor.is_meta:  # `tensor.data` is another name, unrecorded
            found = self._memory.get(_place(tensor))
        if found is None and id(tensor) in self._copies:
            raise RmfxError(f"it is not known of which weight a {tuple(tensor.shape)} is a copy")
        if found is None:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor.detach().clone()
            found = self.graph.get_attr(name)
            self._note(tensor, found)
        return found

    def node_of_copy(self, name: str, tensor: Tensor) -> fx.Node:
        """The node that holds a tensor of the result, which may be a copy made by `deepcopy`.

        Raises:
            RmfxError: nobody saw how it was made, so it may hold today's random weights.
        """
        if id(tensor) in self._nodes or _place(tensor) in self._memory:
            return self.node(tensor)
        source = self._tensors.get(name)
        if source is None or not torch.equal(source, tensor):
            raise RmfxError(f"{name}: it is not known how this weight follows from the parameters")
        return self.sources[name]

    def needed(self, outputs: set[fx.Node]) -> list[fx.Node]:
        """The nodes on which some nodes depend, in order, with the writes to their memory."""
        needed = set(outputs)
        memory = {place for node in outputs for place in self._storage[node]}
        for node in reversed(self.graph.nodes):
            writes = node.op == "call_function" and _writes(node) and self._storage[node] & memory
            if node in needed or writes:
                needed.add(node)
                needed.update(node.all_input_nodes)
                memory |= self._storage[node]
        return [node for node in self.graph.nodes if node in needed]

    def varying(self) -> set[fx.Node]:
        """The nodes whose values depend on the sources, at once or by a later write."""
        found, memory = set(self.sources.values()), set[int]()
        for node in self.graph.nodes:
            if any(n in found for n in node.all_input_nodes) or self._storage[node] & memory:
                found.add(node)
                memory |= self._given.get(node, set())
        return found | {node for node in self.graph.nodes if self._storage[node] & memory}


def _item(values: Any, index: int) -> Any:
    return values[index]


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: Tensor) -> tuple[object, ...]:
    layout = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)
    return (_storage(tensor), *layout)


# ---- the graph ----------------------------------------------------------------------------------


def linked(
    source: fx.GraphModule,
    convert: Callable[[fx.GraphModule], fx.GraphModule],
    lifted: Sequence[Lifted] = (),
) -> fx.GraphModule:
    """What a pass makes of a graph, with weights that follow the parameters of the graph.

    Args:
        source: a graph in the dialect.
        convert: the pass; its decisions may rest on random weights, not on their values.
        lifted: parameters that the graph is handed at every call, and that it shall read there.

    Returns:
        A graph that shares the parameters and buffers of `source` and computes the weights from
        them at every call.

    Raises:
        RmfxError: a layer was made whose weights cannot be handed over.
    """
    generic = _with_random_weights(source)
    recorder = _Recorder(_tensors(generic))
    with recorder, torch.no_grad():
        converted = convert(generic)
    weights = {
        name: recorder.node_of_copy(name, tensor) for name, tensor in _tensors(converted).items()
    }
    linker = _Linker(source, converted, recorder, weights, {_place(x.value) for x in lifted})
    made = linker.link()
    if lifted:
        _read_inputs(made, lifted)
    return made


def _read_inputs(gm: fx.GraphModule, lifted: Sequence[Lifted]) -> None:
    """Let a graph read lifted tensors where it is handed them; there is nothing to check then."""
    inputs = gm.graph.find_nodes(op="placeholder")
    given = {_place(one.value): inputs[one.position] for one in lifted}
    for node in list(gm.graph.nodes):
        tensor = attribute(gm, node) if node.op == "get_attr" else None
        if isinstance(tensor, Tensor) and _place(tensor) in given:
            node.replace_all_uses_with(given[_place(tensor)])
            gm.graph.erase_node(node)
    for check in gm.graph.find_nodes(
        op="call_function", target=torch.ops.rmfx.weights_are_fresh.default
    ):
        for user in list(check.users):
            gm.graph.erase_node(user)
        gm.graph.erase_node(check)
    gm.delete_all_unused_submodules()
    gm.recompile()


def _tensors(gm: nn.Module) -> dict[str, Tensor]:
    parameters = gm.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(gm.named_buffers(remove_duplicate=False))}


def _with_random_weights(source: fx.GraphModule) -> fx.GraphModule:
    generic = copy.deepcopy(source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in _tensors(generic).items():
            if not tensor.is_floating_point():
                continue
            size = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
            sign = torch.randint(2, tensor.shape, generator=generator) * 2 - 1
            tensor.copy_(size if name.endswith("running_var") else size * sign)
    return generic


class _Linker:
    """Puts recorded weights and a converted graph together."""

    def __init__(
        self,
        source: fx.GraphModule,
        converted: fx.GraphModule,
        recorder: _Recorder,
        weights: Mapping[str, fx.Node],
        handed: set[tuple[object, ...]],
    ) -> None:
        self._handed = handed
        self._source, self._converted, self._recorder = source, converted, recorder
        self._weights = weights
        self._varying = recorder.varying()
        # Looked up for every node.
        self._modules = dict(source.named_modules())
        self._tensors = _tensors(source)
        self._source_nodes = set(recorder.sources.values())
        self._graph = fx.Graph()
        self._root: dict[str, Any] = {}
        self._places: dict[fx.Node, fx.Node] = {}

    def link(self) -> fx.GraphModule:
        """The graph of both."""
        gm = self._converted
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                self._places[node] = self._graph.node_copy(node)
        layers = {node: self._weights_of(node) for node in gm.graph.nodes}
        used = {self._weights[name] for names in layers.values() for name in names or ()}
        used |= {self._weights[str(node.target)] for node in gm.graph.nodes if self._varies(node)}
        for node in self._recorder.needed(used):
            self._copy_recorded(node)
        for node in gm.graph.nodes:
            if node.op != "placeholder":
                self._copy(node, layers[node])
        self._graph.set_codegen(gm.graph._codegen)
        made = ConvertedModule(self._root, self._graph, type(self._source).__name__)
        made.meta = dict(gm.meta)
        made.graph.lint()
        return made.eval()

    def _copy_recorded(self, node: fx.Node) -> None:
        copied = self._graph.node_copy(node, lambda n: self._places[n])
        self._places[node] = copied
        if node.op == "get_attr":
            name = str(node.target)
            of_source = node in self._source_nodes
            self._root[name] = (self._tensors if of_source else self._recorder.constants)[name]

    def _weights_of(self, node: fx.Node) -> tuple[str, ...] | None:
        """Names of the weights that a node's module gets from the graph; None to call it as is."""
        if node.op != "call_module":
            return None
        module = self._converted.get_submodule(str(node.target))
        names = tuple(f"{node.target}.{name}" for name in _tensors(module))
        if not any(self._weights[name] in self._varying for name in names):
            return None
        if self._is_untouched(module, str(node.target)):
            return None
        if type(module) not in (*CONVS, *BATCH_NORMS, *PRELUS, MaskedActivation):
            raise RmfxError(
                f"{node.name}: a {type(module).__name__} cannot take its weights from the graph; "
                "convert without differentiable=True"
            )
        return names

    def _is_untouched(self, module: nn.Module, target: str) -> bool:
        """Whether a module is a mere copy of the source's."""
        own = self._modules.get(target)
        if own is None or type(own) is not type(module):
            return False
        if any(_place(tensor) in self._handed for tensor in _tensors(own).values()):
            return False
        names = [f"{target}.{name}" for name in _tensors(module)]
        sources = self._recorder.sources
        return all(sources.get(name) is _origin(self._weights[name]) for name in names)

    def _copy_masked(self, node: fx.Node, module: MaskedActivation) -> None:
        """A masked activation, one of whose activations has slopes that vary, in single steps."""
        x = y = self._places[node.all_input_nodes[0]]
        for i, activation in enumerate(module.activations):
            mask, target = f"{node.target}.mask{i}", f"{node.target}.activations.{i}"
            self._root[mask] = getattr(module, f"mask{i}")
            if isinstance(activation, PRELUS):
                weight = self._places[self._weights[f"{target}.weight"]]
                value = self._graph.call_function(_function(activation), (x, weight))
            else:
                self._root[target] = activation
                value = self._graph.call_module(target, (x,))
            y = self._graph.call_function(torch.where, (self._graph.get_attr(mask), value, y))
        y.name, y.meta = node.name, dict(node.meta)
        self._places[node] = y

    def _varies(self, node: fx.Node) -> bool:
        """Whether a node reads a constant that was computed from the sources."""
        if node.op != "get_attr" or str(node.target) in self._tensors:
            return False
        return self._weights.get(str(node.target)) in self._varying

    def _copy(self, node: fx.Node, names: tuple[str, ...] | None) -> None:
        if self._varies(node):
            self._places[node] = self._places[self._weights[str(node.target)]]
            return
        module = self._converted.get_submodule(str(node.target)) if names else None
        if isinstance(module, MaskedActivation):
            self._copy_masked(node, module)
            return
        copied = self._graph.node_copy(node, lambda n: self._places[n])
        self._places[node] = copied
        target = str(node.target)
        if names is not None and module is not None:
            given = {name.rpartition(".")[2]: self._places[self._weights[name]] for name in names}
            copied.op, copied.target = "call_function", _function(module)
            x = copied.args[0] if copied.args else next(iter(copied.kwargs.values()))
            copied.args, copied.kwargs = _arguments(module, x, given), {}
        elif node.op == "call_module":
            if self._is_known(target):
                self._root[target] = self._source.get_submodule(target)
            else:  # constants, which training must not touch
                constant = self._converted.get_submodule(target)
                self._root[target] = constant.requires_grad_(False)
        elif node.op == "get_attr":
            own = self._tensors.get(target)
            self._root[target] = attribute(self._converted, node) if own is None else own

    def _is_known(self, target: str) -> bool:
        module = self._converted.get_submodule(target)
        return self._is_untouched(module, target) and bool(_tensors(module))


def _origin(node: fx.Node) -> fx.Node:
    """The node that a weight is a plain copy of."""
    while node.target in (aten.clone.default, aten.copy_.default):
        node = node.args[-1] if node.target is aten.copy_.default else node.args[0]  # type: ignore[assignment]
    return node


def _function(module: nn.Module) -> Callable[..., Tensor]:
    if isinstance(module, nn.PReLU):
        return F.prelu
    if isinstance(module, ChannelPReLU):
        return channel_prelu
    if isinstance(module, BATCH_NORMS):
        return F.batch_norm
    return CONV_FUNCTIONS[CONVS.index(type(module))]


def _arguments(module: Any, x: Any, weights: Mapping[str, fx.Node]) -> tuple[Any, ...]:
    if isinstance(module, PRELUS):
        return (x, weights["weight"])
    if isinstance(module, nn.Linear):
        return (x, weights["weight"], weights.get("bias"))
    if isinstance(module, BATCH_NORMS):
        names = ("running_mean", "running_var", "weight", "bias")
        return (x, *(weights.get(name) for name in names), False, 0.0, module.eps)
    options = (module.stride, module.padding, module.dilation, module.groups)
    return (x, weights["weight"], weights.get("bias"), *options)
