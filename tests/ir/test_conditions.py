"""A converted network raises for inputs that it was not made for; it gives no wrong numbers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Apply, Residual, basic_branch, chain, conv, conv_branch, image, ready
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import rmfx
from rmfx.ir.conditions import demand, refuses

COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda gm: gm,
    "deepcopy": copy.deepcopy,
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
    "pickle of a deepcopy": lambda gm: pickle.loads(pickle.dumps(copy.deepcopy(gm))),
    "converted again": rmfx.remove_residuals,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("shapes", [True, False])
def test_an_unbatched_image_is_refused(shapes: bool, way: str) -> None:
    # PReLU would take the height, which equals its channels, for the channels.
    model = ready(Residual(conv_branch(nn.LeakyReLU(0.1))))
    converted = rmfx.remove_residuals(model, image(2, 4, 8, 8) if shapes else None)
    assert "PReLU" in {type(m).__name__ for m in converted.modules()}
    model(image(4, 8, 8))
    with pytest.raises(rmfx.ShapeError, match=r"x has shape \(4, 8, 8\), but .*converted for 4"):
        COPIES[way](converted)(image(4, 8, 8))
    assert torch.allclose(COPIES[way](converted)(image(3, 4, 9, 5)), model(image(3, 4, 9, 5)))


class OnlyExported(nn.Module):
    """Control flow over sizes, which symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(basic_branch())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 5:
            x = x * 2
        return self.block(x)


def test_a_model_that_is_exported_takes_any_image_for_which_its_code_goes_the_same_way() -> None:
    model = ready(OnlyExported())
    converted = rmfx.remove_residuals(model, image(1, 4, 9, 7))
    assert rmfx.report(converted).removed == 1
    for shape in [(1, 4, 9, 7), (2, 4, 9, 7), (5, 4, 6, 5), (1, 4, 20, 1)]:
        assert torch.allclose(converted(image(*shape)), model(image(*shape)))
    for height in (4, 5):
        with pytest.raises(rmfx.ShapeError, match=r"exported for \(any, .*, any\) with \w+ >= 6"):
            converted(image(1, 4, height, 7))
    with pytest.raises(rmfx.ShapeError, match=r"size\(\)\[1\] == 4"):
        converted(image(1, 5, 9, 7))


def test_code_that_depends_on_the_batch_fixes_it() -> None:
    class OneOrMany(OnlyExported):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x * 3 if x.shape[0] == 1 else x)

    model = ready(OneOrMany())
    one, many = (rmfx.remove_residuals(model, image(n, 4, 9, 7)) for n in (1, 3))
    assert torch.allclose(one(image(1, 4, 9, 7)), model(image(1, 4, 9, 7)))
    assert torch.allclose(many(image(3, 4, 9, 7)), model(image(3, 4, 9, 7)))
    for converted, batch in ((one, 3), (many, 1)):
        with pytest.raises(rmfx.ShapeError):
            converted(image(batch, 4, 9, 7))


def test_an_exported_program_keeps_its_conditions() -> None:
    class Even(OnlyExported):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x * 3 if x.shape[0] % 2 == 0 else x)

    model = ready(Even())
    program = torch.export.export(model, (image(4, 4, 9, 7),), dynamic_shapes=({0: Dim.AUTO},))
    converted = rmfx.remove_residuals(program)
    for way in COPIES.values():
        copied = way(converted)
        assert torch.allclose(copied(image(6, 4, 9, 7)), model(image(6, 4, 9, 7)))
        with pytest.raises(rmfx.ShapeError, match="% 2"):
            copied(image(3, 4, 9, 7))


def test_ranges_and_equal_sizes_of_an_exported_program() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(basic_branch())

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.block(x) + y

    model = ready(Sum())
    batch = Dim("batch", min=3, max=8)
    x = image(4, 4, 9, 7)
    program = torch.export.export(model, (x, x), dynamic_shapes=({0: batch}, {0: batch}))
    converted = rmfx.remove_residuals(program)
    x = image(8, 4, 9, 7)
    assert torch.allclose(converted(x, x), model(x, x))
    for a, b in ((9, 9), (2, 2), (4, 5)):
        with pytest.raises(rmfx.ShapeError):
            converted(image(a, 4, 9, 7), image(b, 4, 9, 7))


def test_numbers_that_exporting_fixed_are_checked() -> None:
    class Scaled(OnlyExported):
        def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    model = ready(Scaled())
    converted = rmfx.remove_residuals(model, (image(), 2.0))
    assert torch.allclose(converted(image(), 2.0), model(image(), 2.0))
    with pytest.raises(rmfx.ShapeError, match=r"scale is 3.0, but .* exported for 2.0"):
        converted(image(), 3.0)


# ---- they go wherever the graph goes ------------------------------------------------------------

OPEN = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)


