"""The public names, their signatures, and what every verb promises."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Residual, assert_same, basic_branch, chain, conv_bn, image, ready, snapshot
from torch import fx, nn

import rmfx
from rmfx.testing import assert_equivalent, random_statistics

pytestmark = pytest.mark.oldest

VERBS: list[Callable[..., fx.GraphModule]] = [
    rmfx.remove_residuals,
    rmfx.fold_batch_norm,
    rmfx.merge_branches,
    rmfx.merge_convs,
    rmfx.remove_noops,
    rmfx.eliminate_dead_channels,
]
every_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
ERRORS = [
    rmfx.ModeError,
    rmfx.NotPlainError,
    rmfx.RefusedError,
    rmfx.ShapeError,
    rmfx.TraceError,
    rmfx.WeightError,
]


def network() -> nn.Module:
    model: nn.Module = chain(conv_bn(), nn.ReLU(), Residual(basic_branch()), nn.Dropout(0.2))
    return random_statistics(model, seed=1).double().eval()


def test_all_names_exist_and_are_documented() -> None:
    assert sorted(rmfx.__all__) == rmfx.__all__
    for name in rmfx.__all__:
        assert getattr(rmfx, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'remove_residual'"):
        _ = rmfx.remove_residual


def test_errors_have_one_base() -> None:
    for error in ERRORS:
        assert issubclass(error, rmfx.RmfxError)
        assert error.__doc__


def test_verbs_take_the_model_and_inputs_by_place_and_options_by_name() -> None:
    for verb in VERBS:
        kinds = {n: p.kind for n, p in inspect.signature(verb).parameters.items()}
        assert list(kinds)[:2] == ["model", "example_inputs"]
        options = list(kinds.values())[2:]
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind in options)
    names = list(inspect.signature(rmfx.remove_residuals).parameters)
    assert names[2:] == [
        *("strict", "fold_batch_norm", "activation"),
        *("input_range", "calibration", "differentiable", "policy", "minimise"),
        *("copy_shared", "verify"),
    ]


@every_verb
@pytest.mark.parametrize("held", ["module", "graph", "program"])
def test_verb_gives_a_new_module_and_leaves_its_argument_alone(
    verb: Callable[..., fx.GraphModule], held: str
) -> None:
    model = network()
    given: Any = model
    if held == "graph":
        given = fx.symbolic_trace(model)
    elif held == "program":
        given = torch.export.export(model, (image(),))
    before = None if held == "program" else snapshot(given)
    result = verb(given, image())
    if before is not None:
        assert_same(before, snapshot(given))
    assert isinstance(result, fx.GraphModule)
    assert result is not given
    result.graph.lint()
    with torch.no_grad():
        assert torch.allclose(result(image()), model(image()), rtol=1e-10)
    addresses = {p.data_ptr() for p in model.parameters()}
    assert not addresses & {p.data_ptr() for p in result.parameters()}


@every_verb
def test_verb_keeps_names_of_inputs_and_the_structure_of_outputs(
    verb: Callable[..., fx.GraphModule],
) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(basic_branch())

        def forward(self, picture: torch.Tensor, gain: torch.Tensor) -> dict[str, Any]:
            return {"y": [self.block(picture) * gain], "gain": gain}

    model = ready(Named())
    gain = image(2, 1, 1, 1)
    result = verb(model, (image(), gain))
    assert [n.target for n in result.graph.nodes if n.op == "placeholder"] == ["picture", "gain"]
    assert_equivalent(model, result, (image(), gain))
    by_name = result(gain=gain, picture=image())
    assert torch.equal(by_name["y"][0], result(image(), gain)["y"][0])


def test_verbs_compose_in_any_order() -> None:
    model = network()
    for first in VERBS:
        for second in VERBS:
            assert_equivalent(model, _without_report(second(first(model))), image())


def _without_report(gm: fx.GraphModule) -> fx.GraphModule:
    """The joins of an intermediate result are not those of the model."""
    gm.meta = {}
    return gm


@every_verb
def test_result_can_be_copied_pickled_moved_and_saved(verb: Callable[..., fx.GraphModule]) -> None:
    result = verb(network())
    expected = result(image())
    assert torch.equal(copy.deepcopy(result)(image()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(result))(image()), expected)
    assert torch.allclose(copy.deepcopy(result).float()(image().float()).double(), expected, 1e-3)
    other = verb(network())
    other.load_state_dict(result.state_dict())
    assert torch.equal(other(image()), expected)


def test_report_survives_a_copy() -> None:
    converted = rmfx.remove_residuals(network())
    assert rmfx.report(copy.deepcopy(converted)) == rmfx.report(converted)


def test_result_exports_and_compiles_to_torchs_graph() -> None:
    converted: Any = rmfx.remove_residuals(network())
    program: Any = torch.export.export(converted, (image(),))
    assert torch.allclose(program.module()(image()), converted(image()))
    compiled: Any = torch.compile(converted, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(image()), converted(image()))


@every_verb
def test_frozen_parameters_do_not_matter(verb: Callable[..., fx.GraphModule]) -> None:
    model = network().requires_grad_(False)
    with torch.inference_mode():
        assert torch.allclose(verb(model, image())(image()), model(image()))


def test_example_inputs_may_be_a_list_a_tuple_or_a_tensor() -> None:
    codes = {rmfx.remove_residuals(network(), x).code for x in (image(), (image(),), [image()])}
    assert len(codes) == 1


def test_testing_and_models_are_imported_when_asked_for() -> None:
    assert rmfx.testing.assert_equivalent is assert_equivalent
    assert rmfx.models.__name__ == "rmfx.models"
