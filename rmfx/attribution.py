"""Layer-wise relevance propagation on plain networks, with captum: `pip install captum`.

Relevance that a layer gets is handed to what it read, in proportion to what each value added to the
output (Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise
Relevance Propagation, 2015). That is defined for chains. At a residual connection captum follows
gradients instead, without an error, and relevance is neither kept nor bounded; a plain network has
no such place. `docs/attribution.md` has examples and figures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import MULTIPLYING
from rmfx.errors import RmfxError
from rmfx.ir.kinds import AVERAGE_POOLS, BATCH_NORMS, BORDERS, MAX_POOLS, PADS, POOLS_OF_ALL, is_a
from rmfx.modules.activations import OWN_ACTIVATIONS, MaskedActivation, Pointwise
from rmfx.plain import Conditions, to_sequential

try:
    from captum.attr import LRP as _LRP
    from captum.attr._utils.lrp_rules import EpsilonRule, IdentityRule
except ImportError as error:
    raise ImportError(f"rmfx.attribution needs captum: pip install captum ({error})") from error

_CAPTUMS = (nn.ReLU, nn.Tanh, nn.Dropout)  # through which captum hands relevance on
_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.ChannelShuffle, nn.PixelShuffle)
_LINEAR = (
    *(*MULTIPLYING, *BATCH_NORMS, *AVERAGE_POOLS, *MAX_POOLS, *POOLS_OF_ALL, *PADS, *BORDERS),
    *(*_SHAPES, nn.PixelUnshuffle, nn.Upsample),
)


class LRP(_LRP):  # type: ignore[misc]
    """Captum's LRP of a plain network, with a rule for every layer.

    Linear layers, pools and changes of shape take the epsilon rule, activations hand relevance on.

    Args:
        model: a plain network: what `remove_residuals` gives, or `to_sequential`; it is copied,
            without hooks and rules that other tools have left.

    Raises:
        NotPlainError: the graph is not a chain; the message names the node.
        RmfxError: there is no rule for one of its layers.
    """

    def __init__(self, model: nn.Module) -> None:
        network: Any = copy.deepcopy(model) if _is_chain(model) else to_sequential(model)
        if len(network) and isinstance(network[0], Conditions):
            network = network[1:]  # which ask about sizes alone
        for name, layer in list(network.named_modules()):
            _forget_hooks(layer)
            if isinstance(layer, MaskedActivation):
                network.set_submodule(name, _Whole(layer))
        self._rules = {layer: _rule_of(name, layer) for name, layer in _leaves(network)}
        super().__init__(network)

    def attribute(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The relevance of every input, a tensor, as captum's `LRP.attribute` has it.

        Raises:
            RmfxError: there are several inputs, or they are of float16.
        """
        if isinstance(inputs, tuple) and len(inputs) == 1:
            (inputs,) = inputs
        if not isinstance(inputs, Tensor) or inputs.dtype == torch.float16:
            given = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise RmfxError(
                f"relevance of {given}: a plain network has one tensor for an input, and the rules "
                "divide by sums that float16 has no digits for; use model.float() and x.float()"
            )
        for layer, rule in self._rules.items():
            if rule is not None:  # captum forgets rules after each call
                layer.rule = rule()
        # Captum warns of inputs whose gradients it has to ask for itself.
        found = super().attribute(inputs.detach().clone().requires_grad_(), *args, **kwargs)
        return pytree.tree_map_only(Tensor, Tensor.detach, found)


def _is_chain(model: nn.Module) -> bool:
    """Whether a model is layers in a row, without any code of its own between them."""
    own = (Conditions, MaskedActivation)
    leaves = (isinstance(layer, own) or not any(layer.children()) for layer in model.children())
    return type(model) is nn.Sequential and all(leaves)


def _forget_hooks(layer: nn.Module) -> None:
    """Take off what was registered on a layer, as captum's own LRP leaves it where it fails."""
    for name in ("forward", "forward_pre", "backward", "backward_pre"):
        getattr(layer, f"_{name}_hooks").clear()
    vars(layer).pop("rule", None)


class _Whole(nn.Module):
    """A layer made of others, as one: captum looks at the innermost modules."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layers = (layer,)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._layers[0](x)
        return y


def _leaves(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without modules of their own, by their names."""
    modules = network.named_modules()
    return ((name, module) for name, module in modules if not any(module.children()))


def _rule_of(name: str, layer: nn.Module) -> Any:
    """What makes the rule of a layer; None where captum knows what to do.

    Raises:
        RmfxError: relevance is not defined for it.
    """
    if type(layer) in _CAPTUMS:
        return None
    if is_a(layer, _LINEAR):
        return EpsilonRule
    if is_activation(layer) or isinstance(layer, (*OWN_ACTIVATIONS, Pointwise, _Whole)):
        return IdentityRule
    last = "; leave it off: network[:-1]" if isinstance(layer, (nn.Softmax, nn.LogSoftmax)) else ""
    raise RmfxError(f"{name}: no rule of relevance is known for {type(layer).__name__}{last}")
