"""In-place operations become functional where nobody could tell, and are left alone elsewhere."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image
from torch import Tensor, fx, nn

import rmfx
from rmfx.testing import assert_equivalent

Forward = Callable[[Any, Tensor], Any]


def model_of(forward: Forward) -> nn.Module:
    """A model with some modules and tensors that its forward may use."""
    modules: dict[str, Any] = {name: conv() for name in "abc"}
    modules |= {"relu": nn.ReLU(inplace=True), "p": nn.Parameter(torch.rand(4, 1, 1))}
    return Apply(forward, **modules).double().eval()


def frozen(gm: fx.GraphModule) -> dict[str, str]:
    return {n.name: n.meta["frozen"] for n in gm.graph.nodes if n.meta.get("frozen")}


def writes(gm: fx.GraphModule) -> list[str]:
    """Names of the calls that may write to their input."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            is_write = getattr(gm.get_submodule(str(node.target)), "inplace", False)
        else:
            name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
            is_write = name.endswith("_") or name in ("iadd", "isub", "imul", "setitem")
        found += [node.name] * bool(is_write)
    return found


def same_values(model: nn.Module, converted: fx.GraphModule) -> None:
    """Both give the same outputs and do the same to their input."""
    mine, theirs = image(), image()
    expected, actual = copy.deepcopy(model)(mine), converted(theirs)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(mine, theirs)


