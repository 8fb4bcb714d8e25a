"""Bad input: a clear error or a refusal with its reason, and the model untouched in each case."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    Residual,
    adds,
    assert_refused,
    assert_removed,
    assert_same,
    basic_branch,
    chain,
    conv,
    conv_bn,
    conv_branch,
    image,
    ready,
    snapshot,
    types,
)
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

pytestmark = pytest.mark.oldest

VERBS: list[Callable[..., Any]] = [
    rmfx.trace,
    rmfx.remove_residuals,
    rmfx.fold_batch_norm,
    rmfx.merge_convs,
    rmfx.remove_noops,
]
every_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert_same(before, snapshot(model))


def block() -> Any:
    return ready(Residual(basic_branch()))


# ---- training mode ------------------------------------------------------------------------------


@every_verb
def test_batch_norm_in_training_mode_is_named_with_the_way_out(verb: Callable[..., Any]) -> None:
    model = block().train()
    with (
        untouched(model),
        pytest.raises(rmfx.ModeError, match=r"branch\.0\.1 \(BatchNorm2d\).*model\.eval\(\)"),
    ):
        verb(model)


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.RReLU(), nn.InstanceNorm2d(4)])
def test_other_layers_in_training_mode_are_errors_too(layer: nn.Module) -> None:
    model = chain(conv(), layer).train()
    with untouched(model), pytest.raises(rmfx.ModeError, match=type(layer).__name__):
        rmfx.remove_residuals(model)


def test_one_batch_norm_left_in_training_mode_is_found() -> None:
    model = block()
    model.branch[2][1].train()
    with pytest.raises(rmfx.ModeError, match=r"branch\.2\.1"):
        rmfx.remove_residuals(model)


def test_graph_module_in_training_mode_is_an_error() -> None:
    model = torch.fx.symbolic_trace(block()).train()
    with untouched(model), pytest.raises(rmfx.ModeError, match=r"BatchNorm2d"):
        rmfx.remove_residuals(model)


def test_program_exported_in_training_mode_is_an_error() -> None:
    program = torch.export.export(block().train(), (image(),))
    with pytest.raises(rmfx.ModeError, match=r"eval"):
        rmfx.remove_residuals(program)


def test_functional_batch_norm_in_training_mode_is_an_error() -> None:
    norm = nn.BatchNorm2d(4).eval()
    model = Apply(
        lambda m, x: F.batch_norm(x, m.bn.running_mean, m.bn.running_var, training=m.training),
        bn=norm,
    )
    norm.eval()
    with untouched(model), pytest.raises(rmfx.ModeError, match=r"eval"):
        rmfx.remove_residuals(model)


def test_training_flag_without_layers_that_mind_is_fine() -> None:
    model = Residual(conv_branch()).double().train()
    with untouched(model):
        converted = rmfx.remove_residuals(model)
    assert rmfx.report(converted).removed == 1
    assert not converted.training


# ---- batch norm without statistics --------------------------------------------------------------


def test_batch_norm_without_running_statistics_is_refused() -> None:
    branch = chain(conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), conv())
    model = ready(Residual(branch))
    with untouched(model):
        assert_refused(model, image(), reason="running statistics")
        folded = rmfx.fold_batch_norm(model)
    assert "BatchNorm2d" in types(folded)
    assert_equivalent(model, folded, image())


# ---- what cannot be traced ----------------------------------------------------------------------


class OnShape(nn.Module):
    """Control flow that depends on a value that symbolic tracing does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(conv_branch())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four channels, please")
        y: Tensor = self.block(x)
        return y


class OnValue(OnShape):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x) if float(x.sum()) > 0 else x
        return y


@every_verb
def test_untraceable_module_asks_for_example_inputs_and_export_takes_over(
    verb: Callable[..., Any],
) -> None:
    model = ready(OnShape())
    with untouched(model):
        with pytest.raises(rmfx.TraceError, match=r"OnShape .*pass example_inputs"):
            verb(model)
        result = verb(model, image())
    assert torch.allclose(result(image()), model(image()))


def test_module_that_cannot_even_be_exported_names_both_causes() -> None:
    model = ready(OnValue())
    with untouched(model), pytest.raises(rmfx.TraceError, match=r"OnValue .*pass a GraphModule"):
        rmfx.remove_residuals(model, image())


def test_forward_that_is_missing_is_an_error_of_rmfx() -> None:
    with pytest.raises(rmfx.TraceError, match=r"Module"):
        rmfx.remove_residuals(nn.Module())


