"""A weight is drawn from one short vector: recurrent parameter generators (arXiv 2107.07110).

    W_l = c_l · reshape(sign_l ⊙ ring[index_l])

The ring is all that is trained of the layers that draw from it; `rmfx/modules/ring.py` says in
which order. c_l gives a layer the standard deviation √(2 / fan out) at the start, with the fan out
of `torch.nn.init`. The gradient of ring[j] is the sum of c_l·sign·dW_l over all its uses, which is
autograd's.

Forms handled: Linear, Conv1d/2d/3d and transposed convolutions, of one type and device. Refused:
weights that a hook computes, that are parametrized already, not initialised, or one parameter with
another layer's; whole numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rmfx.errors import WeightError
from rmfx.modules.parametrized import make_ordinary
from rmfx.modules.ring import FromRing, Ring


def check_drawable(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise WeightError unless all weights can be drawn from rings of one kind."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            owners[id(p)].append(f"{path}.{name}")
    kinds = {}
    for path, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise WeightError(f"{path}: its weight is parametrized; remove that, or exclude it")
        weight = layer._parameters.get("weight")
        if weight is None and layer._forward_pre_hooks:
            raise WeightError(
                f"{path}: a hook computes its weight (weight_norm, spectral_norm or pruning do "
                "that); remove it, or exclude the layer"
            )
        if weight is None or is_lazy(weight):
            raise WeightError(f"{path} has no weight yet; run the model once, or exclude it")
        if len(owners[id(weight)]) > 1:
            names = " and ".join(owners[id(weight)])
            raise WeightError(
                f"{names} are one parameter; exclude the layers, or give each its own"
            )
        kinds[weight.dtype, weight.device] = path
    if len(kinds) > 1:
        found = ", ".join(f"{path} {dtype} on {d}" for (dtype, d), path in kinds.items())
        raise WeightError(f"weights of several kinds ({found}); include those of one kind only")
    ((dtype, _),) = kinds
    if not dtype.is_floating_point:
        raise WeightError(f"weights are {dtype}, which cannot be trained; convert the model first")


def draw(layers: Mapping[str, nn.Module], size: int, seed: int) -> Ring:
    """A ring for some layers, which draw from it from now on."""
    weights = {path: weight_of(layer) for path, layer in layers.items()}
    fans = {path: nn.init._calculate_fan_in_and_fan_out(w)[1] for path, w in weights.items()}
    deviations = {path: math.sqrt(2 / fan) for path, fan in fans.items()}
    least = min(deviations.values())
    generator = torch.Generator("cpu").manual_seed(seed)
    values = least * torch.randn(
        size, generator=generator, dtype=torch.float64, device=torch.device("cpu")
    )
    sizes = [weight.numel() for weight in weights.values()]
    starts = dict(zip(layers, accumulate([0, *sizes]), strict=False))
    parts = [(path, starts[path], tuple(weight.shape)) for path, weight in weights.items()]
    first, *_ = weights.values()
    ring = Ring(values.to(first), sum(sizes), seed, parts)
    ring.to(first.device).requires_grad_(any(weight.requires_grad for weight in weights.values()))
    for path, layer in layers.items():
        drawn = FromRing(ring, starts[path], weights[path].shape)
        parametrize.register_parametrization(layer, "weight", drawn, unsafe=True)
        scale = weights[path].new_tensor(deviations[path] / least)
        layer.get_submodule("parametrizations.weight").register_parameter(
            "original", nn.Parameter(scale, requires_grad=False)
        )
    return ring


def materialise(path: str, layer: nn.Module) -> None:
    """Gives a layer an ordinary weight."""
    parametrized = [name for name, _ in layer.get_submodule("parametrizations").named_children()]
    if parametrized != ["weight"]:
        others = ", ".join(name for name in parametrized if name != "weight")
        raise WeightError(f"{path}: its {others} is parametrized as well; remove that first")
    drawn: Any = next(layer.get_submodule("parametrizations.weight").children())
    trained = any(p.requires_grad for p in drawn.ring.parameters())
    weight = nn.Parameter(weight_of(layer).detach().clone(), trained)
    make_ordinary(layer, {"weight": weight})


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer."""
    return cast(Tensor, layer.weight)


def is_drawn(layer: nn.Module) -> bool:
    """Whether a layer's weight is drawn from a ring."""
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    return isinstance(next(layer.get_submodule("parametrizations.weight").children()), FromRing)
