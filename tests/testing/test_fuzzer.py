"""The fuzzer finds what attacks found: each mechanism taken away again, each feature broken."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import Apply, conv, image, ready
from torch import Tensor, fx, nn

import rmfx
from rmfx import fuzz
from rmfx.frontend import freshness, functionalise, schemas
from rmfx.ir import open_sizes, selections, size_conditions
from rmfx.removal import odd_pairs
from rmfx.testing import (
    Act,
    Arithmetic,
    Conv,
    Flip,
    Focal,
    Gain,
    Join,
    Linear,
    Mean,
    NetworkSpec,
    Node,
    Norm,
    Pool,
    Recall,
    Repeat,
    Reshaped,
    Roll,
    SharedNorm,
    Take,
    Tokens,
    Write,
    trial,
)
from rmfx.testing.case import Case
from rmfx.testing.compare import COPRIME, ONE, OTHER_BATCH, OTHER_SIZE, NoNumbersError, compare
from rmfx.testing.compiled import CHANGES, MOVED, compare_compiled
from rmfx.testing.fuzz_report import FuzzReport
from rmfx.testing.networks.digits import SLOPES, TYPES
from rmfx.testing.networks.memory import GAINS, VIEWS, WRITES
from rmfx.testing.networks.places import INDICES, ROLLS, STATISTICS
from rmfx.testing.networks.unusual_features import UNUSUAL
from rmfx.testing.trial import try_case

# ---- the nodes ----------------------------------------------------------------------------------


def result(node: Node, *shape: int) -> tuple[Tensor, Tensor]:
    """A random value behind a copy, and what the node makes of it."""
    spec = NetworkSpec((shape,), (node,))
    (x,) = spec.inputs(seed=0)
    with torch.no_grad():
        return x, spec.build(seed=0)(x.clone())


@pytest.mark.parametrize("form", ROLLS)
def test_every_form_of_a_roll_is_the_same(form: str) -> None:
    x, rolled = result(Roll((2, -1), (3, 0), form), 3, 2, 4, 5)
    assert torch.equal(rolled, torch.cat([x[..., -2:], x[..., :-2]], 3)[[1, 2, 0]])


def test_indices_flips_and_repeats_take_positions() -> None:
    for form in ("list", "buffer", "index_select"):
        x, taken = result(Take(2, (2, 0, 0), form), 2, 3, 4, 5)
        assert torch.equal(taken, torch.stack([x[:, :, 2], x[:, :, 0], x[:, :, 0]], 2))
    x, taken = result(Take(3, (1, 2), "slice"), 2, 3, 4, 5)
    assert torch.equal(taken, x[:, :, :, 1::2])
    for form in ("torch.flip", "x.flip"):
        x, turned = result(Flip((2, 0), form), 2, 3, 4, 5)
        assert torch.equal(turned, x[[1, 0]][:, :, [3, 2, 1, 0]])
    for form in ("method", "function"):
        x, twice = result(Repeat(1, 2, form), 1, 2, 3)
        assert torch.equal(twice, x[:, [0, 0, 1, 1]])


@pytest.mark.parametrize("form", STATISTICS)
def test_a_value_is_joined_with_its_mean(form: str) -> None:
    x, y = result(Mean(form, (2,), "x.mean"), 2, 3, 4, 5)
    m = x.mean(2, keepdim=True).expand_as(x)
    for place in ((0, 0, 0, 0), (1, 2, 3, 4)):
        a, b = float(x[place]), float(m[place])
        sigmoid = 1 / (1 + math.exp(-b))
        values = [a - b, b - a, a + b, a * sigmoid, a / (1 + b * b), a * b]
        assert float(y[place]) == pytest.approx(dict(zip(STATISTICS, values, strict=True))[form])


def test_tokens_are_the_positions_and_come_back_as_a_map() -> None:
    for form in ("transpose", "permute"):
        x, tokens = result(Tokens(form), 2, 3, 4, 5)
        assert torch.equal(tokens[:, 7], x[:, :, 1, 2])
        x, turned = result(Reshaped((Flip((1,)),), form), 2, 3, 4, 5)
        assert torch.equal(turned, x.flip(2, 3))
    x, turned = result(Reshaped((Flip((1,)),), "flat"), 2, 3, 4, 5)
    assert torch.equal(turned, x.flip(1, 2, 3))


def test_the_last_term_of_a_focal_modulation_has_one_position() -> None:
    x, y = result(Focal(3, 2, 2), 2, 3, 4, 5)
    assert y.shape == x.shape
    moved = x.clone()
    moved[:, :, -1, -1] += 1
    with torch.no_grad():
        network = NetworkSpec((tuple(x.shape),), (Focal(3, 2, 2),)).build(seed=0)
        assert (network(moved) - y)[:, :, 0, 0].abs().max() > 0  # too far for two windows of 3


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_every_write_is_seen_by_whoever_reads_the_value_later(kind: str, view: str) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    given, before = x.clone(), x.clone()
    written = Write(kind, view, 0.5).apply(given)
    assert written is given
    where = VIEWS[view](given) != VIEWS[view](before)
    assert where.any()
    VIEWS[view](before).copy_(VIEWS[view](given))
    assert torch.equal(before, given)  # nothing changed elsewhere
    if "init" in kind:
        assert (VIEWS[view](given) == 0.5).all()


@pytest.mark.parametrize("form", GAINS)
def test_a_factor_shares_memory_also_in_another_type_and_in_a_copy(form: str) -> None:
    spec = NetworkSpec(((2, 3, 4, 5),), (Gain(3, 2, form),), dtype="bfloat16")
    layer: Any = spec.build(seed=0).body[0]
    assert layer.gain.dtype == torch.bfloat16
    assert layer.gain.untyped_storage()._cdata == layer.whole.untyped_storage()._cdata
    network, (x,) = replace(spec, dtype="float64").build(seed=0), spec.inputs(seed=0)
    first, second = network(x.double()), network(x.double())
    assert torch.equal(first, second)  # what forward writes is the same every time
    if "written" in form:
        assert not torch.allclose(first, x.double() * torch.linspace(0.5, 1.5, 6)[3:, None, None])


def test_statistics_are_views_that_forward_may_fill() -> None:
    shape = (2, 3, 4, 5)
    layers: list[Any] = [
        NetworkSpec((shape,), (SharedNorm(3, 2, writes),)).build(seed=0).body[0]
        for writes in (False, True)
    ]
    memory = [layer.statistics.untyped_storage()._cdata for layer in layers]
    assert memory == [layer.layer.running_var.untyped_storage()._cdata for layer in layers]
    x = torch.randn(shape, dtype=torch.float64)
    assert not torch.allclose(layers[0](x), layers[1](x))
    assert (layers[1].layer.running_mean == 0.75).all()
    assert layers[0].layer.running_mean.std() > 0.01


def test_slopes_of_a_prelu_lie_near_a_number_and_types_are_those_asked_for() -> None:
    spec = NetworkSpec(((1, 4, 3),), (Act("prelu", args=(4, -1.0)),), dtype="float16")
    weight = spec.build(seed=0).body[0].weight
    assert weight.dtype == torch.float16 == spec.inputs(seed=0)[0].dtype
    assert 1e-4 < (weight + 1).abs().max() <= 2e-3
    assert "float16 network" in spec.features()
    assert "slope near -1" in spec.features()
    assert -1.0 in SLOPES


# ---- features broken one at a time ---------------------------------------------------------------

Fault = Callable[[fx.Node, fx.GraphModule], bool]


def calls(*names: str) -> Fault:
    """Calls of functions and methods of these names are left out."""

    def fault(node: fx.Node, gm: fx.GraphModule) -> bool:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return node.op in ("call_function", "call_method") and str(name).split(".")[0] in names

    return fault


def kept_means(node: fx.Node, gm: fx.GraphModule) -> bool:
    return calls("mean", "amax")(node, gm) and bool(node.kwargs.get("keepdim"))


def layers(*kinds: type[nn.Module]) -> Fault:
    """Layers of these kinds are left out."""

    def fault(node: fx.Node, gm: fx.GraphModule) -> bool:
        return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), kinds)

    return fault


def either(*faults: Fault) -> Fault:
    return lambda node, gm: any(fault(node, gm) for fault in faults)


def all_writes(node: fx.Node, gm: fx.GraphModule) -> bool:
    target = str(getattr(node.target, "_name", node.target))
    named = node.op == "call_function" and "add_into" in target
    return named or "out" in node.kwargs or calls(*WRITERS)(node, gm)


def indices(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Indices that are lists or buffers are left out."""
    index = node.args[1] if node.target is operator.getitem else ()
    return isinstance(index, tuple) and any(isinstance(i, (list, fx.Node)) for i in index)