def test_forward_that_raises_is_an_error_of_rmfx() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("lost")

    for inputs in (None, image()):
        with pytest.raises(rmfx.TraceError, match="lost"):
            rmfx.remove_residuals(Apply(forward), inputs)


@every_verb
@pytest.mark.parametrize("model", [torch.relu, "resnet18", None, {"conv": 1}, [conv()]])
def test_what_is_no_module_is_an_error_of_rmfx(verb: Callable[..., Any], model: Any) -> None:
    with pytest.raises(rmfx.TraceError, match=r"pass an nn.Module"):
        verb(model)


def _recorded(model: nn.Module) -> Any:
    return torch.jit.trace(model, image(), check_trace=False)  # type: ignore[no-untyped-call]


def _frozen(model: nn.Module) -> Any:
    return torch.jit.freeze(torch.jit.script(model))


def _held(model: nn.Module) -> Any:
    return ready(Residual(torch.jit.script(model)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [_recorded, torch.jit.script, _frozen, _held])
def test_scripted_module_is_an_error_of_rmfx(make: Callable[[nn.Module], Any]) -> None:
    model = ready(conv_branch())
    scripted = make(model)
    for inputs in (None, image()):
        with pytest.raises(rmfx.TraceError, match=r"is TorchScript, .*; pass the nn.Module"):
            rmfx.remove_residuals(scripted, inputs)


@every_verb
def test_a_dict_of_inputs_is_answered_with_a_tuple(verb: Callable[..., Any]) -> None:
    model = ready(conv_branch())
    inputs = {"x": image(), "rest": [image()]}
    with pytest.raises(rmfx.ShapeError, match="pass a tuple in the order of the arg") as caught:
        verb(model, inputs)
    shape = str(tuple(image().shape))
    assert f"[{{'x': {shape}, 'rest': [{shape}]}}]" in str(caught.value)


def test_class_instead_of_an_instance_is_an_error_of_rmfx() -> None:
    with pytest.raises(rmfx.TraceError):
        rmfx.remove_residuals(nn.ReLU)


# ---- layers shared, tied, hooked, parametrized --------------------------------------------------


@pytest.mark.parametrize("example", [True, False])
def test_conv_shared_by_two_call_sites_is_refused_where_no_copy_is_allowed(example: bool) -> None:
    shared = conv()
    model = ready(chain(Residual(chain(shared, nn.ReLU(), shared)), nn.ReLU()))
    reason = "is called 2 times"
    with untouched(model):
        assert_refused(model, image(), reason=reason, example=example, copy_shared=False)


def test_conv_shared_with_its_own_batch_norms_is_not_folded() -> None:
    """Torch's own `fuse` folds the shared conv twice: an error as large as the output."""
    shared = conv()
    model = ready(chain(shared, nn.BatchNorm2d(4), nn.ReLU(), shared, nn.BatchNorm2d(4)))
    with untouched(model):
        folded = rmfx.fold_batch_norm(model)
    assert types(folded) == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"]
    assert_equivalent(model, folded, image())


def test_batch_norm_shared_by_two_call_sites_is_not_folded() -> None:
    shared = nn.BatchNorm2d(4)
    model = ready(chain(conv(), shared, nn.ReLU(), conv(), shared))
    folded = rmfx.fold_batch_norm(model)
    assert types(folded).count("BatchNorm2d") == 2
    assert_equivalent(model, folded, image())


def test_tied_weights_are_refused_where_no_copy_is_allowed() -> None:
    model = ready(Residual(conv_branch()))
    model.branch[2].weight = model.branch[0].weight
    with untouched(model):
        assert_refused(model, image(), reason="also used elsewhere", copy_shared=False)


def test_weight_that_is_also_read_by_itself_is_a_constant_there() -> None:
    model = ready(Apply(lambda m, x: x + m.c(x) * m.c.weight.sum(), c=conv()))
    with untouched(model):
        assert_removed(model, image(), without_inputs=False)


@pytest.mark.parametrize("where", ["branch.0", "branch.1", "branch.2"])
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooked_layers_are_refused_and_keep_their_hooks(where: str, kind: str) -> None:
    model = ready(Residual(conv_branch()))
    module = model.get_submodule(where)
    if kind == "forward":
        module.register_forward_hook(lambda module, args, output: output * 2)
    else:
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with untouched(model):
        assert_refused(model, image(), reason=f"module {where} has hooks")


def test_hooks_on_containers_are_traced() -> None:
    model = ready(chain(Residual(conv_branch()), nn.ReLU()))
    model[0].branch.register_forward_hook(lambda module, args, output: output * 2)
    with untouched(model):
        converted = rmfx.remove_residuals(model)
    assert rmfx.report(converted).removed == 1
    assert_equivalent(model, converted, image())


@pytest.mark.parametrize("traced", [False, True])
def test_hooks_on_the_root_are_kept_or_refused(traced: bool) -> None:
    model: nn.Module = ready(Residual(conv_branch()))
    model = torch.fx.symbolic_trace(model) if traced else model
    model.register_forward_hook(lambda module, args, output: output * 2)
    with untouched(model):
        try:
            converted = rmfx.remove_residuals(model, image())
        except rmfx.RmfxError as error:
            assert "hook" in str(error)  # noqa: PT017
            return
    assert torch.allclose(converted(image()), model(image()))


def test_conv_whose_forward_was_replaced_is_not_read_as_a_conv() -> None:
    model = ready(Residual(conv_branch()))
    original = model.branch[0].forward
    model.branch[0].forward = lambda x: 2 * original(x)
    assert_equivalent(model, rmfx.remove_residuals(model, image()), image())


# ---- sites that are none ------------------------------------------------------------------------


def assert_broadcasts(model: nn.Module, shape: str, unknown: str) -> None:
    """The add stays: told apart where sizes are known, else refused for another reason."""
    converted = rmfx.remove_residuals(model, image(), strict=True)
    report = rmfx.report(converted)
    assert (report.removed, report.refused, report.other) == (0, 0, 1), str(report)
    assert f"the add broadcasts, of 2x4x9x7 and {shape}" in report.rows[0].reason
    assert adds(converted) == 1
    assert_equivalent(model, converted, image())
    assert_refused(model, image(), reason=unknown, example=False)


def test_add_that_broadcasts_over_channels_is_told_apart() -> None:
    assert_broadcasts(ready(Residual(conv(4, 1))), "2x1x9x7", unknown="4 and 1 channels")


def test_add_that_broadcasts_over_space_is_told_apart() -> None:
    pooled = chain(nn.AvgPool2d((9, 7)), conv(kernel=1))
    assert_broadcasts(ready(Residual(pooled)), "2x4x1x1", unknown="pass example_inputs")
    assert_broadcasts(ready(Residual(conv(kernel=(9, 7)))), "2x4x1x1", unknown="size")


def test_add_that_broadcasts_over_the_batch_is_told_apart() -> None:
    model = ready(Apply(lambda m, x: x + m.c(x[:1, :]), c=conv()))
    assert_broadcasts(model, "1x4x9x7", unknown="pass example_inputs")


def test_integers_are_refused() -> None:
    model = Residual(nn.ReLU()).eval()
    x = torch.arange(-12, 12).reshape(1, 4, 3, 2)
    assert_refused(model, x, reason="torch.int64 values")


def test_complex_values_are_refused() -> None:
    model = Apply(lambda m, x: x + 2 * x).eval()
    assert_refused(model, torch.randn(1, 4, 3, 2, dtype=torch.complex64), reason="complex64 values")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_weights_of_another_type_than_the_values_are_refused(dtype: torch.dtype) -> None:
    gain = nn.Parameter(torch.rand(4, 1, 1, dtype=torch.float64))
    model = Apply(lambda m, x: x + x * m.gain, gain=gain).eval()
    x = (10 * image()).to(dtype)
    converted = rmfx.remove_residuals(model, x)
    assert_equivalent(model, converted, x, tolerance=1e-6)
    assert rmfx.report(converted).refused == 1


def test_layers_of_mixed_types_are_refused() -> None:
    cast = Apply(lambda m, x: x.double())
    model = Residual(chain(conv(), cast, conv().double())).eval()
    report = rmfx.report(rmfx.remove_residuals(model, image(dtype=torch.float32)))
    assert report.refused == 1


# ---- weights ------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["branch.0.0.weight", "branch.0.1.bias", "branch.2.1.running_var"])
def test_weight_that_is_not_finite_is_named(
    verb: Callable[..., Any], value: float, name: str
) -> None:
    model = block()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[1] = value
    with untouched(model), pytest.raises(rmfx.WeightError, match=f"{name}: .*NaN or Inf"):
        verb(model)


@pytest.mark.parametrize("inputs", [None, image()])
def test_weights_on_the_meta_device_are_named_with_the_way_out(inputs: Any) -> None:
    with torch.device("meta"):
        model = Residual(basic_branch()).eval()
    with untouched(model), pytest.raises(rmfx.WeightError, match=r"branch\.0\.0\.weight: .*meta"):
        rmfx.remove_residuals(model, inputs)


def test_lazy_module_without_weights_is_an_error_of_rmfx() -> None:
    for inputs in (None, image()):
        with pytest.raises(rmfx.RmfxError):
            rmfx.remove_residuals(Residual(nn.LazyConv2d(4, 3, padding=1)).eval(), inputs)


def test_complex_weights_are_an_error() -> None:
    model = nn.Conv2d(2, 2, 1, dtype=torch.complex64).eval()
    with untouched(model), pytest.raises(rmfx.WeightError, match=r"complex"):
        rmfx.remove_residuals(model)


def test_integer_weights_are_an_error_with_the_way_out() -> None:
    model = Residual(conv()).eval()
    model.branch.weight = nn.Parameter(torch.ones(4, 4, 3, 3, dtype=torch.int32), False)
    with untouched(model), pytest.raises(rmfx.WeightError, match=r"model\.float\(\)"):
        rmfx.remove_residuals(model)


def test_negative_variance_is_an_error_or_left_alone() -> None:
    model = block()
    model.branch[0][1].running_var.fill_(-1.0)
    with untouched(model):
        try:
            converted = rmfx.remove_residuals(model)
        except rmfx.WeightError:
            return
    assert rmfx.report(converted).refused == 1


def test_weights_that_overflow_their_type_once_merged_are_an_error() -> None:
    model = ready(Residual(conv_bn()), torch.float16)
    with torch.no_grad():
        model.branch[1].weight.fill_(60000.0)
        model.branch[1].running_var.zero_()
    with untouched(model), pytest.raises(rmfx.WeightError):
        rmfx.remove_residuals(model)


# ---- empty graphs, no residuals -----------------------------------------------------------------

EMPTY: dict[str, Callable[[], nn.Module]] = {
    "a module that returns its input": nn.Identity,
    "a sequential without layers": nn.Sequential,
    "a function without operations": lambda: Apply(lambda m, x: x),
    "a tuple of its input": lambda: Apply(lambda m, x: (x, {"x": x})),
    "a constant": lambda: Apply(lambda m, x: m.p, p=nn.Parameter(torch.ones(2).double())),
    "nothing": lambda: Apply(lambda m, x: None),
}


@every_verb
@pytest.mark.parametrize("name", EMPTY)
def test_empty_graph_stays_what_it_is(verb: Callable[..., Any], name: str) -> None:
    model = EMPTY[name]().eval()
    for inputs in (None, image()):
        with untouched(model):
            result = verb(model, inputs)
        assert_equivalent(model, result, image())


def test_network_without_residuals_is_left_as_it_is_and_the_report_says_so() -> None:
    model = ready(chain(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 3)))
    with untouched(model):
        converted = rmfx.remove_residuals(model, image(), strict=True)
    assert types(converted) == types(rmfx.trace(model))
    assert_equivalent(model, converted, image())
    assert str(rmfx.report(converted)).startswith("no residual connections")


