"""Weights drawn from one short vector: recurrent parameter generators (arXiv 2107.07110).

    W_l = c_l · reshape(sign_l ⊙ ring[index_l])

The ring is all that is trained of the layers that draw from it; `rmfx/modules/ring.py` says in
which order. c_l gives a layer the standard deviation √(2 / fan out) at the start, with the fan out
of `torch.nn.init`. The gradient of ring[j] is the sum of c_l·sign·dW_l over all its uses, which is
autograd's.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rmfx.algebra.affine import CONVS, MULTIPLYING
from rmfx.errors import OptionError, WeightError, first_line
from rmfx.ir.undisturbed import undisturbed
from rmfx.modules.parametrized import make_ordinary
from rmfx.modules.ring import FromRing, Ring, Rings
from rmfx.options import count_of, is_named, number_of, patterns_of

Model = TypeVar("Model", bound=nn.Module)
Scope = str | Callable[[str], str]
RINGS = "parameter_rings"  # the attribute of a model under which its rings are


# ---- the verbs ----------------------------------------------------------------------------------


@undisturbed
def share_parameters(
    model: Model,
    budget: int | None = None,
    *,
    ratio: float | None = None,
    scope: Scope = "global",
    seed: int = 0,
    include: Sequence[str] | Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Let layers draw their weights from a ring, to be trained from there.

    What the weights were is lost: those drawn have the distribution of Kaiming's initialisation.

    Args:
        model: in any mode; not changed.
        budget: how many numbers all rings hold together.
        ratio: the same as a share of the numbers in the weights that are drawn.
        scope: "global", one ring; "block", one for all layers with the same path up to its first
            number (layer1.0); or a function of a layer's path that says which ring it draws from.
        seed: of the plan and of the first numbers.
        include: patterns of paths such as "layer4.*", or a function of a path and a layer. Without
            it every convolution but the first one draws; transposed ones and linear layers only if
            they are named.

    Returns:
        A copy, with its rings under the attribute `parameter_rings`. Like all that torch
        parametrizes it is saved by its state, not pickled.

    Raises:
        OptionError: a number makes no sense, or nothing is included.
        WeightError: a weight cannot be replaced.

    Example:
        >>> import rmfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 8, 3))
        >>> small = rmfx.share_parameters(model, ratio=0.25)
        >>> small[1].weight.shape, small.parameter_rings["all"].numbers.shape
        (torch.Size([8, 8, 3, 3]), torch.Size([144]))
    """
    if hasattr(model, RINGS):
        raise OptionError(
            f"the model has {RINGS} already; materialize(model) makes weights of them"
        )
    seed = count_of("seed", seed, least=0, most=2**62 - 1)
    _check(model, _included(model, include))
    made = _copy(model)
    by_ring = _by_ring(_included(made, include), scope)
    totals = {name: sum(_weight(m).numel() for m in own.values()) for name, own in by_ring.items()}
    sizes = _sizes(totals, budget, ratio)
    rings = Rings()
    for i, (name, own) in enumerate(by_ring.items()):
        rings[name] = _draw(own, sizes[name], seed + i)
    made.add_module(RINGS, rings)
    return made


@undisturbed
def materialize(model: Model) -> Model:
    """Make ordinary weights of those that are drawn from rings.

    Args:
        model: what `share_parameters` made, trained or not, or something with that in it; not
            changed.

    Returns:
        A copy without rings that computes the same, for all other passes.

    Raises:
        OptionError: the model has no rings.
        WeightError: something else of a layer with a drawn weight is parametrized.
    """
    if not any(_is_drawn(layer) for layer in model.modules()):
        raise OptionError("no weight of the model is drawn from a ring; share_parameters does that")
    made = copy.deepcopy(model)
    for path, layer in made.named_modules():
        if _is_drawn(layer):
            _materialise(path, layer)
    for module in list(made.modules()):
        if isinstance(getattr(module, RINGS, None), Rings):
            delattr(module, RINGS)
    return made


# ---- steps --------------------------------------------------------------------------------------