def slices_begin_elsewhere(node: fx.Node, gm: fx.GraphModule) -> bool:
    if node.target is operator.getitem and isinstance(node.args[1], tuple):
        parts = [
            slice(1 - part.start, None, 2) if part in HALVES else part for part in node.args[1]
        ]
        node.args = (node.args[0], tuple(parts))
    return False


def repeats_as_tiles(node: fx.Node, gm: fx.GraphModule) -> bool:
    """x0 x0 x1 x1 becomes x0 x1 x0 x1."""
    if calls("repeat_interleave")(node, gm):
        axis = node.kwargs.get("dim", node.args[-1])
        node.op, node.target, node.kwargs = "call_function", torch.cat, {}
        node.args = ([node.args[0], node.args[0]], axis)
    return False


def gains(node: fx.Node, gm: fx.GraphModule) -> bool:
    read = (n for n in node.all_input_nodes if n.op == "get_attr")
    return any(str(n.target).endswith(".gain") for n in read)


def without(model: fx.GraphModule, fault: Fault) -> fx.GraphModule:
    """A copy in which every call that the fault holds for gives what it was given."""
    gm = copy.deepcopy(model)
    for node in list(gm.graph.nodes):
        if fault(node, gm):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


WRITERS = ("_foreach_mul_", "_foreach_add_", "mul_", "copy_", "constant_", "__setitem__")
HALVES = (slice(0, None, 2), slice(1, None, 2))
AXES = ("space", "channels", "batch")
EXTREMES = ("tiny", "huge")
SLOPED = layers(nn.LeakyReLU, nn.PReLU)
BROKEN: dict[str, Fault] = {
    **{f"roll along {kind}": calls("roll") for kind in AXES},
    "roll backwards": calls("roll"),
    "roll along several dimensions": calls("roll"),
    **{f"roll as {form}": calls("roll") for form in ROLLS},
    **{f"flip along {kind}": calls("flip") for kind in AXES},
    **{f"index as {form}": either(indices, calls("index_select")) for form in INDICES[:-1]},
    **{f"index along {kind}": either(indices, calls("index_select")) for kind in AXES},
    "index as slice": slices_begin_elsewhere,
    "index of all there is at one size": either(indices, calls("index_select")),
    **{f"repeat_interleave along {kind}": repeats_as_tiles for kind in AXES[:2]},
    "map seen as tokens": calls("roll", "flip", "mean"),
    **{f"factor in a buffer: {form}": gains for form in GAINS},
    "statistics that are views": layers(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "statistics written by forward": layers(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    **{f"slope near {n}": either(calls("leaky_relu", "prelu"), SLOPED) for n in (-1, 0, 1)},
    **{f"{size} bounds": either(calls("hardtanh"), layers(nn.Hardtanh)) for size in EXTREMES},
    "values of very different scale": calls("mul", "truediv"),
    **{f"joined with its mean: {form}": kept_means for form in STATISTICS},
    "spatial mean inside a branch": kept_means,
    "mean over space": kept_means,
    "mean over one dimension": kept_means,
    "focal modulation": kept_means,
    "residual on tokens of a map": calls("flip", "roll"),
    "residual on one row": calls("flip", "roll"),
    **{f"write by {kind}": all_writes for kind in WRITES},
    **{f"write through {view}": all_writes for view in VIEWS if view},
    "write between two reads": all_writes,
}


@pytest.mark.parametrize("feature", BROKEN)
def test_a_feature_that_is_left_out_is_found(feature: str) -> None:
    """Within 400 draws, of which only those are tried that have the feature."""
    for example in range(400):
        case = fuzz.draw_case(example, seed=0, frontend="traced")
        if feature not in case.spec.features():
            continue
        model, inputs = fx.symbolic_trace(case.spec.build()), case.spec.inputs()
        try:
            compare(model, without(model, BROKEN[feature]), inputs)
        except (AssertionError, rmfx.VerificationError):
            return
    pytest.fail(f"400 networks did not tell that {feature} was left out")


@pytest.mark.parametrize("dtype", dict.fromkeys(TYPES))
def test_weights_of_too_few_digits_are_found_in_every_type(dtype: str) -> None:
    digits = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}[dtype]
    for example in range(400):
        spec = fuzz.draw_case(example, seed=0).spec
        if spec.dtype == dtype:
            model, inputs = spec.build(), spec.inputs()
            off = copy.deepcopy(model)
            for weight in off.parameters():
                weight.data.mul_(1 + digits)
            with pytest.raises((AssertionError, rmfx.VerificationError)):
                compare(model, off, inputs)
            return
    pytest.fail(f"400 networks were not of type {dtype}")


def test_every_new_feature_is_broken_once() -> None:
    assert UNUSUAL.names == set(BROKEN)


# ---- mechanisms taken away again ----------------------------------------------------------------


def first_arguments_only(node: fx.Node, *_: Any) -> Iterator[fx.Node]:
    return (n for n in node.args[:1] if isinstance(n, fx.Node))


def by_name(tensors: Any) -> dict[int, int]:
    return {id(tensor): id(tensor) for tensor in tensors}


def fails(case: Case, apply: Callable[..., Any]) -> bool:
    """Whether the fuzzer finds anything wrong with a network."""
    report = fuzz.FuzzReport(case.transform, case.frontend, seed=0)
    trial.try_case(report, case, apply, 0)
    return report.failure is not None


@pytest.fixture(autouse=True)
def _without_making_networks_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "shrink", lambda spec, fails: spec)


