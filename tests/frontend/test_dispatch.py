"""A call is what it dispatches to, whatever its name; what acts on each value alone passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, assert_removed, chain, conv, image, ready
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses import fake_tensor

import rmfx
from rmfx.files.saving import save
from rmfx.modules.activations import Composed
from rmfx.testing import assert_equivalent

Function = Callable[[Any], Any]


def block(function: Function) -> Any:
    """x + conv(function(conv(x))) behind a convolution."""
    middle = Apply(lambda m, x: function(x))
    return ready(chain(conv(), Residual(chain(conv(), middle, conv()))))


# Other names of activations that have a row in the table.
SYNONYMS: dict[str, Function] = {
    "clamp_max": lambda x: x.clamp_max(0.5),
    "torch.clamp_max": lambda x: torch.clamp_max(x, 0.5),
    "torch.arctan": torch.arctan,
    "x.arctan": lambda x: x.arctan(),
    "special.erf": torch.special.erf,
    "special.expit": torch.special.expit,
    "clip by keyword": lambda x: torch.clip(x, max=0.3),
    "positive": lambda x: +torch.relu(x),
    "torch.positive": lambda x: torch.positive(torch.relu(x)),
    "alpha_dropout": lambda x: F.alpha_dropout(torch.relu(x)),
    "feature_dropout": lambda x: F.feature_alpha_dropout(torch.relu(x), training=False),
    "rrelu": lambda x: torch.rrelu(x),
    "aten.hardswish": torch.ops.aten.hardswish,
}


@pytest.mark.parametrize("name", SYNONYMS)
def test_another_name_of_an_activation_is_that_activation(name: str) -> None:
    assert_removed(block(SYNONYMS[name]), image())


# Functions of each value alone without a row; those of the second group know types by examples.
ALONE: dict[str, Function] = {
    "floor": torch.floor,
    "x.ceil": lambda x: x.ceil(),
    "round to a decimal": lambda x: torch.round(x, decimals=1),
    "remainder": lambda x: x % 1.0,
    "floor division": lambda x: x // 0.5,
    "div with a mode": lambda x: torch.div(x, 0.5, rounding_mode="trunc"),
    "from a number": lambda x: 2.0**x,
    "one over": lambda x: 1 / (x.abs() + 1),
    "sigmoid by hand": lambda x: 1 / (1 + torch.exp(-x)),
    "times itself": lambda x: x * x,
    "frac": torch.frac,
    "nan_to_num": torch.nan_to_num,
    "step": lambda x: (x > 0).to(x.dtype),
    "step of a type": lambda x: (x > 0).type_as(x),
    "by an own comparison": lambda x: torch.where(x > 0, x, 0.1 * x),
    "by masked_fill": lambda x: x.masked_fill(x < 0, 0.5),
    "product with a comparison": lambda x: x * (x > 0.1),
    "heaviside": lambda x: torch.heaviside(x, torch.tensor(0.5, dtype=x.dtype)),
    "two in a row": lambda x: torch.round(torch.floor(x * 3) / 2),
    "lerp": lambda x: torch.lerp(x, torch.tanh(x).floor(), 0.25),
}
BY_EXAMPLE: dict[str, Function] = {
    "largest with a constant": lambda x: torch.max(x, torch.tensor(0.0, dtype=torch.float64)),
    "clamped by tensors": lambda x: torch.clamp(
        x, -torch.ones(1, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    ),
    "there and back": lambda x: torch.relu(x.float()).double(),
    "there and back by a number": lambda x: (x * 8).to(torch.int32).to(torch.float64) / 8,
    "copysign": lambda x: torch.copysign(x.abs().sqrt(), x),
    "written to": lambda x: (2 * x).floor_(),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_acts_on_each_value_alone_is_an_activation(name: str) -> None:
    assert_removed(block(ALONE[name]), image())


@pytest.mark.parametrize("name", BY_EXAMPLE)
def test_what_acts_on_each_value_alone_of_a_known_type_is_an_activation(name: str) -> None:
    model, x = block(BY_EXAMPLE[name]), image()
    converted = assert_removed(model, x, without_inputs=False)
    assert_equivalent(model, converted, (image(1, 4, 5, 12),))


CHANNELS = torch.tensor([0.1, 0.2, 0.5, -0.5], dtype=torch.float64).reshape(4, 1, 1)
LIMITS: dict[str, Function] = {
    "clamp": lambda x: torch.clamp(x, CHANNELS - 1, CHANNELS),
    "one number": lambda x: torch.clamp(x, -torch.ones(1, dtype=torch.float64), CHANNELS),
    "x.clip": lambda x: x.clip(max=CHANNELS[None]),
    "clamp_min": lambda x: torch.clamp_min(x, CHANNELS),
    "torch.max": lambda x: torch.max(x, CHANNELS),
    "minimum, constant first": lambda x: torch.minimum(CHANNELS, x),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_for_each_channel_are_a_clamp(name: str) -> None:
    model, x = block(LIMITS[name]), image()
    converted = assert_removed(model, x, strategy="per-channel", without_inputs=False)
    assert_equivalent(model, converted, (image(1, 4, 5, 12),))


def test_fake_quantisation_is_an_activation() -> None:
    model = block(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -128, 127)).float()
    x = image(dtype=torch.float32)
    converted = rmfx.remove_residuals(model, x)
    assert rmfx.report(converted).removed == 1
    y = model(x)
    assert (converted(x) - y).abs().max() <= 1e-4 * y.abs().max()


def test_an_activation_of_several_calls_is_copied_saved_and_traced_again(tmp_path: Path) -> None:
    model, x = block(lambda x: torch.where(x > 0, x, 0.1 * x.round())), image()
    converted = assert_removed(model, x)
    again = rmfx.remove_residuals(fx.symbolic_trace(copy.deepcopy(converted)), x)
    save(converted, tmp_path / "net.pt2", (x,))
    loaded = torch.export.load(tmp_path / "net.pt2")
    for other in (again, loaded.module(), rmfx.to_sequential(converted)):
        assert torch.equal(other(x), converted(x))
    assert_equivalent(model, rmfx.remove_residuals(loaded, x), (x,))


def test_the_constants_of_an_activation_are_the_models_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x / self.step).abs() * self.step

    model, x = ready(Residual(chain(conv(), Scaled(), conv()))), image()
    converted = rmfx.remove_residuals(model, x, differentiable=True)
    model.branch[1].step.data.mul_(2)
    assert_equivalent(model, converted, (x,))


def test_an_operator_without_a_law_for_shapes_never_runs_on_large_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def run(mode: Any, func: Any, flat: Any, spec: Any, error: Any) -> Any:
        sizes.extend(t.numel() for t in flat if isinstance(t, Tensor))
        return fallback(mode, func, flat, spec, error)

    fallback = fake_tensor.run_fallback_kernel
    monkeypatch.setattr(fake_tensor, "run_fallback_kernel", run)
    unlike = Apply(lambda m, x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255))
    model = ready(chain(conv(), unlike, nn.PixelShuffle(2), Residual(conv(1, 1))), torch.float32)
    rmfx.remove_residuals(model, image(dtype=torch.float32))
    assert max(sizes) < 1 << 22


def test_what_does_not_run_alone_is_printed_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = F.prelu(m.a(x), m.slopes).clone()  # of a type that probes do not have
        return m.b(y.clamp_(0.0, 6.0)) + x

    model = ready(Apply(forward, a=conv(), b=conv(), slopes=nn.Parameter(torch.rand(4))))
    converted = rmfx.remove_residuals(model)
    assert capfd.readouterr().err == ""
    assert_equivalent(model, converted, (image(),))


# What looks alike and is none.
OTHER: dict[str, Function] = {
    "sums on the way": lambda x: torch.cumsum(x, 3),
    "another place": lambda x: torch.where(x > x.flip(3), x, 0.0),
    "constants by place": lambda x: torch.floor_divide(x, torch.arange(1.0, 8.0)),
    "constants by channel": lambda x: torch.floor_divide(x, torch.arange(1.0, 5.0)[:, None, None]),
    "another order": lambda x: torch.sort(x, 3).values,
}


@pytest.mark.parametrize("name", OTHER)
def test_what_reads_other_values_is_no_activation(name: str) -> None:
    model = block(OTHER[name])
    converted = rmfx.remove_residuals(model, image())
    assert not any(isinstance(module, Composed) for module in converted.modules())
    assert_equivalent(model, converted, (image(),))


def test_a_number_that_depends_on_sizes_is_not_taken_into_an_activation() -> None:
    model = block(lambda x: torch.floor(x / x.size(3)))
    converted = rmfx.remove_residuals(model, image())
    assert_equivalent(model, converted, (image(1, 4, 5, 12),))


@pytest.mark.parametrize("name", ["clamp", "maximum"])
def test_limits_that_may_change_are_told_as_the_reason(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return x + m.b(torch.clamp(y, -m.most, m.most) if name == "clamp" else y.maximum(m.most))

    model = Apply(forward, a=conv(), b=conv())
    model.register_buffer("most", torch.rand(4, 1, 1))
    converted = rmfx.remove_residuals(ready(model), image(), differentiable=True)
    assert "differentiable=True" in str(rmfx.report(converted).rows[0].reason)


def test_a_cast_to_a_lower_type_is_no_activation_without_an_example() -> None:
    model = block(lambda x: torch.relu(x.half()).float()).float()
    assert rmfx.report(rmfx.remove_residuals(model)).removed == 0


KEPT: dict[str, Callable[[Any, Tensor], Any]] = {  # of real numbers these give the value as it is
    "conj": lambda m, x: torch.fft.ifft2(torch.fft.fft2(x).conj()).real + m.a(x),
    "function": lambda m, x: torch.fft.ifft2(torch.conj(torch.fft.fft2(x))).real + m.a(x),
    "computed": lambda m, x: torch.fft.ifft2(torch.conj_physical(torch.fft.fft2(x))).real + m.a(x),
    "real": lambda m, x: torch.real(torch.fft.fft2(x)) + m.a(x),
    "resolved": lambda m, x: torch.view_as_real(torch.fft.fft2(m.a(x)).conj().resolve_conj()),
}


@pytest.mark.parametrize("has_inputs", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_what_does_nothing_to_real_numbers_is_kept_for_complex_ones(
    name: str, has_inputs: bool
) -> None:
    model = ready(Apply(KEPT[name], a=conv()))
    for verb in (rmfx.remove_residuals, rmfx.remove_noops):
        converted = verb(model, image() if has_inputs else None)
        assert converted(image()).dtype == torch.float64
        torch.testing.assert_close(converted(image()), model(image()))


# ---- every operator that torch says is pointwise ------------------------------------------------
class Operator(nn.Module):
    """An operator on numbers that it has values for, and its value as a real number."""

    def __init__(self, op: OpOverload, low: float) -> None:
        super().__init__()
        self.op, self.low = op, low
        given = [a for a in op._schema.arguments if not a.has_default_value()]
        at = next(a for a in given if str(a.type) == "Tensor")
        self.args = [None if a is at else _number(a) for a in given if not a.kwarg_only]
        self.options = {a.name: _number(a) for a in given if a.kwarg_only}

    def of(self, x: Tensor) -> Tensor:
        args = [x if a is None else a for a in self.args]
        return self.op(*args, **self.options)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.of(torch.sigmoid(x) + self.low).to(x.dtype)


def _number(argument: Any) -> Any:
    return {"int": 1, "Optional[str]": "floor"}.get(str(argument.type), 2.0)


def pointwise_operators() -> Iterator[OpOverload]:
    """Those with torch's tag that take one tensor and give one."""
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            if torch.Tag.pointwise not in op.tags or op._schema.is_mutable:
                continue
            given = [str(a.type) for a in op._schema.arguments if not a.has_default_value()]
            if given.count("Tensor") == 1 and len(op._schema.returns) == 1:
                yield op


