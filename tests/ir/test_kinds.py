"""What the tables say of kinds of layers and of operations is so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import Apply, conv, image, ready
from torch import Tensor, fx, nn

import rmfx
from rmfx.ir.kinds import LAYERS, NO_OPS, OPERATIONS, SPREADING, Layers, Operation
from rmfx.modules.activations import OWN_ACTIVATIONS
from rmfx.testing import assert_equivalent

# How to make layers, by what their names hold.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"), (1,)),
    **dict.fromkeys(("AdaptiveAvgPool", "AdaptiveMaxPool", "MaxPool", "AvgPool"), (2,)),
    "ConstantPad": (1, 3.0),
    "Norm1d": (4,),
    "Norm2d": (4,),
    "Norm3d": (4,),
    "SyncBatchNorm": (4,),
    "GroupNorm": (2, 4),
    "LayerNorm": (5,),
    "Softmax": (1,),
    "Upsample": (None, 2),
    "Linear": (5, 2),
    "Conv": (4, 2, 3),
    "Embedding": (9, 2),
    "Threshold": (0.1, 0.2),
    "Pointwise": ("square",),
    "Composed": (fx.symbolic_trace(lambda x: torch.floor(x) * (x > 0)),),
}


def made(kind: type[nn.Module]) -> nn.Module:
    name = kind.__name__
    fitting = [key for key in ARGUMENTS if key in name and name != "Softmax2d"]
    return kind(*ARGUMENTS[max(fitting, key=len)] if fitting else ()).double().eval()


def read_by(kind: type[nn.Module]) -> Tensor:
    """Numbers that a layer takes: of one, two or three spatial dimensions."""
    if kind is nn.Embedding:
        return torch.tensor([[1, 2], [3, 4]])
    dims = kind.__name__[-2:]
    return image(2, 4, *[5] * (int(dims[0]) if dims in ("1d", "2d", "3d") else 2))


def kinds(column: str) -> list[Any]:
    """Every kind that has a column of the table, but for those that hold tensors of the caller."""
    found = [kind for row in LAYERS if getattr(row, column) for kind in row.kinds]
    return [pytest.param(kind, id=kind.__name__) for kind in found if kind not in OWN_ACTIVATIONS]


@pytest.mark.parametrize("kind", kinds("channelwise"))
def test_what_goes_channel_by_channel_keeps_dimensions_and_channels(kind: type[nn.Module]) -> None:
    x = read_by(kind)
    y = made(kind)(x)
    assert (y.dim(), y.shape[1]) == (x.dim(), x.shape[1])


@pytest.mark.parametrize("kind", kinds("spatial"))
def test_in_space_each_channel_goes_its_own_way(kind: type[nn.Module]) -> None:
    x = read_by(kind)
    changed = x.clone()
    changed[:, 1] += 1
    before, after = made(kind)(x), made(kind)(changed)
    same = [bool((before[:, i] == after[:, i]).all()) for i in range(4)]
    assert same == [True, False, True, True]


@pytest.mark.parametrize("kind", kinds("hull"))
def test_what_a_hull_holds_is_not_left(kind: type[nn.Module]) -> None:
    x = read_by(kind)
    for shifted in (x - 9, x + 9):  # a zero of a border would lie outside
        y = made(kind)(shifted)
        assert shifted.min() <= y.min()
        assert y.max() <= shifted.max()


@pytest.mark.parametrize("kind", kinds("fresh"))
def test_what_is_fresh_shares_no_memory(kind: type[nn.Module]) -> None:
    x = read_by(kind)
    y = made(kind)(x)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", NO_OPS)
def test_what_does_nothing_gives_what_it_reads(kind: type[nn.Module]) -> None:
    x = read_by(kind)
    assert torch.equal(made(kind)(x), x)


def operands(row: Operation, form: Any) -> tuple[Any, ...]:
    """What a form of an operation takes; some operators take a number."""
    x, y = image(), 2 + image().abs()
    if row.function is torch.cat:
        return [x, y], 1
    if row.function is torch.where:
        number = str(form).rpartition(".")[2]
        return x > 0, 0.5 if number == "ScalarSelf" else x, 0.5 if number == "ScalarOther" else y
    return (x,) if row.function is torch.neg else (x, y)


@pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: row.function.__name__)
def test_every_form_of_an_operation_computes_it(row: Operation) -> None:
    for form in row.forms():
        wanted = row.function(*operands(row, form))
        first, *rest = operands(row, form)
        found = getattr(first, form)(*rest) if isinstance(form, str) else form(first, *rest)
        assert torch.equal(found, wanted), form


@pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: row.function.__name__)
def test_a_neutral_operand_leaves_the_other_one_unchanged(row: Operation) -> None:
    x = image()
    for place, others in row.neutral.items():
        given = [x if i == place else number for i, number in enumerate(others)]
        given = [torch.tensor(0.0 if n is None else n) if n is not x else n for n in given]
        assert torch.equal(row.function(*given).to(x.dtype), x), place


@pytest.mark.parametrize("function", SPREADING, ids=lambda function: function.__name__)
def test_sizes_are_known_behind_whatever_combines_place_by_place(function: Any) -> None:
    """The shortcut rounds its sizes up, so that its pool is linear at some sizes only."""

    def forward(m: Any, x: Tensor) -> Tensor:
        pair = (m.a(x), m.b(x))
        y = function(pair[0] > 0, *pair) if function is torch.where else function(*pair)
        return m.d(m.pool(y)) + m.g(torch.relu(m.f(y)))

    parts = {"a": conv(), "b": conv(), "d": conv(4, 4, 1), "f": conv(stride=2), "g": conv()}
    model = ready(Apply(forward, pool=nn.AvgPool2d(2, ceil_mode=True), **parts))
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    assert rmfx.report(gm).rows[-1].status == "removed"
    assert_equivalent(model, gm, image(2, 4, 8, 8))


@pytest.mark.parametrize(
    "form", ["divide", "divide_", "true_divide_", "multiply_", "subtract_", "negative", "negative_"]
)
def test_other_names_of_arithmetic_are_seen_through(form: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        number = () if "neg" in form else (2.0,)
        return x + m.b(getattr(y, form)(*number))

    model = ready(Apply(forward, a=conv(), b=conv()))
    gm = rmfx.remove_residuals(model, image())
    assert rmfx.report(gm).removed == 1
    assert_equivalent(model, gm, image())


def test_every_row_says_something() -> None:
    for row in LAYERS:
        assert row != Layers(row.kinds)
