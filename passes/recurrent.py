"""Weights drawn from rings: which layers draw from which, and of how many numbers.

`rmfx.rules.rings` says how a weight is drawn and how it becomes an ordinary one again.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from rmfx.algebra.affine import CONVS, MULTIPLYING
from rmfx.errors import OptionError, WeightError, first_line
from rmfx.ir.undisturbed import undisturbed
from rmfx.modules.ring import Rings
from rmfx.options import count_of, is_named, number_of, patterns_of, with_article
from rmfx.rules.rings import check_drawable, draw, is_drawn, materialise, weight_of

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
    check_drawable(model, _included(model, include))
    made = _copy(model)
    by_ring = _by_ring(_included(made, include), scope)
    totals = {
        name: sum(weight_of(m).numel() for m in own.values()) for name, own in by_ring.items()
    }
    sizes = _sizes(totals, budget, ratio)
    rings = Rings()
    for i, (name, own) in enumerate(by_ring.items()):
        rings[name] = draw(own, sizes[name], seed + i)
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
    if not any(is_drawn(layer) for layer in model.modules()):
        raise OptionError("no weight of the model is drawn from a ring; share_parameters does that")
    made = copy.deepcopy(model)
    for path, layer in made.named_modules():
        if is_drawn(layer):
            materialise(path, layer)
    for module in list(made.modules()):
        if isinstance(getattr(module, RINGS, None), Rings):
            delattr(module, RINGS)
    return made


# ---- steps --------------------------------------------------------------------------------------


def _included(model: nn.Module, include: Any) -> dict[str, nn.Module]:
    """Layers by path, in the order of the model."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"cannot share the parameters of {with_article(model)}")
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
