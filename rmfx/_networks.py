"""Random residual networks as plain data: the grammar, its interpreter and its sampler.

A `NetworkSpec` is a tree of frozen dataclasses that says everything about a small network: every
layer, every join, which modules are shared, what is returned. Its `repr` is an expression that
gives the same spec back, so a failing network can be pasted into a test. `NetworkSpec.build` makes
an ordinary `nn.Module` of it, whose control flow is fixed by the spec: any tracer can read it.

The sampler (`Sampler`, second half) draws such trees. It knows the shape of every value while it
draws and only ever chooses among what fits, so no drawn network is ever thrown away. It also
knows which values share memory, so that an in-place operation never reaches the caller's
inputs and never overlaps with what it reads; every other aliasing is fair game.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Saved = dict[str, Tensor]
Store = dict[str, Any]  # what several layers of one network share, by the name in their spec

# --- What a network is made of -------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Node:
    """One step of a chain. Subclasses override `build`, or `apply` when they hold no state."""

    def __repr__(self) -> str:
        """The constructor call, without the arguments that have their default value."""
        shown: list[str] = []
        for position, item in enumerate(fields(self)):
            value = getattr(self, item.name)
            if value == item.default and type(value) is type(item.default):
                continue
            named = position >= 3 or len(shown) < position
            shown.append(f"{item.name}={value!r}" if named else repr(value))
        return f"{type(self).__name__}({', '.join(shown)})"

    def build(self, store: Store) -> nn.Module:
        """The module that computes this node."""
        return _Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        """What a node without state computes."""
        raise NotImplementedError


Nodes = tuple[Node, ...]


@dataclass(frozen=True, repr=False)
class Conv(Node):
    """A convolution; the length of `kernel` says over how many dimensions.

    `form` is "module", "functional", or either with " keyword" (arguments passed by name).
    `shared` is "" or a key: "module:KEY" is one module called at every place that names it,
    "weight:KEY" are several modules that own the same weight.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    form: str = "module"
    shared: str = ""

    def build(self, store: Store) -> nn.Module:
        build: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.kernel) - 1]
        layer = build(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.padding_mode,
        )
        return _in_form(_share(layer, self.shared, store), self.form)


@dataclass(frozen=True, repr=False)
class Linear(Node):
    """A linear layer over the last axis; `form` and `shared` as in `Conv`."""

    inputs: int
    outputs: int
    bias: bool = True
    form: str = "module"
    shared: str = ""

    def build(self, store: Store) -> nn.Module:
        layer = nn.Linear(self.inputs, self.outputs, self.bias)
        return _in_form(_share(layer, self.shared, store), self.form)


@dataclass(frozen=True, repr=False)
class Norm(Node):
    """Batch norm over axis 1 of a value with `dims` spatial dimensions; `form` as in `Conv`."""

    channels: int
    dims: int = 2
    affine: bool = True
    eps: float = 1e-5
    form: str = "module"

    def build(self, store: Store) -> nn.Module:
        build = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dims]
        return _in_form(build(self.channels, eps=self.eps, affine=self.affine), self.form)


@dataclass(frozen=True, repr=False)
class Act(Node):
    """A pointwise activation; `args` are the positional arguments of its module.

    `form` is "module", "functional", "torch" (`torch.relu`) or "method", each also with
    " in-place". `shared` is "" or the key of one module that all such activations call.
    """

    kind: str
    form: str = "module"
    args: tuple[float, ...] = ()
    shared: str = ""

    def build(self, store: Store) -> nn.Module:
        way, _, in_place = self.form.partition(" ")
        if self.kind == "prelu":
            channels = int(self.args[0]) if self.args else 1
            prelu = nn.PReLU(channels)
            return _in_form(_share(prelu, self.shared, store), way)
        if way != "module":
            return _Operation(self)
        keywords = {"inplace": True} if in_place else {}
        return _share(MODULES[self.kind](*self.args, **keywords), self.shared, store)

    def apply(self, x: Tensor) -> Tensor:
        way, _, in_place = self.form.partition(" ")
        name = self.kind + ("_" if in_place else "")
        if way == "method":
            return getattr(x, name)(*self.args)  # type: ignore[no-any-return]
        if way == "torch":
            return getattr(torch, name)(x, *self.args)  # type: ignore[no-any-return]
        keywords = {"inplace": True} if in_place else {}
        return FUNCTIONS[self.kind](x, *self.args, **keywords)


@dataclass(frozen=True, repr=False)
class Drop(Node):
    """What does nothing at inference: dropout, identity, clone, detach, contiguous."""

    kind: str

    def build(self, store: Store) -> nn.Module:
        return NO_OPS[self.kind]() if self.kind in NO_OPS else _Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        if self.kind == "functional dropout":
            return F.dropout(x, 0.3, training=False)
        return getattr(x, self.kind)()  # type: ignore[no-any-return]


@dataclass(frozen=True, repr=False)
class Slice(Node):
    """Part of every spatial axis: `starts` and `ends` elements are left out, then every `step`-th.

    `form` "index" writes `x[:, :, 1:-1, 1:-1]` or `x[:, :, ::2, ::2]`; "pad" is `F.pad` with
    negative amounts, for a step of 1.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    step: int = 1
    form: str = "index"

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "pad":
            pairs = list(zip(self.starts, self.ends, strict=True))
            return F.pad(x, [-amount for pair in reversed(pairs) for amount in pair])
        step = self.step if self.step > 1 else None
        spatial = [
            slice(start or None, -end if end else None, step)
            for start, end in zip(self.starts, self.ends, strict=True)
        ]
        return x[(slice(None), slice(None), *spatial)]


@dataclass(frozen=True, repr=False)
class Channels(Node):
    """Channels `start` to `stop` of axis 1 (or of the last axis, for `axis=-1`)."""

    start: int
    stop: int
    axis: int = 1

    def apply(self, x: Tensor) -> Tensor:
        if self.axis == -1:
            return x[..., self.start : self.stop]
        return x[:, self.start : self.stop]


@dataclass(frozen=True, repr=False)
class PadChannels(Node):
    """Zero channels before and after those there are (option A of the CIFAR ResNets).

    `dims` counts the axes after the padded one; `form` is "pad" or "cat".
    """

    before: int
    after: int
    dims: int = 2
    form: str = "pad"

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "cat":  # before = 0 and after = all channels: [x; 0 * x]
            return torch.cat((x, torch.zeros_like(x)), 1)
        return F.pad(x, (0, 0) * self.dims + (self.before, self.after))


@dataclass(frozen=True, repr=False)
class Pad(Node):
    """Spatial padding by a layer of its own: one (before, after) pair for every axis."""

    amounts: tuple[tuple[int, int], ...]
    value: float = 0.0

    def apply(self, x: Tensor) -> Tensor:
        flat = [amount for pair in reversed(self.amounts) for amount in pair]
        return F.pad(x, flat, "constant", self.value)


@dataclass(frozen=True, repr=False)
class Pool(Node):
    """Pooling over `dims` dimensions: "avg", "max", "global avg", "global max" or "mean"."""

    kind: str
    dims: int
    kernel: int = 2
    stride: int = 2
    padding: int = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    form: str = "module"

    def build(self, store: Store) -> nn.Module:
        if self.form == "functional" or self.kind == "mean":
            return _Operation(self)
        if self.kind.startswith("global"):
            kind = "Avg" if self.kind == "global avg" else "Max"
            return getattr(nn, f"Adaptive{kind}Pool{self.dims}d")(1)  # type: ignore[no-any-return]
        window = (self.kernel, self.stride, self.padding)
        if self.kind == "max":
            build = getattr(nn, f"MaxPool{self.dims}d")
            return build(*window, ceil_mode=self.ceil_mode)  # type: ignore[no-any-return]
        build = getattr(nn, f"AvgPool{self.dims}d")
        return build(*window, self.ceil_mode, self.count_include_pad)  # type: ignore[no-any-return]

    def apply(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            return x.mean(tuple(range(2, 2 + self.dims)), keepdim=True)
        if self.kind.startswith("global"):
            kind = "avg" if self.kind == "global avg" else "max"
            pool = getattr(F, f"adaptive_{kind}_pool{self.dims}d")
            return pool(x, 1)  # type: ignore[no-any-return]
        pool = getattr(F, f"{self.kind}_pool{self.dims}d")
        window = (self.kernel, self.stride, self.padding)
        if self.kind == "max":
            return pool(x, *window, ceil_mode=self.ceil_mode)  # type: ignore[no-any-return]
        return pool(x, *window, self.ceil_mode, self.count_include_pad)  # type: ignore[no-any-return]


@dataclass(frozen=True, repr=False)
class Arithmetic(Node):
    """A value joined with a constant: one of `ARITHMETIC`, where c is `value`.

    In the forms with p, p is a parameter (b: a buffer) of shape `shape`, to be broadcast.
    """

    form: str
    value: float = 0.5
    shape: tuple[int, ...] = ()

    def build(self, store: Store) -> nn.Module:
        return _TensorArithmetic(self) if self.shape else _Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        return ARITHMETIC[self.form](x, self.value)


@dataclass(frozen=True, repr=False)
class Opaque(Node):
    """What no residual removal sees through; keeps the shape (kinds: the keys of `OPAQUE`)."""

    kind: str
    dims: int = 2

    def apply(self, x: Tensor) -> Tensor:
        return OPAQUE[self.kind](x, self.dims)


@dataclass(frozen=True, repr=False)
class Flatten(Node):
    """Everything but the batch into one axis: "module", "function", "method" or "reshape"."""

    form: str = "module"

    def build(self, store: Store) -> nn.Module:
        return nn.Flatten() if self.form == "module" else _Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "function":
            return torch.flatten(x, 1)
        return x.flatten(1) if self.form == "method" else x.reshape(x.shape[0], -1)


@dataclass(frozen=True, repr=False)
class Save(Node):
    """Remembers the value under a name, for a `Recall` or for the network's output."""

    name: str

    def build(self, store: Store) -> nn.Module:
        return _Save(self.name)


