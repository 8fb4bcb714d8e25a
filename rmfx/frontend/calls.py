"""What calls mean: kinds of modules, operators, and a row for each kind of layer.

A row says which targets mean a layer, the names of their arguments in order, and how to build the
`torch.nn` module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.ir.kinds import overloads
from rmfx.ir.nodes import each
from rmfx.modules.activations import POINTWISE, Pointwise

Arguments = dict[str, Any]
Builder = Callable[[Arguments], nn.Module | None]


@dataclass(frozen=True)
class Call:
    """One way to call a layer: argument names in order, and the module it amounts to."""

    names: tuple[str, ...]
    build: Builder


# ---- pointwise activations ----------------------------------------------------------------------
def _activation(kind: type[nn.Module], names: str) -> Builder:
    def build(given: Arguments) -> nn.Module | None:
        if given.pop("training", False) or given.pop("inplace", None) not in (None, False, True):
            return None
        return kind(**given)

    return build


_ACTIVATIONS: tuple[tuple[type[nn.Module], str, str], ...] = (
    (nn.ReLU, "relu", "inplace"),
    (nn.ReLU6, "relu6", "inplace"),
    (nn.Hardtanh, "hardtanh", "min_val max_val inplace"),
    (nn.LeakyReLU, "leaky_relu", "negative_slope inplace"),
    (nn.RReLU, "rrelu", "lower upper training inplace"),
    (nn.ELU, "elu", "alpha inplace"),
    (nn.CELU, "celu", "alpha inplace"),
    (nn.SELU, "selu", "inplace"),
    (nn.GELU, "gelu", "approximate"),
    (nn.SiLU, "silu", "inplace"),
    (nn.Mish, "mish", "inplace"),
    (nn.Softplus, "softplus", "beta threshold"),
    (nn.Softsign, "softsign", ""),
    (nn.Tanh, "tanh", ""),
    (nn.Sigmoid, "sigmoid", ""),
    (nn.LogSigmoid, "logsigmoid", ""),
    (nn.Hardsigmoid, "hardsigmoid", "inplace"),
    (nn.Hardswish, "hardswish", "inplace"),
    (nn.Hardshrink, "hardshrink", "lambd"),
    (nn.Softshrink, "softshrink", "lambd"),
    (nn.Tanhshrink, "tanhshrink", ""),
    (nn.Threshold, "threshold", "threshold value inplace"),
)


def _pointwise(name: str) -> Builder:
    def build(given: Arguments) -> nn.Module | None:
        numbers = all(type(value) in (int, float) for value in given.values())
        complete = len(given) == (name == "pow")
        return Pointwise(name, *given.values()) if numbers and complete else None

    return build


def _clamp(given: Arguments) -> nn.Module | None:
    low, high = given.get("min"), given.get("max")
    if any(isinstance(v, Tensor) for v in (low, high)) or (low is None and high is None):
        return None
    low = -float("inf") if low is None else float(low)
    high = float("inf") if high is None else float(high)
    if (low, high) == (0.0, float("inf")):
        return nn.ReLU()
    return nn.Hardtanh(low, high) if low < high else None


def _prelu(given: Arguments) -> nn.Module | None:
    weight = given["weight"]
    if not isinstance(weight, Tensor):
        return None
    return _filled(nn.PReLU(weight.numel(), device="meta"), weight=weight)


# ---- layers with weights ------------------------------------------------------------------------
def _filled(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """The module with its parameters and buffers set to the model's own tensors."""
    for name, value in tensors.items():
        if name in module._parameters and isinstance(value, Tensor):
            shared = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
            module._parameters[name] = shared
        elif name in module._parameters:
            module._parameters[name] = None
        else:
            module._buffers[name] = value
    return module


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def conv(dims: int, *, transposed: bool = False) -> Builder:
    """What makes convolutions of so many spatial dimensions, with the weights that are given."""
    kind: Any = (_TRANSPOSED if transposed else _CONVS)[dims - 1]

    def build(given: Arguments) -> nn.Module | None:
        weight, bias = given.pop("weight"), given.pop("bias", None)
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
            return None
        groups = given.get("groups", 1)
        options = {k: each(v, dims) for k, v in given.items() if k != "groups"}
        read, made = weight.shape[1] * groups, weight.shape[0]
        channels = (made, read) if transposed else (read, made)
        module = kind(*channels, weight.shape[2:], groups=groups, device="meta", **options)
        return _filled(module, weight=weight, bias=bias)

    return build