def with_values(op: OpOverload) -> Operator | None:
    """An operator on real numbers for which it has finite values; None if there are none."""
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(3, 4)
    for low in (0.0, 1.0, 0.0001):
        found = Operator(op, low)
        try:
            y = found(x)
        except (RuntimeError, ValueError, NotImplementedError):  # it is for integers, say
            continue
        if y.shape == x.shape and y.isfinite().all():
            return found
    return None


@pytest.mark.slow
def test_every_pointwise_operator_of_torch_is_an_activation(
    record_property: Callable[[str, object], None],
) -> None:
    operators = list(pointwise_operators())
    found = [one for one in map(with_values, operators) if one is not None]
    left = {str(op) for op in operators} - {str(one.op) for one in found}
    # Bits of whole numbers, and clamps without a bound.
    names = ("bitwise", "shift", "__xor__", "clamp", "clip", "__and__", "__or__")
    assert all(any(word in name for word in names) for name in left), left
    for i in range(0, len(found), 12):
        sites = [Residual(chain(conv(), one, conv())) for one in found[i : i + 12]]
        model = ready(Apply(lambda m, x: [site(x) for site in m.sites], sites=nn.ModuleList(sites)))
        assert_removed(model, image(2, 4, 5, 3), sites=len(sites), without_inputs=False)
    record_property("operators", len(found))
    print(f"{len(found)} of {len(operators)} pointwise operators take real numbers; all pass")  # noqa: T201
    assert len(found) > 100
