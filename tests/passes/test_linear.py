"""Merging of linear layers in a row: where it is exact, where it pays, where it stays away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    assert_same,
    chain,
    conv,
    conv_bn,
    image,
    ready,
    shapes,
    snapshot,
    types,
)
from hypothesis import given, settings
from torch import nn

import rmfx
from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks

Make = Callable[[], nn.Module]


def merge(model: nn.Module, *inputs: Any, policy: Any = "profitable") -> torch.fx.GraphModule:
    merged: torch.fx.GraphModule = rmfx.merge_convs(model, inputs, policy=policy)
    assert_equivalent(model, merged, inputs)
    return merged


PAYS: dict[str, tuple[Make, list[tuple[int, ...]]]] = {
    "1x1 then 1x1": (lambda: chain(conv(4, 8, 1), conv(8, 4, 1)), [(4, 4, 1, 1)]),
    "3x3 then 1x1": (lambda: chain(conv(4, 8, 3), conv(8, 4, 1)), [(4, 4, 3, 3)]),
    "1x1 without bias, then padded 3x3": (
        lambda: chain(conv(4, 8, 1, bias=False), conv(8, 4, 3)),
        [(4, 4, 3, 3)],
    ),
    "1x1 then valid 3x3": (lambda: chain(conv(4, 8, 1), conv(8, 4, padding=0)), [(4, 4, 3, 3)]),
    "strided 3x3 then 1x1": (
        lambda: chain(conv(4, 8, stride=2), conv(8, 4, 1)),
        [(4, 4, 3, 3)],
    ),
    "three in a row": (
        lambda: chain(conv(4, 16, 1), conv(16, 16, 1), conv(16, 4, 1)),
        [(4, 4, 1, 1)],
    ),
    "conv, BN, conv": (lambda: chain(conv_bn(4, 8, 1), conv(8, 4, 1)), [(4, 4, 1, 1)]),
    "scale after conv": (
        lambda: chain(conv(), Apply(lambda m, x: x * 3 - 1)),
        [(4, 4, 3, 3)],
    ),
    "layer scale after conv": (
        lambda: chain(conv(), Apply(lambda m, x: m.g * x, g=nn.Parameter(torch.randn(4, 1, 1)))),
        [(4, 4, 3, 3)],
    ),
    "depthwise 3x3 then depthwise 1x1": (
        lambda: chain(conv(groups=4), conv(kernel=1, groups=4)),
        [(4, 1, 3, 3)],
    ),
    "zero padding then conv": (lambda: chain(nn.ZeroPad2d(2), conv(padding=0)), [(4, 4, 3, 3)]),
}


@pytest.mark.parametrize("name", PAYS)
def test_cheaper_pairs_become_one_conv(name: str) -> None:
    make, expected = PAYS[name]
    model = ready(make())
    merged = merge(model, image())
    assert shapes(merged) == expected
    assert len(types(merged)) == 1
    assert_equivalent(model, merged, image(1, 4, 6, 11))


def test_linear_layers_merge() -> None:
    model = ready(chain(nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 4), nn.ReLU()))
    assert shapes(merge(model, image(3, 6))) == [(4, 6)]
    assert shapes(merge(model, image(2, 3, 6))) == [(4, 6)]


def test_dearer_pairs_stay_unless_all_are_asked_for() -> None:
    """MobileNetV2's project and expand: 24 -> 4 -> 24 merged is three times the work."""
    model = ready(chain(conv(24, 4, 1), conv(4, 24, 1)))
    x = image(1, 24, 5, 5)
    assert shapes(merge(model, x)) == [(4, 24, 1, 1), (24, 4, 1, 1)]
    assert shapes(merge(model, x, policy="all")) == [(24, 24, 1, 1)]


def test_depthwise_separable_pair_stays_unless_all_are_asked_for() -> None:
    model = ready(chain(conv(groups=4), conv(4, 16, 1)))
    assert len(shapes(merge(model, image()))) == 2
    assert shapes(merge(model, image(), policy="all")) == [(16, 4, 3, 3)]