# Where a mechanism is looked up, and what stood there when attacks succeeded; how the networks are
# held, what those have that could show it, the seed, and within how many draws one must.
PLANTED: dict[str, tuple[Any, str, Any, str, Callable[[str], bool], int, int]] = {
    "a roll along space is taken for the identity": (
        *(selections, "_moves", lambda node, rank: set(), "traced"),
        *(lambda feature: feature == "roll along space", 3, 100),
    ),
    "writes through second arguments are not seen": (
        *(schemas, "_written", first_arguments_only, "traced"),
        *(lambda feature: feature.startswith("write by"), 0, 100),
    ),
    "memory is compared by name": (
        *(functionalise, "memories", by_name, "traced"),
        *(lambda feature: "written" in feature, 1, 100),
    ),
    "a way past an activation may cost all digits": (
        *(odd_pairs, "affords", lambda dtype, bits: True, "traced"),
        *(lambda feature: feature == "slope near -1", 2, 200),
    ),
    "sizes at which a join broadcasts are not refused": (
        *(size_conditions, "agreements", lambda sizes, node: (), "traced"),
        *(lambda feature: True, 0, 200),
    ),
    "sizes of one example are taken for those of every call": (
        *(open_sizes.OpenSizes, "__call__", lambda self, name, dim: False, "traced"),
        *(lambda feature: "tokens" in feature or "row" in feature, 0, 200),
    ),
    "weights are compared by their versions alone": (
        *(freshness._Sampler, "read", lambda self, tensors: (), "compiled"),
        *(lambda feature: feature.startswith("fused"), 0, 50),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mechanism", PLANTED)
def test_a_mechanism_taken_away_is_noticed(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, planted, frontend, shows, seed, most = PLANTED[mechanism]
    for example in range(most):
        case = fuzz.draw_case(example, seed, frontend=frontend, activation="random")
        if not any(map(shows, case.features())):
            continue
        with monkeypatch.context() as patch:
            patch.setattr(place, name, planted)
            found = fails(case, rmfx.remove_residuals)
        if found and not fails(case, rmfx.remove_residuals):
            return
    pytest.fail(f"{most} networks did not notice that {mechanism}")


# ---- sizes and changes --------------------------------------------------------------------------


class WrongAt(nn.Module):
    """Twice the right answer at some sizes."""

    def __init__(self, model: nn.Module, wrong: Callable[[Any], bool]) -> None:
        super().__init__()
        self.model, self.wrong = model, wrong

    def forward(self, x: Tensor) -> Any:
        y = self.model(x)
        return 2 * y if self.wrong(x.shape) else y


WRONG_AT: dict[str, Callable[[Any], bool]] = {
    OTHER_BATCH: lambda shape: shape[0] not in (1, 2),
    OTHER_SIZE: lambda shape: tuple(shape[2:]) != (6, 6),
    COPRIME: lambda shape: shape[2] > 1 and math.gcd(shape[2], 6) == 1,
    ONE: lambda shape: tuple(shape[2:]) == (1, 1),
}


@pytest.mark.parametrize("sizes", WRONG_AT)
def test_what_is_wrong_at_other_sizes_only_is_found(sizes: str) -> None:
    layers = (Conv(3, 4, (3, 3), padding=1), Norm(4), Act("relu"))
    spec = NetworkSpec(((2, 3, 6, 6),), layers)
    model, inputs = spec.build(), spec.inputs()
    assert sizes in compare(model, model, inputs)[1]
    with pytest.raises(rmfx.VerificationError):
        compare(model, WrongAt(model, WRONG_AT[sizes]), inputs)


def test_what_is_nothing_but_rounding_is_no_difference() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x + m.a(torch.relu(m.a(x)))
        return (y - y.mean((2, 3), keepdim=True)).mean((2, 3))

    model, inputs = ready(Apply(forward, a=conv(1, 1, 1))), (image(1, 1, 1, 7),)
    other = Apply(lambda m, x: m.net(x + 3 - 3), net=model)
    assert compare(model, other, inputs)[0].error > 1e-3
    compare(model, rmfx.remove_residuals(model, inputs), inputs)
    with pytest.raises(AssertionError, match="the networks differ"):
        compare(model, nn.Sequential(model, nn.Softplus()), inputs)


def test_a_size_at_which_the_original_fails_says_nothing() -> None:
    flat = NetworkSpec(((2, 2, 4, 4),), (Conv(2, 1, (1, 1)), Norm(1)))
    model, inputs = flat.build(), flat.inputs()
    only = WrongAt(model, lambda shape: False)
    only.wrong = lambda shape: {4: False}[shape[2]]  # type: ignore[assignment,return-value]
    assert compare(only, model, inputs)[1] <= {OTHER_BATCH}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_moves_the_answer_and_is_seen(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = (Conv(3, 3, (3, 3), padding=1), Norm(3), Act("relu"), Conv(3, 3, (1, 1)))
    spec = NetworkSpec(((2, 3, 5, 5),), (Join((branch, ())),))
    model, inputs = spec.build(), spec.inputs()
    before = model(*inputs)
    rows, found = compare_compiled(model, inputs, (change,), {})
    assert rows[0].status == "removed"
    assert len(rows) == 2  # it was converted again
    assert found.error < 1e-10
    assert not torch.allclose(model(*inputs), before)
    monkeypatch.setattr(freshness.Snapshot, "holds", lambda self, tensors: True)
    with pytest.raises(AssertionError, match="networks differ"):
        compare_compiled(spec.build(), inputs, (change,), {})


def test_statistics_are_moved_only_where_there_are_some() -> None:
    for example in range(40):
        case = fuzz.draw_case(example, seed=0, frontend="compiled")
        assert 1 <= len(case.changes) <= 3
        if MOVED in case.changes:
            network = case.spec.build()
            before = {k: v.clone() for k, v in network.named_buffers()}
            CHANGES[MOVED](network)
            after = dict(network.named_buffers())
            assert any(not torch.equal(before[k], after[k]) for k in before)


def test_a_network_that_nothing_can_trace_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise rmfx.TraceError("the network cannot be traced: 3 reasons")

    case = fuzz.draw_case(0, seed=0)
    report = fuzz.FuzzReport("remove_residuals", "module", seed=0)
    monkeypatch.setattr(trial, "is_traceable", lambda case, arguments: False)
    trial.try_case(report, case, refuses, 0)
    assert (report.skipped, report.failure) == (1, None)
    assert list(report.untraced) == ["the network cannot be traced: N reasons"]
    monkeypatch.undo()
    assert fails(case, refuses)  # torch can trace this one


def test_a_compiled_network_is_for_the_backend_alone() -> None:
    with pytest.raises(rmfx.RmfxError, match="which the backend runs"):
        fuzz.fuzz("merge_convs", frontend="compiled")


def test_equal_seeds_draw_equal_changes_and_everything_is_counted() -> None:
    first, second = (fuzz.draw_case(7, seed=3, frontend="compiled") for _ in range(2))
    assert first == second
    assert first.features() <= fuzz.COUNTED


def test_what_is_nothing_but_rounding_is_no_wrong_number() -> None:
    """A value minus its own mean, behind bounds that are next to each other, in bfloat16."""
    nodes = (
        Act("hardtanh", args=(0.001, 0.002)),
        Conv(2, 2, (3, 3), padding="same", bias=False),
        Norm(2),
        Mean("m - x", (3,)),
    )
    spec = NetworkSpec(((1, 2, 1, 2),), nodes, dtype="bfloat16")
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)
    given = torch.export.export(model, inputs)
    before = given.module()
    after = rmfx.remove_residuals(given, inputs, verify=False)
    with pytest.raises(AssertionError):
        rmfx.testing.assert_equivalent(before, after, inputs)
    assert compare(before, after, inputs)[0].error > 0.08
    with pytest.raises(AssertionError):
        compare(before, nn.Sequential(before, nn.Softplus()), inputs)


def _held_at_other_sizes(spec: NetworkSpec, *, traced: bool) -> None:
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)
    before = fx.symbolic_trace(model) if traced else model
    after = rmfx.remove_residuals(before, inputs, verify=False)
    assert rmfx.report(after).removed > 0
    compare(before, after, inputs)


def test_another_input_may_spread_out_what_a_branch_adds() -> None:
    """Beside a value whose sizes nobody knows, so that nothing can be demanded of them."""
    other = ((Recall("input1", form="b - a"),), (Reshaped(()),), ())
    branches = ((Join(other, ("a + b", "a + b")),), (Conv(1, 1, (3, 3), padding=1),))
    nodes = (Conv(1, 1, (3, 3)), Join(branches))
    _held_at_other_sizes(NetworkSpec(((1, 1, 9, 5), (1, 1, 7, 3)), nodes), traced=False)


def test_what_is_demanded_comes_before_what_reads_the_first_of_two_inputs() -> None:
    branches = ((Linear(1, 1), Join(((), ()))), (), ())
    spec = NetworkSpec(((1, 1, 1), (1, 1, 1)), (Join(branches, ("a + b", "a + b")),))
    _held_at_other_sizes(spec, traced=True)


def test_what_rounding_makes_of_constants_is_no_wrong_number() -> None:
    """A branch that begins with a constant, behind bounds that are next to each other."""
    same = {"padding": "same", "form": "functional keyword"}
    branch = (
        *(Write("x.__setitem__", value=-0.5), Norm(1, form="functional")),
        *(Conv(1, 2, (3, 3), **same), Conv(2, 2, (3, 3), dilation=2, bias=False, **same)),
        *(Norm(2, form="functional"), Norm(2, form="functional")),
        Conv(2, 3, (3, 3), padding=2, dilation=2, bias=False, form="functional keyword"),
        Act("hardtanh", "module in-place", (-0.001, 0.001)),
        Join(((), (Roll((6,), (0,), "torch.roll keyword"),)), scale=-0.5),
        Conv(3, 2, (3, 3), padding="valid", form="functional"),
    )
    other = (Conv(1, 2, (3, 3), bias=False, form="functional"), Norm(2, form="functional"))
    nodes = (
        *(Conv(3, 3, (1, 2), bias=False), Norm(3), Conv(3, 1, (2, 2), padding="same")),
        *(Conv(1, 1, (3, 3), padding=2, bias=False), Norm(1, eps=0.001, form="functional")),
        Join((other, branch), ("a + c * b",), -1.0),
    )
    first = Conv(1, 1, (4, 4), padding="same", bias=False, form="functional")
    spec = NetworkSpec(((1, 3, 1, 2),), (*nodes[:4], first, *nodes[4:]), dtype="bfloat16")
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)
    after = rmfx.remove_residuals(model, inputs, activation="scale", verify=False)
    compare(model, after, inputs)
    with pytest.raises(AssertionError):
        compare(model, nn.Sequential(model, nn.Softplus()), inputs)


def test_a_network_that_does_not_run_itself_tells_nothing() -> None:
    """Torch has no average pool over three dimensions for bfloat16."""
    spec = NetworkSpec(((1, 2, 6, 6, 6),), (Pool("avg", 3),), dtype="bfloat16")
    report = FuzzReport("remove_residuals", "traced", 0)

    def refuses(*_: Any, **__: Any) -> Any:
        raise rmfx.ShapeError("the model does not run on the example")

    try_case(report, Case(spec, "remove_residuals"), refuses, 0)
    assert (report.skipped, report.failure) == (1, None)
    assert "not implemented" in next(iter(report.untraced))
    runs = NetworkSpec(((1, 2, 6, 6, 6),), (Pool("avg", 3),))
    try_case(report, Case(runs, "remove_residuals"), refuses, 0)
    assert report.failure is not None


def test_a_network_that_gives_no_numbers_tells_nothing() -> None:
    """All of it overflows float16; a pass is not to blame, and is not said to be right."""
    larger = (Arithmetic("x / c", 1 / 32768), Act("softplus"))
    nodes = (*larger, *larger, *larger, Mean("x - m", (2, 3)))
    spec = NetworkSpec(((1, 2, 4, 4),), nodes, dtype="float16")
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)

    def other(model: nn.Module, *_: Any) -> nn.Module:
        return Apply(lambda m, x: m.net(x).nan_to_num(), net=model)

    with pytest.raises(NoNumbersError, match="not finite"):
        compare(model, other(model), inputs)
    report = FuzzReport("other", "module", 0)
    try_case(report, Case(spec, "other"), other, 0)
    assert (report.skipped, report.failure) == (1, None)


def test_what_is_too_large_for_its_type_is_no_wrong_number() -> None:
    """A value that overflows float16, of which the rest is compared."""
    times = (Arithmetic("x / c", 1 / 512), Act("relu"), Conv(2, 2, (1, 1)))
    branch = (Conv(2, 4, (1, 1)), Norm(4), Act("relu"), Conv(4, 2, (1, 1)))
    nodes = (Conv(3, 2, (1, 1)), *times, *times, Join((branch, ())), Act("hardtanh", args=(-1, 1)))
    spec = NetworkSpec(((2, 3, 4, 4),), nodes, dtype="float16")
    before, inputs = fx.symbolic_trace(spec.build(seed=0)), spec.inputs(seed=0)
    after = rmfx.remove_residuals(before, inputs, verify=False)
    with pytest.raises(AssertionError, match="not finite"):
        rmfx.testing.assert_equivalent(before, after, inputs)
    assert compare(before, after, inputs)[0].error < 1e-2
    with pytest.raises(AssertionError):
        compare(before, nn.Sequential(before, nn.Softplus()), inputs)
