"""The features of layers and of single operations."""

from __future__ import annotations

from collections.abc import Iterator

from .counted import Counted, Place
from .forms import MODULES, NO_OPS, OPAQUE, WITHOUT_MODULE
from .further import Blur, Deconv, Shuffle, Transpose
from .layers import Act, Conv, Linear, Norm
from .operations import Arithmetic, Drop, Opaque, Pad, Pool

LAYERS = Counted()
_WAYS = ("module", "functional", "torch", "method")
_MODES = ("reflect", "replicate", "circular")


@LAYERS.of(
    Conv,
    names=(
        *(f"conv{dims}d" for dims in (1, 2, 3)),
        *("conv with bias", "conv without bias", "conv without BN"),
        *("grouped conv", "depthwise conv", "grouped point convolution"),
        *("dilated conv", "even kernel", "strided conv", "conv that differs between axes"),
        *("valid conv", "padding=same", *(f"padding mode {mode}" for mode in _MODES)),
        *("module keyword conv", "functional conv", "functional keyword conv"),
        *("weight standardised", "conv called twice", "tied weights"),
    ),
)
def _(node: Conv, place: Place) -> Iterator[str]:
    yield f"conv{len(node.kernel)}d"
    yield f"conv {'with' if node.bias else 'without'} bias"
    if not isinstance(place.following, Norm):
        yield "conv without BN"
    yield from _window(node)
    if node.groups > 1:
        depthwise = node.groups == node.inputs
        yield "depthwise conv" if depthwise else "grouped conv"
        if max(node.kernel) == 1 and not depthwise:
            yield "grouped point convolution"
    if node.form == "standardised":
        yield "weight standardised"
    elif node.form != "module":
        yield f"{node.form} conv"
    if node.shared:
        yield "conv called twice" if node.shared.startswith("module:") else "tied weights"


def _window(node: Conv) -> Iterator[str]:
    """What a convolution does along the axes."""
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
        yield f"padding mode {node.padding_mode}"


@LAYERS.of(Linear, names=("linear",))
def _(node: Linear, place: Place) -> Iterator[str]:
    yield "linear"


@LAYERS.of(Deconv, names=("transposed conv", "strided transposed conv"))
def _(node: Deconv, place: Place) -> Iterator[str]:
    yield "transposed conv"
    if node.stride > 1:
        yield "strided transposed conv"


@LAYERS.of(Norm, names=("module BN", "functional BN", "BN before conv"))
def _(node: Norm, place: Place) -> Iterator[str]:
    yield f"{'functional' if 'functional' in node.form else 'module'} BN"
    if isinstance(place.following, Conv) and not isinstance(place.previous, Conv):
        yield "BN before conv"


@LAYERS.of(
    Act,
    names=(
        *(f"activation {kind}" for kind in (*MODULES, "prelu", *WITHOUT_MODULE)),
        *(f"activation as {way}{how}" for way in _WAYS for how in ("", " in-place")),
        "shared activation module",
    ),
)
def _(node: Act, place: Place) -> Iterator[str]:
    yield f"activation {node.kind}"
    yield f"activation as {node.form}"
    if node.shared:
        yield "shared activation module"


@LAYERS.of(
    Arithmetic,
    names=("constant scale", "join with a constant", "parameter or buffer as constant"),
)
def _(node: Arithmetic, place: Place) -> Iterator[str]:
    scales = "*" in node.form or "/" in node.form or node.form == "-x"
    yield "constant scale" if scales else "join with a constant"
    if node.shape:
        yield "parameter or buffer as constant"


@LAYERS.of(
    *(Opaque, Drop),
    names=(
        *OPAQUE,
        *NO_OPS,
        "functional dropout",
        "clone",
        "contiguous",
        "detach",
        "channels_last",
    ),
)
def _(node: Opaque | Drop, place: Place) -> Iterator[str]:
    yield node.kind


@LAYERS.of(
    Pool,
    names=(
        *(f"{kind} pool" for kind in ("avg", "max", "mean", "global avg", "global max")),
        *("pool inside a branch", "ceil_mode pool", "max pool of one"),
    ),
)
def _(node: Pool, place: Place) -> Iterator[str]:
    yield f"{node.kind} pool"
    if place.depth and node.kind in ("avg", "max"):
        yield "pool inside a branch"
    if node.ceil_mode:
        yield "ceil_mode pool"
    if node.kind == "max" and node.kernel == 1:
        yield "max pool of one"


@LAYERS.of(
    Pad, names=(*(f"{mode} padding" for mode in ("constant", *_MODES)), "asymmetric padding")
)
def _(node: Pad, place: Place) -> Iterator[str]:
    yield f"{node.mode} padding"
    if any(before != after for before, after in node.amounts):
        yield "asymmetric padding"


@LAYERS.of(Blur, names=("blur pool", "strided blur pool", "reflect blur pool"))
def _(node: Blur, place: Place) -> Iterator[str]:
    yield "strided blur pool" if node.stride > 1 else "blur pool"
    if node.padding_mode == "reflect":
        yield "reflect blur pool"


@LAYERS.of(Shuffle, names=("channel shuffle",))
def _(node: Shuffle, place: Place) -> Iterator[str]:
    yield "channel shuffle"


@LAYERS.of(Transpose, names=("tokens transposed",))
def _(node: Transpose, place: Place) -> Iterator[str]:
    yield "tokens transposed"
