"""Layers with factors: put there, trained to nothing, removed, merged; in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from builders import image, ready
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.errors import OptionError, ShapeError
from rmfx.models import cifar_resnet
from rmfx.modules.factors import Carried, ResConv
from rmfx.testing import assert_equivalent
from rmfx.training import Slimming

LIMIT = 1e-10


def chain(
    *layers: tuple[int, int, int, int, int], act: Callable[[], nn.Module] = nn.ReLU
) -> nn.Module:
    """Convolutions (in, out, kernel, stride, groups), each with batch norm and an activation."""
    made: list[nn.Module] = []
    for n_in, n_out, k, stride, groups in layers:
        conv = nn.Conv2d(n_in, n_out, k, stride, padding=k // 2, groups=groups, bias=k == 1)
        made += [conv, nn.BatchNorm2d(n_out), act()]
    return nn.Sequential(*made)


def with_factors(model: nn.Module, x: Tensor, zeros: set[int] | None = None) -> nn.Module:
    """Factors of every sign and size; those of some layers 0."""
    net, _ = rmfx.insert_resconv(model, x)
    gates = [m for m in net.modules() if isinstance(m, ResConv)]
    with torch.no_grad():
        for i, gate in enumerate(gates):
            gate.scale.uniform_(-1.5, 1.5)
            gate.raw_carry.uniform_(-2, 2)
            if zeros is not None and i in zeros:
                gate.scale.zero_()
    return net


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def size() -> st.SearchStrategy[int]:
    return st.integers(5, 9)


# ---- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_a_layer_with_factors_is_one_convolution(
    kernel: int, stride: int, groups: int, act: Callable[[], nn.Module]
) -> None:
    x = torch.randn(2, 4, 7, 6).double()
    model = ready(chain((4, 4, kernel, stride, groups), act=act))
    net = with_factors(model, x)
    assert any(isinstance(m, ResConv) for m in net.modules())
    fused = rmfx.fuse_resconv(net, x)
    assert_equivalent(net, fused, x, tolerance=LIMIT)
    (conv,) = convolutions(fused)
    assert (conv.kernel_size, conv.groups) == ((kernel, kernel), groups)
    assert len(list(fused.children())) == 2


def test_merging_needs_no_example_inputs() -> None:
    x = torch.randn(2, 4, 6, 6).double()
    net = with_factors(ready(chain((4, 4, 3, 1, 1), (4, 4, 3, 1, 4))), x)
    fused = rmfx.fuse_resconv(net)
    assert_equivalent(net, fused, x, tolerance=LIMIT)
    assert len(convolutions(fused)) == 2


def test_inserting_leaves_the_model_alone_and_can_change_little() -> None:
    x = torch.randn(2, 4, 6, 6).double()
    model = ready(chain((4, 4, 3, 1, 1)))
    before = copy.deepcopy(model.state_dict())
    net, _ = rmfx.insert_resconv(model, x, carry=1e-6)
    torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(list(model.children())) == 3


# ---- removal ------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.sets(st.integers(0, 4)), st.data())
@settings(max_examples=20)
def test_layers_with_scale_0_go_without_a_change(zeros: set[int], data: st.DataObject) -> None:
    x = torch.randn(2, 3, data.draw(size()), data.draw(size())).double()
    act = data.draw(st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.ReLU6]))
    model = ready(
        chain(
            (3, 4, 3, 1, 1),
            *[(4, 4, k, 1, g) for k, g in ((3, 1), (1, 2), (5, 4), (3, 2), (3, 1))],
            act=act,
        )
    )
    net = with_factors(model, x, zeros)
    short, report = rmfx.prune_layers(net, x, threshold=0.0)
    assert report.removed == min(len(zeros), 4)  # one of the five stays
    assert len(convolutions(short)) == 6 - report.removed
    assert_equivalent(net, short, x, tolerance=LIMIT)
    assert_equivalent(net, rmfx.fuse_resconv(short, x), x, tolerance=LIMIT)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_inside_of_basic_blocks(first: bool, second: bool) -> None:
    x = torch.randn(2, 3, 16, 16).double()
    model = ready(cifar_resnet(14, "B"))
    net = with_factors(model, x)
    gates = {name: m for name, m in net.named_modules() if isinstance(m, ResConv)}
    with torch.no_grad():
        for name, gate in gates.items():
            if name.startswith("layer1.1"):
                gate.scale.fill_(1.0)
                if first if "conv1" in name else second:
                    gate.scale.zero_()
    short, report = rmfx.prune_layers(net, x, threshold=0.0)
    gone = {row.place for row in report.layers if row.removed}
    assert gone == {f"layer1.1.conv{i}" for i, goes in ((1, first), (2, second)) if goes}
    assert_equivalent(net, short, x, tolerance=LIMIT)
    fused = rmfx.fuse_resconv(short, x)
    assert_equivalent(net, fused, x, tolerance=LIMIT)
    # Nothing is left of factors: neither products nor layers of their own.
    usual = rmfx.merge_convs(model, x)
    assert len(convolutions(fused)) <= len(convolutions(usual)) - len(gone) + (first and second)
    assert not any(node.target is torch.mul for node in fused.graph.nodes)
    plain = rmfx.remove_residuals(fused, x, strict=True)
    assert_equivalent(net, plain, x, tolerance=LIMIT)


def test_the_relu_goes_with_its_layer() -> None:
    """relu(a·x) = a·x where x comes out of a ReLU, and the next layer takes a."""
    x = torch.randn(2, 3, 6, 6).double()
    net = with_factors(ready(chain((3, 4, 3, 1, 1), (4, 4, 3, 1, 1), (4, 4, 3, 1, 1))), x, {0})
    short, _ = rmfx.prune_layers(net, x, threshold=0.0)
    fused = rmfx.fuse_resconv(short, x)
    assert [type(m).__name__ for m in fused.children()] == ["Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert_equivalent(net, fused, x, tolerance=LIMIT)


def test_the_layers_that_matter_least_go_first() -> None:
    x = torch.randn(2, 4, 6, 6).double()
    net = with_factors(ready(chain(*[(4, 4, 3, 1, 1)] * 4)), x)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    gates = [m for m in net.modules() if isinstance(m, ResConv)]
    with torch.no_grad():
        for gate, norm, scale, slope in zip(
            gates, norms, (0.1, -0.2, 0.01, 3.0), (1.0, 2.0, 90.0, 1.0), strict=True
        ):
            gate.scale.fill_(scale)
            norm.weight.fill_(slope)
            norm.running_var.fill_(1.0 - norm.eps)  # type: ignore[union-attr]
    _, report = rmfx.prune_layers(net, x, ratio=0.5)
    scores = [row.score for row in report.layers]
    assert scores == pytest.approx([0.1, 0.4, 0.9, 3.0])
    assert [row.removed for row in report.layers] == [True, True, False, False]


def test_one_layer_of_each_stage_stays() -> None:
    x = torch.randn(1, 3, 32, 32)
    net, _ = rmfx.insert_resconv(cifar_resnet(20, "B").eval(), x)
    short, report = rmfx.prune_layers(net, x, ratio=1.0)
    assert short(x).shape == (1, 10)
    stays = [row.place for row in report.layers if row.reason == "the last of its stage"]
    assert [place.split(".")[0] for place in stays] == ["layer1", "layer2", "layer3"]


@pytest.mark.slow
def test_the_headline_of_the_paper_as_an_architecture() -> None:
    """ResNet-110 for CIFAR: 65.5 % fewer multiply-adds are 70 of its layers of equal width."""
    x = torch.randn(1, 3, 32, 32)
    model = cifar_resnet(110, "A").eval()
    whole = rmfx.cost.count(model, x).macs
    assert whole == 252_887_680
    net, _ = rmfx.insert_resconv(model, x)
    short, report = rmfx.prune_layers(net, x, budget=(1 - 0.655) * whole)
    assert report.removed == 71
    assert len(convolutions(short)) == 109 - 71
    fused = rmfx.fuse_resconv(short, x)
    assert rmfx.cost.count(fused, x).macs <= (1 - 0.655) * whole
    assert_equivalent(short, fused, x)


def test_a_budget_is_of_the_example_inputs_as_costs_are() -> None:
    model = cifar_resnet(20, "A").eval()
    kept = []
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        net, _ = rmfx.insert_resconv(model, x)
        budget = 0.5 * rmfx.cost.count(model, x).macs
        short, report = rmfx.prune_layers(net, x, budget=budget)
        assert report.macs <= budget
        kept.append([row.place for row in report.layers if not row.removed])
        fused = rmfx.fuse_resconv(short, x)
        classifier = 640 * batch
        assert rmfx.cost.count(fused, x).macs == pytest.approx(report.macs + classifier, rel=0.01)
    assert kept[0] == kept[1]


class Overwritten(nn.Module):
    """A ReLU that changes no value, but keeps it from what is written later."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain((4, 4, 3, 1, 1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        kept = self.relu(y)
        y[:, :1].add_(1.0)
        return kept * y


