"""The shapes of a graph's values, found without computing them.

Those behind common layers follow from their laws, which is far quicker than running them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import CONVS
from rmfx.algebra.modules import from_conv
from rmfx.errors import Refusal

from .nodes import has_hooks

COMBINING = (torch.add, torch.sub, torch.mul, torch.div)
RANKS_OF_NORM: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}


def shape_after(module: nn.Module, x: Tensor) -> tuple[int, ...] | None:
    """Shape behind a common layer, None where only running it can tell (or would fail)."""
    shape = tuple(x.shape)
    if is_activation(module) and not isinstance(module, nn.PReLU):
        return shape
    ranks = RANKS_OF_NORM.get(type(module))
    if ranks is not None:
        fits = len(shape) in ranks and shape[1] == module.num_features
        return shape if fits else None
    if type(module) in (nn.LayerNorm, nn.GroupNorm):
        return shape if _normalises(module, x) else None
    if type(module) not in CONVS or x.dtype != module.weight.dtype:
        return None
    if isinstance(module, nn.Linear):
        return (*shape[:-1], module.out_features) if shape[-1] == module.in_features else None
    with unset_fake_temporarily():  # fakes of its weights would take ten times as long
        layer = from_conv(module)
    if isinstance(layer, Refusal) or len(shape) != layer.dims + 2 or shape[1] != layer.in_channels:
        return None
    size = layer.output_size(shape[2:])
    return (shape[0], layer.out_channels, *size) if min(size) > 0 else None


def _normalises(module: nn.Module, x: Tensor) -> bool:
    """Whether a layer or group norm takes a value."""
    own: Any = module
    if own.weight is not None and own.weight.dtype != x.dtype:
        return False
    if isinstance(own, nn.LayerNorm):
        return tuple(x.shape[-len(own.normalized_shape) :]) == tuple(own.normalized_shape)
    # Of one value in each group torch makes no norm.
    return x.dim() > 1 and bool(x.shape[1] == own.num_channels and x.numel() > own.num_groups)


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
        found = _combined(*args) if target in COMBINING and len(args) == 2 and not kwargs else None
        return super().call_function(target, args, kwargs) if found is None else found

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a layer gives."""
        module = self.fetch_attr(target)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            shape = shape_after(module, args[0])
            if shape is not None:
                return args[0].new_empty(shape) if shape != args[0].shape else args[0]
        return self._weights.call(module, args, kwargs)


def _combined(x: Any, y: Any) -> Tensor | None:
    """A value like what two real numbers at each place give, None where only a run can tell."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if type(y) in (int, float):
        return x
    kind = x.dtype, x.device, x.layout
    if not isinstance(y, Tensor) or kind != (y.dtype, y.device, y.layout):
        return None
    if not all(type(n) is int for n in (*x.shape, *y.shape)):
        return None  # comparing sizes of Dynamo's would fix them
    return x if x.shape == y.shape else x.new_empty(torch.broadcast_shapes(x.shape, y.shape))


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
