"""Channel pruning: what goes together, that the numbers are right, and that targets are met.

The oracle runs the network as it was, with every channel that goes replaced by its mean where a
layer mixes it with others, in the padding as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _masked import Masked
from builders import (
    Apply,
    Residual,
    assert_same,
    chain,
    conv,
    conv_bn,
    image,
    ready,
    shapes,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import rmfx
from rmfx.analysis.channel_labels import Channels
from rmfx.choices import ALLOCATIONS, IMPORTANCES
from rmfx.errors import OptionError
from rmfx.frontend import trace
from rmfx.ir.net import Net
from rmfx.pruning.allocation import spare
from rmfx.pruning.cutting import without
from rmfx.pruning.families import Widths, multiply_adds, parameters
from rmfx.pruning.importance import Responses, taylor
from rmfx.testing import NetworkSpec, residual_networks


def prepared(model: nn.Module, *inputs: Tensor) -> tuple[Net, Widths]:
    net = Net(trace(model, inputs))
    net.sweep()
    return net, Widths(net, Channels(net))


def families(model: nn.Module, *inputs: Tensor) -> dict[tuple[str, ...], int]:
    _, widths = prepared(model, *inputs)
    return {family.layers: len(family.members) for family in widths.families}


def assert_masks_hold(
    model: nn.Module, inputs: Sequence[Tensor], seed: int, *, borders: bool = False
) -> int:
    """Cut at random and compare, in both ways; returns how many labels have gone."""
    net, widths = prepared(model, *inputs)
    if not len(widths.roots):
        return 0
    drawn = torch.rand(2, len(widths.roots), generator=torch.Generator().manual_seed(seed))
    keep = spare(widths, drawn[1], drawn[0] > 0.4)
    means = Responses(net, widths, [(tuple(inputs), None)], lambda text: None).means
    with torch.no_grad():
        masked = Masked(net, widths, keep, means, borders=borders)
        expected = tree_leaves(masked.run(*inputs))
        found = tree_leaves(without(net, widths, keep, means, borders=borders)(*inputs))
    if not borders:
        assert_masks_hold(model, inputs, seed, borders=True)
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-10 * float(a.abs().max()) + 1e-14
    return int((~keep).sum())


# ---- what goes together -------------------------------------------------------------------------


def test_filters_that_meet_in_a_sum_go_together_and_those_of_a_plain_net_alone() -> None:
    model = ready(chain(conv(3, 4), Residual(chain(conv(4, 8), nn.ReLU(), conv(8, 4))), conv(4, 2)))
    x = image(1, 3, 8, 8)
    found = families(model, x)
    assert found == {("0", "1.branch.2"): 4, ("1.branch.0",): 8}
    plain = rmfx.remove_residuals(model, x)
    widths = families(plain, x)
    assert all(len(layers) == 1 for layers in widths)
    assert sum(widths.values()) == 4 + (8 + 4) + 4  # the carry's filters are filters like others


def gated(m: Any, x: Any) -> Any:
    y = m.start(x)
    return m.end(y * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True))))


def sliced(m: Any, x: Any) -> Any:
    y = m.a(x)
    return m.b(y[:, 2:5]) + m.c(y[:, :2])


GATED = Apply(
    gated,
    start=conv(3, 6),
    gate=chain(conv(6, 2, 1), nn.ReLU(), conv(2, 6, 1)),
    end=conv(6, 2),
)
KINDS: dict[str, tuple[nn.Module, dict[tuple[str, ...], int]]] = {
    "depthwise": (
        chain(conv(3, 6), conv_bn(6, 6, groups=6), conv(6, 2)),
        {("0", "1.0"): 6},
    ),
    "groups": (chain(conv(3, 8), conv(8, 12, groups=4), conv(12, 2)), {("0", "1"): 4}),
    "few wide groups": (
        chain(conv(3, 8), conv_bn(8, 12, groups=2), conv(12, 2)),
        {("0",): 4, ("1.0",): 6},
    ),
    "few wide groups, transposed": (
        chain(conv(3, 8), nn.ConvTranspose2d(8, 12, 3, 2, groups=2), conv(12, 2)),
        {("0",): 4, ("1",): 6},
    ),
    "gate": (GATED, {("start", "gate.2"): 6, ("gate.0",): 2}),
    "flattened": (chain(conv(3, 4), nn.Flatten(), nn.Linear(4 * 64, 5)), {("0",): 4}),
    "pooled": (
        chain(conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
        {("0",): 4},
    ),
    "concatenated": (
        Apply(
            lambda m, x: m.c(torch.cat((m.a(x), x, m.b(x)), 1)),
            a=conv(3, 2),
            b=conv(3, 5),
            c=conv(10, 2),
        ),
        {("a",): 2, ("b",): 5},
    ),
    "sliced": (Apply(sliced, a=conv(3, 6), b=conv(3, 2), c=conv(2, 2)), {("a",): 6}),
    "padded with channels": (
        Apply(
            lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 2, 1)) + m.c(x)),
            a=conv(3, 3),
            b=conv(6, 2),
            c=conv(3, 6),
        ),
        {("c", "pad"): 3, ("a", "c"): 3},
    ),
    "one slope on tokens": (
        chain(nn.Flatten(2), nn.Linear(64, 6), nn.PReLU(), nn.Linear(6, 5)),
        {("1",): 6},
    ),
    "slopes of the tokens": (
        chain(nn.Flatten(2), nn.Linear(64, 6), nn.PReLU(3), nn.Linear(6, 5)),
        {},
    ),
    "layer norm": (
        Apply(
            lambda m, x: m.b(m.n(m.a(x).movedim(1, -1)).movedim(-1, 1)),
            a=conv(3, 4),
            b=conv(4, 2),
            n=nn.LayerNorm(4),
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_families(name: str) -> None:
    model, expected = KINDS[name]
    model = ready(model)
    assert families(model, image(1, 3, 8, 8)) == expected
    if expected:
        assert assert_masks_hold(model, (image(2, 3, 8, 8),), 3) > 0


@pytest.mark.parametrize("layout", [(16, 4), (10, 4), (6, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_carries_of_grouped_layers_go_one_by_one(layout: tuple[int, int], seed: int) -> None:
    n, inner = layout
    block = Residual(
        chain(conv(n, inner, 1), nn.ReLU(), conv(inner, inner), nn.ReLU(), conv(inner, n, 1))
    )
    model = ready(chain(conv(3, n), block, nn.ReLU(), conv(n, 2)))
    plain = rmfx.remove_residuals(model, image(1, 3, 6, 6)).double()
    assert assert_masks_hold(plain, (image(2, 3, 6, 6),), seed) > 0


def test_the_main_block_of_a_grouped_layer_may_go_on_one_side() -> None:
    # A group that mixes and two channels that are carried; others read what the group reads.
    grouped = conv(4, 4, groups=2)
    with torch.no_grad():
        grouped.weight[0, 1], grouped.weight[1, 0] = 0, 0

    def forward(m: Any, x: Any) -> Any:
        y = m.start(x)
        return m.end(torch.relu(m.grouped(y))) + m.other(y)

    layers = {"start": conv(3, 4), "grouped": grouped, "end": conv(4, 2), "other": conv(4, 2)}
    model, x = ready(Apply(forward, **layers)), image(2, 3, 8, 8)
    net, widths = prepared(model, x)
    (part,) = [part for part in widths.parts if bool(part.carries.any())]
    for side in (part.outs, part.ins):
        keep = torch.ones(len(widths.roots), dtype=torch.bool)
        keep[side[2:]] = False
        net, widths = prepared(model, x)
        means = Responses(net, widths, [(x, None)], lambda text: None).means
        expected = Masked(net, widths, keep, means).run(x)
        cost = widths.cost(keep, multiply_adds)
        small = without(net, widths, keep, means)
        torch.testing.assert_close(small(x), expected, rtol=1e-10, atol=1e-10)
        assert rmfx.cost.count(small, x).macs == cost


@pytest.mark.slow
@settings(max_examples=20)
@given(spec=residual_networks(), seed=st.integers(0, 99))
def test_random_masks_are_means_in_place_of_channels(spec: NetworkSpec, seed: int) -> None:
    assert_masks_hold(spec.build(seed=0).double(), spec.inputs(seed=0), seed)


# ---- the verb -----------------------------------------------------------------------------------


def small_net() -> nn.Module:
    """A stem, two residual blocks and a classifier."""
    blocks = [Residual(chain(conv_bn(8, 16), nn.ReLU(), conv_bn(16, 8))) for _ in range(2)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return ready(chain(conv_bn(3, 8), nn.ReLU(), *blocks, *head))


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(x, torch.arange(6) % 5) for x in draw]


def pruned(model: nn.Module, **options: Any) -> tuple[fx.GraphModule, rmfx.PruningReport]:
    before = snapshot(model)
    result = rmfx.prune_channels(model, image(1, 3, 8, 8), **options)
    assert_same(before, snapshot(model))
    return result


@pytest.mark.parametrize("of", ["macs", "parameters"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_targets_are_met_and_no_layer_is_empty(allocation: str, of: str) -> None:
    model, x = small_net(), image(1, 3, 8, 8)
    for target in (0.9, 0.5, 0.15):
        small, report = pruned(
            model, target=target, of=of, allocation=allocation, importance="l2", floor=0.0
        )
        cost = rmfx.cost.count(small, x)
        assert cost.macs == report.macs_after
        share = {
            "macs": cost.macs / report.macs_before,
            "parameters": report.parameters_after / report.parameters_before,
        }
        assert target - 0.15 <= share[of] <= target
        assert min(min(shape[:2]) for shape in shapes(small)) >= 1
        assert small(image(3, 3, 8, 8)).shape == (3, 5)


def test_parameters_are_counted_as_they_are() -> None:
    net, widths = prepared(small_net(), image(1, 3, 8, 8))
    everything = torch.ones(len(widths.roots), dtype=torch.bool)
    assert widths.cost(everything, parameters) == sum(p.numel() for p in net.source.parameters())
    cost = rmfx.cost.count(net.source, image(1, 3, 8, 8))
    assert widths.cost(everything, multiply_adds) == cost.macs


@pytest.mark.parametrize("responses", ["bias", "borders", "none"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_budget_of_parameters_has_room_for_new_biases(allocation: str, responses: str) -> None:
    """A layer without bias that loses inputs gets one for what they were on average."""
    widths = pairwise((3, 16, 16, 16, 4))
    convs = [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False) for n_in, n_out in widths]
    model = ready(chain(*[layer for each in convs for layer in (each, nn.ReLU())]))
    for budget in (4000, 2000, 900):
        small, report = rmfx.prune_channels(
            model,
            image(1, 3, 6, 6),
            budget=budget,
            of="parameters",
            importance="l2",
            data=[(image(4, 3, 6, 6), torch.zeros(4))],
            allocation=allocation,
            responses=responses,
        )
        size = sum(p.numel() for p in small.parameters())
        assert size == report.parameters_after
        assert budget / 2 < size <= budget


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_channels_that_do_nothing_go_first(importance: str) -> None:
    model = small_net()
    dead = (1, 4, 6, 7, 9, 12, 13, 15)
    with torch.no_grad():
        for block in (2, 3):
            norm: Any = model[block].branch[0][1]  # type: ignore[index]
            norm.weight[list(dead)] = 0
            norm.bias[list(dead)] = 0
    small, report = pruned(
        model, target=0.55, importance=importance, data=batches(), protect=("0.*", "*.branch.2.0")
    )
    assert [f.after for f in report.families] == [8, 8]
    if importance == "random":
        return
    x = image(4, 3, 8, 8)
    torch.testing.assert_close(small(x), model(x), atol=1e-12, rtol=1e-12)


def test_a_constant_channel_leaves_its_number_in_the_next_bias() -> None:
    x = image(4, 3, 8, 8)
    for padding, responses in ((0, "bias"), (1, "borders"), (0, "borders")):
        last = (conv(6, 4, padding=padding), nn.ReLU(), conv(4, 2))
        model = ready(chain(conv_bn(3, 6), nn.Tanh(), *last))
        with torch.no_grad():
            model[0][0].weight[2:5] = 0
        small, _ = pruned(
            model,
            target=0.7,
            data=[(x, None)],
            protect=("2",),
            importance=lambda gm: {"0.0": (gm.get_submodule("0.0").weight != 0).flatten(1).sum(1)},
            responses=responses,
        )
        assert shapes(small)[0][0] == 3
        assert shapes(small)[1][1] == 3 + padding  # the channel of ones
        torch.testing.assert_close(small(x), model(x), atol=1e-12, rtol=1e-12)
        again, _ = rmfx.prune_channels(small, x, target=0.9, importance="l2")
        assert again(x).shape == small(x).shape


def test_means_go_into_the_running_mean_of_a_batch_norm() -> None:
    model = ready(chain(conv(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)))
    small, _ = pruned(model, target=0.5, data=batches(), importance="l1")
    assert small.get_submodule("2").bias is None


def test_importance_is_by_what_is_given() -> None:
    for data, importance in ((None, "l2"), (batches(1), "taylor")):
        _, by_default = pruned(small_net(), target=0.5, data=data)
        _, chosen = pruned(small_net(), target=0.5, data=data, importance=importance)
        assert by_default == chosen
        assert by_default.importance == importance


def test_taylor_is_the_slope_of_the_loss_towards_the_mean() -> None:
    model = small_net()
    net, widths = prepared(model, image(1, 3, 8, 8))
    data = batches(1)
    means = Responses(net, widths, data, lambda text: None).means
    found = taylor(net, widths, data, F.cross_entropy, means, lambda text: None)
    x, y = data[0]
    step = 1e-6
    for place in range(0, len(widths.roots), 5):
        keep = torch.ones(len(widths.roots), dtype=torch.bool)
        keep[place] = False
        with torch.no_grad():
            outputs = Towards(net, widths, keep, means, step).run(x), model(x)
        after, before = (F.cross_entropy(output, y, reduction="none") for output in outputs)
        change = after - before
        expected = float((change / step).abs().sum()) / len(x) ** 2  # the loss is a mean
        assert float(found[place]) == pytest.approx(expected, rel=1e-3, abs=1e-7)


class Towards(Masked):
    """Goes a step from what channels are towards their means, without those in the padding."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments[:-1])
        self._step = arguments[-1]

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.layers or n not in self.means:
            return super().run_node(n)
        source = n.all_input_nodes[0]
        x = self.env[source]
        gone, mean = (
            t.reshape(-1, *[1] * (x.dim() - 2)) for t in (self.gone(n), self.means[n].to(x))
        )
        self.env[source] = torch.where(gone, x + self._step * (mean - x), x)
        result = fx.Interpreter.run_node(self, n)
        self.env[source] = x
        return result


