"""Every way to hold a model gives one graph in one dialect."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    Residual,
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
from torch import Tensor, fx, nn

import rmfx
from rmfx.frontend.kept_state import unchanged
from rmfx.testing import assert_equivalent

pytestmark = pytest.mark.oldest


def targets(gm: fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op in ("call_function", "call_method")]


# ---- one dialect --------------------------------------------------------------------------------

BN = nn.BatchNorm2d(4)
CALLS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "F.conv2d": (lambda m, x: F.conv2d(x, m.c.weight, m.c.bias, 1, 1), "Conv2d"),
    "torch.conv2d": (lambda m, x: torch.conv2d(x, m.c.weight, stride=2), "Conv2d"),
    "F.conv2d padding same": (lambda m, x: F.conv2d(x, m.c.weight, padding="same"), "Conv2d"),
    "F.linear": (lambda m, x: F.linear(x, m.l.weight, m.l.bias), "Linear"),
    "F.batch_norm": (
        lambda m, x: F.batch_norm(m.c(x), m.b.running_mean, m.b.running_var, m.b.weight),
        "BatchNorm2d",
    ),
    "torch.batch_norm": (
        lambda m, x: torch.batch_norm(
            m.c(x), m.b.weight, m.b.bias, m.b.running_mean, m.b.running_var, False, 0.1, 0.2, False
        ),
        "BatchNorm2d",
    ),
    "F.relu": (lambda m, x: F.relu(x), "ReLU"),
    "F.relu inplace": (lambda m, x: F.relu(x * 2, inplace=True), "ReLU"),
    "torch.relu_": (lambda m, x: torch.relu_(x * 2), "ReLU"),
    "x.relu": (lambda m, x: x.relu(), "ReLU"),
    "x.clamp": (lambda m, x: x.clamp(min=0), "ReLU"),
    "x.clamp to an interval": (lambda m, x: x.clamp(-1, max=2), "Hardtanh"),
    "F.hardtanh": (lambda m, x: F.hardtanh(x, -2.0, 0.5), "Hardtanh"),
    "F.prelu": (lambda m, x: F.prelu(x, m.p), "PReLU"),
    "F.rrelu": (lambda m, x: F.rrelu(x, 0.1, 0.3, m.training), "RReLU"),
    "F.gelu": (lambda m, x: F.gelu(x, approximate="tanh"), "GELU"),
    "x.sigmoid": (lambda m, x: x.sigmoid(), "Sigmoid"),
    "F.softplus": (lambda m, x: F.softplus(x, 2, threshold=3), "Softplus"),
    "F.threshold": (lambda m, x: F.threshold(x, 0.1, -2.0), "Threshold"),
    "F.max_pool2d": (lambda m, x: F.max_pool2d(x, 3, 2, padding=1), "MaxPool2d"),
    "F.avg_pool2d": (lambda m, x: F.avg_pool2d(x, 3, ceil_mode=True), "AvgPool2d"),
    "F.adaptive_avg_pool2d": (lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)), "AdaptiveAvgPool2d"),
    "F.dropout": (lambda m, x: F.dropout(x, 0.5, m.training), "Dropout"),
    "torch.flatten": (lambda m, x: torch.flatten(x, 1), "Flatten"),
    "x.view(x.size(0), -1)": (lambda m, x: x.view(x.size(0), -1), "Flatten"),
    "x.view(x.shape[0], -1)": (lambda m, x: x.view(x.shape[0], -1), "Flatten"),
    "x.reshape(x.size()[0], -1)": (lambda m, x: x.reshape(x.size()[0], -1), "Flatten"),
    "torch.reshape": (lambda m, x: torch.reshape(x, (x.size(0), -1)), "Flatten"),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_and_methods_become_modules(name: str) -> None:
    function, expected = CALLS[name]
    parts = {"c": conv(), "b": nn.BatchNorm2d(4), "l": nn.Linear(7, 3)}
    model = ready(Apply(function, p=nn.Parameter(torch.randn(4)), **parts))
    before = snapshot(model)
    gm = rmfx.trace(model, image())
    assert types(gm)[-1] == expected
    assert_equivalent(model, gm, image())
    assert_same(before, snapshot(model))


in_place: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.iadd,
    "-": operator.isub,
    "*": operator.imul,
    "/": operator.itruediv,
}
SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Any]] = {
    "x + y": (operator.add, torch.add),
    "y += x": (lambda x, y: in_place["+"](y, x), torch.add),
    "x.add": (lambda x, y: x.add(y, alpha=2), torch.add),
    "y.add_": (lambda x, y: y.add_(x), torch.add),
    "x - y": (operator.sub, torch.sub),
    "y -= x": (lambda x, y: in_place["-"](y, x), torch.sub),
    "torch.subtract": (torch.subtract, torch.sub),
    "x * y": (operator.mul, torch.mul),
    "y *= x": (lambda x, y: in_place["*"](y, x), torch.mul),
    "x / y": (lambda x, y: x / (y * y + 1), torch.div),
    "y /= x": (lambda x, y: in_place["/"](y, x * x + 1), torch.div),
}


@pytest.mark.parametrize("name", SUMS)
def test_arithmetic_has_one_form(name: str) -> None:
    combine, expected = SUMS[name]
    model = ready(Residual(conv(), combine=combine))
    gm = rmfx.trace(model)
    assert expected in targets(gm)
    assert all(getattr(t, "__module__", "") != "_operator" for t in targets(gm))
    assert_equivalent(model, gm, image())


@pytest.mark.parametrize("mode", ["trunc", "floor"])
def test_division_that_rounds_is_not_taken_for_a_scale(mode: str) -> None:
    model = Apply(lambda m, x: x + torch.div(x, 0.3, rounding_mode=mode)).eval()
    assert not {torch.mul, torch.div} & {*targets(rmfx.trace(model, image()))}
    assert_removed(model, image(), strategy="masked", without_inputs=False)  # an activation
    assert_refused(model, image(), reason="div with options", example=False)


# ---- three front-ends ---------------------------------------------------------------------------


def test_modules_graph_modules_and_exported_programs_give_the_same_layers() -> None:
    model = ready(
        chain(conv_bn(), nn.ReLU(), Residual(basic_branch()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    held = (model, fx.symbolic_trace(model), torch.export.export(model, (image(),)))
    layers = [types(rmfx.trace(one, image())) for one in held]
    assert layers[0] == layers[1] == layers[2]
    for one in held:
        assert_equivalent(model, rmfx.trace(one), image())


def test_exported_program_with_a_dynamic_batch_stays_dynamic() -> None:
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    model = ready(Residual(basic_branch()))
    program = torch.export.export(model, (image(),), dynamic_shapes=dynamic)
    converted = rmfx.remove_residuals(program)
    assert rmfx.report(converted).removed == 1
    x = image(5, 4, 9, 7)
    assert torch.allclose(converted(x), model(x))


def test_tracing_twice_gives_the_same_names() -> None:
    model = ready(chain(conv_bn(), Residual(basic_branch()), Residual(conv_branch())))
    first, second = (rmfx.trace(model, image()) for _ in range(2))
    assert [n.name for n in first.graph.nodes] == [n.name for n in second.graph.nodes]
    again = rmfx.trace(first, image())
    assert [n.name for n in again.graph.nodes] == [n.name for n in first.graph.nodes]


def test_shapes_and_source_lines_are_noted() -> None:
    gm = rmfx.trace(ready(Residual(conv(stride=2), conv(kernel=1, stride=2))), image())
    add = next(n for n in gm.graph.nodes if n.target is torch.add)
    assert add.meta["shape"] == (2, 4, 5, 4)
    path, _, line = add.meta["source"].rpartition(":")
    assert path.endswith("builders.py")
    assert line.isdigit()


def test_flow_that_depends_on_values_of_sizes_needs_example_inputs() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(conv_branch())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if x.shape[0] > 1 else x

    model = ready(Branching())
    with pytest.raises(rmfx.TraceError, match="pass example_inputs"):
        rmfx.trace(model)
    converted = rmfx.remove_residuals(model, image())
    assert rmfx.report(converted).removed == 1
    assert_equivalent(model, converted, image())


def test_model_with_keyword_defaults_and_containers_traces() -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(conv_branch())

        def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, list[Tensor]]:
            return {"y": [self.block(x) * scale]}

    model = ready(Options())
    converted = rmfx.remove_residuals(model)
    assert rmfx.report(converted).removed == 1
    assert_equivalent(model, converted, image())


# ---- writes in place ----------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "chain of writes": lambda m, x: m.c(x).mul_(2).add_(x).relu_(),
    "write, then read the old name": lambda m, x: (lambda y: (y.add_(x), y * 2)[1])(m.c(x)),
    "write to a view": lambda m, x: (lambda y: (y.view(-1).add_(1), y)[1])(m.c(x)),
    "write to a slice": lambda m, x: (lambda y: (y[:, 1:].mul_(3), y + x)[1])(m.c(x)),
    "write after a view was taken": lambda m, x: (
        lambda y: (lambda v: (y.add_(1), v.sum() + y)[1])(y.view(-1))
    )(m.c(x)),
    "write to the input": lambda m, x: x.add_(1) * m.c(x),
    "write to the input through a view": lambda m, x: (x.view(-1).add_(1), m.c(x))[1],
    "write seen by an earlier reader only": lambda m, x: (
        lambda y: (lambda z: (y.add_(1), z + y)[1])(m.c(y))
    )(m.c(x)),
    "write with out=": lambda m, x: (lambda y: torch.add(y, x, out=y))(m.c(x)),
    "write through detach": lambda m, x: (lambda y: (lambda v: (v.add_(1), y * 2)[1])(y.detach()))(
        m.c(x)
    ),
    "write of a kind without functional form": lambda m, x: m.c(x).fill_(2.0) + x,
    "write to a chunk": lambda m, x: (lambda y: (y.chunk(2, 1)[0].add_(1), y + x)[1])(m.c(x)),
    "dropout in place": lambda m, x: F.dropout(m.c(x), 0.5, False, True) + x,
    "two names of one value": lambda m, x: (
        lambda y: (lambda z: (y.add_(x), z * 2)[1])(y.contiguous())
    )(m.c(x)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_in_place_mean_what_they_meant(name: str) -> None:
    model = ready(Apply(WRITES[name], c=conv())).requires_grad_(False)
    with torch.no_grad():
        expected = model(image())
        for verb in (rmfx.trace, rmfx.remove_noops, rmfx.remove_residuals):
            for inputs in (None, image()):
                assert torch.allclose(verb(model, inputs)(image()), expected), verb.__name__
    exported = torch.export.export(model, (image(),))
    with torch.no_grad():
        assert torch.allclose(rmfx.remove_residuals(exported)(image()), expected)


def test_in_place_module_is_detached_without_touching_the_model() -> None:
    model = ready(chain(conv(), nn.ReLU(inplace=True), Residual(conv()), nn.ReLU6(inplace=True)))
    before = snapshot(model)
    gm = rmfx.trace(model)
    assert not any(getattr(m, "inplace", False) for m in gm.modules())
    assert_same(before, snapshot(model))
    assert_equivalent(model, gm, image())


# ---- wrappers -----------------------------------------------------------------------------------


def test_data_parallel_and_compiled_modules_are_seen_through() -> None:
    model = ready(Residual(conv_branch()))
    converted = rmfx.remove_residuals(nn.DataParallel(model), image())
    assert rmfx.report(converted).removed == 1
    assert_equivalent(model, converted, image())


def test_subclass_of_a_layer_with_its_own_forward_is_traced_into() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = ready(Residual(Doubled(4, 4, 3, padding=1)))
    converted = rmfx.remove_residuals(model, image())
    assert rmfx.report(converted).removed == 1
    assert_equivalent(model, converted, image())


# ---- what a trace cannot tell -------------------------------------------------------------------


class Masked(nn.Module):
    """Does something else where its mask is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.a(x) if mask is None else self.b(x)
        return x + y


