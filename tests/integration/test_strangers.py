"""What outside testers found: code that people write, held in every way, at several sizes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, chain, conv, conv_branch, image, ready
from torch import Tensor, fx, nn

import rmfx
from rmfx.testing import assert_equivalent

Forward = Callable[[Any, Tensor], Tensor]
VERBS = (
    rmfx.trace,
    rmfx.remove_noops,
    rmfx.remove_residuals,
    rmfx.merge_branches,
    rmfx.merge_convs,
    rmfx.fold_batch_norm,
)


def model_of(forward: Forward, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    parts = {"a": conv(), "b": conv(kernel=1), "c": conv(), "g": nn.Parameter(torch.rand(4, 1, 1))}
    return ready(Apply(forward, **(parts | more)))


def held(model: nn.Module, x: Tensor, *, export: bool = True) -> list[tuple[Any, Any]]:
    """A model and example inputs, in several ways."""
    found: list[tuple[Any, Any]] = [(model, x), (model, None), (fx.symbolic_trace(model), x)]
    if export:
        program = torch.export.export(model, (x,))
        found += [(program, None), (program.run_decompositions(), None)]
    return found


def check(forward: Forward, x: Tensor, *others: Tensor, export: bool = True, **more: Any) -> None:
    """Every verb leaves what is computed; others are of further sizes, for what is not exported."""
    model = model_of(forward, **more)
    for how, example in held(model, x, export=export):
        for verb in VERBS:
            sizes = (x,) if isinstance(how, torch.export.ExportedProgram) else (x, *others)
            try:
                found = [verb(how, example)(value) for value in sizes]
            except rmfx.RmfxError:  # without example inputs a network may be unreadable
                assert example is None
                assert how is model
                continue
            for value, output in zip(sizes, found, strict=True):
                torch.testing.assert_close(output, model(value), rtol=1e-9, atol=1e-9)


WEIGHTS: dict[str, Forward] = {
    "type_as": lambda m, x: x + m.c(x) * m.g.type_as(x),
    "to": lambda m, x: x + m.c(x) * m.g.to(x),
    "behind a sigmoid": lambda m, x: x + m.c(x) * torch.sigmoid(m.g.type_as(x)),
    "shift": lambda m, x: torch.relu(m.c(x) + m.g.to(x)) + x,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_cast_to_the_type_of_a_value_is_no_value(name: str) -> None:
    check(WEIGHTS[name], image(2, 4, 8, 8))


def test_an_instance_norm_told_to_use_the_instance_does() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    norm.track_running_stats = False
    check(lambda m, x: x + m.n(m.c(x)), image(2, 4, 8, 8), n=norm)


@pytest.mark.parametrize("kind", ["bool", "uint8"])
def test_sums_of_stacks_that_hold_no_real_numbers(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        parts = [x, m.a(x), m.b(x)]
        if kind == "bool":
            return m.b(x) * torch.stack([part > 0 for part in parts]).sum(0)
        return m.b(x) * torch.stack([(part.abs() * 99).to(torch.uint8) for part in parts]).sum(0)

    check(forward, image(2, 4, 8, 8))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.cat((x, m.a(x)), 3)[..., -x.size(3) :],
        lambda m, x: (torch.cat((m.a(x), x), 2)[:, :, : x.size(2)] * 2).sum(2),
    ],
)
def test_a_concatenation_along_space_is_larger(forward: Forward) -> None:
    x = image(2, 4, 8, 8)
    check(forward, x, image(1, 4, 5, 7))
    auto = torch.export.Dim.AUTO
    model = model_of(forward)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for verb in VERBS:
        gm = verb(program, None)
        for value in (x, image(2, 4, 10, 12)):
            torch.testing.assert_close(gm(value), model(value))


def test_a_slice_of_a_small_map_is_empty() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x[:, :, 6:]
        return F.pad(y, (0, 0, 0, x.size(2) - y.size(2)))

    check(forward, image(2, 4, 9, 8), image(1, 4, 5, 8), export=False)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: sum(_parts(m.c(x), 2, 2)),
        lambda m, x: m.c(x).split(4, 2)[-1],
        lambda m, x: m.c(x).chunk(2, 0)[0],
        lambda m, x: m.c(x).permute(0, 2, 3, 1).chunk(2, 1)[1],
    ],
)
def test_parts_of_space_follow_its_size(forward: Forward) -> None:
    check(forward, image(2, 4, 8, 8), image(4, 4, 16, 8), export=False)


def _parts(x: Tensor, count: int, dim: int) -> list[Tensor]:
    parts = x.chunk(count, dim)
    return [parts[i] for i in range(count)]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a((x * 3).int().clamp(-0.5, 1.5).double()) + x,
        lambda m, x: m.a((x * 3).long().clamp(max=1).double()) + x,
        lambda m, x: m.a((x * 3).long().abs().double()) + x,
        lambda m, x: m.a(torch.fft.irfft2(torch.fft.rfft2(x).abs(), s=x.shape[2:])) + x,
    ],
)
def test_functions_of_integers_and_complex_numbers_stay(forward: Forward) -> None:
    check(forward, image(2, 4, 8, 8))


def test_reflections_as_exporting_takes_them_apart() -> None:
    check(
        lambda m, x: x + m.d(F.pad(x, (1, 1, 1, 1), mode="reflect")),
        image(2, 4, 8, 8),
        d=conv(padding=0),
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.sqrt(F.relu(x) + 1),
        lambda x: (F.relu(x) + 1) ** 0.5,
        lambda x: torch.rsqrt(F.relu(x) + 1),
        lambda x: torch.log(F.relu(x) + 1),
    ],
)
@pytest.mark.parametrize("differentiable", [False, True])
def test_gradients_do_not_see_the_carry_outside_of_a_domain(
    function: Callable[[Tensor], Tensor], differentiable: bool
) -> None:
    model, x = model_of(lambda m, x: x + m.b(function(m.a(x)))), image(2, 4, 8, 8)
    gm = rmfx.remove_residuals(model, x, differentiable=differentiable)
    assert rmfx.report(gm).removed == 1
    found = []
    for net in (model, gm):
        own = x.clone().requires_grad_(True)
        net(own).square().sum().backward()
        found.append(own.grad)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (x / 255.0) + m.c(x / 255.0),
        lambda m, x: m.b(torch.relu(m.c(x / 255))),
        lambda m, x: m.b((x - 200) / 255 + 1),
    ],
)
def test_images_of_bytes(forward: Forward) -> None:
    model = model_of(forward).float()
    x = (torch.rand(2, 4, 8, 8) * 255).to(torch.uint8)
    for how in (model, fx.symbolic_trace(model), torch.export.export(model, (x,))):
        for verb in VERBS:
            torch.testing.assert_close(verb(how, x)(x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.pad(x.double(), (1, 1, 1, 1)) + m.a(F.pad(x.double(), (1, 1, 1, 1))),
        lambda m, x: x.double() * 2 + m.a(x.double() * 2),
    ],
)
def test_layers_are_not_named_after_methods(forward: Forward) -> None:
    check(forward, image(2, 4, 8, 8))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.cat(torch.split(m.c(x), 2, 1), 1),
        lambda m, x: torch.cat(m.a(x).chunk(2, 1)[::-1], 1),
        lambda m, x: (
            m.d(x) + torch.cat([m.c(x)] + [m.c(x).mul(0)] * (m.d(x).size(1) // x.size(1) - 1), 1)
        ),
    ],
)
def test_concatenations_of_containers(forward: Forward) -> None:
    check(forward, image(2, 4, 8, 8), d=conv(4, 8))


def test_a_batch_norm_with_a_weight_that_is_computed() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = x.mean((0, 2, 3))
        return m.c(x) + F.batch_norm(m.a(x), m.mean, m.var, weight=weight)

    buffers = {"mean": nn.Buffer(torch.randn(4)), "var": nn.Buffer(torch.rand(4) + 0.5)}
    check(forward, image(2, 4, 8, 8), **buffers)


def grouped(g: int, x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(g, b * c // g, h, w).transpose(0, 1).reshape(b, c, h, w)


def test_views_that_mix_batch_and_channels() -> None:
    check(lambda m, x: x + m.c(grouped(2, m.a(x))), image(3, 4, 8, 8), image(1, 4, 5, 4))


def test_a_view_of_one_dimension() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = (m.a(x) + x).mean((1, 2, 3))
        return y.view(y.size(0), -1)

    check(forward, image(3, 4, 8, 8))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (
            x.view(x.size(0), 2, 2, x.size(2), x.size(3))
            .transpose(1, 2)
            .reshape(x.shape)
            .view(x.size(0), -1)
        ),
        lambda m, x: (
            m.c(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1).view(-1, 4)
        ),
        lambda m, x: _last(m, x.contiguous(memory_format=torch.channels_last)),
    ],
)
def test_views_do_not_rely_on_a_memory_format(forward: Forward) -> None:
    x = image(2, 4, 8, 6)
    model = model_of(forward)
    formats = [x]
    try:
        model(x.to(memory_format=torch.channels_last))
        formats.append(x.to(memory_format=torch.channels_last))
    except RuntimeError:
        pass
    check(forward, *formats)


def _last(m: Any, y: Tensor) -> Tensor:
    return (y + m.b(torch.relu(m.c(y)))).permute(0, 2, 3, 1).view(-1, 4)


def test_unbatched_maps_behind_a_pool() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        p = m.pool(x)
        y = p[..., 1:]
        return y + p[..., p.size(2) - y.size(2) :]

    check(forward, image(4, 9, 12), pool=nn.MaxPool2d((2, 3)))


@pytest.mark.parametrize(
    "cut",
    [
        lambda x, y: x[..., : y.shape[2:][0], : y.shape[-2:][1]],
        lambda x, y: x.narrow(2, 0, y.size(2)).narrow(-1, 0, y.size(3)),
        lambda x, y: torch.narrow(x, 2, 0, y.size(2))[..., 2:-2].contiguous(),
    ],
)
def test_other_ways_to_write_a_crop(cut: Callable[[Tensor, Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.d(torch.relu(m.d(x)))
        return y + cut(x, y)

    model, x = model_of(forward, d=conv(padding=0)), image(2, 4, 9, 8)
    for how, example in held(model, x):
        gm = rmfx.remove_residuals(how, example)
        torch.testing.assert_close(gm(x), model(x), rtol=1e-10, atol=1e-10)


def test_the_chomp_of_a_tcn_is_read_in_every_form() -> None:
    model = ready(chain(conv(3, 4, dims=1), nn.ReLU(), Twice(), conv(4, 2, dims=1)))
    x = image(2, 3, 20)
    for how, example in held(model, x):
        gm = rmfx.remove_residuals(how, example)
        assert rmfx.report(gm).removed == 1
        assert_equivalent(model, gm, x)


class Twice(nn.Module):
    """The block of a TCN."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (conv(dims=1, padding=2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)[:, :, :-2].contiguous())
        return torch.relu(x + self.second(y)[:, :, :-2].contiguous())