def test_a_relu_that_keeps_a_value_stays() -> None:
    x = torch.randn(2, 4, 6, 6).double()
    model = ready(Overwritten())
    assert_equivalent(model, rmfx.fuse_resconv(model, x), x, tolerance=LIMIT)
    net = with_factors(model, x)
    assert_equivalent(net, rmfx.fuse_resconv(net, x), x, tolerance=LIMIT)


# ---- training -----------------------------------------------------------------------------------


def test_slimming_takes_scales_to_zero_and_training_goes_on() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    net, _ = rmfx.insert_resconv(cifar_resnet(8, "B").eval(), x)
    net.train()
    slimming = Slimming(net, 20.0, scales=rmfx.layer_scales(net))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(6):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        slimming.step(0.01)
    assert slimming.zeros() > 0
    net.eval()
    short, report = rmfx.prune_layers(net, x, threshold=0.0)
    assert 0 < report.removed <= slimming.zeros()
    torch.testing.assert_close(short(x), net(x), rtol=1e-4, atol=1e-4)
    left = [m for m in short.modules() if isinstance(m, (ResConv, Carried))]
    before = [m.raw_carry.item() for m in left]
    short.train()
    short(x).square().mean().backward()
    torch.optim.SGD(short.parameters(), 0.1).step()
    assert any(m.raw_carry.item() != value for m, value in zip(left, before, strict=True))
    assert all(float(m.carry.detach()) > 0 for m in left if isinstance(m, ResConv))