def test_the_result_can_be_trained() -> None:
    small, _ = pruned(small_net(), target=0.5, importance="l2")
    small.train()
    (x, y), *_ = batches()
    F.cross_entropy(small(x), y).backward()
    assert all(p.grad is not None and p.requires_grad for p in small.parameters())
    again, _ = rmfx.prune_channels(small.eval(), x, target=0.7, importance="l2")
    assert rmfx.cost.count(again, x).macs <= 0.7 * rmfx.cost.count(small, x).macs


def test_multiples_floors_and_protected_layers() -> None:
    model = small_net()
    _, report = pruned(model, target=0.5, importance="l2", multiple=4)
    assert all(f.after % 4 == 0 for f in report.families)
    _, report = pruned(model, target=0.6, importance="l2", floor=0.5, allocation="global")
    assert all(f.after >= f.before / 2 for f in report.families)
    _, report = pruned(model, target=0.6, importance="l2", protect=("2.branch.0.*",))
    assert ("2.branch.0.0",) not in [f.layers for f in report.families]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_multiple_can_depend_on_the_filters_of_a_family(allocation: str) -> None:
    widths = (8, 32, 64)
    layers = [nn.Conv2d(a, b, 1) for a, b in pairwise((3, *widths, 4))]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8)
    options = {"importance": "l2", "floor": 0.0, "allocation": allocation}
    for target in (0.7, 0.4, 0.2):
        _, report = rmfx.prune_channels(
            model, x, target=target, multiple=lambda n: min(16, n // 2), **options
        )
        assert [f.before for f in report.families] == list(widths)
        assert all(f.after % min(16, f.before // 2) == 0 for f in report.families)
        assert report.macs_after <= target * report.macs_before
    with pytest.raises(OptionError, match="multiple gives 0 for 8 filters"):
        rmfx.prune_channels(model, x, target=0.5, multiple=lambda n: n // 16, **options)
    with pytest.raises(OptionError, match="multiple=0 must be a whole number, at least 1"):
        rmfx.prune_channels(model, x, target=0.5, multiple=0, **options)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_what_rounding_leaves_of_the_budget_is_used(allocation: str) -> None:
    layers = [nn.Conv2d(3, 16, 1), *(nn.Conv2d(16, 16, 1) for _ in range(6))]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8)
    options = {"importance": "l2", "multiple": 8, "floor": 0.0, "allocation": allocation}
    for target in (0.9, 0.7, 0.5, 0.35):
        small, _ = rmfx.prune_channels(model, x, target=target, **options)
        used = rmfx.cost.count(small, x).macs / rmfx.cost.count(model, x).macs
        assert target - 0.18 < used <= target  # a step of one layer is less than 0.18 of the cost


def test_the_table_tells_what_went() -> None:
    _, report = pruned(small_net(), target=0.5, importance="l2")
    text = str(report)
    assert "2.branch.0.0" in text
    assert "multiply-adds (0." in text
    assert report.to_dict()["families"][0]["before"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either target"),
        ({"target": 0.5, "budget": 3}, "either target"),
        ({"target": 1.5}, "above 0 and at most 1"),
        ({"budget": -1}, "must be a number above 0"),
        ({"target": 0.5, "of": "flops"}, "of='flops'"),
        ({"target": 0.5, "importance": "best"}, "importance='best'"),
        ({"target": 0.5, "importance": 3}, "choose from taylor"),
        ({"target": 0.5, "allocation": "fair"}, "allocation='fair'"),
        ({"target": 0.5, "floor": 2}, "floor"),
        ({"target": 0.5, "importance": "taylor"}, "needs data"),
        ({"target": 0.5, "data": iter([])}, "iterator"),
        ({"target": 0.5, "importance": "l2", "responses": "all"}, "responses='all'"),
        ({"target": 0.5, "importance": "l2", "responses": "borders"}, "needs data"),
        ({"target": 0.5, "data": []}, "no batches"),
        ({"target": 0.001, "importance": "l2"}, "cannot be reached"),
        ({"target": 0.5, "importance": lambda gm: {"nowhere": torch.ones(3)}}, "no such layer"),
        ({"target": 0.5, "importance": lambda gm: {"0.0": torch.ones(3)}}, "has 8 outputs"),
        ({"target": 0.5, "importance": lambda gm: {"0.0": torch.full((8,), torch.nan)}}, "NaN"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(rmfx.RmfxError, match=message):
        pruned(small_net(), **options)


def test_shapes_and_batches_are_needed_as_they_are() -> None:
    with pytest.raises(rmfx.ShapeError, match="example inputs"):
        rmfx.prune_channels(small_net(), None, target=0.5, importance="l2")
    with pytest.raises(rmfx.ShapeError, match="batch of data"):
        pruned(small_net(), target=0.5, data=[(image(1, 4, 8, 8), torch.zeros(1).long())])


def test_bn_scale_needs_a_batch_norm() -> None:
    with pytest.raises(rmfx.RmfxError, match="no batch norm with a scale"):
        pruned(ready(chain(conv(3, 4), nn.ReLU(), conv(4, 2))), target=0.5, importance="bn_scale")


def test_layers_that_are_shared_or_hooked_stay() -> None:
    layer = conv(4, 4)
    model = ready(chain(conv(3, 4), layer, nn.ReLU(), layer, conv(4, 2)))
    assert families(model, image(1, 3, 8, 8)) == {}
    hooked = ready(chain(conv(3, 4), conv(4, 4), conv(4, 2)))
    hooked[1].register_forward_hook(lambda *arguments: None)  # type: ignore[index]
    assert families(hooked, image(1, 3, 8, 8)) == {}


def test_deep_networks() -> None:
    blocks = [Residual(chain(conv_bn(8, 8), nn.ReLU(), conv_bn(8, 8))) for _ in range(60)]
    model = ready(chain(conv_bn(3, 8), *blocks, conv(8, 2)))
    small, _ = pruned(model, target=0.5, importance="l2")
    assert rmfx.cost.count(small, image(1, 3, 8, 8)).macs > 0


def test_layers_that_are_shared_count() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    first = (nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
    model, x = nn.Sequential(*first, shared, nn.ReLU(), shared).eval(), torch.randn(1, 3, 8, 8)
    for of in ("macs", "parameters"):
        with pytest.raises(OptionError, match="cannot be reached"):
            rmfx.prune_channels(model, x, target=0.5, of=of, importance="l2")
    small, report = rmfx.prune_channels(model, x, target=0.97, importance="l2")
    assert report.macs_before == rmfx.cost.count(model, x).macs
    assert report.macs_after == rmfx.cost.count(small, x).macs <= 0.97 * report.macs_before
    assert report.parameters_after == rmfx.cost.count(small, x).parameters


@pytest.mark.parametrize("of", ["macs", "parameters"])
def test_channels_of_ones_count(of: str) -> None:
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8), (8, 2))]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    options = {"importance": "l2", "data": [(x, 0)], "responses": "borders", "of": of}
    small, report = rmfx.prune_channels(model, x, target=0.6, **options)
    before, after = rmfx.cost.count(model, x), rmfx.cost.count(small, x)
    assert getattr(after, of) <= 0.6 * getattr(before, of)
    assert (report.macs_after, report.parameters_after) == (after.macs, after.parameters)


def test_transposed_convolutions_count() -> None:
    model, x = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2)).eval(), torch.randn(1, 8, 4, 4)
    assert rmfx.cost.count(model, x).macs == 8 * 4 * 4 * 16
    assert rmfx.cost.count(model, x).layers == 1


def test_a_pattern_may_stand_alone_and_must_fit() -> None:
    model = small_net()
    _, report = pruned(model, target=0.6, importance="l2", protect="2.branch.0.*")
    assert ("2.branch.0.0",) not in [f.layers for f in report.families]
    for wrong in (["branch"], "2.brunch.*"):
        with pytest.raises(OptionError, match=r"protect='.*' is of no layer"):
            pruned(model, target=0.6, importance="l2", protect=wrong)


class TwoParts(nn.Module):
    """Two layers read parts of what one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 1, 1)
        self.p, self.q = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        y: Tensor = self.o(torch.cat([self.p(a[:, :2]), self.q(a[:, 2:])], 1))
        return y


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("seed", range(6))
def test_what_must_stay_comes_in_multiples(allocation: str, seed: int) -> None:
    torch.manual_seed(seed)
    options = {"importance": "l2", "allocation": allocation, "multiple": 2, "target": 0.5}
    _, report = rmfx.prune_channels(TwoParts().eval(), torch.randn(1, 3, 8, 8), **options)
    assert all(f.after % 2 == 0 for f in report.families)


def test_what_holds_filters_is_named() -> None:
    model = ready(chain(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 8), nn.Softmax(1)))
    with pytest.raises(OptionError, match=r"held by _1: GroupNorm divides.*; _4: Softmax weighs"):
        rmfx.prune_channels(model, image(2, 3, 8, 8), target=0.5, importance="l2")
    _, report = rmfx.prune_channels(model, image(2, 3, 8, 8), target=1.0, importance="l2")
    assert [name for name, _ in report.held] == ["_1", "_4"]
    assert "GroupNorm divides by statistics" in str(report)


def test_a_layer_that_must_stay_is_named() -> None:
    model = ready(chain(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4)))
    nn.utils.parametrizations.weight_norm(model[2])
    model[2].register_forward_hook(lambda module, inputs, output: output)
    _, report = rmfx.prune_channels(model, image(2, 3, 8, 8), target=1.0, importance="l2")
    assert report.held[0][0] == "_2"
    assert "module 2 computes its weights at every call" in report.held[0][1]


def test_a_layer_that_computes_its_weights_is_pruned_as_it_is_now() -> None:
    model = ready(chain(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4)))
    x = image(2, 3, 8, 8)
    nn.utils.parametrizations.weight_norm(model[2])
    whole, report = rmfx.prune_channels(model, x, target=1.0, importance="l2")
    assert report.held == ()
    torch.testing.assert_close(whole(x), model(x), rtol=1e-10, atol=1e-10)
    _, report = rmfx.prune_channels(model, x, target=0.5, importance="l2")
    assert all(f.after < f.before for f in report.families)
    assert len(report.families) == 2


def test_nothing_to_choose_from() -> None:
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)
    _, report = rmfx.prune_channels(
        model, x, target=1.0, data=[(x, 0)], loss=lambda y, target: y.sum()
    )
    assert not report.families


def nan_loss(y: Tensor, target: Any) -> Tensor:
    return y.sum() * float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": [(torch.randn(2, 3, 8, 8), 0), (torch.randn(0, 3, 8, 8), 0)]}, "an empty batch"),
        ({"data": [(torch.full((2, 3, 8, 8), float("nan")), 0)]}, "NaN or Inf on the data"),
        ({"data": [(torch.randn(2, 3, 8, 8), 0)], "loss": nan_loss}, "the loss, or its gradient"),
        ({"data": [torch.randn(2, 3, 8, 8)]}, "holds a Tensor, where batches are pairs"),
        ({"data": torch.randn(2, 3, 8, 8)}, "data is a tensor"),
        ({"importance": lambda gm: [1.0]}, "must give a dict of tensors"),
        ({"importance": "l2", "of": None}, "of=None"),
        ({"importance": "l2", "allocation": None}, "allocation=None"),
        ({"importance": "l2", "target": "0.5"}, "target='0.5' must be a number"),
    ],
)
def test_wrong_arguments_are_told(options: dict[str, Any], message: str) -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    given = {"target": 0.5} | options
    with pytest.raises(OptionError, match=message):
        rmfx.prune_channels(nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8), **given)


@pytest.mark.parametrize("index", [[3, 0, 2, 1], [1, 1, 3, 0, 2], [-1, 2]], ids=str)
def test_a_list_of_channels_names_those_that_are_left(index: list[int]) -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.last(torch.relu(m.first(x))[:, index])

    model = ready(Apply(forward, first=conv(4, 4), last=conv(len(index), 3)))
    with torch.no_grad():  # what is cut is read with zeros
        model.last.weight[:, [i for i, row in enumerate(index) if row % 4 in (1, 3)]] = 0
    scores = {"first": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    pruned, _ = rmfx.prune_channels(
        model, image(), target=0.9, importance=lambda gm: scores, protect="last"
    )
    assert shapes(pruned)[0][0] < 4
    torch.testing.assert_close(pruned(image()), model(image()))


def test_lists_that_make_further_dimensions_keep_all_channels() -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.last(torch.relu(m.first(x))[:, :, [[0, 1], [2, 3]]].flatten(3))

    model = ready(Apply(forward, first=conv(4, 4), last=conv(4, 3, dims=2)))
    with pytest.raises(OptionError):
        rmfx.prune_channels(model, image(), target=0.7, importance="l2", protect="last")
