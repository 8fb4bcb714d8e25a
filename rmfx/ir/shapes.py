"""The shapes of a graph's values, found without computing them.

Those behind common layers follow from their laws, which is far quicker than running them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import CONVS
from rmfx.algebra.modules import from_conv
from rmfx.errors import Refusal

from .nodes import has_hooks

Shape = tuple[int, ...]
Law = Callable[[Shape, torch.dtype], Shape | None]  # None where only a run can tell, or would fail
COMBINING = (torch.add, torch.sub, torch.mul, torch.div)
RANKS_OF_NORM: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}


class Unmade:
    """A tensor of which only the shape is known, made when somebody asks for it.

    Args:
        like: a tensor of its type on its device.
    """

    __slots__ = ("_made", "like", "shape")

    def __init__(self, shape: Shape, like: Tensor) -> None:
        self.shape, self.like = shape, like
        self._made: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def layout(self) -> torch.layout:
        return self.like.layout

    def made(self) -> Tensor:
        """The tensor, always the same one: a graph may write to it."""
        if self._made is None:
            self._made = self.like.new_empty(self.shape)
        return self._made


def law_of(module: nn.Module) -> Law | None:
    """How the shape behind a common layer follows from what it reads; None for other layers."""
    if is_activation(module):
        return _of_prelu(module) if isinstance(module, nn.PReLU) else lambda shape, kind: shape
    if type(module) in RANKS_OF_NORM:
        return _of_batch_norm(module)
    if type(module) in (nn.LayerNorm, nn.GroupNorm):
        return partial(_of_norm, module)
    return _of_conv(module) if type(module) in CONVS else None


def _of_prelu(module: nn.PReLU) -> Law:
    slopes, own = module.weight.numel(), module.weight.dtype

    def law(shape: Shape, kind: torch.dtype) -> Shape | None:
        fits = slopes == 1 or (len(shape) > 1 and shape[1] == slopes)
        return shape if fits and kind == own else None

    return law


def _of_batch_norm(module: Any) -> Law:
    ranks, channels = RANKS_OF_NORM[type(module)], module.num_features

    def law(shape: Shape, kind: torch.dtype) -> Shape | None:
        return shape if len(shape) in ranks and shape[1] == channels else None

    return law


def _of_norm(module: Any, shape: Shape, kind: torch.dtype) -> Shape | None:
    if module.weight is not None and module.weight.dtype != kind:
        return None
    if isinstance(module, nn.LayerNorm):
        normalised = tuple(module.normalized_shape)
        return shape if shape[-len(normalised) :] == normalised else None
    # Of one value in each group torch makes no norm.
    fits = len(shape) > 1 and shape[1] == module.num_channels
    return shape if fits and math.prod(shape) > module.num_groups else None


def _of_conv(module: Any) -> Law | None:
    with unset_fake_temporarily():  # fakes of its weights would take ten times as long
        layer = from_conv(module)
    if isinstance(layer, Refusal):
        return None
    own, n_in, n_out, dims = module.weight.dtype, layer.in_channels, layer.out_channels, layer.dims
    places = tuple(zip(layer.growth, layer.stride, strict=True))

    def law(shape: Shape, kind: torch.dtype) -> Shape | None:
        if kind != own:
            return None
        if not dims:
            return (*shape[:-1], n_out) if shape and shape[-1] == n_in else None
        if len(shape) != dims + 2 or shape[1] != n_in:
            return None
        size = [(n + a) // s for n, (a, s) in zip(shape[2:], places, strict=True)]
        return (shape[0], n_out, *size) if min(size) > 0 else None

    return law


class AsFakes:
    """Lets a graph run on fake tensors, which do what real ones do."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode: Any = mode

    def device(self, real: torch.device) -> torch.device:
        """Where inputs are."""
        return real

    def of(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor of the model: a graph may write to it."""
        made: Tensor = self.mode.from_tensor(tensor)
        return made

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a module gives."""
        with _as_before(module) if has_hooks(module) else contextlib.nullcontext():
            return module(*args, **kwargs)


class OnMeta:
    """Lets a graph run on tensors without values, the model's among them."""

    def __init__(self) -> None:
        self.mode: Any = contextlib.nullcontext()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._modules: dict[int, tuple[nn.Module, nn.Module]] = {}

    def device(self, real: torch.device) -> torch.device:
        """Where inputs are."""
        return torch.device("meta")

    def of(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor of the model."""
        return self._known.setdefault(id(tensor), (tensor, tensor.detach().to("meta")))[1]

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a module gives."""
        known = self._modules.get(id(module))
        if known is None:
            named = itertools.chain(module.named_parameters(), module.named_buffers())
            made = copy.deepcopy(module, {id(x): self.of(x) for _, x in named})
            known = self._modules[id(module)] = module, made
        return known[1](*args, **kwargs)


Weights = AsFakes | OnMeta


class WithoutValues(fx.Interpreter):
    """Runs a graph on tensors without values, the common layers by their laws.

    Args:
        gm: the graph.
        weights: what stands for the model's tensors.
    """

    def __init__(self, gm: fx.GraphModule, weights: Weights) -> None:
        super().__init__(gm)
        self._weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the model, or what else it holds."""
        value = super().get_attr(target, args, kwargs)
        return self._weights.of(value) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives."""
        if target in COMBINING and len(args) == 2 and not kwargs:
            x, shape = args[0], combined(*args)
            if shape is not None:
                return x if shape == x.shape else x.new_empty(shape)
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a layer gives."""
        module = self.fetch_attr(target)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            law = law_of(module)
            shape = law and law(tuple(args[0].shape), args[0].dtype)
            if shape is not None:
                return args[0].new_empty(shape) if shape != args[0].shape else args[0]
        return self.call_layer(module, args, kwargs)

    def call_layer(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a layer gives whose law is not known."""
        return self._weights.call(module, args, kwargs)


def combined(x: Any, y: Any) -> Shape | None:
    """The shape of what two real numbers at each place give, None where only a run can tell.

    Args:
        x, y: tensors or what stands for them; y may be a number.
    """
    if not isinstance(x, Tensor | Unmade) or not x.dtype.is_floating_point:
        return None
    if type(y) in (int, float):
        return tuple(x.shape)
    if not isinstance(y, Tensor | Unmade) or _kind(x) != _kind(y):
        return None
    if not all(type(n) is int for n in (*x.shape, *y.shape)):
        return None  # comparing sizes of Dynamo's would fix them
    return _spread(tuple(x.shape), tuple(y.shape))


def _kind(x: Any) -> Any:
    return x.dtype, x.device, x.layout


def _spread(a: Shape, b: Shape) -> Shape | None:
    """The shape of two values spread out over one another, None where they do not fit."""
    if a == b:
        return a
    ones = (1,) * abs(len(a) - len(b))
    pairs = zip(*(x if len(x) == max(len(a), len(b)) else ones + x for x in (a, b)), strict=True)
    sizes = [n if m == 1 else m if n in (1, m) else None for n, m in pairs]
    return None if None in sizes else tuple(n for n in sizes if n is not None)


@contextlib.contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Puts back what a layer's hooks set: weights that they compute here have no values."""
    tables = [vars(one) for one in module.modules()]
    tables += [table[name] for table in tables for name in ("_parameters", "_buffers")]
    before = [(table, dict(table)) for table in tables]
    try:
        yield
    finally:
        for table, held in before:
            table.clear()
            table.update(held)