def test_module_without_inputs_is_left_alone() -> None:
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(2)

    assert torch.equal(rmfx.remove_residuals(Constant())(), torch.ones(2))


# ---- example inputs -----------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize(
    "inputs",
    [
        image(1, 5, 8, 8),
        (image(), image()),
        (),
        {"x": image()},
        "a photo",
        image(4),
    ],
    ids=["channels", "too many", "none", "dict", "text", "vector"],
)
def test_inputs_that_do_not_fit_are_shown(verb: Callable[..., Any], inputs: Any) -> None:
    model = block()
    with (
        untouched(model),
        pytest.raises(rmfx.ShapeError, match=r"does not run on the example inputs"),
    ):
        verb(model, inputs)


def test_inputs_that_do_not_fit_an_exported_program_are_an_error_of_rmfx() -> None:
    program = torch.export.export(block(), (image(),))
    with pytest.raises(rmfx.RmfxError):
        rmfx.remove_residuals(program, image(2, 5, 9, 7))


@pytest.mark.parametrize(
    "bounds", [(0, 10**400), (1.0, -1.0), (float("nan"), 1.0), (0.0,), 3.0, "all"]
)
def test_input_range_that_is_none_is_an_error_of_rmfx(bounds: Any) -> None:
    with pytest.raises(rmfx.RmfxError, match=r"input_range"):
        rmfx.remove_residuals(block(), input_range=bounds)