def _included(model: nn.Module, include: Any) -> dict[str, nn.Module]:
    """Layers by path, in the order of the model."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"cannot share the parameters of a {type(model).__name__}")
    layers = {path: m for path, m in model.named_modules() if isinstance(m, MULTIPLYING)}
    if include is None:
        convolutions = {path: m for path, m in layers.items() if isinstance(m, CONVS[1:])}
        found = dict(list(convolutions.items())[1:])
    elif callable(include):
        found = {path: m for path, m in layers.items() if include(path, m)}
    else:
        patterns = patterns_of("include", include, layers)
        found = {p: m for p, m in layers.items() if is_named(p, patterns)}
    if not found:
        raise OptionError(
            f"include={include!r}: no layer is left to draw; without include= all convolutions but "
            "the first one draw, and linear layers want to be named"
        )
    return found


def _copy(model: Model) -> Model:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # of a weight that a hook has computed
        raise WeightError(f"the model cannot be copied: {first_line(error)}") from error


def _check(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """All weights can be drawn from rings of one kind."""
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


def _by_ring(layers: dict[str, nn.Module], scope: Scope) -> dict[str, dict[str, nn.Module]]:
    """The layers of each ring, by path."""
    found: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    given: dict[str, str] = {}
    for path, layer in layers.items():
        name = _ring_of(path, scope)
        allowed = name.replace(".", "_")
        if hasattr(Rings(), allowed):
            allowed += "_ring"
        if given.setdefault(allowed, name) != name:
            raise OptionError(
                f"two rings would have the name {allowed}: {given[allowed]} and {name}; give scope "
                "a function that calls them otherwise"
            )
        found[allowed][path] = layer
    return found


def _ring_of(path: str, scope: Scope) -> str:
    """What the ring that a layer draws from is called."""
    if callable(scope):
        name = scope(path)
    elif scope == "global":
        name = "all"
    elif scope == "block":
        numbered = re.match(r"(?:[^.]*\.)*?\d+(?=\.|$)", path)
        name = numbered[0] if numbered else path.split(".")[0]
    else:
        raise OptionError(f"scope={scope!r}: 'global', 'block' or a function of a path")
    if not isinstance(name, str) or not name:
        raise OptionError(f"scope gives {name!r} for {path}: return the name of a ring")
    return name


def _sizes(totals: dict[str, int], budget: int | None, ratio: float | None) -> dict[str, int]:
    """How many numbers each ring holds: the same share of what its layers need."""
    total = sum(totals.values())
    if (budget is None) == (ratio is None):
        raise OptionError("give either budget=, a number, or ratio=, a share")
    if ratio is not None:
        share = number_of("ratio", ratio, above=0, most=1)
        budget = max(len(totals), round(total * share))
    # One for each ring at least, and at most what the layers need.
    wanted = count_of("budget", budget, len(totals), total)
    # A number at least; then down to whole numbers, and what is left to those that lost most.
    spare = wanted - len(totals)
    shares = {name: spare * (own - 1) / max(1, total - len(totals)) for name, own in totals.items()}
    order = sorted(shares, key=lambda name: shares[name] % 1, reverse=True)
    left = spare - sum(int(share) for share in shares.values())
    return {name: 1 + int(shares[name]) + (name in order[:left]) for name in totals}


def _draw(layers: Mapping[str, nn.Module], size: int, seed: int) -> Ring:
    """A ring for some layers, which draw from it from now on."""
    weights = {path: _weight(layer) for path, layer in layers.items()}
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


def _materialise(path: str, layer: nn.Module) -> None:
    """Gives a layer an ordinary weight."""
    parametrized = [name for name, _ in layer.get_submodule("parametrizations").named_children()]
    if parametrized != ["weight"]:
        others = ", ".join(name for name in parametrized if name != "weight")
        raise WeightError(f"{path}: its {others} is parametrized as well; remove that first")
    drawn: Any = next(layer.get_submodule("parametrizations.weight").children())
    trained = any(p.requires_grad for p in drawn.ring.parameters())
    weight = nn.Parameter(_weight(layer).detach().clone(), trained)
    make_ordinary(layer, {"weight": weight})


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _is_drawn(layer: nn.Module) -> bool:
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    return isinstance(next(layer.get_submodule("parametrizations.weight").children()), FromRing)