def test_an_argument_that_may_be_none_wants_example_inputs() -> None:
    model = ready(Masked())
    with pytest.raises(
        rmfx.TraceError, match=r"its argument mask may be None.*pass example_inputs"
    ):
        rmfx.remove_residuals(model)
    assert_equivalent(model, rmfx.remove_residuals(model, image()), image())


def test_hooks_of_all_modules_are_refused() -> None:
    model = ready(Residual(conv_branch()))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(rmfx.TraceError, match="a hook for all modules"):
            rmfx.remove_residuals(model, image())
    finally:
        handle.remove()
    assert rmfx.report(rmfx.remove_residuals(model, image())).removed == 1


def test_a_module_named_by_a_keyword_is_refused() -> None:
    model = ready(nn.Sequential(OrderedDict([("class", conv()), ("act", nn.ReLU())])))
    for inputs in (None, image()):
        with pytest.raises(rmfx.TraceError, match=r"class: .* a keyword"):
            rmfx.remove_residuals(model, inputs)


def test_a_module_named_self() -> None:
    model = ready(nn.Sequential(OrderedDict([("self", conv()), ("act", nn.ReLU())])))
    for inputs in (None, image()):
        torch.testing.assert_close(rmfx.remove_noops(model, inputs)(image()), model(image()))
    exported = rmfx.remove_noops(torch.export.export(model, (image(),)))
    torch.testing.assert_close(exported(image()), model(image()))


def test_the_larger_of_two_tensors() -> None:
    class Larger(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inner = torch.max(x, 0.1 * x).min(x + 1)
            return inner + x.max(1, keepdim=True)[0] + x.max()

    gm = rmfx.trace(ready(Larger()), image())
    names = [getattr(n.target, "__name__", n.target) for n in gm.graph.nodes]
    assert names.count("maximum") == names.count("minimum") == 1
    torch.testing.assert_close(gm(image()), Larger()(image()))


SEEN: list[int] = []


def test_a_global_that_is_only_named_like_an_attribute_is_left_alone() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.SEEN, self.c = 2.0, conv()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.c(x) * self.SEEN

    with unchanged(ready(Named())):
        SEEN.append(1)  # by another thread, say
    assert SEEN == [1]