# ---- arguments of another class ------------------------------------------------------------------

ODD_VALUES: list[Any] = [
    *(None, 3, -1, 1e30, float("nan"), True, "x", object(), [], {}, (1, 2, 3), [None]),
    *(torch.zeros(2, 2), Path("none"), ...),
]
PUBLIC = [name for name in rmfx.__all__ if inspect.isfunction(getattr(rmfx, name))]


@pytest.mark.parametrize("verb", PUBLIC)
def test_no_argument_makes_a_verb_raise_anything_but_errors_of_rmfx(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    function = getattr(rmfx, verb)
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty]
    with torch.random.fork_rng():
        for parameter in parameters:
            for value in ODD_VALUES:
                given = {name: image() if "inputs" in name else block() for name in needed}
                try:
                    function(**(given | {parameter.name: value}))
                except rmfx.InternalError:
                    raise
                except rmfx.RmfxError:
                    continue


def test_an_argument_of_another_class_is_told_what_is_wanted() -> None:
    with pytest.raises(rmfx.OptionError, match=r"verify=3: it takes bool"):
        rmfx.remove_residuals(block(), image(), verify=3)
    with pytest.raises(rmfx.OptionError, match="activation=None: it takes str or Collection"):
        rmfx.remove_residuals(block(), image(), activation=None)