# ---- what a model's code does beside computing --------------------------------------------------


def test_code_that_switches_autocast_keeps_its_precision() -> None:
    """The part without autocast runs in float32, also in what is made of it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = m.a(torch.relu(m.b(x.float())))
        return x + y  # type: ignore[no-any-return]

    model = ready(Apply(forward, a=conv(), b=conv())).float()
    x = image(dtype=torch.float32)
    compiled = torch.compile(model, backend="rmfx", options={"backend": "eager"})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        for made in (rmfx.remove_residuals(model, x), rmfx.fold_batch_norm(model, x)):
            torch.testing.assert_close(made(x), expected, rtol=1e-6, atol=1e-6)
        with pytest.warns(UserWarning, match="switches autocast"):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(rmfx.TraceError, match="switches autocast off"):
        rmfx.trace(model)


class Reversed(torch.autograd.Function):
    """The identity, with the gradient of its negative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


def _without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(torch.relu(m.b(x)))
    return x + y  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "forward",
    [_without_gradients, lambda m, x: x + m.a(torch.relu(Reversed.apply(m.b(x))))],
    ids=["no_grad", "a function"],
)
def test_gradients_of_its_own_are_not_lost_silently(forward: Any) -> None:
    model, x = ready(Apply(forward, a=conv(), b=conv())), image().requires_grad_()
    assert rmfx.report(rmfx.remove_residuals(model, x.detach())).rows
    with pytest.raises(rmfx.RmfxError, match="which differentiable=True would lose"):
        rmfx.remove_residuals(model, x.detach(), differentiable=True)
    options = {"backend": "eager", "differentiable": True}
    compiled = torch.compile(model, backend="rmfx", options=options)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the graph stays as it is
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_model_that_notes_its_sizes_compiles() -> None:
    """Dynamo then names the weights by way of __dict__."""

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.size = Residual(conv_branch()), None

        def forward(self, x: Tensor) -> Tensor:
            self.size: Any = x.shape[2:]
            return self.block(x)  # type: ignore[no-any-return]

    model, x, reports = ready(Notes()), image(), []
    options = {"backend": "eager", "on_report": reports.append}
    with torch.no_grad():
        found = torch.compile(model, backend="rmfx", options=options)(x)
    torch.testing.assert_close(found, model(x))
    assert [report.removed for report in reports] == [1]