def test_chain_is_cut_where_it_is_cheapest_not_greedily() -> None:
    """16 -> 2 -> 16 -> 2: the outer pair to the right merges, the bottleneck to the left stays."""
    model = ready(chain(conv(16, 2, 1), conv(2, 16, 1), conv(16, 2, 1)))
    assert shapes(merge(model, image(1, 16, 4, 4))) == [(2, 16, 1, 1)]
    model = ready(chain(conv(16, 2, 1), conv(2, 16, 1), conv(16, 16, 1)))
    assert shapes(merge(model, image(1, 16, 4, 4))) == [(2, 16, 1, 1), (16, 2, 1, 1)]


def test_valid_convs_merge_when_all_are_asked_for() -> None:
    model = ready(chain(conv(padding=0), conv(kernel=2, padding=0)))
    assert shapes(merge(model, image(), policy="all")) == [(4, 4, 4, 4)]


STAY: dict[str, Make] = {
    "padded conv after a bias": lambda: chain(conv(4, 8, 1), conv(8, 4, 3)),
    "padded conv after a wide kernel": lambda: chain(conv(bias=False), conv()),
    "activation between": lambda: chain(conv(kernel=1), nn.ReLU(), conv(kernel=1)),
    "max pooling between": lambda: chain(conv(kernel=1), nn.MaxPool2d(2), conv(kernel=1)),
    "value read elsewhere": lambda: Apply(
        lambda m, x: (m.b(y := m.a(x)), y), a=conv(4, 8, 1), b=conv(8, 4, 1)
    ),
    "strided conv before a wide one": lambda: chain(
        conv(stride=2, padding=0, bias=False), conv(kernel=3, padding=1)
    ),
    "reflecting conv": lambda: chain(conv(4, 8, 1), conv(8, 4, 3, padding_mode="reflect")),
    "shift before a padded conv": lambda: chain(Apply(lambda m, x: x + 1), conv()),
    "transposed conv": lambda: chain(nn.ConvTranspose2d(4, 8, 2, 2), conv(8, 4, 1)),
}


@pytest.mark.parametrize("name", STAY)
@pytest.mark.parametrize("policy", ["profitable", "all"])
def test_what_would_not_be_exact_stays(name: str, policy: str) -> None:
    model = ready(STAY[name]())
    merged = merge(model, image(), policy=policy)
    assert types(merged) == types(rmfx.trace(model, image()))


def test_average_pool_merges_with_the_conv_before_it() -> None:
    model = ready(Apply(lambda m, x: F.avg_pool2d(m.conv(x), 2), conv=conv(4, 4, 1, bias=False)))
    assert shapes(merge(model, image(), policy="all")) == [(4, 4, 2, 2)]
    assert_equivalent(model, merge(model, image()), image(1, 4, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floating_type_stays(dtype: torch.dtype) -> None:
    model = ready(chain(conv(4, 8, 1), conv(8, 4, 1)), dtype)
    merged = merge(model, image(dtype=dtype))
    assert [p.dtype for p in merged.parameters()] == [dtype, dtype]


@pytest.mark.parametrize("name", [*PAYS, *STAY])
@pytest.mark.parametrize("policy", ["profitable", "all"])
def test_second_run_changes_nothing_and_the_model_is_untouched(name: str, policy: str) -> None:
    model = ready(({k: v[0] for k, v in PAYS.items()} | STAY)[name]())
    before = snapshot(model)
    once = rmfx.merge_convs(model, image(), policy=policy)
    assert_same(before, snapshot(model))
    twice = rmfx.merge_convs(once, image(), policy=policy)
    assert (types(twice), shapes(twice)) == (types(once), shapes(once))
    assert_equivalent(model, twice, image())


@settings(max_examples=5)
@given(residual_networks())
def test_random_networks_keep_their_function(spec: NetworkSpec) -> None:
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)
    for policy in ("profitable", "all"):
        assert_equivalent(model, rmfx.merge_convs(model, inputs, policy=policy), inputs)
