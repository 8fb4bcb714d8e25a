"""The sampler: draws networks that are valid as drawn.

`Sampler` draws the trees that `spec.py` describes. It knows the shape of every value while it
draws and only ever chooses among what fits, so no drawn network is ever thrown away. It also
knows which values share memory, so that an in-place operation never reaches the caller's
inputs and never overlaps with what it reads; every other aliasing is fair game.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from rmfx.testing.networks import constructs as constructs

from .digits import SLOPES, STEEP, TYPES, awkward_arguments, suits_types
from .forms import FUNCTIONS, IN_PLACE, INTO_A, METHODS, OPAQUE, OPAQUE_ANYWHERE, WITHOUT_MODULE
from .joins import Join, Recall, Save
from .layers import (
    Act,
    Arithmetic,
    Channels,
    Conv,
    Drop,
    Flatten,
    Linear,
    Norm,
    Opaque,
    Pad,
    PadChannels,
    Pool,
    Slice,
)
from .node import Node
from .spec import NetworkSpec
from .unusual import take_all, tokens, unusual
from .values import INPUT, Path, Value, collapse, out, pooled

# 2 instead of 1.75 would let whole networks cancel to nothing but rounding.
_CONSTANTS = (0.5, -0.5, 1.75, -1.0, 0.1)
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
_Window = tuple[int, int, int, bool]  # kernel, stride, padding, ceil_mode
_POOLS: tuple[_Window, ...] = (
    *((2, 2, 0, True), (2, 2, 0, False), (1, 2, 0, False), (3, 2, 1, False)),
)
_OUT_OF_PLACE = (
    *("a + b", "a + b", "b + a", "torch.add(a, b)", "a.add(b)", "a - b", "b - a"),
    *("a + c * b", "c * a + b", "torch.add(a, b, alpha=c)", "torch.sub(a, b, alpha=c)"),
    *("torch.add(input=a, other=b)", "sum([a, b])"),
)


@functools.cache
def _fits(size: int, target: int) -> tuple[tuple[int, int, int], ...]:
    """Every small (kernel, stride, padding) that brings one axis from size to target."""
    found = [
        (kernel, stride, padding)
        for stride in (1, 2, 3)
        for kernel in (1, 2, 3, 4)
        for padding in (0, 1, 2)
        if padding < max(kernel, 2) and out(size, kernel, stride, padding, 1) == target
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
        self.storages = INPUT
        self.products = 0  # of two values without bounds
        self.layers: list[Conv | Linear] = []  # those that may be called again
        self.kind = self.pick(("relu", "relu", "relu", "relu6", "leaky_relu", "prelu", "silu"))
        self.is_awkward = self.one_in(5)  # with slopes, bounds and scales that cost digits
        self.is_scaled = False
        if self.is_awkward:
            self.kind = self.pick(("leaky_relu", "prelu", "hardtanh"))
            self.slopes = self.pick((STEEP, SLOPES))
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
            return self.typed(self.finish(path))
        if not self.one_in(4):
            self.layer(path, style=self.pick(("keep", "stride", "valid")))
        if path.value.is_map and self.one_in(15):
            take_all(self, path)
        for _ in range(self.pick((1, 2, 2, 3, 4))):
            self.any_block(path)
            if not self.one_in(3):
                self.act(path)
            self.between(path)
            if self.one_in(4) and not self.is_large:
                self.unusual(path)
        if self.one_in(3):
            self.head(path)
        return self.typed(self.finish(path))

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
        return Path(Value(shape, INPUT, tokens=layout == "tokens"), depth=3)

    def finish(self, path: Path) -> NetworkSpec:
        output = self.pick(("tensor", "tensor", "tensor", "tuple", "list", "dict", "nested"))
        names = [] if output == "tensor" else [n for n in self.saved if self.one_in(2)]
        return NetworkSpec(tuple(self.shapes), tuple(path.nodes), output, tuple(names))

    def typed(self, spec: NetworkSpec) -> NetworkSpec:
        """The network in another type, now and then, if it computes nearly the same in one."""
        if not (self.is_awkward or self.one_in(12)):
            return spec
        dtype = self.pick(TYPES)
        return replace(spec, dtype=dtype) if suits_types(spec.features()) else spec

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
            out(n, k, s, p, d)
            for n, k, s, p, d in zip(value.size, kernel, stride, padding, dilation, strict=True)
        ]
        of_groups = self.groups(value.channels, outputs, groups)
        mode = "zeros"
        if form.startswith("module") and self.may_wrap(value, style, padding):
            mode = self.pick(("reflect", "replicate", "circular"))
        # One weight for each filter would be its own mean.
        elif value.channels // of_groups * math.prod(kernel) > 1 and self.one_in(25):
            form = "standardised"
        node = Conv(
            value.channels,
            outputs,
            tuple(kernel),
            collapse(stride),
            padding[0] if isinstance(padding[0], str) else collapse(padding),
            collapse(dilation),
            of_groups,
            bias,
            mode,
            form,
        )
        self.put(path, node, (outputs, *sizes))

    def may_wrap(self, value: Value, style: str, padding: Sequence[int | str]) -> bool:
        """Whether this convolution gets another padding than zeros, now and then."""
        widest = max((n for n in padding if isinstance(n, int)), default=0)
        keeps = style in ("keep", "preserve") and 0 < widest < min(value.size)
        return keeps and self.one_in(20)

    def geometry(
        self, value: Value, style: str
    ) -> tuple[list[int], list[int], list[Any], list[int]]:
        """Kernel, stride, padding, dilation per axis; pointwise where the style does not fit."""

        def fitting(size: Sequence[int]) -> list[tuple[int, int, int | str, int]]:
            fits = [g for g in _GEOMETRY[style] if all(out(n, *g) >= 1 for n in size)]
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
            forms = ["method", "torch"] + (forms if kind not in WITHOUT_MODULE else [])
        if path.value.storage != INPUT:
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
        if self.is_awkward:
            options |= awkward_arguments(value.shape[0], self.slopes)
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
        if self.is_large or not self.one_in(4):
            return
        what: list[Any] = [self.drop, self.save, self.save, self.scale, self.recall, self.recall]
        what += [self.repeat, self.opaque]
        what += [self.construct] * 4 + [self.unusual] * 3
        if path.depth > 0:
            what.append(self.any_block)
        self.pick(what)(path)

    def drop(self, path: Path) -> None:
        kinds = ["identity", "dropout", "functional dropout", "contiguous", "detach", "clone"]
        kinds += ["alpha_dropout", "in-place dropout"]
        if path.value.is_map and path.value.dims == 2:
            kinds += ["dropout2d", "channels_last"]
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
        form = self.pick(forms if value.storage == INPUT else [*forms, in_place])
        shape: tuple[int, ...] = ()
        if "p" in form or "b" in form:
            shape = (value.channels, *(1 for _ in value.size)) if value.is_map else value.shape[-1:]
        self.put(path, Arithmetic(form, self.pick(_CONSTANTS), shape), alias="=" in form)

    def opaque(self, path: Path) -> None:
        value = path.value
        kinds = tuple(OPAQUE) if value.is_map else OPAQUE_ANYWHERE
        if value.channels * math.prod(value.size) == 1:  # nothing to normalise
            kinds = tuple(kind for kind in kinds if "norm" not in kind)
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

    def combine(self, path: Path, other: Value, wanted: str = "", *, adds: bool = False) -> str:
        """How to join the path's value a with b, of the same shape; the result's memory is set.

        Args:
            wanted: a form to take where it is allowed.
            adds: whether to leave out subtractions.
        """
        value = path.value
        forms = list(_OUT_OF_PLACE)
        if value.storage != other.storage:
            if value.storage != INPUT:
                forms += INTO_A
            if other.storage != INPUT:
                forms += ["b += a", "b += a"]
        if adds:
            forms = [form for form in forms if "-" not in form and "sub" not in form]
        form: str = wanted if wanted in forms else self.pick(forms)
        if form in INTO_A:
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
        other = Path(replace(value, storage=INPUT))
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
        if self.one_in(4) and not self.is_large:
            self.unusual(path)
        if self.one_in(2):
            self.pick((self.free, self.free, self.linear, self.site_first))(path)
            return
        if not self.is_large and self.one_in(3):
            parts = constructs.built_of_parts
            self.pick((parts, constructs.shrinking, constructs.stacked, parts))(self, path)
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
        self.perhaps_squeeze(path)

    def inverted(self, path: Path, outputs: int, style: str) -> None:
        """Expand, depthwise, project, with a linear end."""
        if not self.one_in(3):
            self.layer(path, min(8, 2 * path.value.channels), "point")
        self.oddment(path)
        self.affine(path, path.value.channels, style, "depthwise")
        self.perhaps_norm(path)
        late = self.one_in(3)
        if not late:
            self.act(path)
        self.perhaps_squeeze(path)
        if late:
            self.act(path)
        self.affine(path, outputs, "point")
        self.perhaps_norm(path)

    def perhaps_squeeze(self, path: Path) -> None:
        """Squeeze and excite, in one branch of six."""
        if path.value.is_map and self.one_in(6):
            constructs.squeeze(self, path)

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
        pools = [window for window in _POOLS if self.pools(value, size, window)]
        if pools:
            ways += ["pool", "pool"]
        way = self.pick(ways)
        if way == "crop":
            self.crop(path, size)
            self.fit_channels(path, shape[0])
        elif way.startswith("step"):
            none, step = (0,) * value.dims, int(way[-1])
            if self.one_in(5):
                node: Node = Pool("max", value.dims, 1, step, ceil_mode=self.one_in(2))
                self.put(path, node, (value.channels, *size))
            else:
                self.put(path, Slice(none, none, step), (value.channels, *size), alias=True)
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

    def pools(self, value: Value, size: tuple[int, ...], pool: _Window) -> bool:
        """Whether an average pool with this window gives the size."""
        *window, ceil_mode = pool
        return all(
            n >= window[0] and pooled(n, *window, ceil_mode=ceil_mode) == target
            for n, target in zip(value.size, size, strict=True)
        )

    def average(self, path: Path, size: tuple[int, ...], window: _Window) -> None:
        form = "functional" if self.functional else "module"
        node = Pool("avg", path.value.dims, *window, not self.one_in(2), form)
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
            collapse(stride),
            collapse(padding),
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
        if main.value.is_map and self.one_in(12):
            constructs.put_alike(self, [main, *others])
        self.saved = {**self.saved, **made}
        self.join(path, [*others, main] if shortcut_first else [main, *others])

    def join(self, path: Path, operands: list[Path], form: str = "") -> None:
        """End the operands in one join, in the form given where it is allowed."""
        joined = Path(operands[0].value)
        several = len(operands) > 2  # equal ones of opposite signs would cancel to mere rounding
        forms = tuple(
            self.combine(joined, operand.value, form, adds=several) for operand in operands[1:]
        )
        chains = tuple(tuple(operand.nodes) for operand in operands)
        constants = [c for c in _CONSTANTS if c > 0] if several else _CONSTANTS
        path.nodes.append(Join(chains, forms, self.pick(constants)))
        path.value = joined.value

    def any_block(self, path: Path) -> None:
        """A residual site, or now and then one of the constructs that only look like one."""
        if not self.one_in(5):
            self.residual(path)
            return
        odd: list[Any] = [self.double, self.opaque_branch, self.constant, self.product]
        odd += [self.repeat, self.recall, self.more_input, self.late_read]
        if path.value.is_map:
            odd += [self.broadcast, self.broadcast, self.concatenate, self.construct]
        odd += [self.unusual] * 3
        self.pick(odd)(path)

    def construct(self, path: Path) -> None:
        """What else stands in branches, outside of one."""
        constructs.construct(self, path)

    def unusual(self, path: Path) -> None:
        """What attacks found: rolls, indices, writes through views, shared memory and more."""
        unusual(self, path)

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
        if path.value.storage == INPUT:
            self.layer(path)
        name = self.save(path)
        if path.value.storage == INPUT or self.one_in(2):
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
        forms = ["torch.stack([a, b]).sum(0)", *constructs.CHOICES]
        if constructs.spends_product(self):
            forms.insert(0, "a * b")
        form = self.pick(forms)
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
            what += [self.pool, self.pad, self.blur, self.tokens]
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

    def tokens(self, path: Path) -> None:
        tokens(self, path)

    def pool(self, path: Path) -> None:
        constructs.put_pool(self, path)

    def blur(self, path: Path) -> None:
        constructs.put_blur(self, path, 2)

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