def test_a_buffer_with_a_history_is_named() -> None:
    model = ready(Apply(lambda m, x: x + m.a(torch.relu(x)) * m.last, a=conv()))
    model.register_buffer("last", torch.ones(1, dtype=torch.float64, requires_grad=True) * 2)
    with pytest.raises(rmfx.WeightError, match=r"last = model.last.detach\(\)"):
        rmfx.remove_residuals(model, image())


# ---- arguments ----------------------------------------------------------------------------------


def test_arguments_that_were_not_given_stay_so() -> None:
    def forward(m: Any, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x if other is None else x + other
        return x + m.a(torch.relu(x))  # type: ignore[no-any-return]

    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv()

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return forward(self, x, other)

    model, x = ready(Optional()), image()
    for given, wrong in (
        ((x, None), [(x, x)]),
        ((x,), [(x, x)]),
        ((x, x), [(x, None), (x,)]),
    ):
        for verb in (rmfx.remove_residuals, rmfx.trace, rmfx.fold_batch_norm):
            made = verb(model, given)
            torch.testing.assert_close(made(*given), model(*given))
            for others in wrong:
                with pytest.raises((rmfx.ShapeError, TypeError)):
                    made(*others)


def test_any_number_of_arguments() -> None:
    class Star(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv()

        def forward(self, *xs: Tensor, **options: float) -> Tensor:
            return xs[0] * options.get("scale", 1.0) + self.a(torch.relu(xs[-1]))

    model, x = ready(Star()), image()
    for given in ((x,), (x, x + 1)):
        made = rmfx.remove_residuals(model, given)
        torch.testing.assert_close(made(*given), model(*given))
        with pytest.raises((rmfx.ShapeError, TypeError)):
            made(x, x, x)
    assert rmfx.report(rmfx.remove_residuals(model, (x,))).removed
    with pytest.raises(rmfx.TraceError, match="any number of arguments"):
        rmfx.trace(model)


@pytest.mark.parametrize("options", [{}, {"differentiable": True}])
def test_sizes_that_were_exported_are_checked_however_it_is_converted(options: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(torch.relu(m.b(x)))
        return x + (y * 2 if x.shape[-1] > 6 else y)  # type: ignore[no-any-return]

    model, x = ready(Apply(forward, a=conv(), b=conv())), image(2, 4, 8, 8)
    made = rmfx.remove_residuals(model, x, **options)
    forms = [made] if options else [made, rmfx.to_sequential(made), copy.deepcopy(made)]
    for form in forms:
        torch.testing.assert_close(form(x), model(x))
        with pytest.raises(rmfx.ShapeError, match="exported for"):
            form(image(2, 4, 5, 5))


def test_a_dict_of_a_class_of_its_own_is_not_made_a_dict() -> None:
    class Output(dict[str, Tensor]):
        pass

    model = ready(Apply(lambda m, x: Output(y=x + m.a(torch.relu(x))), a=conv()))
    with pytest.raises(rmfx.TraceError, match="makes an Output"):
        rmfx.remove_residuals(model)


NUMBERS: dict[str, Forward] = {
    "power": lambda m, x: x + m.a(torch.relu(m.b(x))) * x.shape[1] ** -0.5,
    "root": lambda m, x: x + m.a(torch.relu(m.b(x))) / math.sqrt(x.size(1)),
    "sum": lambda m, x: x + (x.size(1) + 2) / 3 * m.a(torch.relu(m.b(x))),
    "of the image": lambda m, x: x + m.a(torch.relu(m.b(x))) / math.sqrt(x.size(2)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_channels_are_numbers(name: str) -> None:
    check(NUMBERS[name], image(), image(2, 4, 6, 5))
    made = rmfx.remove_residuals(model_of(NUMBERS[name]), image())
    assert rmfx.report(made).removed == (name != "of the image")


# ---- sums inside of sums ------------------------------------------------------------------------


def test_a_sum_inside_a_branch_leaves_the_outer_one_open_to_removal() -> None:
    """Removing the inner one puts channels of ones beside a value, which is linear."""

    def film(m: Any, x: Tensor, e: Tensor) -> Tensor:
        e = m.e(e)[:, :, None, None]
        return x + m.b(torch.relu(m.a(x) * (1 + e) + e))  # type: ignore[no-any-return]

    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.e = conv(), conv(), nn.Linear(3, 4)

        def forward(self, x: Tensor, e: Tensor) -> Tensor:
            return film(self, x, e)

    def split(m: Any, x: Tensor) -> Tensor:
        y, z = torch.relu(m.c(x)).chunk(2, 1)
        p = torch.sigmoid(m.f((y + z).mean((2, 3), keepdim=True)))
        return x + m.o(p[:, :4] * y + p[:, 4:] * z)  # type: ignore[no-any-return]

    attention = Apply(split, c=conv(4, 8), f=conv(4, 8, 1), o=conv(4, 4, 1))
    for model, inputs in (
        (ready(Film()), (image(), torch.randn(2, 3).double())),
        (ready(attention), (image(),)),
    ):
        made = rmfx.remove_residuals(model, inputs)
        rows = rmfx.report(made).rows
        assert {row.status for row in rows} == {"removed"}
        assert_equivalent(model, made, inputs)


@pytest.mark.parametrize(
    "function",
    [torch.relu, F.silu, F.gelu, torch.tanh, Tensor.relu, lambda x: F.dropout(x, 0.5, False)],
)
def test_parts_behind_a_function_are_parts_behind_its_layer(function: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = function(m.c(x)).chunk(2, 1)
        return x + m.o(y * z)  # type: ignore[no-any-return]

    model = ready(Apply(forward, c=conv(4, 8), o=conv()))
    made = rmfx.remove_residuals(model, image())
    assert rmfx.report(made).removed == 1
    assert_equivalent(model, made, image())
