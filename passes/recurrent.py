"""Weights drawn from one short vector: recurrent parameter generators (arXiv 2107.07110).

    W_l = c_l · reshape(sign_l ⊙ ring[index_l])

The ring is all that is trained of the layers that draw from it. Of the T numbers that they need,
each element of a ring of n gives ⌊T/n⌋ or ⌈T/n⌉: index holds 0 … n−1 as often as it fits into T and
T mod n of them once more, in one random order of which each layer takes the next part. Signs are
random, and c_l gives a layer the standard deviation √(2 / fan out) at the start. The gradient of
ring[j] is the sum of c_l·sign·dW_l over all its uses, which is autograd's.

Order and signs are not stored. They are made again from a seed in the state of the ring, by the raw
numbers of Philox, which stay the same from one version of numpy to the next.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rmfx._affine import CONVS
from rmfx._errors import OptionError, WeightError
from rmfx._names import is_named
from rmfx._state import undisturbed

Model = TypeVar("Model", bound=nn.Module)
Scope = str | Callable[[str], str]
RINGS = "parameter_rings"  # the attribute of a model under which its rings are


class Ring(nn.Module):
    """The numbers that layers share.

    Anything that works on a parameter works on `numbers`: a parametrization, pruning, quantisation.

    Attributes:
        numbers: [n], trained.
        total: T, how many numbers the layers need together.
        seed: of the order and of the signs.
    """

    def __init__(self, numbers: Tensor, total: int, seed: int) -> None:
        super().__init__()
        self.numbers = nn.Parameter(numbers)
        self.total = total
        self.seed = seed
        self._plans: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(self, start: int, stop: int) -> Tensor:
        """Some of the T numbers."""
        index, sign = self._plan(self.numbers.device)
        return self.numbers.index_select(0, index[start:stop]) * sign[start:stop]

    def _plan(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._plans:
            made = plan(self.total, self.numbers.numel(), self.seed)
            self._plans[device] = (made[0].to(device), made[1].to(device))
        return self._plans[device]

    def get_extra_state(self) -> Tensor:
        """The seed."""
        return torch.tensor(self.seed)

    def set_extra_state(self, state: Tensor) -> None:
        """Follows the seed of what is loaded."""
        self.seed = int(state)
        self._plans.clear()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_plans": {}}
        if "numbers" in state:  # torch's pruning puts there what it computed, which has no copy
            state["numbers"] = self.numbers.detach()
        return state

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.numbers.numel()} for {self.total}, seed={self.seed}"


def plan(total: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which element of a ring stands at each of `total` places, and with which sign.

    Returns:
        Indices below `size`, int32 [total], each used as often as any other or once more; and
        signs, int8 [total].
    """
    draw = np.random.Philox(key=seed).random_raw
    once_more = np.argsort(draw(size), kind="stable")[: total % size]
    index = np.concatenate([np.tile(np.arange(size), total // size), once_more])
    index = index[np.argsort(draw(total), kind="stable")]
    sign = np.where(draw(total) >> np.uint64(63), np.int8(-1), np.int8(1))
    return torch.from_numpy(index.astype(np.int32)), torch.from_numpy(sign)


class FromRing(nn.Module):
    """A parametrization: the weight of one layer.

    Args:
        ring: that it draws from.
        start: which of its numbers is the first.
        shape: of the weight.
    """

    def __init__(self, ring: Ring, start: int, shape: Sequence[int]) -> None:
        super().__init__()
        # Not a child of this module: it would stand in the state of every layer.
        self._ring = (ring,)
        self.start = start
        self.shape = tuple(shape)

    def forward(self, scale: Tensor) -> Tensor:
        """The weight, for the scale of the layer."""
        (ring,) = self._ring
        numbers: Tensor = ring(self.start, self.start + math.prod(self.shape))
        return scale * numbers.view(self.shape)


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
            it every convolution but the first one draws; linear layers only if they are named.

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
    if not 0 <= seed < 2**62:
        raise OptionError(f"seed={seed!r} must be a number from 0 to 2^62 - 1")
    made = copy.deepcopy(model)
    layers = _included(made, include)
    _check(made, layers)
    by_ring: dict[str, list[nn.Module]] = defaultdict(list)
    for path, layer in layers.items():
        by_ring[_ring_of(path, scope)].append(layer)
    totals = {name: sum(_weight(m).numel() for m in own) for name, own in by_ring.items()}
    sizes = _sizes(totals, budget, ratio)
    rings = nn.ModuleDict()
    for i, (name, own) in enumerate(by_ring.items()):
        rings[name] = _draw(own, sizes[name], seed + i)
    made.add_module(RINGS, rings)
    return made


@undisturbed
def materialize(model: Model) -> Model:
    """Make ordinary weights of those that are drawn from rings.

    Args:
        model: what `share_parameters` made, trained or not; not changed.

    Returns:
        A copy without rings that computes the same, for all other passes.

    Raises:
        OptionError: the model has no rings.
        WeightError: something else of a layer with a drawn weight is parametrized.
    """
    if not hasattr(model, RINGS):
        raise OptionError(f"the model has no {RINGS}; share_parameters makes them")
    made = copy.deepcopy(model)
    for path, layer in made.named_modules():
        if _is_drawn(layer):
            _materialise(path, layer)
    delattr(made, RINGS)
    return made


# ---- steps --------------------------------------------------------------------------------------


def _included(model: nn.Module, include: Any) -> dict[str, nn.Module]:
    """Layers by path, in the order of the model."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, CONVS)}
    if include is None:
        convolutions = {path: m for path, m in layers.items() if not isinstance(m, nn.Linear)}
        found = dict(list(convolutions.items())[1:])
    elif callable(include):
        found = {path: m for path, m in layers.items() if include(path, m)}
    else:
        patterns = [include] if isinstance(include, str) else list(include)
        found = {p: m for p, m in layers.items() if is_named(p, patterns)}
    if not found:
        raise OptionError(
            f"include={include!r}: no layer is left to draw; without include= all convolutions but "
            "the first one draw, and linear layers want to be named"
        )
    return found


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


def _ring_of(path: str, scope: Scope) -> str:
    """The name of the ring that a layer draws from."""
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
    name = name.replace(".", "_")
    return f"{name}_ring" if hasattr(nn.ModuleDict, name) else name


def _sizes(totals: dict[str, int], budget: int | None, ratio: float | None) -> dict[str, int]:
    """How many numbers each ring holds: the same share of what its layers need."""
    total = sum(totals.values())
    if (budget is None) == (ratio is None):
        raise OptionError("give either budget=, a number, or ratio=, a share")
    if ratio is not None and not 0 < ratio <= 1:
        raise OptionError(f"ratio={ratio!r} must be above 0 and at most 1")
    wanted = budget if budget is not None else max(len(totals), round(total * cast(float, ratio)))
    if not isinstance(wanted, SupportsIndex) or not len(totals) <= wanted <= total:
        raise OptionError(
            f"budget={wanted!r} must be a whole number from {len(totals)}, one for each ring, to "
            f"{total}, what the layers need"
        )
    # A number at least; then down to whole numbers, and what is left to those that lost most.
    spare = wanted - len(totals)
    shares = {name: spare * (own - 1) / max(1, total - len(totals)) for name, own in totals.items()}
    order = sorted(shares, key=lambda name: shares[name] % 1, reverse=True)
    left = spare - sum(int(share) for share in shares.values())
    return {name: 1 + int(shares[name]) + (name in order[:left]) for name in totals}


def _draw(layers: Sequence[nn.Module], size: int, seed: int) -> Ring:
    """A ring for some layers, which draw from it from now on."""
    weights = [_weight(layer) for layer in layers]
    deviations = [math.sqrt(2 / nn.init._calculate_fan_in_and_fan_out(w)[1]) for w in weights]
    least = min(deviations)
    generator = torch.Generator().manual_seed(seed)
    values = least * torch.randn(size, generator=generator, dtype=torch.float64)
    ring = Ring(values.to(weights[0]), sum(w.numel() for w in weights), seed)
    start = 0
    for layer, weight, deviation in zip(layers, weights, deviations, strict=True):
        drawn = FromRing(ring, start, weight.shape)
        parametrize.register_parametrization(layer, "weight", drawn, unsafe=True)
        scale = nn.Parameter(weight.new_tensor(deviation / least), requires_grad=False)
        layer.get_submodule("parametrizations.weight").register_parameter("original", scale)
        start += weight.numel()
    return ring


def _materialise(path: str, layer: nn.Module) -> None:
    """Gives a layer an ordinary weight.

    torch's `remove_parametrizations` takes the property from the class, which copies share.
    """
    parametrized = [name for name, _ in layer.get_submodule("parametrizations").named_children()]
    if parametrized != ["weight"]:
        others = ", ".join(name for name in parametrized if name != "weight")
        raise WeightError(f"{path}: its {others} is parametrized as well; remove that first")
    weight = _weight(layer).detach().clone()
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    layer.register_parameter("weight", nn.Parameter(weight))


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _is_drawn(layer: nn.Module) -> bool:
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    return isinstance(next(layer.get_submodule("parametrizations.weight").children()), FromRing)