def test_the_pruned_net_has_parameters_of_its_own() -> None:
    x = torch.randn(1, 4, 6, 6)
    net, _ = rmfx.insert_resconv(chain(*[(4, 4, 3, 1, 1)] * 2).eval(), x)
    short, _ = rmfx.prune_layers(net, x, ratio=0.5)
    mine, theirs = ({id(p) for p in m.parameters()} for m in (net, short))
    assert not mine & theirs


# ---- refusals -----------------------------------------------------------------------------------


def test_what_cannot_have_factors_says_why() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    ).eval()
    net, report = rmfx.insert_resconv(model, torch.randn(1, 3, 12, 12), layers=list("0369"))
    assert [row.reason for row in report.layers] == [
        "3 channels become 4",
        "its kernel has no middle, or zeros are not evenly around it",
        "its kernel has no middle, or zeros are not evenly around it",
        "its kernel has no middle, or zeros are not evenly around it",
        "not named",
        "not named",
        "not named",
    ]
    net, report = rmfx.insert_resconv(model, torch.randn(1, 3, 12, 12))
    assert [row.reason for row in report.layers[4:]] == [
        "batch norm is not all that reads it",
        "",
        "",
    ]
    assert "3 channels become 4" in str(report)
    _, pruned = rmfx.prune_layers(net, torch.randn(1, 3, 12, 12), ratio=1.0, protect=["16"])
    assert [row.reason for row in pruned.layers[4:]] == ["has no factors", "", "protected"]
    assert pruned.removed == 1


def test_a_strided_layer_stays() -> None:
    x = torch.randn(1, 4, 8, 8)
    net, _ = rmfx.insert_resconv(chain((4, 4, 3, 2, 1), (4, 4, 3, 1, 1), (4, 4, 3, 1, 1)).eval(), x)
    _, report = rmfx.prune_layers(net, x, ratio=1.0)
    assert [row.reason for row in report.layers] == ["has a stride", "", "the last of its stage"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of"),
        ({"ratio": 0.5, "budget": 3}, "give one of"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"threshold": "all"}, "threshold='all' must be a number"),
        ({"budget": -1}, "budget=-1"),
        ({"budget": 10}, "without all layers that can go it is"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, float], message: str) -> None:
    x = torch.randn(1, 4, 8, 8)
    net, _ = rmfx.insert_resconv(chain(*[(4, 4, 3, 1, 1)] * 2).eval(), x)
    with pytest.raises(OptionError, match=message):
        rmfx.prune_layers(net, x, **options)  # type: ignore[arg-type]


def test_other_wrong_calls() -> None:
    x = torch.randn(1, 4, 8, 8)
    model = chain((4, 4, 3, 1, 1)).eval()
    with pytest.raises(OptionError, match="carry=0"):
        rmfx.insert_resconv(model, x, carry=0)
    with pytest.raises(ShapeError, match="insert_resconv needs example inputs"):
        rmfx.insert_resconv(model, None)
    with pytest.raises(OptionError, match="has no ResConv"):
        rmfx.prune_layers(model, x, ratio=0.5)
    net, _ = rmfx.insert_resconv(model, x)
    with pytest.raises(OptionError, match="prune layers before batch norms are folded"):
        rmfx.prune_layers(rmfx.fold_batch_norm(net, x), x, ratio=0.5)
    with pytest.raises(OptionError, match="scales= is empty"):
        Slimming(model, 0.1, scales=rmfx.layer_scales(model))
    for options, message in (
        ({"carry": float("inf")}, "carry=inf"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"layers": ["layer9.*"]}, "layers='layer9"),
        ({"layers": 3}, "layers=3 must be a pattern"),
        ({"carry": "a"}, "carry='a' must be a finite number"),
        ({"scale": True}, "scale=True must be a finite number"),
    ):
        with pytest.raises(OptionError, match=message):
            rmfx.insert_resconv(model, x, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="protect='layer9"):
        rmfx.prune_layers(net, x, ratio=0.5, protect="layer9.*")


