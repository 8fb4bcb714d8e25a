"""Batch norm folding: which pairs become one layer, that it is exact, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    NORMS,
    Apply,
    Residual,
    assert_same,
    chain,
    conv,
    conv_bn,
    image,
    ready,
    snapshot,
    types,
)
from torch import Tensor, nn

import rmfx
from rmfx.errors import OptionError
from rmfx.testing import assert_equivalent

Make = Callable[[], nn.Module]


def fold(model: nn.Module, *inputs: Any) -> torch.fx.GraphModule:
    """Fold with and without example inputs; both must be exact and give the same layers."""
    folded: torch.fx.GraphModule = rmfx.fold_batch_norm(model, inputs)
    without = rmfx.fold_batch_norm(model)
    assert_equivalent(model, folded, inputs)
    assert_equivalent(model, without, inputs)
    return folded


FOLDED: dict[str, tuple[Make, list[str]]] = {
    "conv, BN": (conv_bn, ["Conv2d"]),
    "conv with bias, BN": (lambda: chain(conv(4, 6), nn.BatchNorm2d(6)), ["Conv2d"]),
    "BN, conv without padding": (
        lambda: chain(nn.BatchNorm2d(4), conv(padding=0), nn.ReLU()),
        ["Conv2d", "ReLU"],
    ),
    "BN, conv, BN": (
        lambda: chain(nn.BatchNorm2d(4), conv(kernel=1), nn.BatchNorm2d(4)),
        ["Conv2d"],
    ),
    "conv, BN, BN": (lambda: chain(conv_bn(), nn.BatchNorm2d(4)), ["Conv2d"]),
    "conv, BN, ReLU twice": (
        lambda: chain(conv_bn(), nn.ReLU(), conv_bn(stride=2), nn.ReLU()),
        ["Conv2d", "ReLU", "Conv2d", "ReLU"],
    ),
    "depthwise conv": (lambda: conv_bn(groups=4), ["Conv2d"]),
    "grouped conv": (lambda: conv_bn(4, 8, groups=2, stride=2, dilation=2), ["Conv2d"]),
    "BN without weight": (
        lambda: chain(conv(), nn.BatchNorm2d(4, affine=False, eps=0.1)),
        ["Conv2d"],
    ),
    "SyncBatchNorm": (lambda: chain(conv(), nn.SyncBatchNorm(4)), ["Conv2d"]),
    "reflecting conv before BN": (
        lambda: conv_bn(padding_mode="reflect"),
        ["Conv2d"],
    ),
    "F.batch_norm": (
        lambda: Apply(
            lambda m, x: F.batch_norm(
                m.conv(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, eps=1e-2
            ),
            conv=conv(),
            bn=nn.BatchNorm2d(4),
        ),
        ["Conv2d"],
    ),
    "BN of a network's input": (
        lambda: chain(nn.BatchNorm2d(4), nn.ReLU()),
        ["BatchNorm2d", "ReLU"],
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_pairs_become_one_layer(name: str) -> None:
    make, expected = FOLDED[name]
    assert types(fold(ready(make()), image())) == expected


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convs_of_one_two_and_three_dimensions_fold(dims: int) -> None:
    model = ready(chain(conv_bn(dims=dims), nn.ReLU(), conv_bn(dims=dims)))
    assert types(fold(model, image(2, 4, *(5, 6, 7)[:dims]))) == [
        f"Conv{dims}d",
        "ReLU",
        f"Conv{dims}d",
    ]


def test_linear_folds_once_its_input_is_known_to_be_two_dimensional() -> None:
    model = ready(chain(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()))
    x = image(5, 4)
    assert types(rmfx.fold_batch_norm(model)) == ["Linear", "BatchNorm1d", "ReLU"]
    folded = rmfx.fold_batch_norm(model, x)
    assert types(folded) == ["Linear", "ReLU"]
    assert_equivalent(model, folded, x)


def test_linear_behind_flatten_folds_without_example_inputs() -> None:
    model = ready(chain(conv(), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6)))
    assert types(fold(model, image(2, 4, 3, 3))) == ["Conv2d", "Flatten", "Linear"]


def test_names_of_the_convs_stay() -> None:
    model = ready(chain(conv_bn(), nn.ReLU(), chain(nn.BatchNorm2d(4), conv(kernel=1))))
    folded = fold(model, image())
    assert {"0.0.weight", "0.0.bias", "2.1.weight", "2.1.bias"} == set(folded.state_dict())


# ---- what stays ---------------------------------------------------------------------------------


def test_padded_conv_after_batch_norm_would_read_the_shift_and_stays() -> None:
    assert types(fold(ready(chain(nn.BatchNorm2d(4), conv())), image())) == [
        "BatchNorm2d",
        "Conv2d",
    ]


def test_batch_norm_without_shift_folds_into_a_padded_conv() -> None:
    model = ready(chain(nn.BatchNorm2d(4), conv()))
    norm = model[0]
    with torch.no_grad():
        norm.bias.zero_()
        norm.running_mean.zero_()
    assert types(fold(model, image())) == ["Conv2d"]


def test_conv_output_that_is_also_read_elsewhere_stays() -> None:
    model = Apply(lambda m, x: (m.bn(y := m.conv(x)), y), conv=conv(), bn=nn.BatchNorm2d(4))
    assert types(fold(ready(model), image())) == ["Conv2d", "BatchNorm2d"]


def test_batch_norm_over_tokens_stays_beside_linear_layers() -> None:
    model = ready(chain(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    x = image(2, 6, 6)  # dimension 1 is as long as the features: a wrong fold would run
    folded = rmfx.fold_batch_norm(model, x)
    assert types(folded) == ["Linear", "BatchNorm1d"]
    assert_equivalent(model, folded, x)


def test_activation_between_keeps_them_apart() -> None:
    model = ready(chain(conv(), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()))
    assert types(fold(model, image())) == ["Conv2d", "ReLU", "BatchNorm2d", "ReLU"]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_and_group_norm_are_left_alone(dims: int) -> None:
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    model = ready(chain(conv(dims=dims), norm(4), conv(dims=dims), nn.GroupNorm(2, 4)))
    folded = fold(model, image(2, 4, *(5, 6, 7)[:dims]))
    assert types(folded)[1::2] == [f"InstanceNorm{dims}d", "GroupNorm"]


# ---- types, idempotence, the model untouched ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floating_type_stays(dtype: torch.dtype) -> None:
    folded = fold(ready(conv_bn(), dtype), image(dtype=dtype))
    assert {p.dtype for p in folded.parameters()} == {dtype}


def test_tiny_variance_folds_exactly() -> None:
    model = ready(conv_bn())
    with torch.no_grad():
        model[1].running_var.fill_(1e-30)
    assert types(fold(model, image())) == ["Conv2d"]


def test_fold_that_overflows_its_type_names_the_conv() -> None:
    model = ready(conv_bn(), torch.float16)
    with torch.no_grad():
        model[1].weight.fill_(60000.0)
        model[1].running_var.zero_()
    with pytest.raises(rmfx.WeightError, match="0"):
        rmfx.fold_batch_norm(model)


@pytest.mark.parametrize("name", FOLDED)
def test_second_run_changes_nothing_and_the_model_is_untouched(name: str) -> None:
    model = ready(FOLDED[name][0]())
    before = snapshot(model)
    once = rmfx.fold_batch_norm(model, image())
    assert_same(before, snapshot(model))
    twice = rmfx.fold_batch_norm(once, image())
    assert types(twice) == types(once)
    assert all(
        torch.equal(a, b)
        for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True)
    )


def test_folding_keeps_residual_connections() -> None:
    model = ready(Residual(chain(conv_bn(), nn.ReLU(), conv_bn())))
    folded = fold(model, image())
    assert types(folded) == ["Conv2d", "ReLU", "Conv2d"]
    with pytest.raises(rmfx.RmfxError, match="carries no report"):
        rmfx.report(folded)


def test_every_norm_module_is_covered() -> None:
    for dims, norm in NORMS.items():
        model = ready(chain(conv(dims=dims), norm(4)))
        x: Tensor = image(2, 4, *(3, 4, 5)[:dims])
        assert len(types(fold(model, x))) == 1


# ---- tokens flattened for their batch norm ------------------------------------------------------


def token_norm(n_in: int, n_out: int, end: int = 1) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        return m.norm(y.flatten(0, end)).reshape_as(y)  # type: ignore[no-any-return]

    return Apply(forward, linear=nn.Linear(n_in, n_out, bias=False), norm=nn.BatchNorm1d(n_out))


def test_batch_norm_of_flattened_tokens_folds_into_the_linear_layer() -> None:
    model = ready(chain(token_norm(4, 6), nn.Hardswish(), token_norm(6, 4)))
    folded = fold(model, image(2, 5, 4))
    assert types(folded) == ["Linear", "Hardswish", "Linear"]
    assert len(folded.graph.nodes) == 5 + 2  # and the number of dimensions, demanded
    exported = rmfx.fold_batch_norm(torch.export.export(model, (image(2, 5, 4),)))
    assert types(exported) == ["Linear", "Hardswish", "Linear"]
    assert_equivalent(model, exported, image(2, 5, 4))
    more = ready(token_norm(4, 6, end=2))
    assert types(fold(more, image(2, 3, 5, 4))) == ["Linear"]


def test_a_residual_block_of_flattened_tokens_is_removed() -> None:
    model = ready(Residual(chain(token_norm(4, 6), nn.Hardswish(), token_norm(6, 4))))
    gm = rmfx.remove_residuals(model, image(2, 5, 4))
    assert rmfx.report(gm).adds_left == 0
    assert_equivalent(model, gm, image(2, 5, 4))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (m.norm((y := m.linear(x)).flatten(0, 1)).reshape_as(y), y),
        lambda m, x: m.norm((y := m.linear(x)).flatten(1)).reshape_as(y),
        lambda m, x: m.norm(m.linear(x).flatten(0, 1)).reshape_as(x),
    ],
)
def test_other_reshapes_around_a_batch_norm_stay(forward: Any) -> None:
    model = ready(Apply(forward, linear=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)))
    assert "BatchNorm1d" in types(fold(model, image(2, 1, 4)))


def test_batches_for_new_norms_are_a_list() -> None:
    model, x = ready(nn.Sequential(conv(3, 4))), image(2, 3, 8, 8)
    with pytest.raises(OptionError, match="data is a tensor"):
        rmfx.insert_batch_norm(model, x)
    with pytest.raises(rmfx.ShapeError, match="an empty batch"):
        rmfx.insert_batch_norm(model, [x[:0]])
    with pytest.raises(OptionError, match="layers='layer9"):
        rmfx.insert_batch_norm(model, [x], layers="layer9.*")


@pytest.mark.parametrize(
    "spoil", [lambda x: x / 0, lambda x: x * float("nan"), lambda x: x * 1e200]
)
def test_data_of_which_there_is_no_variance_are_refused(spoil: Any) -> None:
    model, x = ready(nn.Sequential(conv(3, 4))), image(2, 3, 8, 8)
    with pytest.raises(OptionError, match="NaN, Inf or numbers whose variance is beyond"):
        rmfx.insert_batch_norm(model, [x, spoil(x)])