@pytest.mark.parametrize("option", ["activation", "policy"])
@pytest.mark.parametrize("value", [torch.ones(2), np.ones((2, 2)), [["relu"]]])
def test_a_choice_that_is_an_array_is_an_option_error(option: str, value: Any) -> None:
    with pytest.raises(rmfx.OptionError, match=f"{option}=.*choose"):
        rmfx.remove_residuals(block(), image(), **{option: value})


# ---- what runs around everything, and what is packed ---------------------------------------------


def test_a_hook_for_all_modules_is_named_as_such() -> None:
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model = block()
    try:
        with untouched(model), pytest.raises(rmfx.TraceError, match="a hook for all modules"):
            rmfx.remove_residuals(model, image())
    finally:
        hook.remove()


@pytest.mark.parametrize("verb", VERBS[1:])  # a trace makes no tensors
def test_another_default_device_is_named(verb: Callable[..., Any]) -> None:
    model = block()
    refused = pytest.raises(rmfx.OptionError, match="default device is meta")
    with untouched(model), refused, torch.device("meta"):
        verb(model)


def test_a_variance_below_zero_is_named() -> None:
    model = chain(conv(), nn.BatchNorm2d(4).eval())
    model[1].running_var[2] = -1.0
    with untouched(model), pytest.raises(rmfx.WeightError, match=r"1\.running_var: .* below 0"):
        rmfx.remove_residuals(model, image())


class Packed(nn.Linear):
    """What torch's own quantised layers have, which are deprecated."""

    _packed_params = 0


def test_layers_of_packed_integers_are_named_with_the_way_out() -> None:
    model = chain(conv(), nn.Flatten(), Packed(4, 2))
    with pytest.raises(rmfx.TraceError, match=r"2 \(.*Packed\) .* quantise the result"):
        rmfx.remove_residuals(model, image())


def test_lazy_layers_are_named_with_the_way_out() -> None:
    model = chain(conv(), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(rmfx.WeightError, match=r"2\.weight: .* run the model once"):
        rmfx.remove_residuals(model, image())


def test_arrays_in_the_place_of_tensors_are_told_from_them() -> None:
    with pytest.raises(rmfx.ShapeError, match="from_numpy"):
        rmfx.remove_residuals(block(), image().numpy())


def test_what_fails_in_code_of_the_caller_names_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    def wrong(_: nn.Module, x: Tensor) -> Tensor:
        return x.view(-1, 1009)

    def decides(_: nn.Module, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x

    first = inspect.getsourcelines(wrong)[1]
    with pytest.raises(rmfx.RmfxError, match=rf"test_bad_input\.py, line {first + 1}"):
        rmfx.remove_residuals(Apply(wrong), image())
    with pytest.raises(rmfx.TraceError, match=rf"by values, at .*\.py, line {first + 4}"):
        rmfx.remove_residuals(Apply(decides), image())
    assert capfd.readouterr().err == ""  # torch prints what it has traced, and logs


@pytest.mark.parametrize(
    "verb", [rmfx.remove_residuals, rmfx.eliminate_dead_channels, rmfx.close_carries]
)
def test_example_inputs_outside_of_their_range_are_an_error(verb: Callable[..., Any]) -> None:
    model = block()
    with untouched(model), pytest.raises(rmfx.OptionError, match=r"range=\(0, 1\): the example"):
        verb(model, image(), input_range=(0, 1))
    verb(model, torch.zeros_like(image()), input_range=(1, 2))  # which stands for its shape
    verb(model, image().sigmoid(), input_range=(0, 1))