def check(forward: Forward) -> list[fx.GraphModule]:
    """Trace and convert by both front-ends, with and without shapes; values must not change."""
    model = model_of(forward)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    traces = []
    for inputs in (None, image()):
        traces.append(rmfx.trace(model, inputs))
        same_values(model, rmfx.trace(model, inputs))
        same_values(model, rmfx.remove_residuals(model, inputs))
        same_values(model, rmfx.remove_residuals(rmfx.remove_residuals(model, inputs)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    return traces


# ---- safe writes --------------------------------------------------------------------------------


def add_to_branch(m: Any, x: Tensor) -> Any:
    y = m.b(m.relu(m.a(x)))
    y += x
    return y


def relu_on_fork(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = m.relu(y)
    return y + m.b(z)  # y has been written to: both operands see the ReLU


def functional_relu_on_fork(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = F.relu(y, True)
    return y + m.b(z)


def write_twice(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y.mul_(2).add_(1)
    y -= x
    y /= 4
    return m.relu(y) + y


def methods_and_functions(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    torch.relu_(y)
    F.leaky_relu_(y, 0.2)
    y.clamp_(0, 3)
    F.hardtanh(y, -1.0, 2.0, inplace=True)
    return x + m.b(y)


def view_before_that_nobody_reads_again(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    total = y.view(-1).sum()
    y.relu_()
    return m.b(y) + total


def output_holds_both_names(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = y.relu_()
    return torch.cat([y, z])


def copy_before(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    kept = y.clone()
    y.relu_()
    return kept + m.b(y)


def dropped_out(m: Any, x: Tensor) -> Any:
    y = F.dropout(m.a(x), 0.5, False, True)
    return y + m.b(m.relu(y))


SAFE = [
    add_to_branch,
    relu_on_fork,
    functional_relu_on_fork,
    write_twice,
    methods_and_functions,
    view_before_that_nobody_reads_again,
    output_holds_both_names,
    copy_before,
    dropped_out,
]


@pytest.mark.parametrize("forward", SAFE)
def test_safe_writes_become_functional(forward: Forward) -> None:
    for gm in check(forward):
        assert not frozen(gm)
        assert not writes(gm)


@pytest.mark.parametrize("forward", SAFE)
def test_exported_writes_become_functional(forward: Forward) -> None:
    model = model_of(forward)
    program = torch.export.export(model, (image(),), strict=False)
    gm = rmfx.trace(program)
    torch.testing.assert_close(gm(image()), model(image()), rtol=1e-11, atol=1e-11)
    assert not writes(gm)


def test_a_shared_in_place_module_becomes_functional_at_every_call() -> None:
    model = model_of(lambda m, x: x + m.relu(m.b(m.relu(m.a(x)))))
    gm = rmfx.remove_residuals(model)
    assert rmfx.report(gm).removed == 1
    torch.testing.assert_close(gm(image()), model(image()))
    assert model.relu.inplace  # the caller's module is as it was


# ---- unsafe writes ------------------------------------------------------------------------------


def relu_on_the_input(m: Any, x: Tensor) -> Any:
    y = m.relu(x)
    return y + m.a(y)


def copy_of_the_input(m: Any, x: Tensor) -> Any:
    kept = x.clone()
    x.relu_()
    return kept + m.a(x)


def sum_of_the_input(m: Any, x: Tensor) -> Any:
    kept = x + 0
    x.relu_()
    return kept + m.a(x)


def view_of_the_input(m: Any, x: Tensor) -> Any:
    y = x.view(2, 4, -1)
    y.mul_(2)
    return x + m.a(x)


def parameter(m: Any, x: Tensor) -> Any:
    m.p.add_(1)
    return x + m.b(torch.relu(m.a(x) * m.p))


def weight_of_a_module(m: Any, x: Tensor) -> Any:
    m.a.weight.mul_(2)
    return x + m.b(torch.relu(m.a(x)))


def view_read_later(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    view = y.view(2, 4, -1)
    y.relu_()
    return y + m.b(view.view_as(x))


def view_of_a_view_read_later(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    view = y.flatten(1)[:, :3]
    y += x
    return m.b(y) + view.sum()


def written_through_a_view(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y[:, :2].mul_(3)
    return y + m.b(y)


def chunk_written(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    first, second = y.chunk(2, 1)
    first.relu_()
    return x + torch.cat([second, first], 1) + m.b(y)


def item_set(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y[:, 0] = 1
    return y + m.b(y)


def other_alias_of_a_sum(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    alias = y.contiguous()
    y += m.b(x)
    return alias - m.c(y)


def no_functional_form(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y.clamp_(max=y.mean())
    return y + m.b(y)


def into_out(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    torch.add(x, 1, out=y)
    return y + m.b(y)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (relu_on_the_input, "network's input"),
        (copy_of_the_input, "network's input"),
        (sum_of_the_input, "network's input"),
        (view_of_the_input, "network's input"),
        (view_read_later, "another name"),
        (view_of_a_view_read_later, "another name"),
        (written_through_a_view, "another name"),
        (chunk_written, "another name"),
        (other_alias_of_a_sum, "another name"),
        (into_out, "functional form"),
        (no_functional_form, "functional form"),
    ],
)
def test_unsafe_writes_stay_and_are_marked(forward: Forward, reason: str) -> None:
    with torch.no_grad():
        for gm in check(forward):
            assert any(reason in why for why in frozen(gm).values()), frozen(gm)


def test_items_that_are_set_need_export_and_stay() -> None:
    model = model_of(item_set)
    gm = rmfx.remove_residuals(model, image())
    torch.testing.assert_close(gm(image()), model(image()))
    assert rmfx.report(gm).removed == 0


@pytest.mark.parametrize("forward", [parameter, weight_of_a_module])
def test_a_parameter_that_forward_writes_is_never_baked(forward: Forward) -> None:
    model = model_of(forward).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for inputs in (None, image()):
        gm = rmfx.remove_residuals(model, inputs)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert "parameter or buffer" in rmfx.report(gm).rows[0].reason
        own = copy.deepcopy(model)
        for _ in range(2):  # the second run sees the first one's write
            torch.testing.assert_close(gm(image()), own(image()))


@pytest.mark.parametrize("shapes", [True, False])
def test_a_buffer_that_forward_counts_in_still_counts(shapes: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        m.n.add_(1)
        return x + m.a(x) * m.n

    model = model_of(forward)
    model.register_buffer("n", torch.zeros(1, dtype=torch.float64))
    gm = rmfx.remove_residuals(model, image() if shapes else None)
    assert model.n == 0
    for _ in range(2):
        torch.testing.assert_close(gm(image()), model(image()))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x).add_(m.b(x).double()),
        lambda m, x: x + m.b(torch.relu(m.a(x).mul_(m.g))),
        lambda m, x: m.a(x).mul_(m.g) + x,
    ],
)
@pytest.mark.parametrize("shapes", [True, False])
def test_in_place_arithmetic_keeps_the_left_type(forward: Forward, shapes: bool) -> None:
    model = model_of(forward).float()
    model.register_buffer("g", torch.rand(4, 1, 1, dtype=torch.float64))
    x = image().float()
    gm = rmfx.remove_residuals(model, x if shapes else None)
    expected = model(x)
    assert gm(x).dtype == expected.dtype == torch.float32
    torch.testing.assert_close(gm(x), expected)


def test_numbers_are_marked() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        n = x.shape[0] * x.size(1) + x.dim()
        n += 1
        return m.a(x) * n

    gm = rmfx.trace(model_of(forward))
    marked = [n for n in gm.graph.nodes if n.meta.get("number")]
    tensors = [n for n in gm.graph.nodes if n.op == "call_module" or n.target is torch.mul]
    assert len(marked) >= 4
    assert not any(n.meta.get("number") for n in tensors)
    assert not frozen(gm)


def into_second(join: Callable[[Any, Any], Any]) -> Forward:
    def forward(m: Any, x: Any) -> Any:
        x = m.a(x)
        p = join(x.chunk(2, 1), m.b(x).chunk(2, 1))
        p[1].relu_()
        return torch.tanh(x)

    return forward


@pytest.mark.parametrize(
    "join",
    [lambda p, q: p + q, lambda p, q: p * 2, lambda p, q: 2 * p, lambda p, q: p[:1] + p[1:] + q],
)
def test_containers_put_together_hold_the_same_memory(join: Callable[[Any, Any], Any]) -> None:
    with torch.no_grad():  # where torch lets a part be written to
        check(into_second(join))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.einsum("bchw->bhwc", x),
        lambda x: torch.unsafe_chunk(x, 2, 1)[0],
        lambda x: torch.unsafe_split(x, 2, 1)[1],
        lambda x: torch.atleast_2d(x),
        lambda x: torch.broadcast_tensors(x, x[:1])[0],
    ],
)
def test_views_that_schemas_do_not_tell_of(view: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Any, x: Any) -> Any:
        x = m.a(x)
        view(x).relu_()
        return m.b(x) + x

    model = model_of(forward)
    exported = torch.export.export(model, (image(),))
    torch.testing.assert_close(rmfx.remove_noops(exported)(image()), model(image()))
    torch.testing.assert_close(rmfx.remove_residuals(exported)(image()), model(image()))


@pytest.mark.parametrize("name", ["ipow", "ifloordiv", "imod", "imul", "isub"])
def test_every_in_place_operator_writes(name: str) -> None:
    def forward(m: Any, x: Any) -> Any:
        x = m.a(x)
        skip = x
        x = getattr(operator, name)(x, 2)
        return m.b(x) + skip

    check(forward)
    model = model_of(forward)
    assert_equivalent(model, rmfx.remove_residuals(model, image()), image())


def _written_twice(first: Callable[[Any], Tensor], m: Any) -> Tensor:
    value = first(m)
    value.add_(m.p)  # a write that has a functional form,
    value[..., :1].mul_(0.5)  # and one that stays, and so does the one before it
    return value


TWICE: dict[str, Forward] = {
    "a constant": lambda m, x: x * _written_twice(lambda m: torch.zeros_like(m.p), m) + m.b(x),
    "a copy of a parameter": lambda m, x: x + _written_twice(lambda m: m.p * 1, m) * m.b(x),
    "a clone of a value": lambda m, x: (
        m.c(_written_twice(lambda _: m.a(x).clone(), m)) + (m.a(x) + m.b(x).softmax(1))
    ),
}


@pytest.mark.parametrize("transform", ["remove_residuals", "fold_batch_norm", "remove_noops"])
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", TWICE)
def test_what_is_written_safely_and_then_not_stays_whole(
    name: str, exported: bool, transform: str
) -> None:
    model = model_of(TWICE[name])
    given = torch.export.export(model, (image(),)) if exported else model
    made = getattr(rmfx, transform)(given, image(), verify=False)
    for seed in range(3):  # what a call leaves behind shows at the next one
        x = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(seed)).double()
        torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)


def test_a_value_read_beside_its_clone_is_not_written_to() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        r = m.a(x).relu()
        k = r.clone()
        k.add_(m.p)
        k[:, :2].mul_(0.5)
        return m.c(k), r + m.b(r).softmax(1)

    model = model_of(forward)
    for verb in (rmfx.remove_residuals, rmfx.remove_noops, rmfx.merge_branches):
        made = verb(model, image(), verify=False)
        for one, other in zip(made(image()), model(image()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "again", ["fold_batch_norm", "merge_convs", "remove_noops", "remove_residuals"]
)
def test_a_differentiable_result_may_be_converted_again(again: str) -> None:
    model = model_of(lambda m, x: (y := x.relu()) + m.b(m.a(y).relu()))
    result = rmfx.remove_residuals(model, image(), differentiable=True)
    made = getattr(rmfx, again)(result, image(), verify=False)
    for _ in range(3):
        torch.testing.assert_close(made(image()), model(image()), rtol=1e-10, atol=1e-10)