@dataclass(frozen=True, repr=False)
class Recall(Node):
    """Combines the value a with b: what `chain` makes of the value saved under `name`.

    The network's inputs after the first are saved as "input1", "input2".
    """

    name: str
    chain: Nodes = ()
    form: str = "a + b"
    scale: float = 0.5

    def build(self, store: Store) -> nn.Module:
        return _Recall(self, store)


@dataclass(frozen=True, repr=False)
class Join(Node):
    """Every operand is a chain that starts at the value; an empty chain is the value itself.

    `forms[i]` (a key of `JOINS`, where c is `scale`) combines a, the result so far, with b, the
    operand i + 1. Operands run in the order given, each right before it is combined.
    """

    operands: tuple[Nodes, ...]
    forms: tuple[str, ...] = ("a + b",)
    scale: float = 0.5

    def build(self, store: Store) -> nn.Module:
        return _Join(self, store)


@dataclass(frozen=True, repr=False)
class NetworkSpec:
    """A whole network as data; its `repr` is an expression that gives the same spec back.

    Attributes:
        shapes: the shape of every input, with the batch.
        body: the chain that the first input runs through.
        output: "tensor", "tuple", "list", "dict" or "nested".
        returned: the names of saved values that are returned as well.
    """

    shapes: tuple[tuple[int, ...], ...]
    body: Nodes
    output: str = "tensor"
    returned: tuple[str, ...] = ()

    __repr__ = Node.__repr__

    def build(self, seed: int = 0) -> Network:
        """The network in eval mode and float64, with random weights and batch norm statistics."""
        _hear_padding_warning()
        with torch.random.fork_rng(devices=[]):  # layers draw initial weights from the global one
            network = (Network, _PairNetwork, _TripleNetwork)[len(self.shapes) - 1](self)
        _randomise_weights(network.double().eval(), seed)
        random_statistics(network, seed)
        return network

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs, wide enough to reach both bounds of a ReLU6."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in self.shapes
        )

    def features(self) -> frozenset[str]:
        """Which of `FEATURES` occur in the network."""
        found = {f"{self.output} output"}
        if any(shape[0] == 1 for shape in self.shapes):
            found.add("batch 1")
        if any(size % 2 for shape in self.shapes for size in shape[2:]):
            found.add("odd size")
        if len(self.shapes) > 1:
            found.add("several inputs")
        if self.returned:
            found.add("intermediate returned")
        found.update(_chain_features(self.body, depth=0))
        inner = set(_saved_names(self.body, depth=0))
        if inner & {*self.returned, *_recalled_names(self.body)}:
            found.add("inner value used outside its site")
        return frozenset(found)


# --- The tables the nodes look into --------------------------------------------------------------

_iadd: Callable[[Any, Any], Any] = operator.iadd
_isub: Callable[[Any, Any], Any] = operator.isub
_imul: Callable[[Any, Any], Any] = operator.imul

MODULES: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "rrelu": nn.RReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, "tanh"),
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "threshold": nn.Threshold,
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{kind: getattr(F, kind) for kind in MODULES if kind != "gelu_tanh"},
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "clamp": torch.clamp,
}
METHODS = ("clamp", "relu", "tanh", "sigmoid")  # kinds that are also methods of a tensor
IN_PLACE = ("relu", "leaky_relu", "rrelu", "relu6", "hardtanh", "silu", "elu", "mish", "hardswish")
NO_OPS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "dropout2d": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "in-place dropout": functools.partial(nn.Dropout, inplace=True),
}
JOINS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "a + b": lambda a, b, c: a + b,
    "b + a": lambda a, b, c: b + a,
    "a += b": lambda a, b, c: _iadd(a, b),
    "b += a": lambda a, b, c: _iadd(b, a),
    "torch.add(a, b)": lambda a, b, c: torch.add(a, b),
    "a.add(b)": lambda a, b, c: a.add(b),
    "a.add_(b)": lambda a, b, c: a.add_(b),
    "a - b": lambda a, b, c: a - b,
    "b - a": lambda a, b, c: b - a,
    "a -= b": lambda a, b, c: _isub(a, b),
    "a + c * b": lambda a, b, c: a + c * b,
    "c * a + b": lambda a, b, c: c * a + b,
    "torch.add(a, b, alpha=c)": lambda a, b, c: torch.add(a, b, alpha=c),
    "torch.sub(a, b, alpha=c)": lambda a, b, c: torch.sub(a, b, alpha=c),
    "a.add_(b, alpha=c)": lambda a, b, c: a.add_(b, alpha=c),
    "torch.add(input=a, other=b)": lambda a, b, c: torch.add(input=a, other=b),
    "sum([a, b])": lambda a, b, c: 0 + a + b,  # what sum() does
    "torch.stack([a, b]).sum(0)": lambda a, b, c: torch.stack([a, b]).sum(0),
    "a * b": lambda a, b, c: a * b,
    "torch.maximum(a, b)": lambda a, b, c: torch.maximum(a, b),
    "torch.cat([a, b], 1)": lambda a, b, c: torch.cat([a, b], 1),
}
ARITHMETIC: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "c * x": lambda x, c: c * x,
    "x * c": lambda x, c: x * c,
    "x / c": lambda x, c: x / c,
    "-x": lambda x, c: -x,
    "x *= c": lambda x, c: _imul(x, c),
    "x + c": lambda x, c: x + c,
    "c + x": lambda x, c: c + x,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "x += c": lambda x, c: _iadd(x, c),
    "x * p": lambda x, p: x * p,
    "x + p": lambda x, p: x + p,
    "p - x": lambda x, p: p - x,
    "x + b": lambda x, b: x + b,
}
OPAQUE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda x, dims: F.softmax(x, 1),
    "layer norm": lambda x, dims: F.group_norm(x, 1),
    "normalize": lambda x, dims: F.normalize(x, dim=1),
    "view": lambda x, dims: x.reshape(x.shape[0], -1).reshape(x.shape),
    "flip": lambda x, dims: x.flip(1),
    "roll": lambda x, dims: torch.roll(x, 1, 1),
    "cumsum": lambda x, dims: x.cumsum(1),
    "centre": lambda x, dims: x - x.mean(1, keepdim=True),  # an add that broadcasts
    "absolute": lambda x, dims: torch.abs(x),
    "gate": lambda x, dims: x * torch.sigmoid(x),
    # The rest needs spatial dimensions.
    "max pool": lambda x, dims: getattr(F, f"max_pool{dims}d")(x, 3, 1, 1),
    "interpolate": lambda x, dims: F.interpolate(
        x, scale_factor=2.0, mode=("linear", "bilinear", "trilinear")[dims - 1]
    )[(slice(None), slice(None)) + (slice(None, None, 2),) * dims],
}
OPAQUE_ANYWHERE = tuple(OPAQUE)[:-2]

