"""The oracle fails when it should; the generator draws valid networks with everything in them."""

from __future__ import annotations

import copy
import math
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import rmfx
from rmfx import testing
from rmfx.testing import (
    FEATURES,
    Act,
    Blur,
    ChannelsLast,
    Conv,
    Join,
    Linear,
    NetworkSpec,
    Node,
    Norm,
    Pool,
    Recall,
    Save,
    Shuffle,
    Split,
    assert_equivalent,
    random_block,
    random_network,
    random_statistics,
    residual_blocks,
    residual_networks,
)
from rmfx.testing.drawing.values import pooled

BLOCK = Join(((Conv(3, 3, (3, 3), padding=1), Norm(3), Act("relu"), Conv(3, 3, (1, 1))), ()))


def drawn(count: int) -> list[NetworkSpec]:
    """Blocks and networks by turns, always the same ones."""
    draws = (random_block, random_network)
    return [draws[seed % 2](Random(seed)) for seed in range(count)]


def leaves(output: Any) -> list[Tensor]:
    return pytree.tree_leaves(output)


def residual_net() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A stem and a residual block, with inputs."""
    spec = NetworkSpec(((2, 3, 7, 7),), (Conv(3, 3, (1, 1)), BLOCK, Act("relu")))
    return spec.build(seed=0), spec.inputs(seed=0)


# The generator


@torch.no_grad()
def test_drawn_networks_run_give_finite_values_and_leave_their_inputs_alone() -> None:
    for seed, spec in enumerate(drawn(300)):
        inputs = spec.inputs(seed)
        output = spec.build(seed)(*inputs)
        assert all(leaf.isfinite().all() for leaf in leaves(output)), spec
        assert all(leaf.abs().max() < 1e6 for leaf in leaves(output)), spec
        assert all(torch.equal(x, y) for x, y in zip(inputs, spec.inputs(seed), strict=True)), spec


def test_drawn_networks_trace_symbolically() -> None:
    for seed, spec in enumerate(drawn(300)):
        graph = fx.symbolic_trace(spec.build(seed)).graph
        assert len(graph.find_nodes(op="placeholder")) == len(spec.shapes), spec


@torch.no_grad()
def test_hardly_any_network_gives_nothing_but_zeros() -> None:
    zeros = sum(
        not any(leaf.any() for leaf in leaves(spec.build(seed)(*spec.inputs(seed))))
        for seed, spec in enumerate(drawn(200))
    )
    assert zeros <= 4


def test_the_repr_of_a_spec_gives_the_spec_back() -> None:
    for spec in drawn(300):
        assert eval(repr(spec), vars(testing)) == spec


def test_every_feature_occurs_and_none_is_unlisted() -> None:
    counts = Counter(feature for spec in drawn(3000) for feature in spec.features())
    assert set(counts) == FEATURES


def test_equal_seeds_build_equal_networks_and_leave_the_global_generator_alone() -> None:
    spec = NetworkSpec(((1, 3, 5, 5),), (BLOCK,))
    state = torch.get_rng_state()
    first, second, other = spec.build(seed=1), spec.build(seed=1), spec.build(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    (x,) = spec.inputs(seed=0)
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))


def test_a_saved_value_changed_in_place_reads_as_changed() -> None:
    body = (Conv(1, 1, (1,)), Save("s1"), Act("relu", "functional in-place"), Recall("s1"))
    spec = NetworkSpec(((1, 1, 9),), body)
    network, (x,) = spec.build(seed=0), spec.inputs(seed=0)
    convolved = network.body[0](x)
    torch.testing.assert_close(network(x), 2 * convolved.relu())


def result(node: Node, *shape: int) -> tuple[Tensor, Tensor]:
    """A random value, and what the node makes of it."""
    spec = NetworkSpec((shape,), (node,))
    (x,) = spec.inputs(seed=0)
    with torch.no_grad():
        return x, spec.build(seed=0)(x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("form", ["reshape", "flatten", "function", "module"])
def test_every_form_of_a_channel_shuffle_is_the_same(form: str, dims: int) -> None:
    x, shuffled = result(Shuffle(3, dims, form), 2, 6, *(4,) * dims)
    assert torch.equal(shuffled, x[:, [0, 2, 4, 1, 3, 5]])


@pytest.mark.parametrize("form", ["chunk", "split", "slice", "narrow"])
def test_every_form_of_a_split_takes_the_same_parts(form: str) -> None:
    acts = ((Act("relu"),), (Act("sigmoid"),))
    x, joined = result(Split(acts, (2, 2), form), 1, 4, 5)
    assert torch.equal(joined, torch.cat([x[:, :2].relu(), x[:, 2:].sigmoid()], 1))
    x, gated = result(Split(acts, (3, 3), form, "a * b", axis=-1), 1, 4, 6)
    assert torch.equal(gated, x[..., :3].relu() * x[..., 3:].sigmoid())


def test_a_residual_on_some_channels_is_a_recall_inside_a_split() -> None:
    body = (Save("s1"), Conv(2, 3, (1,)), Split(((Recall("s1"),), ()), (2, 1), "slice"))
    spec = NetworkSpec(((1, 2, 5),), body)
    network, (x,) = spec.build(seed=0), spec.inputs(seed=0)
    y = network.body[1](x)
    torch.testing.assert_close(network(x), torch.cat([y[:, :2] + x, y[:, 2:]], 1))
    assert "partial channel residual" in spec.features()


def test_a_standardised_convolution_does_not_see_the_mean_of_its_weight() -> None:
    spec = NetworkSpec(((1, 3, 5, 5),), (Conv(3, 2, (3, 3), form="standardised"),))
    network, inputs = spec.build(seed=0), spec.inputs(seed=0)
    before = network(*inputs)
    assert 0.1 < before.detach().std() < 30
    network.body[0].layer.weight.data.add_(2.0)
    torch.testing.assert_close(network(*inputs), before)


@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_a_blur_keeps_a_constant_and_its_size(kernel: int) -> None:
    network = NetworkSpec(((1, 2, 6, 7),), (Blur(2, 2, kernel),)).build(seed=0)
    x = torch.ones(1, 2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(network(x), x)


def test_channels_last_is_a_point_convolution() -> None:
    x, y = result(ChannelsLast((Linear(3, 3),)), 1, 3, 4, 5)
    spec = NetworkSpec((tuple(x.shape),), (Conv(3, 3, (1, 1)),))
    torch.testing.assert_close(spec.build(seed=0)(x), y)


def test_the_sizes_of_pools_are_those_of_torch() -> None:
    windows = [(2, 2, 0), (3, 2, 1), (2, 1, 0), (3, 2, 0), (3, 1, 1), (2, 3, 1)]
    for kernel, stride, padding in windows:
        for size in range(3, 12):
            for ceil_mode in (False, True):
                _, y = result(Pool("max", 1, kernel, stride, padding, ceil_mode), 1, 1, size)
                assert y.shape[2] == pooled(size, kernel, stride, padding, ceil_mode=ceil_mode)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(residual_blocks())
def test_blocks_have_a_join_in_eval_mode_and_float64(spec: NetworkSpec) -> None:
    block = spec.build(seed=0)
    assert any(isinstance(node, Join) for node in spec.body)
    assert not any(module.training for module in block.modules())
    assert {parameter.dtype for parameter in block.parameters()} <= {torch.float64}


@pytest.mark.slow
def test_shrinking_gives_small_networks() -> None:
    spec = find(
        residual_networks(),
        lambda spec: "crop shortcut" in spec.features(),
        settings=settings(max_examples=200, derandomize=True, database=None),
        random=Random(0),
    )
    assert repr(spec).count("(") < 40


def test_random_statistics_leave_no_batch_norm_fresh() -> None:
    net = nn.Sequential(nn.BatchNorm2d(64), nn.PReLU(64), nn.BatchNorm1d(64, affine=False)).half()
    random_statistics(net, seed=0)
    for bn in (net[0], net[2]):
        assert bn.running_var.dtype == torch.float16
        assert bn.running_var.min() >= 0.29
        assert bn.running_var.max() <= 3.01
        assert bn.running_mean.std() > 0.3
    assert net[0].weight.abs().min() >= 0.49
    assert (net[0].weight < 0).any()
    assert net[1].weight.std() > 0.3


# The oracle


def test_a_network_is_equivalent_to_itself() -> None:
    net, inputs = residual_net()
    assert assert_equivalent(net, net, inputs) == testing.Equivalence(error=0.0, joins=())
    assert assert_equivalent(net, net, inputs[0]).sensitivity == math.inf


def test_a_removed_residual_is_compared_at_its_join() -> None:
    net, inputs = residual_net()
    result = assert_equivalent(net, rmfx.remove_residuals(net, inputs), inputs)
    (join,) = result.joins
    assert join.error <= 1e-12
    assert result.sensitivity == join.sensitivity > 0.01


def test_sensitivity_is_the_share_of_the_smaller_operand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False).double()
            nn.init.constant_(self.conv.weight, 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(x, self.conv(x), alpha=0.25)  # 1 and 0.5 make 1.5

    inputs = (torch.ones(1, 1, 3, 3, dtype=torch.float64),)
    result = assert_equivalent(Net(), rmfx.remove_residuals(Net(), inputs), inputs)
    assert result.sensitivity == pytest.approx(1 / 3)


def test_a_doubled_output_is_found() -> None:
    net, inputs = residual_net()
    doubled = nn.Sequential(copy.deepcopy(net), Times(2.0))
    with pytest.raises(AssertionError, match=r"output: relative error 1 exceeds 1e-10"):
        assert_equivalent(net, doubled, inputs)


def test_a_dropped_skip_is_found_and_its_join_named() -> None:
    net, inputs = residual_net()
    plain = rmfx.remove_residuals(net, inputs)
    carries = [m for m in plain.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3]
    carries[-1].weight.data[:, 3:] = 0
    with pytest.raises(AssertionError, match=r"join \w+ at body.* \(node .*relative error"):
        assert_equivalent(net, plain, inputs)


def test_a_join_that_is_wrong_where_the_outputs_do_not_look_is_found() -> None:
    body = (Conv(3, 3, (1, 1)), BLOCK, Act("relu"), Conv(3, 2, (1, 1)))
    spec = NetworkSpec(((2, 3, 7, 7),), body)
    net, inputs = spec.build(seed=0), spec.inputs(seed=0)
    net.body[3].weight.data[:, 1] = 0  # the head does not see channel 1 of the join
    broken = copy.deepcopy(net)
    broken.body[1].operands[0][3].bias.data[1] += 1
    torch.testing.assert_close(net(*inputs), broken(*inputs))
    with pytest.raises(AssertionError, match="join"):
        assert_equivalent(net, rmfx.remove_residuals(broken, inputs), inputs)


def test_a_join_whose_node_is_gone_is_found() -> None:
    net, inputs = residual_net()
    plain = rmfx.remove_residuals(net, inputs)
    name = next(row.node for row in rmfx.report(plain).rows)
    next(node for node in plain.graph.nodes if node.name == name).name = "elsewhere"
    with pytest.raises(AssertionError, match="no node of that name"):
        assert_equivalent(net, plain, inputs)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Returns(nn.Module):
    """Returns what the function makes of the input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda x: (x,), "structure"),
        (lambda x: {"x": x}, "structure"),
        (lambda x: x[:, :1], r"shape \(2, 3\).* became one of shape \(2, 1\)"),
        (lambda x: x.float(), "float64 on cpu became one of .*float32"),
        (lambda x: 1.0, "float"),
        (lambda x: x * float("nan"), "relative error inf"),
        (lambda x: x + 1e-8, "exceeds 1e-10"),
    ],
)
def test_every_difference_in_the_output_is_named(after: Any, message: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=message):
        assert_equivalent(Returns(lambda x: x), Returns(after), x)


