"""A verb says which of its rules have rewritten how much, and that none has where nothing was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Residual, chain, conv, conv_bn, image, ready
from torch import fx, nn

import rmfx
from rmfx.report import modified


def zeroed(layer: nn.Module, row: int) -> nn.Module:
    own: Any = layer
    with torch.no_grad():
        own.weight[row] = 0
    return layer


def plain_block() -> nn.Module:
    block = Residual(chain(conv(), nn.ReLU(), conv()))
    return rmfx.remove_residuals(ready(chain(conv(), nn.ReLU(), block)), image())


def with_factors() -> nn.Module:
    layers = (layer for _ in range(3) for layer in (conv_bn(4, 4), nn.ReLU()))
    return rmfx.insert_resconv(ready(chain(*layers)), image())[0]


def repvgg_block() -> nn.Module:
    return chain(nn.ReLU(), Residual(conv()), nn.ReLU())


Make = Callable[[], nn.Module]
Verb = Callable[[nn.Module], Any]
idle: Make = lambda: chain(conv(), nn.ReLU(), conv())  # noqa: E731
# A verb, a network that it changes with what its rules do there, and one that it leaves alone.
CASES: dict[str, tuple[Verb, Make, dict[str, int], Make | None]] = {
    "remove_noops": (
        lambda m: rmfx.remove_noops(m, image()),
        lambda: chain(conv(), nn.Dropout(), nn.Identity()),
        {"NoopRule": 2},
        idle,
    ),
    "fold_batch_norm": (
        lambda m: rmfx.fold_batch_norm(m, image()),
        lambda: chain(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4)),
        {"BatchNormRule": 2},
        idle,
    ),
    "insert_batch_norm": (
        lambda m: rmfx.insert_batch_norm(m, [image()]),
        idle,
        {"insert_norm": 2},
        lambda: conv_bn(4, 4),
    ),
    "merge_convs": (
        lambda m: rmfx.merge_convs(m, image(), policy="all"),
        lambda: chain(conv(), conv(4, 4, 1), nn.ReLU(), conv(4, 4, 1)),
        {"LinearRule": 1},
        idle,
    ),
    "merge_branches": (
        lambda m: rmfx.merge_branches(m, image()),
        lambda: Residual(chain(conv_bn(4, 4), nn.Dropout())),
        {"NoopRule": 1, "BatchNormRule": 1, "ResidualRule": 1},
        idle,
    ),
    "remove_residuals": (
        lambda m: rmfx.remove_residuals(m, image()),
        lambda: chain(*(Residual(chain(conv(), nn.ReLU(), conv())) for _ in range(2))),
        {"ResidualRule": 2},
        idle,
    ),
    "optimize": (
        lambda m: rmfx.optimize(m, image(), runtime="eager", rounds=1, seconds=0.0),
        lambda: chain(conv_bn(4, 4), nn.ReLU()),
        {"BatchNormRule": 1},
        idle,
    ),
    "eliminate_dead_channels": (
        lambda m: rmfx.eliminate_dead_channels(m, image()),
        lambda: chain(zeroed(conv(), 1), nn.ReLU(), conv(padding=0)),
        {"dead_channels": 1},
        idle,
    ),
    "close_carries": (
        lambda m: rmfx.close_carries(m, image()),
        plain_block,
        {"close_all": 1, "cut": 4},
        idle,
    ),
    "prune_channels": (
        lambda m: rmfx.prune_channels(m, image(), target=0.5, importance="l2"),
        lambda: chain(conv(4, 8), nn.ReLU(), conv(8, 4)),
        {"cut": 4},
        None,  # it does what it is told, or says that it cannot
    ),
    "reserve": (
        lambda m: rmfx.reserve(m, 0.25, image(), every=1),
        repvgg_block,
        {"let_pass": 1},
        None,
    ),
    "insert_resconv": (
        lambda m: rmfx.insert_resconv(m, image()),
        lambda: chain(conv_bn(4, 4), nn.ReLU()),
        {"insert_factors": 1},
        idle,
    ),
    "prune_layers": (
        lambda m: rmfx.prune_layers(m, image(), ratio=0.5),
        with_factors,
        {"remove_layer": 2},
        None,
    ),
    "fuse_resconv": (
        lambda m: rmfx.fuse_resconv(m, image()),
        with_factors,
        {"write_out": 3, "BatchNormRule": 3, "ResidualRule": 3},
        idle,
    ),
}


def run(name: str, model: nn.Module) -> fx.GraphModule:
    made = CASES[name][0](ready(model))
    gm: fx.GraphModule = made[0] if isinstance(made, tuple) else made
    return gm


@pytest.mark.parametrize("name", CASES)
def test_a_verb_says_what_its_rules_have_done(name: str) -> None:
    _, make, expected, _ = CASES[name]
    assert modified(run(name, make())) == expected


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3]])
def test_a_verb_with_nothing_to_do_says_so(name: str) -> None:
    _, _, _, make = CASES[name]
    assert make is not None
    assert modified(run(name, make())) == {}


def test_what_an_earlier_verb_did_is_not_counted_again() -> None:
    folded = run("fold_batch_norm", conv_bn(4, 4))
    assert modified(folded) == {"BatchNormRule": 1}
    assert modified(run("remove_noops", folded)) == {}
    assert modified(folded) == {"BatchNormRule": 1}


def test_all_verbs_that_rewrite_graphs_are_here() -> None:
    verbs = {
        name
        for place, names in rmfx._PLACES.items()
        if place.startswith("passes.")
        for name in names
        if name.islower()
    }
    others = {"choose_sites", "layer_scales", "materialize", "share_parameters"}
    assert set(CASES) == verbs - others
