"""A converted graph, and the operators that made its weights, put together as one graph.

The algebra computes in float64. Where it names the type of the weights the result asks a parameter
for its type, so the result can be cast as any other module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.affine import CONV_FUNCTIONS, CONVS
from rmfx.errors import RmfxError
from rmfx.ir.callees import Calls
from rmfx.ir.converted import ConvertedModule
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.nodes import attribute
from rmfx.modules.activations import (
    ChannelClamp,
    ChannelPReLU,
    Composed,
    MaskedActivation,
    channel_clamp,
    channel_prelu,
)

from .recording import Recorder, place

PRELUS = (nn.PReLU, ChannelPReLU)
OF_TENSORS = (MaskedActivation, ChannelClamp, Composed)  # activations that may hold some


def tensors_of(gm: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones by every name."""
    parameters = gm.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(gm.named_buffers(remove_duplicate=False))}


class Linker:
    """Puts recorded weights and a converted graph together.

    Args:
        source: the graph whose tensors the result reads.
        converted: what a pass made of a copy of it, with random weights.
        recorder: which operators it ran on them.
        made_by: the nodes of the source that make those of the recorder's sources that are no
            tensors of its own, by their names.
        handed: where tensors lie that the graph is handed at every call.
    """

    def __init__(
        self,
        source: fx.GraphModule,
        converted: fx.GraphModule,
        recorder: Recorder,
        made_by: Mapping[str, fx.Node],
        handed: set[tuple[object, ...]],
    ) -> None:
        self._handed = handed
        self._source, self._converted, self._recorder = source, converted, recorder
        self._made_by = made_by
        # Looked up for every node.
        self._made = tensors_of(converted)
        self._weights = {name: recorder.node(tensor) for name, tensor in self._made.items()}
        self._modules = dict(source.named_modules())
        self._tensors = tensors_of(source)
        self._by_type = {t.dtype: name for name, t in reversed(self._tensors.items())}
        self._by_device = {t.device: name for name, t in reversed(self._tensors.items())}
        self._source_nodes = set(recorder.sources.values())
        self._graph = fx.Graph()
        self._root: dict[str, Any] = {}
        self._places: dict[fx.Node, fx.Node] = {}  # of nodes of all three graphs
        self._own: dict[str, fx.Node] = {}  # of tensors of the source
        self._features: dict[tuple[str, str], fx.Node] = {}

    def link(self) -> fx.GraphModule:
        """The graph of both."""
        gm = self._converted
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                self._places[node] = self._graph.node_copy(node)
        layers = {node: self._weights_of(node) for node in gm.graph.nodes}
        used = {self._weights[name] for names in layers.values() for name in names or ()}
        used |= {self._weights[str(node.target)] for node in gm.graph.nodes if self._varies(node)}
        self._copy_own_code(used)
        for node in self._recorder.needed(used):
            self._copy_recorded(node)
        for node in gm.graph.nodes:
            if node.op != "placeholder":
                self._copy(node, layers[node])
        self._keep_names()
        self._graph.set_codegen(gm.graph._codegen)
        made = ConvertedModule(self._root, self._graph, type(self._source).__name__)
        made.meta = dict(gm.meta)
        made.graph.lint()
        shared = set(self._source.modules())
        for module in made.modules():
            module.training = module.training and module in shared  # which the model has, too
        return made

    def _keep_names(self) -> None:
        """Let the nodes of the converted graph have their names, which what makes weights may bear.

        By these names a report tells of sums, and a check finds them.
        """
        names = {self._places[node]: node.name for node in self._converted.graph.nodes}
        taken = set(names.values())
        for node in self._graph.nodes:
            if node not in names and node.name in taken:
                node._rename(f"{node.name}_of_weights")
        for node, name in names.items():
            node.name = name

    # ---- the weights ------------------------------------------------------------------------
    def _copy_own_code(self, used: set[fx.Node]) -> None:
        """Let the model's own operations make of its parameters what they did."""
        needed = {str(n.target) for n in self._recorder.needed(used) if n in self._source_nodes}
        wanted = {self._made_by[name] for name in needed if name in self._made_by}
        for node in reversed(self._source.graph.nodes):
            if node in wanted:
                wanted.update(node.all_input_nodes)
        for node in self._source.graph.nodes:
            if node in wanted:
                self._copy_own(node)
        places = {name: self._places.get(node) for name, node in self._made_by.items()}
        self._own |= {name: place for name, place in places.items() if place is not None}

    def _copy_own(self, node: fx.Node) -> None:
        target = str(node.target)
        if node.op == "get_attr":
            self._places[node] = self._own_tensor(target)
            return
        self._places[node] = self._graph.node_copy(node, lambda n: self._places[n])
        if node.op == "call_module":
            self._root[target] = self._source.get_submodule(target)

    def _own_tensor(self, name: str) -> fx.Node:
        """The node that reads a tensor of the source, or makes what stands for one."""
        if name not in self._own:
            self._own[name] = self._graph.get_attr(name)
            self._root[name] = self._tensors[name]
        return self._own[name]

    def _copy_recorded(self, node: fx.Node) -> None:
        if node in self._source_nodes:
            copied = self._own_tensor(str(node.target))
        elif node.op == "get_attr":
            name = self._free(str(node.target))
            copied = self._graph.get_attr(name)
            self._root[name] = self._recorder.constants[str(node.target)]
        else:
            options = {k: self._live(v) for k, v in node.kwargs.items()}  # stand before it
            copied = self._graph.node_copy(node, lambda n: self._places[n])
            copied.kwargs = options
        if node in self._recorder.doubles:
            copied = self._graph.call_method("to", (copied, torch.float64))
        self._places[node] = copied

    def _free(self, name: str) -> str:
        taken = (*self._tensors, *self._made, *self._root)
        candidates = (f"{name}_{i}" if i else name for i in count())
        return next(one for one in candidates if one not in taken)

    def _live(self, option: Any) -> Any:
        """A type or a device of the weights as it is at a call; float64 is that of the algebra."""
        if isinstance(option, torch.device) and option in self._by_device:
            return self._feature(self._by_device[option], "device")
        if isinstance(option, torch.dtype) and option is not torch.float64:
            return self._type(option)
        return fx.map_arg(option, lambda n: self._places[n])

    def _type(self, dtype: torch.dtype) -> Any:
        """The type at a call of the weights that have a type now."""
        name = self._by_type.get(dtype) if dtype.is_floating_point else None
        return self._feature(name, "dtype") if name else dtype

    def _feature(self, name: str, feature: str) -> fx.Node:
        if (name, feature) not in self._features:
            tensor = self._own_tensor(name)
            self._features[name, feature] = self._graph.call_function(getattr, (tensor, feature))
        return self._features[name, feature]

    def _weight(self, name: str) -> fx.Node:
        """The node that gives a weight of the result, in the type of the model's weights."""
        recorded, dtype = self._weights[name], self._made[name].dtype
        if recorded in self._source_nodes:
            return self._own_tensor(str(recorded.target))
        given = self._places[recorded]
        if dtype is not torch.float64 or dtype not in self._by_type:
            return given
        return self._graph.call_method("to", (given, self._type(dtype)))

    # ---- the layers -------------------------------------------------------------------------

    def _weights_of(self, node: fx.Node) -> tuple[str, ...] | None:
        """Names of the weights that a node's module gets from the graph; None to call it as is."""
        if node.op != "call_module":
            return None
        module = self._converted.get_submodule(str(node.target))
        names = tuple(f"{node.target}.{name}" for name in tensors_of(module))
        if not any(self._recorder.varies(self._weights[name]) for name in names):
            return None
        if self._is_untouched(module, str(node.target)):
            return None
        known = type(module) in (*CONVS, *BATCH_NORMS, *PRELUS, *OF_TENSORS)
        if not known or getattr(module, "padding_mode", "zeros") != "zeros":
            raise self._cannot(node, module)
        return names

    def _cannot(self, node: fx.Node, module: nn.Module) -> RmfxError:
        return RmfxError(
            f"{node.name}: a {type(module).__name__} cannot take its weights from the graph; "
            "convert without differentiable=True"
        )

    def _is_untouched(self, module: nn.Module, target: str) -> bool:
        """Whether a module is a mere copy of the source's."""
        own = self._modules.get(target)
        if own is None or type(own) is not type(module):
            return False
        if any(place(tensor) in self._handed for tensor in tensors_of(own).values()):
            return False
        names = [f"{target}.{name}" for name in tensors_of(module)]
        sources = self._recorder.sources
        return all(sources.get(n) is self._recorder.origin(self._weights[n]) for n in names)

    def _copy_masked(self, node: fx.Node, module: MaskedActivation) -> None:
        """A masked activation, one of whose activations has slopes that vary, in single steps."""
        x = y = self._places[node.all_input_nodes[0]]
        for i, activation in enumerate(module.activations):
            mask, target = f"{node.target}.mask{i}", f"{node.target}.activations.{i}"
            self._root[mask] = getattr(module, f"mask{i}")
            chosen = self._graph.get_attr(mask)
            if isinstance(activation, PRELUS):
                weight = self._weight(f"{target}.weight")
                value = self._step(node, _function(activation), (x, weight))
            else:
                own = self._step(node, torch.where, (chosen, x, 1.0))  # as the module does
                value = self._called(target, activation, own)
            y = self._step(node, torch.where, (chosen, value, y))
        self._stand_for(node, y)

    def _copy_clamp(self, node: fx.Node, module: ChannelClamp) -> None:
        bounds = [self._held(f"{node.target}.{name}") for name in ("low", "high")]
        x = self._places[node.all_input_nodes[0]]
        self._stand_for(node, self._step(node, channel_clamp, (x, *bounds)))

    def _called(self, target: str, activation: nn.Module, x: fx.Node) -> fx.Node:
        """What an activation gives, with the tensors that it reads as they are at a call."""
        if not isinstance(activation, Composed):
            self._root[target] = activation
            return self._graph.call_module(target, (x,))
        calls = activation.calls
        places: dict[fx.Node, fx.Node] = {}
        for node in calls.graph.nodes:
            inner = f"{target}.calls.{node.target}"
            if node.op == "placeholder":
                places[node] = x
            elif node.op == "get_attr":
                places[node] = self._held(inner)
            elif node.op == "output":
                return places[node.all_input_nodes[0]]
            else:
                places[node] = self._graph.node_copy(node, places.__getitem__)
                if node.op == "call_module":
                    places[node].target = inner
                    self._root[inner] = self._without_weights(calls, node, inner)
        raise RmfxError(f"{target}: calls without a result")

    def _without_weights(self, calls: fx.GraphModule, node: fx.Node, target: str) -> nn.Module:
        """A module that an activation calls, which holds nothing that varies."""
        module = calls.get_submodule(str(node.target))
        names = (f"{target}.{name}" for name in tensors_of(module))
        if any(self._recorder.varies(self._weights[name]) for name in names):
            raise self._cannot(node, module)
        return module

    def _held(self, name: str) -> fx.Node:
        """The node that reads a tensor of the result, which may follow from the weights."""
        if self._recorder.varies(self._weights[name]):
            return self._weight(name)
        self._root[name] = self._made[name].requires_grad_(False)
        return self._graph.get_attr(name)

    def _step(self, node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        """A call on the way to what a node gives."""
        return self._graph.create_node("call_function", function, args, name=f"{node.name}_step")

    def _stand_for(self, node: fx.Node, made: fx.Node) -> None:
        """Let a node of the result be known as the one that it stands for."""
        made.meta = dict(node.meta)
        self._places[node] = made

    def _varies(self, node: fx.Node) -> bool:
        """Whether a node reads a constant that was computed from the sources."""
        if node.op != "get_attr" or str(node.target) in self._tensors:
            return False
        name = str(node.target)
        return name in self._weights and self._recorder.varies(self._weights[name])

    def _copy(self, node: fx.Node, names: tuple[str, ...] | None) -> None:
        if self._varies(node):
            self._places[node] = self._weight(str(node.target))
            return
        module = Calls(self._converted).module(node)
        if isinstance(module, ChannelClamp) and not self._is_known(str(node.target)):
            self._copy_clamp(node, module)
            return
        if isinstance(module, MaskedActivation) and names:
            self._copy_masked(node, module)
            return
        if isinstance(module, Composed) and names:
            y = self._called(str(node.target), module, self._places[node.all_input_nodes[0]])
            self._stand_for(node, y)
            return
        given = {name.rpartition(".")[2]: self._weight(name) for name in names or ()}
        copied = self._graph.node_copy(node, lambda n: self._places[n])
        self._places[node] = copied
        target = str(node.target)
        if names is not None and module is not None:
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
        return self._is_untouched(module, target) and bool(tensors_of(module))


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
