"""Conversions check themselves: what a wrong result would look like, and what is left alone."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, ready
from torch import Tensor, fx, nn

import rmfx
from rmfx.errors import ShapeError
from rmfx.ir.net import Net
from rmfx.models import DigitsNet
from rmfx.oracle.equivalence import traced
from rmfx.oracle.trial_inputs import SAME, Example, candidates
from rmfx.oracle.verification import verified
from rmfx.testing import random_statistics

X = torch.randn(2, 4, 8, 8, dtype=torch.float64)
VERBS = (
    *("remove_residuals", "merge_branches", "fold_batch_norm", "merge_convs", "remove_noops"),
    *("eliminate_dead_channels", "close_carries", "fuse_resconv"),
)


class Function(nn.Module):
    """A function of tensors as a network."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Block(nn.Module):
    """Something for each of the verbs to do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        random_statistics(self, 0)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.b(torch.relu(self.a(x))))


def shapes(found: rmfx.Verification) -> list[tuple[int, ...]]:
    return [one for (one,) in found.shapes]


# ---- what is seen -------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_hands_out_a_wrong_result(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Net.finish

    def broken(net: Net, *arguments: Any) -> fx.GraphModule:
        made: Any = finish(net, *arguments)
        with torch.no_grad():
            next(made.parameters())[0] += 0.1
        return made

    function = getattr(rmfx, verb)
    assert function(Block(), X) is not None
    monkeypatch.setattr(Net, "finish", broken)
    with pytest.raises(rmfx.VerificationError, match=f"{verb}: on random inputs of 2x4x8x8"):
        function(Block(), X)
    assert function(Block(), X, verify=False) is not None


def test_the_first_join_that_differs_is_named_with_its_rewrite() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Two()
    plain = rmfx.remove_residuals(model, X)
    with torch.no_grad():
        plain.second.b.bias += 0.1
    with pytest.raises(rmfx.VerificationError, match=r"the join \w+ at second \(removed; per-ch"):
        rmfx.verify(model, plain, X)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda x: x if x.shape[2] == 8 else x.flip(2), "output 0 differs"),
        (lambda x: x if x.shape[3] == 8 else x.flip(3), "output 0 differs"),
        (lambda x: x if x.shape[0] == 2 else x.flip(0), "output 0 differs"),
        (lambda x: x if min(x.shape[2:]) > 3 else 2 * x, "output 0 differs"),
        (lambda x: x if x.shape[2] != 1 else x[..., :0], "became one of shape"),
        (lambda x: x.reshape(-1, 4, 8, 8), "the original runs and the result raises RuntimeError"),
        (lambda x: x.float(), "became one of"),
        (lambda x: (x,), "output structure"),
        (lambda x: x + torch.nan, "output 0 differs by"),
    ],
)
def test_results_that_are_right_at_some_sizes_only(after: Any, message: str) -> None:
    with pytest.raises(rmfx.VerificationError, match=message):
        rmfx.verify(Function(lambda x: x), Function(after), X)


def test_results_may_fail_where_the_original_has_no_numbers() -> None:
    crop = Function(lambda x: x[:, :, 1:-2])
    found = rmfx.verify(crop, Function(lambda x: x.narrow(2, 1, x.shape[2] - 3)), X)
    assert (1, 4, 1, 1) not in shapes(found)
    assert len(shapes(found)) > 3
    with pytest.raises(rmfx.VerificationError, match="became one of shape"):
        rmfx.verify(crop, Function(lambda x: x[:, :, 1:-2] if x.shape[2] > 3 else x), X)


def test_a_value_inside_without_numbers_excuses_a_failure_at_smaller_sizes_alone() -> None:
    def border(y: Tensor) -> Tensor:
        return F.pad(y, (0, 0, 1, 0), value=0.5)

    crop = Apply(lambda m, x: border(x[:, :, 1:-2]) + border(m.conv(x[:, :, 1:-2])), conv=conv())
    assert rmfx.report(rmfx.remove_residuals(ready(crop), X)).removed == 1  # and is verified
    empty, failing = (
        torch.fx.symbolic_trace(Function(function))
        for function in (
            lambda x: torch.cat((torch.add(x, x), x[:, :, :0]), 2),
            lambda x: torch.add(x, x).narrow(2, 0, 10**6),
        )
    )
    with pytest.raises(rmfx.VerificationError, match="the result raises RuntimeError"):
        rmfx.verify(empty, failing, X)


def test_large_examples_are_run_along_one_axis_at_a_time() -> None:
    x = torch.randn(1, 2, 200, 210)
    found = rmfx.verify(Function(lambda x: x), Function(lambda x: x), x)
    assert shapes(found) == [(1, 2, 200, 19), (2, 2, 1, 210), (1, 2, 1, 1)]
    for at in (2, 3):
        wrong = Function(lambda x, at=at: x if x.shape[at] < 200 else -x)
        with pytest.raises(rmfx.VerificationError):
            rmfx.verify(Function(lambda x: x), wrong, x)


def test_a_large_example_of_fixed_size_is_run_whole() -> None:
    x = torch.randn(1, 2, 200, 210)
    fixed = Function(lambda x: x.reshape(x.shape[0], 2, 200, 210))
    assert shapes(rmfx.verify(fixed, fixed, x)) == [(1, 2, 200, 210), (2, 2, 200, 210)]


# ---- what is left alone -------------------------------------------------------------------------


def test_sizes_that_the_result_refuses_say_nothing() -> None:
    def after(x: Tensor) -> Tensor:
        if x.shape[2] % 4:
            raise ShapeError("not this one")
        return x

    found = rmfx.verify(Function(lambda x: x), Function(after), X)
    assert shapes(found)[0] == (2, 4, 8, 8)
    assert all(shape[2] % 4 == 0 for shape in shapes(found))
    assert len(found.shapes) > 1


def test_sizes_on_which_the_original_fails_say_nothing() -> None:
    def before(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 4, 8, 8)

    found = rmfx.verify(Function(before), Function(lambda x: x), X)
    assert shapes(found) == [(2, 4, 8, 8), (2, 4, 8, 8), (3, 4, 8, 8)]


@pytest.mark.parametrize("by", [1e-16, 1e-12])
def test_weights_may_be_rounded_once(by: float) -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.full((1,), 1 - 2e-8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return 0 * x + (self.bias - 1 + 2e-8)

    before, after = Difference(), Difference()
    with torch.no_grad():
        after.bias += by
    kept = before.bias.clone()
    if by > 1e-15:
        with pytest.raises(rmfx.VerificationError, match="output 0 differs"):
            rmfx.verify(before, after, X)
    else:
        assert rmfx.verify(before, after, X).magnified > 1e-10
    assert torch.equal(before.bias, kept)


@pytest.mark.parametrize("wrong", [False, True])
def test_as_much_as_the_original_is_off_by_rounding_is_allowed(wrong: bool) -> None:
    def before(x: Tensor) -> Tensor:  # 0.3, but in bfloat16 0.5, whatever x
        return (0 * x + 64.3) - 64

    after = Function(lambda x: before(x) * (9 if wrong else 2))
    x = X.bfloat16()
    assert before(x).unique().tolist() == [0.5]
    if wrong:
        with pytest.raises(rmfx.VerificationError, match="output 0 differs"):
            rmfx.verify(Function(before), after, x, tolerance=1e-3)
    else:
        assert rmfx.verify(Function(before), after, x, tolerance=1e-3).magnified > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_a_clamp_as_two_relu_is_no_false_alarm_where_values_are_small(seed: int) -> None:
    """Both ReLU6 of values far below 1 are sums with 6, at sizes of one pixel, too."""
    torch.manual_seed(seed)
    options = {"activation": "relu", "input_range": (0, 1)}
    made = rmfx.remove_residuals(DigitsNet().eval(), torch.rand(1, 1, 28, 28), **options)
    assert any(row.strategy == "double-relu" for row in rmfx.report(made).rows)
    assert len(rmfx.report(made).verification.shapes) > 2


@pytest.mark.parametrize("wrong", [False, True])
def test_what_ten_roundings_do_behind_a_bend_is_allowed(wrong: bool) -> None:
    """One rounding of 1 in float16 is 1e-3, and does nothing in front of a bend at 1 + 4e-3."""

    def behind(by: float) -> nn.Module:
        return Function(lambda x: F.relu(1000 * (x + by - 1) - 4))

    x = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    assert behind(0.0)(x) == 0 < behind(0.005)(x)
    original = behind(0.0)
    if wrong:
        with pytest.raises(rmfx.VerificationError, match="output 0 differs"):
            verified(original, behind(0.05), (x,), None, None, traced, [(x,)])
    else:
        assert verified(original, behind(0.005), (x,), None, None, traced, [(x,)]).shapes


def test_rounding_that_the_network_magnifies_is_allowed() -> None:
    x = torch.rand(2, 3, 8, 8)
    before = Function(lambda x: (x * 1e5).sin())
    found = rmfx.verify(before, Function(lambda x: (x * (1e5 / 3) * 3).sin()), x)
    assert found.magnified > found.limit
    with pytest.raises(rmfx.VerificationError):
        rmfx.verify(Function(lambda x: x), Function(lambda x: x * (1 + 1e-4)), x)


def test_what_cancels_is_measured_by_its_operands() -> None:
    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 1)
            with torch.no_grad():
                self.a.weight.copy_(-torch.eye(4).reshape(4, 4, 1, 1) * (1 + 2**-20))
                self.a.bias.zero_()  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.a(x)) * 0

    assert rmfx.remove_residuals(Cancels().eval(), X.float()) is not None


@pytest.mark.parametrize("wrong", [False, True])
def test_what_a_network_keeps_is_no_rounding(wrong: bool) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = nn.Buffer(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    class Stays(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    if wrong:
        with pytest.raises(rmfx.VerificationError, match=r"output 0 differs by 0\.5"):
            rmfx.verify(Counts(), Stays(), X)
    else:
        found = rmfx.verify(Counts(), rmfx.trace(Counts()), X)
        assert len(shapes(found)) > 3
        assert found.error == 0


def test_the_model_and_the_state_of_the_process_stay() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.conv(x) * self.calls

    model = Counts().double().eval()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    rmfx.fold_batch_norm(model, X)
    assert float(model.calls) == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_what_is_not_verified_is_said() -> None:
    model = Block()
    for arguments, options, reason in (
        ((model,), {}, "there are no example inputs"),
        ((model, X), {"verify": False}, "verify=False"),
    ):
        found = rmfx.report(rmfx.remove_residuals(*arguments, **options))
        assert found.verification is not None
        assert found.verification.reason == reason
        assert f"not verified: {reason}" in str(found)
    noise = Function(lambda x: torch.bernoulli(torch.full_like(x, 0.5)))
    found = rmfx.verify(noise, Function(lambda x: x), X)
    assert "random" in found.reason
    nan = Function(lambda x: x * torch.nan)
    assert "finite" in rmfx.verify(nan, Function(lambda x: x), X).reason


def test_the_report_says_where_a_dropped_skip_would_not_be_seen() -> None:
    model = Block()
    assert rmfx.report(rmfx.remove_residuals(model, X)).verification.unseen == ()
    with torch.no_grad():
        model.norm.weight.mul_(1e-13)
        model.norm.bias.mul_(1e-13)
    report = rmfx.report(rmfx.remove_residuals(model, X))
    assert report.verification.unseen == ("the top level",)
    assert "would not have been seen at the top level" in str(report)


def test_inputs_stay_in_their_range_and_among_their_values() -> None:
    indices = torch.tensor([[1, 5, 7]])
    example = Example((torch.zeros(2, 3, 8, 8), indices), input_range=(2.0, 3.0))
    x, i = example.resized((5, 9, 7), 0)
    assert x.shape == (5, 3, 9, 7)
    assert 2 <= float(x.min()) < float(x.max()) <= 3
    assert set(i.flatten().tolist()) <= {1, 5, 7}


def test_an_input_of_twice_the_resolution_keeps_it() -> None:
    example = Example((torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 16, 16)))
    assert [x.shape[2:] for x in example.resized((2, 17, 18), 0)] == [(17, 18), (34, 36)]


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 224, 224), (4, 10), (1, 2, 5, 9, 9), (3,)])
def test_candidates_fit_the_example(shape: tuple[int, ...]) -> None:
    example = Example((torch.zeros(shape),))
    for choices in candidates(example, further=True):
        for sizes in choices:
            assert len(sizes) == max(1, len(shape) - 1)
            assert all(size == SAME or size > 0 for size in sizes)


def test_every_verb_that_keeps_the_function_can_verify() -> None:
    for verb in VERBS:
        assert inspect.signature(getattr(rmfx, verb)).parameters["verify"].default is True


def test_copies_of_a_verified_network_keep_its_report() -> None:
    plain = rmfx.remove_residuals(Block(), X)
    assert rmfx.report(copy.deepcopy(plain)).verification == rmfx.report(plain).verification


# ---- values of every type ------------------------------------------------------------------------


class Skip(nn.Module):
    """A block, and something made of its output."""

    def __init__(self, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = last

    def forward(self, x: Tensor) -> Any:
        return self.last(x + self.b(torch.relu(self.a(x))))


LASTS: dict[str, Callable[[Tensor], Any]] = {
    "truth values": lambda y: y > 0,
    "both": lambda y: (y, y > 0),
    "sums of truth values": lambda y: y * ((y > 0) + (y < -1)),
    "whole numbers": lambda y: y.argmax(1),
    "uint16": lambda y: (y > 0).to(torch.uint16),
    "float8": lambda y: y.clamp(-1, 1).to(torch.float8_e5m2),
    "complex": torch.fft.fft2,
    "sparse": lambda y: y.flatten(1).to_sparse(),
    "a mask": lambda y: (y, torch.full((2,), -torch.inf)),
    "masked": lambda y: y.masked_fill(y > 2, -torch.inf),
    "padded": lambda y: nn.functional.pad(y, (1, 1), value=-torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LASTS)
def test_outputs_of_every_type_are_compared(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and name in ("complex", "sparse"):
        pytest.skip("torch has no such operator for bfloat16")
    x = torch.randn(2, 4, 16, 16, dtype=dtype)
    model = Skip(LASTS[name]).eval().to(dtype)
    found = rmfx.report(rmfx.remove_residuals(model, x)).verification
    assert found is not None
    assert ((2, 4, 16, 16),) in found.shapes
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.b.weight *= -4
    with pytest.raises(rmfx.VerificationError, match="the networks differ"):
        rmfx.verify(model, wrong, x)


def test_a_buffer_that_nobody_reads_widens_no_limit() -> None:
    model = Skip(lambda y: y).eval()
    model.unused = nn.Buffer(torch.zeros(1, dtype=torch.bfloat16))
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.b.weight *= 1.2
    with pytest.raises(rmfx.VerificationError):
        rmfx.verify(model, wrong, X.float())


@pytest.mark.parametrize("x", [X, X[:, :3].float(), (X.float(), X.float()), None, "cuda", 3])
def test_inputs_on_which_the_original_does_not_run_are_an_error(x: Any) -> None:
    model = Skip(lambda y: y).eval()
    with pytest.raises(rmfx.ShapeError, match="does not run on the example inputs"):
        rmfx.verify(model, model, x)


def test_a_result_of_another_network_is_told() -> None:
    plain = rmfx.remove_residuals(Block(), X)
    with pytest.raises(rmfx.VerificationError, match="was not made of this network"):
        rmfx.verify(nn.Conv2d(4, 4, 1).double(), plain, X)


@pytest.mark.parametrize("tolerance", [-1.0, "small", True])
def test_tolerances_that_make_no_sense(tolerance: Any) -> None:
    with pytest.raises(rmfx.OptionError, match="tolerance="):
        rmfx.verify(Block(), Block(), X, tolerance=tolerance)