def _convolution(given: Arguments) -> nn.Module | None:
    weight = given["weight"]
    transposed = given.pop("transposed")
    if not isinstance(weight, Tensor) or not 3 <= weight.dim() <= 5:
        return None
    if transposed:
        return conv(weight.dim() - 2, transposed=True)(given)
    return None if any(given.pop("output_padding")) else conv(weight.dim() - 2)(given)


def linear(given: Arguments) -> nn.Module | None:
    """`F.linear` as a module, None if it is none."""
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None) or weight.dim() != 2:
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    return _filled(module, weight=weight, bias=bias)


def batch_norm(given: Arguments) -> nn.Module | None:
    """`F.batch_norm` as a module, None if it is none."""
    mean, variance = given["running_mean"], given["running_var"]
    weight, bias = given.get("weight"), given.get("bias")
    rank = given["rank"]
    constant = isinstance(mean, Tensor) and isinstance(variance, Tensor)
    if given.get("training") or not constant or rank not in (2, 3, 4, 5):
        return None
    if not isinstance(weight, Tensor | None) or not isinstance(bias, Tensor | None):
        return None
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]
    empty = kind(mean.numel(), eps=given.get("eps", 1e-5), device="meta")
    module = _filled(empty, running_mean=mean, running_var=variance, weight=weight, bias=bias)
    module.num_batches_tracked = torch.tensor(0)
    return module


def instance_norm(given: Arguments) -> nn.Module | None:
    """With running statistics it is a batch norm."""
    return None if given.pop("use_input_stats", True) is not False else batch_norm(given)


# ---- pooling, padding, shape --------------------------------------------------------------------
def _pool(kind: type[nn.Module]) -> Builder:
    def build(given: Arguments) -> nn.Module | None:
        if given.get("return_indices"):
            return None
        if given.get("stride") in ([], ()):
            given.pop("stride")
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})

    return build


def _dropout(given: Arguments) -> nn.Module | None:
    training = given.get("training", True)
    return None if training or not isinstance(training, bool) else nn.Dropout(given.get("p", 0.5))


def _flatten(given: Arguments) -> nn.Module | None:
    return nn.Flatten(given.get("start_dim", 0), given.get("end_dim", -1))


# ---- the table ----------------------------------------------------------------------------------
Row = tuple[list[Any], str, Builder]  # targets, the names of their arguments behind the input


def _rows_of_activations() -> Iterator[Row]:
    for kind, name, names in _ACTIVATIONS:
        in_place = f"{name}_"
        functions = [getattr(m, n, None) for m in (F, torch) for n in (name, in_place)]
        methods = [n for n in (name, in_place) if hasattr(Tensor, n)]
        yield [*functions, *methods, *overloads(name, in_place)], names, _activation(kind, names)
    for name in POINTWISE:
        forms = (name, f"{name}_")
        functions = [getattr(m, n, None) for m in (torch, operator) for n in forms]
        operators = overloads(*(forms if name != "pow" else ("pow.Tensor_Scalar", "pow_.Scalar")))
        names = "exponent" if name == "pow" else ""
        yield [*functions, *forms, *operators], names, _pointwise(name)


def _rows_of_space(dims: int) -> Iterator[Row]:
    """The layers of so many spatial dimensions."""
    functions = [getattr(F, f"conv{dims}d"), getattr(torch, f"conv{dims}d")]
    operators = overloads(f"conv{dims}d", f"conv{dims}d.padding")
    names = "weight bias stride padding dilation groups"
    yield [*functions, *operators], names, conv(dims)
    functions = [getattr(F, f"conv_transpose{dims}d"), getattr(torch, f"conv_transpose{dims}d")]
    operators = overloads(f"conv_transpose{dims}d" + (".input" if dims > 1 else ""))
    names = "weight bias stride padding output_padding groups dilation"
    yield [*functions, *operators], names, conv(dims, transposed=True)
    divisor = " divisor_override" if dims > 1 else ""
    for prefix, module, names in (
        ("max_pool", "MaxPool", "kernel_size stride padding dilation ceil_mode return_indices"),
        ("avg_pool", "AvgPool", f"kernel_size stride padding ceil_mode count_include_pad{divisor}"),
        ("adaptive_avg_pool", "AdaptiveAvgPool", "output_size"),
        ("adaptive_max_pool", "AdaptiveMaxPool", "output_size return_indices"),
    ):
        name = f"{prefix}{dims}d"
        # torch.adaptive_max_pool1d gives the places, too.
        owners = (F,) if prefix == "adaptive_max_pool" else (F, torch)
        functions = [getattr(m, name, None) for m in owners]
        yield [*functions, *overloads(name)], names, _pool(getattr(nn, f"{module}{dims}d"))