# --- The interpreter ------------------------------------------------------------------------------


class Network(nn.Module):
    """The module of a `NetworkSpec`; subclasses take two and three inputs."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.body = _Chain(spec.body, {})

    def forward(self, x: Tensor) -> Any:
        """Run the network and arrange its output as the spec says."""
        return self.run(x)

    def run(self, *inputs: Tensor) -> Any:
        """The output for any number of inputs; `forward` names them, for tracers to see."""
        saved = {f"input{i}": value for i, value in enumerate(inputs) if i > 0}
        result = self.body(inputs[0], saved)
        extra = [saved[name] for name in self.spec.returned]
        if self.spec.output == "tuple":
            return (result, *extra)
        if self.spec.output == "list":
            return [*extra, result]
        if self.spec.output == "dict":
            return {"out": result, **dict(zip(self.spec.returned, extra, strict=True))}
        if self.spec.output == "nested":
            return {"out": (result, {"extra": extra})}
        return result


class _PairNetwork(Network):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.run(x, y)


class _TripleNetwork(Network):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.run(x, y, z)


class _Step(nn.Module):
    """A module that also reads or writes the saved values."""


class _Chain(nn.ModuleList):
    def __init__(self, nodes: Nodes, store: Store) -> None:
        super().__init__(node.build(store) for node in nodes)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        for layer in self:
            x = layer(x, saved) if isinstance(layer, _Step) else layer(x)
        return x


class _Join(_Step):
    def __init__(self, node: Join, store: Store) -> None:
        super().__init__()
        self.node = node
        self.operands = nn.ModuleList(_Chain(nodes, store) for nodes in node.operands)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        first, *others = self.operands
        value: Tensor = first(x, saved)
        for operand, form in zip(others, self.node.forms, strict=True):
            value = JOINS[form](value, operand(x, saved), self.node.scale)
        return value


class _Recall(_Step):
    def __init__(self, node: Recall, store: Store) -> None:
        super().__init__()
        self.node = node
        self.chain = _Chain(node.chain, store)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        other = self.chain(saved[self.node.name], saved)
        return JOINS[self.node.form](x, other, self.node.scale)


class _Save(_Step):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        saved[self.name] = x
        return x


class _Operation(nn.Module):
    """A node without state."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        return self.node.apply(x)


class _TensorArithmetic(nn.Module):
    """Arithmetic with a parameter (p) or a buffer (b)."""

    def __init__(self, node: Arithmetic) -> None:
        super().__init__()
        self.form = node.form
        constant = node.value * torch.linspace(0.5, 1.5, math.prod(node.shape)).view(node.shape)
        if "p" in node.form:
            self.constant: Tensor = nn.Parameter(constant)
        else:
            self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return ARITHMETIC[self.form](x, self.constant)


class _Functional(nn.Module):
    """Calls the functional form of the layer it holds, with arguments by place or by name."""

    def __init__(self, layer: nn.Module, *, keyword: bool) -> None:
        super().__init__()
        self.layer = layer
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        names = {"weight": layer.weight, "bias": getattr(layer, "bias", None)}
        if isinstance(layer, nn.PReLU):
            return F.prelu(x, layer.weight)
        if isinstance(layer, nn.Linear):
            return F.linear(x, **names) if self.keyword else F.linear(x, *names.values())
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            statistics = (layer.running_mean, layer.running_var)
            if self.keyword:
                return F.batch_norm(x, *statistics, **names, training=False, eps=layer.eps)
            return F.batch_norm(x, *statistics, layer.weight, layer.bias, False, 0.1, layer.eps)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
        geometry = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
        if self.keyword:
            return convolve(input=x, **names, **geometry)
        return convolve(x, *names.values(), *geometry.values())


class _Keyword(nn.Module):
    """Calls the module it holds with its argument by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)  # type: ignore[no-any-return]


@functools.cache
def _hear_padding_warning() -> None:
    """Torch warns once in a process that padding="same" copies for even kernels: have it said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.conv1d(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), padding="same")


def _in_form(layer: nn.Module, form: str) -> nn.Module:
    way, _, keyword = form.partition(" ")
    if way == "functional":
        return _Functional(layer, keyword=bool(keyword))
    return _Keyword(layer) if keyword else layer


def _share(layer: nn.Module, shared: str, store: Store) -> nn.Module:
    """The layer, or the one already stored under the key, or the layer with the stored weight."""
    if shared.startswith("module:"):
        return store.setdefault(shared, layer)  # type: ignore[no-any-return]
    if shared.startswith("weight:"):
        layer.weight = store.setdefault(shared, layer.weight)
    return layer


def _randomise_weights(network: nn.Module, seed: int) -> None:
    """Weights that keep the scale of what passes, so that no branch hides behind its shortcut."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            fan_in = max(1, math.prod(parameter.shape[1:]))
            parameter.data.copy_(values * math.sqrt(1.5 / fan_in))
        else:
            parameter.data.copy_(values * 0.5)


def random_statistics(module: nn.Module, seed: int) -> nn.Module:
    """Give every batch norm random statistics, weight and bias, and every PReLU random slopes.

    A fresh batch norm (mean 0, variance 1, weight 1, bias 0) is the identity up to eps, so a pass
    that forgets it entirely goes unnoticed. Here the weight has magnitude 0.5 to 1.5 and is
    negative for one channel in four, bias and mean are -1 to 1, the variance is 0.3 to 3; slopes
    are -0.5 to 1.5.

    Args:
        module: changed in place, whatever its dtype and device.
        seed: equal seeds give equal values.

    Returns:
        The module.

    >>> bn = random_statistics(nn.BatchNorm2d(8), seed=0)
    >>> bool((bn.running_var >= 0.3).all() and (bn.weight.abs() >= 0.5).all())
    True
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return low + (high - low) * values

    for layer in module.modules():
        if isinstance(layer, nn.PReLU):
            layer.weight.data.copy_(uniform(layer.weight, -0.5, 1.5))
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        if layer.affine:
            sign = torch.where(uniform(layer.weight, 0, 1) < 0.25, -1.0, 1.0)
            layer.weight.data.copy_(sign * uniform(layer.weight, 0.5, 1.5))
            layer.bias.data.copy_(uniform(layer.bias, -1, 1))
        if layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.copy_(uniform(layer.running_mean, -1, 1))
            layer.running_var.copy_(uniform(layer.running_var, 0.3, 3))
    return module


# --- What occurs in a network --------------------------------------------------------------------

_WAYS = ("module", "functional", "torch", "method")
_OTHER_FEATURES = """
    batch 1; odd size; several inputs; intermediate returned; inner value used outside its site;
    linear; conv with bias; conv without bias; conv without BN; grouped conv; depthwise conv;
    dilated conv; even kernel; padding=same; valid conv; strided conv; padding mode;
    conv that differs between axes; module keyword conv; functional conv; functional keyword conv;
    conv called twice; tied weights; module BN; functional BN; BN before conv;
    shared activation module; in-place activation of the fork; in-place add on the fork;
    in-place add on a view of the fork; value changed in place after it was saved;
    identity shortcut; projection shortcut; crop shortcut; strided slice shortcut;
    option A shortcut; average pool shortcut; linear branch; pre-activation branch;
    branch that ends in an activation; branch of three or more layers; two nonlinear branches;
    add that broadcasts; squeeze and excite; nested join; sum of three or more;
    sites that share one fork; a value joined with itself;
    constant scale; join with a constant; parameter or buffer as constant;
    input joined by add; input joined by cat; value from elsewhere joined by add
"""
FEATURES = frozenset(  # everything that `NetworkSpec.features` may say
    [
        *(f"{kind} output" for kind in ("tensor", "tuple", "list", "dict", "nested")),
        *(f"activation {kind}" for kind in (*MODULES, "prelu", "clamp")),
        *(f"activation as {way}{how}" for way in _WAYS for how in ("", " in-place")),
        *(f"join {form}" for form in JOINS),
        *(f"conv{dims}d" for dims in (1, 2, 3)),
        *(f"{kind} pool" for kind in ("avg", "max", "mean", "global avg", "global max")),
        *(*OPAQUE, *NO_OPS, "functional dropout", "clone", "contiguous", "detach"),
        *(" ".join(feature.split()) for feature in _OTHER_FEATURES.split(";")),
    ]
)