def saved(gm: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def without_dead_code(gm: nn.Module) -> fx.GraphModule:
    traced = fx.symbolic_trace(gm)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def exported(gm: nn.Module, *, strict: bool = False) -> Any:
    x = image(2, 4, 8, 8)
    return torch.export.export(gm, (x,), dynamic_shapes=OPEN, strict=strict).module()


def recorded(gm: nn.Module) -> Any:
    return torch.jit.trace(gm, image(2, 4, 8, 8))


def on_fakes(gm: nn.Module) -> Any:
    """It answers with zeros: a fake has no values."""

    def run(x: Tensor) -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return gm(mode.from_tensor(x))

    return run


FORMS: dict[str, Callable[[Any], Any]] = {
    **COPIES,
    "torch.save": saved,
    "symbolic_trace": fx.symbolic_trace,
    "symbolic_trace, without dead code": without_dead_code,
    "symbolic_trace, pickled": lambda gm: pickle.loads(pickle.dumps(fx.symbolic_trace(gm))),
    "traced by rmfx": rmfx.trace,
    "torch.export": exported,
    "torch.export, strict": lambda gm: exported(gm, strict=True),
    "torch.export, converted": lambda gm: rmfx.remove_residuals(exported(gm)),
    "torch.jit.trace": recorded,
    "torch.jit.trace, frozen": lambda gm: torch.jit.freeze(recorded(gm)),
    "torch.jit.script": torch.jit.script,
    "torch.jit.script, frozen": lambda gm: torch.jit.freeze(torch.jit.script(gm)),
    "torch.compile": lambda gm: torch.compile(gm, backend="eager"),
    "sequential": rmfx.to_sequential,
    "sequential, pickled": lambda gm: pickle.loads(pickle.dumps(rmfx.to_sequential(gm))),
    "sequential, traced": lambda gm: fx.symbolic_trace(rmfx.to_sequential(gm)),
    "sequential, recorded": lambda gm: recorded(rmfx.to_sequential(gm)),
    "sequential, scripted": lambda gm: torch.jit.script(rmfx.to_sequential(gm)),
    "sequential, exported": lambda gm: exported(rmfx.to_sequential(gm)),
    "sequential, converted": lambda gm: rmfx.remove_residuals(rmfx.to_sequential(gm)),
}


def pooled(*, ceil_mode: bool) -> nn.Module:
    """Its branch and its shortcut have equal sizes at even sizes of the input only."""
    pool = chain(nn.AvgPool2d(2, ceil_mode=ceil_mode), conv(4, 4, 1))
    branch = chain(conv(4, 4, 3, stride=2), nn.LeakyReLU(0.1), conv(4, 4, 1))
    return ready(Apply(lambda m, x: m.branch(x) + m.pool(x), branch=branch, pool=pool))


@pytest.mark.filterwarnings("ignore")  # of torch.jit, which is deprecated and warns of much
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize("way", FORMS)
def test_every_form_refuses_what_the_network_refuses(way: str, ceil_mode: bool) -> None:
    torch._dynamo.reset()
    model = pooled(ceil_mode=ceil_mode)
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    assert rmfx.report(gm).removed == 1
    form = FORMS[way](gm)
    for size in ((8, 8), (6, 10)):
        x = image(3, 4, *size)
        torch.testing.assert_close(form(x), model(x))
    for wrong in (image(2, 4, 3, 8), image(2, 4, 8, 3), image(4, 8, 8)):
        with pytest.raises(Exception) as caught:
            form(wrong)
        assert refuses(caught.value), caught.value


def test_fakes_and_tensors_without_data_are_refused_too() -> None:
    gm = rmfx.remove_residuals(pooled(ceil_mode=True), image(2, 4, 8, 8))
    assert on_fakes(gm)(image(2, 4, 6, 6)).shape == (2, 4, 3, 3)
    with pytest.raises(rmfx.ShapeError):
        on_fakes(gm)(image(2, 4, 3, 8))
    with pytest.raises(rmfx.ShapeError):
        gm.to("meta")(image(2, 4, 3, 8).to("meta"))


def test_exporting_for_sizes_that_it_refuses_is_an_error() -> None:
    gm = rmfx.remove_residuals(pooled(ceil_mode=False), image(2, 4, 8, 8))
    with pytest.raises(Exception, match=r"% 2|Not all values of h"):
        torch.export.export(gm, (image(2, 4, 8, 8),), dynamic_shapes=({2: Dim("h")},))
    even = 2 * Dim("half")
    program = torch.export.export(gm, (image(2, 4, 8, 8),), dynamic_shapes=({2: even},))
    assert program.module()(image(2, 4, 6, 8)).shape == (2, 4, 3, 4)


def test_guards_of_an_exported_module_are_pickled() -> None:
    class Large(OnlyExported):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x)
            return y * 2 if x.numel() > 1000 else y

    model = ready(Large())
    program = torch.export.export(model, (image(2, 4, 9, 7),), dynamic_shapes=({0: Dim.AUTO},))
    for source in (program, program.module()):
        gm = rmfx.remove_residuals(source)
        for way in COPIES.values():
            torch.testing.assert_close(way(gm)(image(3, 4, 9, 7)), model(image(3, 4, 9, 7)))
            with pytest.raises(rmfx.ShapeError, match=r"252 ?\*.*<= 1000"):
                way(gm)(image(5, 4, 9, 7))


