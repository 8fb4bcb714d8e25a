"""Weights that torch computes anew at every call: by hooks of its own, or by a parametrization.

`weight_norm`, `spectral_norm` and `prune` of `torch.nn.utils` put a hook before the forward of a
layer, which makes the weight of other tensors; parametrizations make it whenever somebody reads it.
None of them sees what the layer is given, so the weight of today is one value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

PARAMETRIZED = "torch.nn.utils.parametrize.remove_parametrizations"


@dataclass(frozen=True)
class Maker:
    """A kind of hook that makes a weight.

    Attributes:
        kind: of the hook.
        name: the attribute of a hook that says which weight it makes.
        sources: what the names of the tensors that it makes it of have beside the weight's.
        remedy: what makes an ordinary weight of it.
    """

    kind: type[Any]
    name: str
    sources: tuple[str, ...]
    remedy: str


MAKERS = (
    Maker(WeightNorm, "name", ("_g", "_v"), "torch.nn.utils.remove_weight_norm"),
    Maker(SpectralNorm, "name", ("_orig", "_u", "_v"), "torch.nn.utils.remove_spectral_norm"),
    Maker(BasePruningMethod, "_tensor_name", ("_orig", "_mask"), "torch.nn.utils.prune.remove"),
)


@dataclass(frozen=True)
class Made:
    """A weight that a hook makes.

    Attributes:
        hook: called with the layer and what the layer is given, of which it reads the first alone.
        name: of the weight.
        maker: the kind of the hook.
    """

    hook: Callable[[nn.Module, Any], None]
    name: str
    maker: Maker

    @property
    def sources(self) -> Iterator[str]:
        """The names of what it is made of."""
        return (self.name + suffix for suffix in self.maker.sources)


def made_by_hook(hook: Any) -> Made | None:
    """What a hook makes, None if it may do anything."""
    for maker in MAKERS:
        if isinstance(hook, maker.kind) and type(hook).__call__ is maker.kind.__call__:
            return Made(hook, getattr(hook, maker.name), maker)
    return None


def made_by_hooks(module: nn.Module) -> list[Made] | None:
    """The weights that the hooks of a layer make, in their order; None if it has other hooks."""
    made = [made_by_hook(hook) for hook in module._forward_pre_hooks.values()]
    others = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    if None in made or any((*others, _global_forward_hooks, _global_forward_pre_hooks)):
        return None
    return [one for one in made if one is not None]


def remedies(module: nn.Module) -> list[str]:
    """The functions that make ordinary weights of a layer's computed ones."""
    by_hook = [one.maker.remedy for one in made_by_hooks(module) or ()]
    both = [*by_hook, PARAMETRIZED] if parametrize.is_parametrized(module) else by_hook
    return list(dict.fromkeys(both))