def test_outputs_that_are_not_floating_point_are_compared_exactly() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    same = Returns(lambda x: {"best": x.argmax(1), "positive": x > 0, "count": 3, "empty": x[:0]})
    assert assert_equivalent(same, same, x).error == 0
    with pytest.raises(AssertionError, match=r"output\['positive'\]"):
        assert_equivalent(same, Returns(lambda x: {**same(x), "positive": x < 0}), x)
    with pytest.raises(AssertionError, match=r"output\['count'\]"):
        assert_equivalent(same, Returns(lambda x: {**same(x), "count": 4}), x)


def test_values_that_are_not_finite_are_outside_the_promise_unless_identical() -> None:
    x = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    before = Returns(lambda x: torch.stack([1 / x, x / 0, (x - x) / 0]))
    assert assert_equivalent(before, before, x).error == 0
    with pytest.raises(AssertionError, match="outside the promise"):
        assert_equivalent(before, Returns(lambda x: torch.stack([1 / x, x, x])), x)


def test_the_inputs_survive_networks_that_change_theirs() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    kept = x.clone()
    assert_equivalent(Returns(lambda x: x.relu_()), Returns(lambda x: x.mul_(x > 0)), x)
    assert torch.equal(x, kept)


def test_the_tolerance_follows_the_coarsest_type_and_the_depth() -> None:
    x = torch.ones(1, 4)
    before = Returns(lambda x: x)
    for dtype, allowed, too_much in [
        (torch.float32, 5e-6, 5e-5),
        (torch.float16, 5e-3, 5e-2),
        (torch.bfloat16, 5e-2, 5e-1),
    ]:
        assert_equivalent(before, Times(1 + allowed), x.to(dtype))
        with pytest.raises(AssertionError, match="exceeds"):
            assert_equivalent(before, Times(1 + too_much), x.to(dtype))
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(64)))  # √64 / 4 = 2
    assert_equivalent(deep, nn.Sequential(copy.deepcopy(deep), Times(1 + 1.5e-5)), x)