_VIEWS = (Slice, Channels, Drop, Save)


def _chain_features(nodes: Nodes, depth: int) -> Iterator[str]:
    """The features of a chain and of all chains inside it; `depth` counts the joins around it."""
    around = (None, *nodes, None)
    for previous, node, following in zip(around, nodes, around[2:], strict=False):
        if isinstance(node, Conv):
            yield from _conv_features(node)
            if not isinstance(following, Norm):
                yield "conv without BN"
        elif isinstance(node, Linear):
            yield "linear"
        elif isinstance(node, Norm):
            yield f"{'functional' if 'functional' in node.form else 'module'} BN"
            if isinstance(following, Conv) and not isinstance(previous, Conv):
                yield "BN before conv"
        elif isinstance(node, Act):
            yield f"activation {node.kind}"
            yield f"activation as {node.form}"
            if node.shared:
                yield "shared activation module"
        elif isinstance(node, Join):
            yield from _join_features(node, depth)
        elif isinstance(node, Recall):
            kind = "input" if node.name.startswith("input") else "value from elsewhere"
            yield f"{kind} joined by {'cat' if 'cat' in node.form else 'add'}"
            yield from _chain_features(node.chain, depth + 1)
        elif isinstance(node, Arithmetic):
            scales = "*" in node.form or "/" in node.form or node.form == "-x"
            yield "constant scale" if scales else "join with a constant"
            if node.shape:
                yield "parameter or buffer as constant"
        elif isinstance(node, (Opaque, Drop)):
            yield node.kind
        elif isinstance(node, Pool):
            yield f"{node.kind} pool"
        elif isinstance(node, Save) and _changes_in_place(following):
            yield "value changed in place after it was saved"


def _chains(node: Node) -> tuple[Nodes, ...]:
    """The chains inside a node."""
    if isinstance(node, Join):
        return node.operands
    return (node.chain,) if isinstance(node, Recall) else ()


def _saved_names(nodes: Nodes, depth: int) -> Iterator[str]:
    """The names of values that are saved inside a join."""
    for node in nodes:
        if isinstance(node, Save) and depth:
            yield node.name
        for chain in _chains(node):
            yield from _saved_names(chain, depth + 1)


def _recalled_names(nodes: Nodes) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Recall):
            yield node.name
        for chain in _chains(node):
            yield from _recalled_names(chain)


def _changes_in_place(node: Node | None) -> bool:
    """Whether the node writes into the memory of what it is given."""
    if isinstance(node, Act):
        return "in-place" in node.form
    if isinstance(node, Join):
        return node.forms[0] in _INTO_A and not node.operands[0]
    return isinstance(node, Arithmetic) and "=" in node.form


def _conv_features(node: Conv) -> Iterator[str]:
    dims = len(node.kernel)
    yield f"conv{dims}d"
    yield f"conv {'with' if node.bias else 'without'} bias"
    if node.groups > 1:
        depthwise = node.groups == node.inputs
        yield "depthwise conv" if depthwise else "grouped conv"
    if node.dilation != 1:
        yield "dilated conv"
    if any(k % 2 == 0 for k in node.kernel):
        yield "even kernel"
    if node.stride != 1:
        yield "strided conv"
    if len(set(node.kernel)) > 1 or isinstance(node.stride, tuple):
        yield "conv that differs between axes"
    if node.padding in (0, "valid") and max(node.kernel) > 1:
        yield "valid conv"
    if node.padding == "same":
        yield "padding=same"
    if node.padding_mode != "zeros":
        yield "padding mode"
    if node.form != "module":
        yield f"{node.form} conv"
    if node.shared:
        yield "conv called twice" if node.shared.startswith("module:") else "tied weights"


def _join_features(node: Join, depth: int) -> Iterator[str]:
    yield from (f"join {form}" for form in node.forms)
    if depth > 0:
        yield "nested join"
    if len(node.operands) > 2:
        yield "sum of three or more"
    if sum(bool(nodes) and isinstance(nodes[0], Join) for nodes in node.operands) > 0:
        yield "sites that share one fork"
    if sum(_is_nonlinear(nodes) for nodes in node.operands) > 1:
        yield "two nonlinear branches"
    if len(set(node.operands)) == 1:
        yield "a value joined with itself"
    if any(isinstance(n, Pool) and n.kind[:4] in ("glob", "mean") for n in sum(node.operands, ())):
        yield "squeeze and excite" if "a * b" in node.forms else "add that broadcasts"
    for nodes in node.operands:
        yield from _operand_features(nodes)
        yield from _chain_features(nodes, depth + 1)
    in_place_first = node.forms[0].startswith(("a +=", "a -=", "a.add_"))
    if in_place_first and all(isinstance(n, _VIEWS) for n in node.operands[0]):
        slices = any(isinstance(n, (Slice, Channels)) for n in node.operands[0])
        yield "in-place add on a view of the fork" if slices else "in-place add on the fork"


def _operand_features(nodes: Nodes) -> Iterator[str]:
    """What one operand of a join is: a kind of shortcut, or a kind of branch."""
    layers = [n for n in nodes if isinstance(n, (Conv, Linear))]
    acts = [n for n in nodes if isinstance(n, Act)]
    if not nodes:
        yield "identity shortcut"
    if nodes and not acts and layers:
        yield "linear branch"
    if len(layers) == 1 and not acts:
        yield "projection shortcut"
    if any(isinstance(n, Slice) and n.step > 1 for n in nodes):
        yield "strided slice shortcut"
        if any(isinstance(n, PadChannels) for n in nodes):
            yield "option A shortcut"
    if any(isinstance(n, Slice) and n.step == 1 for n in nodes) and not layers:
        yield "crop shortcut"
    if any(isinstance(n, Pool) and n.kind == "avg" for n in nodes) and layers and not acts:
        yield "average pool shortcut"
    if layers and isinstance(nodes[-1], Act):
        yield "branch that ends in an activation"
    if layers and acts and nodes.index(acts[0]) < nodes.index(layers[0]):
        yield "pre-activation branch"
    if len(layers) > 2 and len(acts) > 1:
        yield "branch of three or more layers"
    for i, n in enumerate(nodes):
        if (
            isinstance(n, Act)
            and "in-place" in n.form
            and all(isinstance(before, _VIEWS) for before in nodes[:i])
        ):
            yield "in-place activation of the fork"


def _is_nonlinear(nodes: Nodes) -> bool:
    return any(isinstance(n, Act) for n in nodes)


# --- The sampler ----------------------------------------------------------------------------------

