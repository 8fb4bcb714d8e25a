"""Weights that a layer computes at every call are read once, as they are now.

What `weight_norm`, `spectral_norm`, `prune` or a parametrization makes of a layer's tensors depends
on nothing that the network is given. The graph gets an ordinary layer with that value, as it gets a
constant where the model's own code computes one; the model keeps its layer. A weight that is drawn
at random, that changes what it is made of or that is another when it is made again stays computed,
in a layer that stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rmfx.algebra.activation import TABLE
from rmfx.algebra.affine import MULTIPLYING
from rmfx.ir.computed_weights import Made, made_by_hooks
from rmfx.ir.kinds import BATCH_NORMS, is_a
from rmfx.ir.nodes import attribute
from rmfx.ir.weights import check_weight
from rmfx.modules.parametrized import make_ordinary
from rmfx.report import HELD_KEY, HeldReport

from .kept_state import unchanged
from .memory import storage_of, tensors_of
from .watches import Watch

READ = (*MULTIPLYING, *BATCH_NORMS, *TABLE)  # the layers whose weights rules read
TABLES = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks")


def read_present_weights(gm: fx.GraphModule) -> None:
    """Let a graph call ordinary layers in the place of those whose weights are computed.

    Args:
        gm: a graph with a tree of modules of its own, whose leaves may be the model's.

    Raises:
        WeightError: a computed weight is NaN or Inf.
    """
    called = dict.fromkeys(str(n.target) for n in gm.graph.find_nodes(op="call_module"))
    read = {*called, *(str(n.target) for n in gm.graph.find_nodes(op="get_attr"))}
    # By another name, what a weight is made of may be written to.
    constants = (attribute(gm, n) for n in gm.graph.find_nodes(op="get_attr"))
    held = {storage_of(value) for value in constants if isinstance(value, Tensor)}
    made: dict[int, nn.Module] = {}
    rows = []
    for target in called:
        module = gm.get_submodule(target)
        hooks = made_by_hooks(module) if is_a(module, READ) else None
        by = _makers(module, hooks or ())
        if not by or hooks is None or _is_entangled(target, read):
            continue
        if held & {storage_of(tensor) for tensor in tensors_of(module)}:
            continue
        ordinary = made.get(id(module)) or _with_present_weights(module, hooks)
        if ordinary is None:
            continue
        for name, value in ordinary.named_parameters(target, recurse=False):
            check_weight(name, value)
        made[id(module)] = ordinary
        gm.set_submodule(target, ordinary)
        rows.append(HeldReport(target, f"its {by} at every call; here it is as it was read once"))
    if rows:
        gm.meta[HELD_KEY] = (*gm.meta.get(HELD_KEY, ()), *rows)


def _is_entangled(target: str, read: Iterable[str]) -> bool:
    """Whether a graph reads parts of a layer, or the layer as a part of another one, too."""
    return any(
        other.startswith(f"{target}.") or target.startswith(f"{other}.")
        for other in read
        if other != target
    )


def _makers(module: nn.Module, hooks: Iterable[Made]) -> str:
    """What computes which weights of a layer, in words; "" if nothing does."""
    texts = [f"{one.name} is computed by {type(one.hook).__name__}" for one in hooks]
    own: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    for name, several in own.items():
        kinds = ", ".join(type(part).__name__.lstrip("_") for part in several)
        texts.append(f"{name} is computed by the parametrization {kinds}")
    return " and its ".join(texts)


def _with_present_weights(module: nn.Module, hooks: Iterable[Made]) -> nn.Module | None:
    """An ordinary layer that computes what a layer computes now; None where there is none."""
    made: nn.Module = _twin(module)
    kept = [*module.parameters(), *module.buffers()]
    try:
        with unchanged(module) as state, torch.no_grad(), Watch(kept):
            values, again = (_computed(module, made, hooks) for _ in range(2))
            if state.changed() is not None:
                return None
    # The code of a parametrization is the caller's, and the watch refuses what it sees.
    except Exception:  # noqa: BLE001
        return None
    if any(not torch.equal(value, again[name]) for name, value in values.items()):
        return None
    for one in hooks:
        for name in one.sources:
            made._parameters.pop(name, None)
            made._buffers.pop(name, None)
            values.pop(name, None)  # which another hook makes
        vars(made).pop(one.name, None)
    made._forward_pre_hooks.clear()
    if parametrize.is_parametrized(module):
        make_ordinary(made, {})
    _register(made, values, module)
    return made


def _twin(module: nn.Module) -> nn.Module:
    """A layer that shares all tensors of another one, and no table of them."""
    made: nn.Module = type(module).__new__(type(module))
    vars(made).update(vars(module))
    for table in TABLES:
        vars(made)[table] = vars(module)[table].copy()
    return made


def _computed(module: nn.Module, twin: nn.Module, hooks: Iterable[Made]) -> dict[str, Tensor]:
    """The computed weights of a layer by name; hooks leave theirs in its twin."""
    for one in hooks:
        one.hook(twin, ())
    own: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    names = [*(one.name for one in hooks), *own]
    return {name: getattr(twin, name).detach().clone() for name in names}


def _register(made: nn.Module, values: Mapping[str, Tensor], like: nn.Module) -> None:
    """Give a layer its computed weights; statistics of a batch norm stay buffers."""
    trains = any(p.requires_grad for p in like.parameters())
    for name, value in values.items():
        if name in ("weight", "bias"):
            made.register_parameter(name, nn.Parameter(value, requires_grad=trains))
        else:
            made.register_buffer(name, value)