_CLIPS = [torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip", "clip_"]
_CLAMPS_BELOW = [torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"]
_STATISTICS = "running_mean running_var"
_WINDOW = "kernel_size stride padding dilation ceil_mode"
_CONVOLUTION = "weight bias stride padding dilation transposed output_padding groups"
_DROPOUTS = overloads("dropout", "dropout_", "feature_dropout", "feature_dropout_")
_ROWS: tuple[Row, ...] = (
    ([*_CLIPS, *overloads("clamp", "clamp_", "clip", "clip_")], "min max", _clamp),
    ([*_CLAMPS_BELOW, *overloads("clamp_min", "clamp_min_")], "min", _clamp),
    ([operator.ipow], "exponent", _pointwise("pow")),
    (overloads("log_sigmoid"), "", _activation(nn.LogSigmoid, "")),
    ([F.prelu, torch.prelu, *overloads("prelu")], "weight", _prelu),
    ([F.linear, *overloads("linear")], "weight bias", linear),
    ([F.batch_norm], f"{_STATISTICS} weight bias training momentum eps", batch_norm),
    ([F.instance_norm], f"{_STATISTICS} weight bias use_input_stats momentum eps", instance_norm),
    (
        [torch.instance_norm, *overloads("instance_norm")],
        f"weight bias {_STATISTICS} use_input_stats momentum eps cudnn_enabled",
        instance_norm,
    ),
    (
        [torch.batch_norm, *overloads("batch_norm")],
        f"weight bias {_STATISTICS} training momentum eps cudnn_enabled",
        batch_norm,
    ),
    (
        overloads("_native_batch_norm_legit_no_training"),
        f"weight bias {_STATISTICS} momentum eps",
        batch_norm,
    ),
    (
        overloads("native_batch_norm", "_native_batch_norm_legit"),
        f"weight bias {_STATISTICS} training momentum eps",
        batch_norm,
    ),
    (overloads("max_pool2d_with_indices"), _WINDOW, _pool(nn.MaxPool2d)),
    (overloads("max_pool3d_with_indices"), _WINDOW, _pool(nn.MaxPool3d)),
    (overloads("convolution"), _CONVOLUTION, _convolution),
    (
        [
            F.dropout,
            F.dropout1d,
            F.dropout2d,
            F.dropout3d,
            F.alpha_dropout,
            F.feature_alpha_dropout,
        ],
        "p training inplace",
        _dropout,
    ),
    ([torch.dropout, *_DROPOUTS], "p training", _dropout),
    ([torch.flatten, "flatten", *overloads("flatten.using_ints")], "start_dim end_dim", _flatten),
)
CALLS: dict[Any, Call] = {
    target: Call(("input", *names.split()), build)
    for rows in (_rows_of_activations(), *map(_rows_of_space, (1, 2, 3)), _ROWS)
    for targets, names, build in rows
    for target in targets
    if target is not None
}
NORMS = (batch_norm, instance_norm)  # which have to know the number of dimensions
OF_REAL_NUMBERS = (_clamp,)  # modules that do otherwise to integers than the call


def gives_several(target: Any) -> bool:
    """Whether an operator gives several results, of which the layer it amounts to gives one."""
    schema = getattr(target, "_schema", None)
    return schema is not None and len(schema.returns) > 1


def arguments_of(node: fx.Node, *names: str) -> Arguments:
    """What a call is given, by the names of its arguments in order; `self` goes by "input"."""
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if "self" in given:
        given["input"] = given.pop("self")
    return given