_INPUT = 0  # the storage of everything that shares memory with the network's inputs
_CONSTANTS = (0.5, -0.5, 2.0, -1.0, 0.1)
_MASKED = tuple(k for k in FUNCTIONS if k not in ("relu", "leaky_relu", "rrelu", "relu6"))
# (kernel, stride, padding, dilation), the simplest first
_GEOMETRY: dict[str, tuple[tuple[int, int, int | str, int], ...]] = {
    "point": ((1, 1, 0, 1),),
    "keep": (
        *((3, 1, 1, 1), (1, 1, 0, 1), (5, 1, 2, 1), (3, 1, 2, 2)),
        *((3, 1, "same", 1), (2, 1, "same", 1), (3, 1, "same", 2), (4, 1, "same", 1)),
    ),
    "preserve": ((3, 1, 1, 1), (1, 1, 0, 1), (3, 1, "same", 1)),  # at any size
    "valid": ((3, 1, 0, 1), (2, 1, 0, 1), (3, 1, 0, 2), (3, 1, "valid", 1)),
    "stride": (
        *((3, 2, 1, 1), (1, 2, 0, 1), (2, 2, 0, 1), (3, 2, 0, 1)),
        *((2, 2, 1, 1), (5, 2, 2, 1), (3, 2, 2, 2), (3, 3, 1, 1)),
    ),
    "grow": ((2, 1, 1, 1), (3, 1, 2, 1), (1, 1, 1, 1), (4, 1, 2, 1)),
}
_OUT_OF_PLACE = (
    *("a + b", "a + b", "b + a", "torch.add(a, b)", "a.add(b)", "a - b", "b - a"),
    *("a + c * b", "c * a + b", "torch.add(a, b, alpha=c)", "torch.sub(a, b, alpha=c)"),
    *("torch.add(input=a, other=b)", "sum([a, b])"),
)
_INTO_A = ("a += b", "a += b", "a.add_(b)", "a -= b", "a.add_(b, alpha=c)")


@dataclass(frozen=True)
class Value:
    """A value while drawing: its shape without the batch, and whose memory it is.

    `shape` is (channels, *spatial), (features,), or with `tokens` (length, features).
    """

    shape: tuple[int, ...]
    storage: int
    tokens: bool = False

    @property
    def is_map(self) -> bool:
        return len(self.shape) > 1 and not self.tokens

    @property
    def dims(self) -> int:
        return len(self.shape) - 1

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.tokens else self.shape[0]

    @property
    def size(self) -> tuple[int, ...]:
        return self.shape[1:]

    def suits(self, other: Value) -> bool:
        """Whether a chain of layers can bring this value to the other's shape."""
        if self.tokens or other.tokens:
            return self.tokens and other.tokens and self.shape[0] == other.shape[0]
        return len(self.shape) == len(other.shape)


@dataclass
class Path:
    """A chain under construction: the value at its end, and how deep joins may nest inside."""

    value: Value
    depth: int = 0
    nodes: list[Node] = field(default_factory=list)

    def operand(self) -> Path:
        """An empty chain that starts at this value, for a join."""
        return Path(self.value, self.depth - 1)


