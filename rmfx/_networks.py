"""Random residual networks as plain data.

A `NetworkSpec` is a tree of frozen dataclasses that says everything about a small network: every
layer, every join, which modules are shared, what is returned. Its `repr` is an expression that
gives the same spec back, so a failing network can be pasted into a test. `NetworkSpec.build` makes
an ordinary `nn.Module` of it, whose control flow is fixed by the spec: any tracer can read it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._network_modules import (
    ARITHMETIC,
    FUNCTIONS,
    MODULES,
    NO_OPS,
    OPAQUE,
    Network,
    Store,
    _hear_padding_warning,
    _in_form,
    _Join,
    _Operation,
    _PairNetwork,
    _randomise_weights,
    _Recall,
    _Save,
    _share,
    _TensorArithmetic,
    _TripleNetwork,
    random_statistics,
    settle,
)


def arguments(node: Node | NetworkSpec) -> list[tuple[str, Any]]:
    """The arguments that differ from their defaults, "" for the name of a positional one."""
    shown: list[tuple[str, Any]] = []
    for position, item in enumerate(fields(node)):
        value = getattr(node, item.name)
        if value == item.default and type(value) is type(item.default):
            continue
        named = position >= 3 or len(shown) < position
        shown.append((item.name if named else "", value))
    return shown


@dataclass(frozen=True, repr=False)
class Node:
    """One step of a chain. Subclasses override `build`, or `apply` when they hold no state."""

    def __repr__(self) -> str:
        """The constructor call, without the arguments that have their default value."""
        shown = [f"{name}={value!r}" if name else repr(value) for name, value in arguments(self)]
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

    `form` is "module", "functional", or either with " keyword" (arguments passed by name), or
    "standardised": the weight has its mean and variance normalised at every call.
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

    Those of "prelu" are the number of channels and, if given, a number near all slopes.

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
            prelu: Any = nn.PReLU(channels)
            if len(self.args) > 1:
                prelu.around = self.args[1]
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
    """What does nothing at inference: dropout, identity, a copy, another memory format."""

    kind: str

    def build(self, store: Store) -> nn.Module:
        return NO_OPS[self.kind]() if self.kind in NO_OPS else _Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        if self.kind == "functional dropout":
            return F.dropout(x, 0.3, training=False)
        if self.kind == "channels_last":
            return x.to(memory_format=torch.channels_last)
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
    """Spatial padding by a layer of its own: one (before, after) pair for every axis.

    `mode` is that of `F.pad`; `value` is for "constant".
    """

    amounts: tuple[tuple[int, int], ...]
    value: float = 0.0
    mode: str = "constant"

    def apply(self, x: Tensor) -> Tensor:
        flat = [amount for pair in reversed(self.amounts) for amount in pair]
        return F.pad(x, flat, self.mode, self.value if self.mode == "constant" else None)


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
        dtype: the type of weights and inputs.
    """

    shapes: tuple[tuple[int, ...], ...]
    body: Nodes
    output: str = "tensor"
    returned: tuple[str, ...] = ()
    dtype: str = "float64"

    __repr__ = Node.__repr__

    def build(self, seed: int = 0) -> Network:
        """The network in eval mode and its type, with random weights and batch norm statistics."""
        _hear_padding_warning()
        with torch.random.fork_rng(devices=[]):  # layers draw initial weights from the global one
            network = (Network, _PairNetwork, _TripleNetwork)[len(self.shapes) - 1](self)
        _randomise_weights(network.to(getattr(torch, self.dtype)).eval(), seed)
        random_statistics(network, seed)
        settle(network)
        return network

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs, wide enough to reach both bounds of a ReLU6."""
        generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, self.dtype)
        return tuple(
            (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for shape in self.shapes
        )

    def features(self) -> frozenset[str]:
        """Which of `FEATURES` occur in the network."""
        from ._network_features import chain_features, recalled_names, saved_names

        found = {f"{self.output} output"}
        if self.dtype != "float64":
            found.add(f"{self.dtype} network")
        if any(shape[0] == 1 for shape in self.shapes):
            found.add("batch 1")
        if any(size % 2 for shape in self.shapes for size in shape[2:]):
            found.add("odd size")
        if len(self.shapes) > 1:
            found.add("several inputs")
        if self.returned:
            found.add("intermediate returned")
        found.update(chain_features(self.body, depth=0))
        inner = set(saved_names(self.body, depth=0))
        if inner & {*self.returned, *recalled_names(self.body)}:
            found.add("inner value used outside its site")
        return frozenset(found)