def test_a_tolerance_given_is_the_one_used() -> None:
    x = torch.ones(1, 4)
    assert assert_equivalent(Times(1.0), Times(1.5), x, tolerance=0.6).error == 0.5
    with pytest.raises(AssertionError, match="exceeds 1e-07"):
        assert_equivalent(Times(1.0), Times(1.000001), x, tolerance=1e-7)


def test_removing_residuals_keeps_drawn_networks_exact_at_every_join() -> None:
    compared = 0
    for seed, spec in enumerate(drawn(40)):
        before, inputs = spec.build(seed), spec.inputs(seed)
        after = rmfx.remove_residuals(before, inputs)
        compared += len(assert_equivalent(before, after, inputs).joins)
    assert compared > 10


# ---- what no pass can be better than ------------------------------------------------------------


class Cancelling(nn.Module):
    """The join is (x - 1) / 2, of which the output hides the last digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1).double()
        for parameter in self.conv.parameters():
            nn.init.constant_(parameter, -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x) + 1e3


def test_noise_floor_is_what_a_rounding_of_the_input_does_at_outputs_and_joins() -> None:
    net, x = Cancelling().eval(), 1 + 1e-6 * torch.rand(1, 1, 6, 6, dtype=torch.float64)
    converted = rmfx.remove_residuals(net, x)
    assert 1e-11 < testing.noise_floor(net, converted, x) < 1e-9
    assert testing.noise_floor(net, net, x) < 1e-15  # no report, hence the output only
    assert testing.noise_floor(net, converted, (x,)) == testing.noise_floor(net, converted, x)


def test_noise_floor_leaves_integers_and_the_callers_random_numbers_alone() -> None:
    net, state = Returns(lambda x: x + 1), torch.get_rng_state()
    assert testing.noise_floor(net, net, torch.arange(6)) == 0
    assert torch.equal(torch.get_rng_state(), state)
