"""The tables that say what each kind of node computes, and the modules that compute it."""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ._networks import Arithmetic, Join, NetworkSpec, Node, Nodes, Recall


PRODUCTS = ("a * b", "torch.mul(a, b)")  # the forms of `JOINS` that are gates
Saved = dict[str, Tensor]
Store = dict[str, Any]  # what several layers of one network share, by the name in their spec

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
    **{kind: getattr(torch, kind) for kind in ("abs", "sin", "erf")},
}
WITHOUT_MODULE = tuple(kind for kind in FUNCTIONS if kind not in MODULES)
METHODS = ("relu", "tanh", "sigmoid", *WITHOUT_MODULE)  # kinds that are also methods of a tensor
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
    "torch.mul(a, b)": lambda a, b, c: torch.mul(a, b),
    "torch.maximum(a, b)": lambda a, b, c: torch.maximum(a, b),
    "torch.minimum(a, b)": lambda a, b, c: torch.minimum(a, b),
    "torch.where(a > 0.1, a, b)": lambda a, b, c: torch.where(a > 0.1, a, b),
    "a / (1 + b * b)": lambda a, b, c: a / (1 + b * b),
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


class Tied(nn.Module):
    """Has buffers that share memory, which they do after `tie` only.

    Moving a module to another type gives every buffer memory of its own.
    """

    def tie(self) -> None:
        """Let the buffers share memory."""
        raise NotImplementedError


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


class _Standardised(nn.Module):
    """Calls the convolution it holds with its weight standardised, filter by filter."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
        weight = layer.weight
        dims = tuple(range(1, 2 + len(layer.kernel_size)))
        centred = weight - weight.mean(dims, keepdim=True)
        # The scale is that of weights that keep the scale of what passes.
        fan_in = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        spread = torch.sqrt(fan_in * (centred * centred).mean(dims, keepdim=True) + 1e-5)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        result: Tensor = convolve(x, centred / spread, layer.bias, *geometry)
        return result


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
    if way == "standardised":
        return _Standardised(layer)
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


def settle(network: nn.Module) -> None:
    """What comes after random values: buffers share memory, some slopes lie near a number."""
    for layer in network.modules():
        if isinstance(layer, Tied):
            layer.tie()
        around = getattr(layer, "around", None)
        if isinstance(layer, nn.PReLU) and around is not None:
            near = torch.linspace(-1e-3, 1e-3, layer.weight.numel(), dtype=torch.float64)
            layer.weight.data.copy_(around + near)


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
        if not isinstance(layer, nn.modules.batchnorm._NormBase):  # instance norms, too
            continue
        if layer.affine:
            sign = torch.where(uniform(layer.weight, 0, 1) < 0.25, -1.0, 1.0)
            layer.weight.data.copy_(sign * uniform(layer.weight, 0.5, 1.5))
            layer.bias.data.copy_(uniform(layer.bias, -1, 1))
        if layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.copy_(uniform(layer.running_mean, -1, 1))
            layer.running_var.copy_(uniform(layer.running_var, 0.3, 3))
    return module