@pytest.mark.parametrize("options", [{}, {"differentiable": True}, {"fold_batch_norm": False}])
def test_every_verb_keeps_them(options: dict[str, bool]) -> None:
    gm = rmfx.remove_residuals(pooled(ceil_mode=True), image(2, 4, 8, 8), **options)
    smaller = rmfx.fold_batch_norm(rmfx.merge_convs(rmfx.remove_noops(gm), image(2, 4, 8, 8)))
    for form in (gm, smaller):
        with pytest.raises(rmfx.ShapeError, match="averages fewer"):
            form(image(2, 4, 3, 8))


def test_hooks_of_others_come_before_the_conditions() -> None:
    """DeepLift hands a network a tuple, of which its own hook makes one batch."""
    model = ready(Residual(conv_branch(nn.LeakyReLU(0.1))))
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    x, baseline = image(2, 4, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    for form in (gm, rmfx.to_sequential(gm)):
        form.register_forward_pre_hook(lambda m, args: (torch.cat(args[0]),))
        torch.testing.assert_close(form((x, baseline)), model(torch.cat((x, baseline))))


def test_deep_lift_runs() -> None:
    attr = pytest.importorskip("captum.attr")

    def forward(m: Any, x: Tensor) -> Any:
        x = torch.relu(x)
        return m.act(x + m.b(m.r(m.a(x)))).mean((2, 3))

    parts = {"a": conv(), "b": conv(), "r": nn.ReLU(), "act": nn.ReLU()}
    gm = rmfx.remove_residuals(ready(Apply(forward, **parts)), image(2, 4, 8, 8))
    x = image(2, 4, 8, 8)
    for form in (gm, rmfx.to_sequential(gm)):
        options = {"target": 0, "return_convergence_delta": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it sets hooks and asks for gradients
            _, delta = attr.DeepLift(form).attribute(x, x * 0, **options)
        assert delta.abs().max() < 1e-9


# ---- nodes --------------------------------------------------------------------------------------


def demands(gm: fx.GraphModule) -> list[str]:
    return [str(n.args[3]) for n in gm.graph.find_nodes(op="call_function", target=demand)]


def test_a_second_pass_changes_nothing() -> None:
    x = image(2, 4, 8, 8)
    gm = rmfx.remove_residuals(pooled(ceil_mode=False), x)
    assert len(demands(gm)) == 3  # the rank, the height and the width
    for again in (rmfx.remove_residuals(gm, x), rmfx.trace(gm), rmfx.remove_residuals(gm)):
        assert demands(again) == demands(gm)
        assert [n.name for n in again.graph.nodes] == [n.name for n in gm.graph.nodes]


def test_a_graph_with_conditions_is_plain_and_its_sequential_begins_with_them() -> None:
    gm = rmfx.remove_residuals(pooled(ceil_mode=True), image(2, 4, 8, 8))
    assert rmfx.is_plain(gm)
    network = rmfx.to_sequential(gm)
    assert type(network[0]).__name__ == "Conditions"
    assert torch.equal(network[1:](image(2, 4, 6, 6)), gm(image(2, 4, 6, 6)))
    free = rmfx.to_sequential(rmfx.remove_residuals(ready(Residual(conv())), image()))
    assert [type(layer) for layer in free] == [nn.Conv2d]


def test_the_rank_is_asked_first() -> None:
    gm = rmfx.remove_residuals(pooled(ceil_mode=True), image(2, 4, 8, 8))
    with pytest.raises(rmfx.ShapeError, match="converted for 4 dimensions"):
        gm(image(8))
    with pytest.raises(rmfx.ShapeError, match="x is not given"):
        gm(None)


def test_numbers_that_the_network_needs_as_well_stay() -> None:
    gm = rmfx.remove_residuals(pooled(ceil_mode=True), image(2, 4, 8, 8))
    last = next(iter(gm.graph.find_nodes(op="output")))
    number = gm.graph.find_nodes(op="call_function", target=demand)[-1].args[0].args[0]
    with gm.graph.inserting_before(last):
        last.args = (gm.graph.call_function(torch.mul, (last.args[0], number)),)
    gm.recompile()
    again = rmfx.trace(gm)
    assert torch.equal(again(image(2, 4, 6, 6)), gm(image(2, 4, 6, 6)))
    with pytest.raises(rmfx.ShapeError):
        again(image(2, 4, 3, 6))