def test_factors_are_put_there_once() -> None:
    x = torch.randn(1, 4, 8, 8)
    net, _ = rmfx.insert_resconv(chain(*[(4, 4, 3, 1, 1)] * 2).eval(), x, scale=1, carry=500.0)
    again, report = rmfx.insert_resconv(net, x)
    assert len(rmfx.layer_scales(again)) == 2
    assert {row.reason for row in report.layers} == {"it has factors already"}
    torch.testing.assert_close(again(x), net(x))


def test_a_protected_layer_is_one_that_stays() -> None:
    x = torch.randn(1, 4, 8, 8)
    net, _ = rmfx.insert_resconv(chain(*[(4, 4, 3, 1, 1)] * 3).eval(), x)
    first = next(str(n) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    _, report = rmfx.prune_layers(net, x, ratio=1.0, protect=first)
    assert report.removed == 2


def test_filters_of_layers_with_factors_go() -> None:
    model, x = ready(cifar_resnet(8, "B", 10)), image(2, 3, 16, 16)
    net, _ = rmfx.insert_resconv(model, x)
    small, _ = rmfx.prune_channels(net, x, target=0.6, importance="l2")
    assert rmfx.cost.count(small, x).macs <= 0.6 * rmfx.cost.count(net, x).macs
    assert len(rmfx.layer_scales(small)) == len(rmfx.layer_scales(net))
    assert_equivalent(small, rmfx.fuse_resconv(small, x), x)


def test_a_filter_of_zeros_goes_from_all_that_a_shortcut_ties_together() -> None:
    model, x = ready(chain((3, 8, 3, 1, 1), (8, 8, 3, 1, 1), (8, 4, 3, 1, 1))), image(2, 3, 8, 8)
    with torch.no_grad():
        for i in (1, 4):  # the batch norms behind what makes the 8 channels
            model[i].weight[5] = model[i].bias[5] = 0.0
    net = with_factors(model, x)
    small, report = rmfx.prune_channels(net, x, target=0.95, importance="l2")
    assert [(f.before, f.after) for f in report.families] == [(8, 7)]
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=LIMIT)


def test_a_layer_that_adds_a_constant_is_not_taken_for_nothing() -> None:
    model, x = ready(chain((8, 8, 3, 1, 1), (8, 8, 3, 1, 1), (8, 8, 3, 1, 1))), image(2, 8, 9, 9)
    with torch.no_grad():
        model[1].weight.zero_()
        model[4].weight.zero_()
        model[4].bias.zero_()
    net = with_factors(model, x)
    short, report = rmfx.prune_layers(net, x, threshold=0)
    assert [row.removed for row in report.layers] == [False, True, False]
    torch.testing.assert_close(short(x), net(x), rtol=0, atol=LIMIT)


def test_factors_are_as_exact_as_the_network() -> None:
    net, _ = rmfx.insert_resconv(ready(chain((4, 4, 3, 1, 1))), image(1, 4, 5, 5), carry=0.3)
    (gate,) = (m for m in net.modules() if isinstance(m, ResConv))
    assert float(gate.carry.detach()) == pytest.approx(0.3, rel=1e-15)


def test_padding_in_words() -> None:
    for kernel, padding, fits in ((1, "valid", True), (3, "valid", False), (3, "same", True)):
        model = nn.Sequential(nn.Conv2d(4, 4, kernel, padding=padding), nn.BatchNorm2d(4)).eval()
        _, report = rmfx.insert_resconv(model, torch.randn(1, 4, 5, 5))
        assert (report.layers[0].reason == "") is fits


def test_a_batch_norm_without_statistics_gets_no_factors() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    _, report = rmfx.insert_resconv(model, torch.randn(2, 4, 5, 5))
    assert report.layers[0].reason == "its batch norm has no running statistics"


def test_the_additions_of_factors_are_counted_and_refused_with_the_way_out() -> None:
    net, _ = rmfx.insert_resconv(ready(cifar_resnet(8)), image(1, 3, 8, 8))
    x = image(1, 3, 8, 8)
    factors = len(rmfx.layer_scales(net))
    assert rmfx.cost.count(net, x).adds == factors + 3
    assert len(rmfx.cost.skips(net, x)) == factors + 3
    report = rmfx.report(rmfx.remove_residuals(net, x))
    assert any("rmfx.fuse_resconv makes one layer of it" in row.reason for row in report.rows)