def _out(size: int, kernel: int, stride: int, padding: int | str, dilation: int) -> int:
    """The size a convolution gives along one axis."""
    if padding == "same":
        return size
    pad = 0 if isinstance(padding, str) else padding
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def _collapse(values: Sequence[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


@functools.cache
def _fits(size: int, target: int) -> tuple[tuple[int, int, int], ...]:
    """Every small (kernel, stride, padding) that brings one axis from size to target."""
    found = [
        (kernel, stride, padding)
        for stride in (1, 2, 3)
        for kernel in (1, 2, 3, 4)
        for padding in (0, 1, 2)
        if padding < max(kernel, 2) and _out(size, kernel, stride, padding, 1) == target
    ]
    padding = max(0, (target - size + 1) // 2)
    general = (size + 2 * padding - target + 1, 1, padding)
    return tuple(found) or (general,)


class Sampler:
    """Draws networks with the choices of `random`; equal choices give equal networks.

    With the `Random` of `hypothesis.strategies.randoms` the draws shrink: every list of options
    has its simplest option first, and rare things are off at the smallest choice.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.shapes: list[tuple[int, ...]] = []
        self.saved: dict[str, Value] = {}
        self.names = 0
        self.storages = _INPUT
        self.layers: list[Conv | Linear] = []  # those that may be called again
        self.kind = self.pick(("relu", "relu", "relu", "relu6", "leaky_relu", "prelu", "silu"))
        self.norms = not self.one_in(4)
        self.functional = self.one_in(5)
        self.shares_activations = self.one_in(4)

    # Choices

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.random.randrange(len(options))]

    def one_in(self, n: int) -> bool:
        return self.random.randrange(n) == n - 1

    def name(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}{self.names}"

    @property
    def is_large(self) -> bool:
        """Whether the network has had its share of nesting: small ones run fast and read well."""
        return self.storages > 40

    # Whole networks

    def block(self) -> NetworkSpec:
        """One residual block, sometimes behind a stem."""
        path = self.start()
        if self.one_in(2):
            self.layer(path)
        self.residual(path)
        if self.one_in(2):
            self.act(path)
        return self.finish(path)

    def network(self) -> NetworkSpec:
        """Stem, one to four blocks with things between them, head."""
        path = self.start()
        if self.one_in(3):
            self.classic(path)
            return self.finish(path)
        if not self.one_in(4):
            self.layer(path, style=self.pick(("keep", "stride", "valid")))
        for _ in range(self.pick((1, 2, 2, 3, 4))):
            self.any_block(path)
            if not self.one_in(3):
                self.act(path)
            self.between(path)
        if self.one_in(3):
            self.head(path)
        return self.finish(path)

    def classic(self, path: Path) -> None:
        """What a ResNet or a MobileNet is: stages of equal blocks of one family, then a head."""
        family = self.pick((self.basic, self.bottleneck, self.inverted, self.pre_activation))
        self.layer(path, style=self.pick(("keep", "stride")))
        if path.value.is_map and self.one_in(4):
            self.pool(path)
        form = self.pick(("a += b", "a + b", "b + a"))
        for stage in range(self.pick((1, 2))):
            outputs = path.value.channels * self.pick((1, 2)) if stage else path.value.channels
            for block in range(self.pick((1, 2))):
                main, shortcut = path.operand(), path.operand()
                first = block == 0 and stage > 0
                family(main, min(outputs, 8), "stride" if first else "preserve")
                self.fit(shortcut, main.value.shape)
                self.join(path, [main, shortcut], form)
                if family in (self.basic, self.bottleneck):
                    self.act(path)
        self.head(path)

    def start(self) -> Path:
        layout = self.pick(("2d", "2d", "2d", "2d", "1d", "3d", "features", "tokens"))
        channels = self.pick((2, 1, 3, 4, 6))
        if layout == "features":
            shape: tuple[int, ...] = (channels,)
        elif layout == "tokens":
            shape = (self.pick((2, 3, 5)), channels)
        else:
            sizes = (5, 6, 7) if layout == "3d" else (5, 6, 7, 8, 9, 11)
            shape = (channels, *(self.pick(sizes) for _ in range(int(layout[0]))))
        self.batch = self.pick((1, 2, 3))
        self.shapes.append((self.batch, *shape))
        return Path(Value(shape, _INPUT, tokens=layout == "tokens"), depth=3)

    def finish(self, path: Path) -> NetworkSpec:
        output = self.pick(("tensor", "tensor", "tensor", "tuple", "list", "dict", "nested"))
        names = [] if output == "tensor" else [n for n in self.saved if self.one_in(2)]
        return NetworkSpec(tuple(self.shapes), tuple(path.nodes), output, tuple(names))

    # Single steps

    def put(
        self, path: Path, node: Node, shape: tuple[int, ...] | None = None, *, alias: bool = False
    ) -> None:
        """Append a node that gives `shape` (None: the same), in the old memory or in new one."""
        if not alias:
            self.storages += 1
        storage = path.value.storage if alias else self.storages
        shape = path.value.shape if shape is None else shape
        tokens = path.value.tokens and len(shape) == 2
        path.nodes.append(node)
        path.value = Value(shape, storage, tokens)

    def affine(
        self, path: Path, outputs: int | None = None, style: str = "keep", groups: str = "one"
    ) -> None:
        """A convolution, or a linear layer where there is no space."""
        value = path.value
        outputs = value.channels if outputs is None else outputs
        forms = ("functional", "functional keyword") if self.functional else ("module",)
        form = "module keyword" if self.one_in(25) else self.pick(forms)
        bias = not self.one_in(3)
        if not value.is_map:
            shape = (*value.shape[:-1], outputs)
            self.put(path, Linear(value.channels, outputs, bias, form), shape)
            return
        kernel, stride, padding, dilation = self.geometry(value, style)
        sizes = [
            _out(n, k, s, p, d)
            for n, k, s, p, d in zip(value.size, kernel, stride, padding, dilation, strict=True)
        ]
        plain_form = form.startswith("module") and not isinstance(padding[0], str)
        mode = "zeros"
        if plain_form and style == "keep" and max(padding) < min(value.size) and self.one_in(30):
            mode = self.pick(("reflect", "replicate", "circular"))
        node = Conv(
            value.channels,
            outputs,
            tuple(kernel),
            _collapse(stride),
            padding[0] if isinstance(padding[0], str) else _collapse(padding),
            _collapse(dilation),
            self.groups(value.channels, outputs, groups),
            bias,
            mode,
            form,
        )
        self.put(path, node, (outputs, *sizes))

    def geometry(
        self, value: Value, style: str
    ) -> tuple[list[int], list[int], list[Any], list[int]]:
        """Kernel, stride, padding, dilation per axis; pointwise where the style does not fit."""

        def fitting(size: Sequence[int]) -> list[tuple[int, int, int | str, int]]:
            fits = [g for g in _GEOMETRY[style] if all(_out(n, *g) >= 1 for n in size)]
            return fits or list(_GEOMETRY["point"])

        chosen = [self.pick(fitting(value.size))] * value.dims
        if value.dims > 1 and not isinstance(chosen[0][2], str) and self.one_in(6):
            point = _GEOMETRY["point"][0]
            chosen[self.random.randrange(value.dims)] = point
        kernel, stride, padding, dilation = (list(column) for column in zip(*chosen, strict=True))
        return kernel, stride, padding, dilation

    def groups(self, inputs: int, outputs: int, groups: str) -> int:
        if groups == "depthwise" and outputs % inputs == 0:
            return inputs
        common = math.gcd(inputs, outputs)
        divisors = [g for g in range(2, common + 1) if common % g == 0]
        return self.pick(divisors) if groups == "grouped" and divisors else 1

    def norm(self, path: Path) -> None:
        """Batch norm over axis 1 (for tokens that is their position, not their features)."""
        value = path.value
        form = "functional" if self.functional else "module"
        if self.one_in(20):
            form += " keyword"
        eps = self.pick((1e-5, 1e-5, 1e-3))
        node = Norm(value.shape[0], value.dims, not self.one_in(8), eps, form)
        self.put(path, node)

    def perhaps_norm(self, path: Path) -> None:
        """Batch norm, in a network that has them."""
        if self.norms:
            self.norm(path)

    def act(self, path: Path) -> None:
        """An activation: mostly the network's own kind, sometimes any."""
        kind = self.kind
        if self.one_in(3):
            table = ("relu", "leaky_relu", "prelu", "rrelu", "relu6", "hardtanh", "clamp")
            kind = self.pick(table) if not self.one_in(3) else self.pick(_MASKED)
        forms = ["module", "functional"]
        if kind in METHODS:
            forms = ["method", "torch"] if kind == "clamp" else [*forms, "method", "torch"]
        if path.value.storage != _INPUT:
            of_tensors = ("method", "torch")
            forms += [
                f"{form} in-place" for form in forms if form in of_tensors or kind in IN_PLACE
            ]
        if self.functional:
            forms.reverse()
        form = self.pick(forms)
        node = Act(kind, form, self.act_args(kind, path.value))
        if self.shares_activations and form.startswith("module") and not node.args:
            node = replace(node, shared=f"module:{kind}{form[6:]}")
        self.put(path, node, alias="in-place" in form)

    def act_args(self, kind: str, value: Value) -> tuple[float, ...]:
        options: dict[str, tuple[tuple[float, ...], ...]] = {
            "prelu": ((), (value.shape[0],)),
            "leaky_relu": ((), (0.1,), (-0.5,), (1.5,)),
            "rrelu": ((), (0.2, 0.8)),
            "hardtanh": ((), (-0.5, 2.0), (0.0, 6.0), (1.0, 3.0)),
            "clamp": ((0.0,), (0.0, 6.0), (-1.0, 2.0)),
            "threshold": ((0.0, 0.0), (0.5, -1.0)),
            "softplus": ((), (2.0, 5.0)),
            "elu": ((), (0.5,)),
            "celu": ((), (0.5,)),
        }
        args: tuple[float, ...] = self.pick(options.get(kind, ((),)))
        return args

    def layer(self, path: Path, outputs: int | None = None, style: str = "keep") -> None:
        """Affine, batch norm, activation: each of the last two only perhaps."""
        self.affine(path, outputs, style)
        if self.norms and not self.one_in(5):
            self.norm(path)
        if not self.one_in(4):
            self.act(path)

    def oddment(self, path: Path) -> None:
        """Now and then something between two layers of a branch."""
        if self.is_large or not self.one_in(5):
            return
        what: list[Any] = [self.drop, self.save, self.save, self.scale, self.recall, self.recall]
        what += [self.repeat, self.opaque]
        if path.depth > 0:
            what.append(self.any_block)
        self.pick(what)(path)

    def drop(self, path: Path) -> None:
        kinds = ["identity", "dropout", "functional dropout", "contiguous", "detach", "clone"]
        kinds += ["alpha_dropout", "in-place dropout"]
        if path.value.is_map and path.value.dims == 2:
            kinds.append("dropout2d")
        kind = self.pick(kinds)
        self.put(path, Drop(kind), alias=kind != "clone")

    def save(self, path: Path) -> str:
        """Keep the value for a later `recall` or for the output; the name it gets."""
        name = self.name("s")
        path.nodes.append(Save(name))
        self.saved[name] = path.value
        return name

    def scale(self, path: Path) -> None:
        """A constant factor."""
        self.arithmetic(path, ["c * x", "x * c", "x / c", "-x", "x * p"], "x *= c")

    def constant(self, path: Path) -> None:
        """A constant summand."""
        forms = ["x + c", "c + x", "x - c", "c - x", "x + p", "p - x", "x + b"]
        self.arithmetic(path, forms, "x += c")

    def arithmetic(self, path: Path, forms: list[str], in_place: str) -> None:
        """A number, or a tensor with a value for every channel."""
        value = path.value
        form = self.pick(forms if value.storage == _INPUT else [*forms, in_place])
        shape: tuple[int, ...] = ()
        if "p" in form or "b" in form:
            shape = (value.channels, *(1 for _ in value.size)) if value.is_map else value.shape[-1:]
        self.put(path, Arithmetic(form, self.pick(_CONSTANTS), shape), alias="=" in form)

    def opaque(self, path: Path) -> None:
        kinds = tuple(OPAQUE) if path.value.is_map else OPAQUE_ANYWHERE
        kind = self.pick(kinds)
        self.put(path, Opaque(kind, path.value.dims), alias=kind == "view")

    def repeat(self, path: Path) -> None:
        """A layer at two call sites, or two layers with one weight, here or across the network."""
        value = path.value
        known = [n for n in self.layers if n.inputs == value.channels and self.matches(n, value)]
        if known and self.one_in(2):
            self.put(path, self.pick(known))
            return
        self.affine(path, style="preserve")
        kind = "weight:" if self.one_in(2) else "module:"
        layer: Any = path.nodes[-1]
        node = replace(layer, shared=self.name(kind))
        path.nodes[-1] = node
        self.layers.append(node)
        if not self.one_in(3):
            self.act(path)
        self.put(path, node)

    def matches(self, node: Conv | Linear, value: Value) -> bool:
        dims = len(node.kernel) if isinstance(node, Conv) else 0
        return dims == (value.dims if value.is_map else 0)

    def combine(self, path: Path, other: Value, wanted: str = "") -> str:
        """How to join the path's value a with b, of the same shape; the result's memory is set."""
        value = path.value
        forms = list(_OUT_OF_PLACE)
        if value.storage != other.storage:
            if value.storage != _INPUT:
                forms += _INTO_A
            if other.storage != _INPUT:
                forms += ["b += a", "b += a"]
        form: str = wanted if wanted in forms else self.pick(forms)
        if form in _INTO_A:
            return form
        self.storages += 1
        storage = other.storage if form == "b += a" else self.storages
        path.value = replace(value, storage=storage)
        return form

    def recall(self, path: Path, name: str = "") -> None:
        """A value from elsewhere joins in, or another input of the network."""
        value = path.value
        names = [known for known, saved in self.saved.items() if saved.suits(value)]
        if not name and (not names or (len(self.shapes) < 3 and self.one_in(5))):
            self.more_input(path)
            return
        name = name or self.pick(names)
        other = Path(self.saved[name])
        self.fit(other, value.shape)
        form = self.combine(path, other.value)
        path.nodes.append(Recall(name, tuple(other.nodes), form, self.pick(_CONSTANTS)))

    def more_input(self, path: Path) -> None:
        """Another input of the network is added or concatenated."""
        if len(self.shapes) == 3:
            return
        value = path.value
        name = f"input{len(self.shapes)}"
        self.shapes.append((self.batch, *value.shape))
        other = Path(replace(value, storage=_INPUT))
        if value.is_map and value.channels < 5 and self.one_in(3):
            form = "torch.cat([a, b], 1)"
            self.put(path, Recall(name, (), form), (2 * value.channels, *value.size))
            return
        if self.one_in(2):
            self.layer(other)
            self.fit(other, value.shape)
        form = self.combine(path, other.value)
        path.nodes.append(Recall(name, tuple(other.nodes), form, self.pick(_CONSTANTS)))

    # Branches

    def branch(self, path: Path) -> None:
        """A main branch of one of the known families, or of any layers in any order."""
        if self.one_in(2):
            self.pick((self.free, self.free, self.linear, self.site_first))(path)
            return
        family = self.pick(
            (self.basic, self.basic, self.bottleneck, self.inverted, self.pre_activation)
        )
        family(path, self.width(path.value), self.style())

    def width(self, value: Value) -> int:
        return int(self.pick((value.channels,) * 5 + (1, 2, 3, 4, 6)))

    def style(self) -> str:
        return str(self.pick(("keep",) * 5 + ("stride", "valid", "grow")))

    def basic(self, path: Path, outputs: int, style: str) -> None:
        self.layer(path, outputs, style)
        self.oddment(path)
        self.affine(path, outputs)
        self.perhaps_norm(path)
        if self.one_in(5):
            self.act(path)

    def bottleneck(self, path: Path, outputs: int, style: str) -> None:
        """Reduce, spatial (perhaps grouped), expand, with the stride in the first or second."""
        strided_first = style == "stride" and self.one_in(3)
        inner = self.pick((4, 2, 6))
        self.layer(path, inner, style if strided_first else "point")
        self.oddment(path)
        groups = self.pick(("one", "grouped"))
        self.affine(path, inner, "keep" if strided_first else style, groups)
        self.perhaps_norm(path)
        self.act(path)
        self.affine(path, outputs, "point")
        self.perhaps_norm(path)

    def inverted(self, path: Path, outputs: int, style: str) -> None:
        """Expand, depthwise, project, with a linear end."""
        if not self.one_in(3):
            self.layer(path, min(8, 2 * path.value.channels), "point")
        self.oddment(path)
        self.affine(path, path.value.channels, style, "depthwise")
        self.perhaps_norm(path)
        self.act(path)
        self.affine(path, outputs, "point")
        self.perhaps_norm(path)

    def pre_activation(self, path: Path, outputs: int, style: str) -> None:
        for each in (style, "keep"):
            self.perhaps_norm(path)
            self.act(path)
            self.affine(path, outputs, each)
            self.oddment(path)

    def free(self, path: Path) -> None:
        """One to four affine layers with any number of norms and activations around each."""
        for _ in range(self.pick((1, 2, 2, 3, 4))):
            if self.one_in(5):
                self.norm(path)
            outputs = self.width(path.value)
            self.affine(path, outputs, self.style(), self.pick(("one", "grouped", "depthwise")))
            for _ in range(self.pick((0, 1, 1, 2))):
                self.pick((self.act, self.norm, self.act))(path)
            self.oddment(path)

    def linear(self, path: Path) -> None:
        """No activation at all."""
        for _ in range(self.pick((1, 1, 2, 3))):
            self.affine(path, self.width(path.value), self.style())
            self.perhaps_norm(path)
            if self.one_in(4):
                self.scale(path)

    def site_first(self, path: Path) -> None:
        """Another site that starts at the same fork; a few layers behind it."""
        if path.depth > 0 and not self.is_large:
            self.residual(path)
        if path.depth <= 0 or self.one_in(2):
            self.layer(path)

    # Shortcuts

    def fit(self, path: Path, shape: tuple[int, ...]) -> None:
        """Bring the value to the shape without an activation; nothing where it already fits."""
        value = path.value
        if value.shape == shape and not self.one_in(6):
            return
        if not value.is_map:
            self.fit_features(path, shape)
            return
        size = shape[1:]
        ways = ["project", "project"]
        if all(target <= n for n, target in zip(value.size, size, strict=True)):
            ways.append("crop")
            if value.size != size:
                ways.append("crop")
        for step in (2, 3):
            if all(-(-n // step) == target for n, target in zip(value.size, size, strict=True)):
                ways += [f"step {step}"] * 3
        pools = [w for w in ((2, 2, 0), (1, 2, 0), (3, 2, 1)) if self.pools(value, size, w)]
        if pools:
            ways += ["pool", "pool"]
        way = self.pick(ways)
        if way == "crop":
            self.crop(path, size)
            self.fit_channels(path, shape[0])
        elif way.startswith("step"):
            none = (0,) * value.dims
            self.put(path, Slice(none, none, int(way[-1])), (value.channels, *size), alias=True)
            self.fit_channels(path, shape[0])
        elif way == "pool":
            self.average(path, size, self.pick(pools))
            self.affine(path, shape[0], "point")
        else:
            self.project(path, shape)
        if self.norms and path.nodes and isinstance(path.nodes[-1], Conv):
            self.norm(path)

    def fit_features(self, path: Path, shape: tuple[int, ...]) -> None:
        value = path.value
        if shape[-1] < value.channels and self.one_in(3):
            self.put(path, Channels(0, shape[-1], -1), shape, alias=True)
        elif shape[-1] > value.channels and self.one_in(3):
            self.put(path, PadChannels(0, shape[-1] - value.channels, 0), shape)
        else:
            self.affine(path, shape[-1])

    def pools(self, value: Value, size: tuple[int, ...], window: tuple[int, int, int]) -> bool:
        """Whether an average pool with this window gives the size (rounding up, for 2 by 2)."""
        kernel, stride, padding = window
        if window == (2, 2, 0) and min(value.size) > 1:
            return all(-(-n // 2) == target for n, target in zip(value.size, size, strict=True))
        return all(
            n >= kernel and _out(n, kernel, stride, padding, 1) == target
            for n, target in zip(value.size, size, strict=True)
        )

    def average(self, path: Path, size: tuple[int, ...], window: tuple[int, int, int]) -> None:
        ceil_mode = window == (2, 2, 0)
        form = "functional" if self.functional else "module"
        node = Pool("avg", path.value.dims, *window, ceil_mode, not self.one_in(2), form)
        self.put(path, node, (path.value.channels, *size))

    def crop(self, path: Path, size: tuple[int, ...]) -> None:
        """Leave out what is too much: the same at both ends, or mostly so."""
        value = path.value
        surplus = [n - target for n, target in zip(value.size, size, strict=True)]
        starts = tuple(n // 2 for n in surplus)
        if self.one_in(4):
            starts = tuple(self.random.randrange(n + 1) for n in surplus)
        if not any(surplus):
            return
        ends = tuple(n - start for n, start in zip(surplus, starts, strict=True))
        form = self.pick(("index", "pad"))
        node = Slice(starts, ends, 1, form)
        self.put(path, node, (value.channels, *size), alias=form == "index")

    def fit_channels(self, path: Path, channels: int) -> None:
        """Zero channels where some lack (option A), the first ones where there are too many."""
        value = path.value
        lack = channels - value.channels
        shape = (channels, *value.size)
        if lack > 0 and self.one_in(3):
            self.affine(path, channels, "point")
        elif lack == value.channels and self.one_in(3):
            self.put(path, PadChannels(0, lack, value.dims, "cat"), shape)
        elif lack > 0:
            before = self.pick((0, lack // 2))
            self.put(path, PadChannels(before, lack - before, value.dims), shape)
        elif lack < 0:
            self.put(path, Channels(0, channels), shape, alias=True)

    def project(self, path: Path, shape: tuple[int, ...]) -> None:
        """A convolution with any kernel that fits."""
        value = path.value
        options = [_fits(n, m) for n, m in zip(value.size, shape[1:], strict=True)]
        common = [option for option in options[0] if all(option in other for other in options)]
        chosen = [self.pick(common)] * value.dims if common else [self.pick(o) for o in options]
        kernel, stride, padding = zip(*chosen, strict=True)
        groups = self.groups(value.channels, shape[0], self.pick(("one", "one", "grouped")))
        form = "functional" if self.functional else "module"
        node = Conv(
            value.channels,
            shape[0],
            kernel,
            _collapse(stride),
            _collapse(padding),
            1,
            groups,
            self.one_in(2),
            form=form,
        )
        self.put(path, node, shape)

    # Sites

    def residual(self, path: Path) -> None:
        """A join of a main branch and of one or more other operands that fit its shape."""
        shortcut_first = self.one_in(3)
        visible = dict(self.saved)
        main = path.operand()
        self.branch(main)
        made = {name: v for name, v in self.saved.items() if name not in visible}
        if shortcut_first:  # what the main branch saves does not exist yet when the others run
            self.saved = visible
        others = []
        for _ in range(self.pick((1, 1, 1, 1, 2, 3))):
            other = path.operand()
            if self.one_in(4) and not self.is_large:
                self.branch(other)
            self.fit(other, main.value.shape)
            others.append(other)
        self.saved = {**self.saved, **made}
        self.join(path, [*others, main] if shortcut_first else [main, *others])

    def join(self, path: Path, operands: list[Path], form: str = "") -> None:
        """End the operands in one join, in the form given where it is allowed."""
        joined = Path(operands[0].value)
        forms = tuple(self.combine(joined, operand.value, form) for operand in operands[1:])
        chains = tuple(tuple(operand.nodes) for operand in operands)
        path.nodes.append(Join(chains, forms, self.pick(_CONSTANTS)))
        path.value = joined.value

    def any_block(self, path: Path) -> None:
        """A residual site, or now and then one of the constructs that only look like one."""
        if not self.one_in(5):
            self.residual(path)
            return
        odd: list[Any] = [self.double, self.opaque_branch, self.constant, self.product]
        odd += [self.repeat, self.recall, self.more_input, self.late_read]
        if path.value.is_map:
            odd += [self.broadcast, self.squeeze, self.concatenate]
        self.pick(odd)(path)

    def double(self, path: Path) -> None:
        """The value and itself."""
        forms = [form for form in _OUT_OF_PLACE if "-" not in form]
        self.put(path, Join(((), ()), (self.pick(forms),)))

    def opaque_branch(self, path: Path) -> None:
        """A site whose branch mixes positions or channels in a way that depends on the data."""
        main, shortcut = path.operand(), path.operand()
        self.layer(main)
        self.opaque(main)
        if self.one_in(2):
            self.layer(main)
        self.fit(shortcut, main.value.shape)
        self.join(path, [main, shortcut])

    def late_read(self, path: Path) -> None:
        """A value is changed in place after it was saved, and read again later."""
        if path.value.storage == _INPUT:
            self.layer(path)
        name = self.save(path)
        if path.value.storage == _INPUT or self.one_in(2):
            self.residual(path)
        else:
            kind = self.pick(IN_PLACE)
            form = self.pick(("module in-place", "functional in-place"))
            self.put(path, Act(kind, form, self.act_args(kind, path.value)), alias=True)
        if self.one_in(2):
            self.layer(path)
        self.recall(path, name)

    def product(self, path: Path) -> None:
        """Two branches joined by something that is not an addition."""
        main, other = path.operand(), path.operand()
        self.branch(main)
        self.fit(other, main.value.shape)
        form = self.pick(("a * b", "torch.maximum(a, b)", "torch.stack([a, b]).sum(0)"))
        node = Join((tuple(main.nodes), tuple(other.nodes)), (form,))
        self.put(path, node, main.value.shape)

    def broadcast(self, path: Path) -> None:
        """One operand has one channel, or one position."""
        main, other = path.operand(), path.operand()
        self.layer(main)
        shape = main.value.shape
        if self.one_in(2):
            self.affine(other, 1, "point")
            self.fit(other, (1, *shape[1:]))
        else:
            self.pool_all(other)
            self.affine(other, shape[0], "point")
        operands = (tuple(main.nodes), tuple(other.nodes))
        self.put(path, Join(operands, (self.pick(_OUT_OF_PLACE),)), shape)

    def squeeze(self, path: Path) -> None:
        """Squeeze and excite."""
        gate = path.operand()
        self.pool_all(gate)
        self.affine(gate, self.pick((2, 1)), "point")
        self.act(gate)
        self.affine(gate, path.value.channels, "point")
        self.put(gate, Act(self.pick(("sigmoid", "hardsigmoid")), "functional"))
        self.put(path, Join(((), tuple(gate.nodes)), ("a * b",)))

    def concatenate(self, path: Path) -> None:
        """The value next to what a branch makes of it, as in a dense net."""
        fork = path.value
        main, other = path.operand(), path.operand()
        self.branch(main)
        self.fit(other, (fork.channels, *main.value.size))
        node = Join((tuple(other.nodes), tuple(main.nodes)), ("torch.cat([a, b], 1)",))
        self.put(path, node, (fork.channels + main.value.channels, *main.value.size))
        if path.value.channels > 6:
            self.layer(path, 4, "point")

    def pool_all(self, path: Path) -> None:
        value = path.value
        kind = self.pick(("global avg", "mean", "global max"))
        form = "functional" if self.functional else "module"
        node = Pool(kind, value.dims, form=form)
        self.put(path, node, (value.channels, *(1 for _ in value.size)))

    def between(self, path: Path) -> None:
        """What may stand between two blocks."""
        if not self.one_in(4):
            return
        what: list[Any] = [self.drop, self.save, self.recall, self.transition]
        what += [self.constant, self.scale]
        if path.value.is_map:
            what += [self.pool, self.pad]
        self.pick(what)(path)

    def transition(self, path: Path) -> None:
        self.layer(path, self.width(path.value), self.style())

    def pad(self, path: Path) -> None:
        """Padding as a layer of its own, before a convolution without."""
        value = path.value
        amounts = tuple(self.pick(((1, 1), (0, 1), (1, 0))) for _ in value.size)
        size = [n + sum(pair) for n, pair in zip(value.size, amounts, strict=True)]
        self.put(path, Pad(amounts, self.pick((0.0, 1.0))), (value.channels, *size))
        self.affine(path, style="valid")

    def pool(self, path: Path) -> None:
        value = path.value
        windows = ((2, 2, 0), (3, 2, 1), (2, 1, 0))
        fits = [window for window in windows if min(value.size) >= window[0]]
        if not fits:
            return
        kernel, stride, padding = self.pick(fits)
        kind = self.pick(("avg", "max"))
        form = "functional" if self.functional else "module"
        size = [_out(n, kernel, stride, padding, 1) for n in value.size]
        node = Pool(kind, value.dims, kernel, stride, padding, form=form)
        self.put(path, node, (value.channels, *size))

    def head(self, path: Path) -> None:
        """Global pooling, flatten, classifier; sometimes residual blocks on the features."""
        value = path.value
        if value.is_map:
            if not self.one_in(4):
                self.pool_all(path)
            shape = (math.prod(path.value.shape),)
            form = self.pick(("module", "function", "method", "reshape"))
            self.put(path, Flatten(form), shape, alias=True)
        if self.one_in(3):
            self.residual(path)
        self.affine(path, self.pick((3, 5)))
