"""A product with a constant tensor is the linear layer that it is, however it is written."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_removed, called, ready
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

Forward = Callable[[Any, Tensor], Any]


class Holder(nn.Module):
    """Weights of all kinds between layers that give them 4 channels and read 4 of them."""

    def __init__(self, forward: Forward, dims: int) -> None:
        super().__init__()
        self.body, self.dims = forward, dims
        kind: Any = (nn.Linear, nn.Conv1d, nn.Conv2d)[dims]
        options: Any = () if dims == 0 else (1,)
        self.first = kind(4, 4, *options)
        self.last = kind(4, 4, *options)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.v = nn.Parameter(torch.randn(4))
        self.b = nn.Parameter(torch.randn(4))
        self.k = nn.Parameter(torch.randn(1, 4, 4))
        self.t = nn.Parameter(torch.randn(4, 4, 4))
        self.h = nn.Parameter(torch.randn(4, 2, 3))
        self.g = nn.Parameter(torch.randn(2, 3, 4))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.relu(self.body(self, self.first(x))))


# Of (batch, 4): what is called for each between two layers.
FEATURES: dict[str, tuple[Forward, list[str]]] = {
    "@": (lambda m, x: x @ m.w, ["Linear"]),
    "@ of a transposed weight": (lambda m, x: x @ m.w.T, ["Linear"]),
    "@ of mT": (lambda m, x: x @ m.w.mT, ["Linear"]),
    "@ of transpose": (lambda m, x: x @ m.w.transpose(0, 1), ["Linear"]),
    "@ of a weight times a mask": (lambda m, x: x @ (m.w * m.mask), ["Linear"]),
    "operator": (lambda m, x: operator.matmul(x, m.w), ["Linear"]),
    "matmul": (lambda m, x: torch.matmul(x, m.w), ["Linear"]),
    "matmul by names": (lambda m, x: torch.matmul(other=m.w, input=x), ["Linear"]),
    "linalg": (lambda m, x: torch.linalg.matmul(x, m.w), ["Linear"]),
    "method": (lambda m, x: x.matmul(m.w), ["Linear"]),
    "weight on the left": (
        lambda m, x: (m.w @ x.T).T,
        ["Linear"],
    ),
    "mm": (lambda m, x: torch.mm(x, m.w), ["Linear"]),
    "mm by names": (lambda m, x: torch.mm(mat2=m.w, input=x), ["Linear"]),
    "method mm": (lambda m, x: x.mm(mat2=m.w), ["Linear"]),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), ["Linear"]),
    "method addmm": (lambda m, x: m.b.addmm(x, m.w), ["Linear"]),
    "addmm by names": (lambda m, x: torch.addmm(mat2=m.w, mat1=x, input=m.b), ["Linear"]),
    "addmm of a row": (lambda m, x: torch.addmm(m.k[0, :1], x, m.w), ["Linear"]),
    "addmm of a number": (lambda m, x: torch.addmm(m.b[:1], x, m.w), ["Linear", "add"]),
    "addmm with factors": (
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=-2),
        ["Linear", "add"],
    ),
    "addmm to the input": (lambda m, x: torch.addmm(x, x, m.w), ["Linear", "add"]),
    "einsum": (lambda m, x: torch.einsum("bi,io->bo", x, m.w), ["Linear"]),
    "einsum without a result": (lambda m, x: torch.einsum("ai,ib", x, m.w), ["Linear"]),
    "einsum, weight first": (lambda m, x: torch.einsum("oi, ...i -> ...o", m.w, x), ["Linear"]),
    "einsum by lists": (lambda m, x: torch.einsum(x, [0, 1], m.w, [2, 1], [0, 2]), ["Linear"]),
    "einsum by lists without a result": (
        lambda m, x: torch.einsum(x, [0, 30], m.w, [1, 30]),
        ["Linear"],
    ),
    "einsum of a tuple": (lambda m, x: torch.einsum("bi,io->bo", (x, m.w)), ["Linear"]),
    "einsum of two weights": (
        lambda m, x: torch.einsum("bi,i,oi->bo", x, m.v, m.w),
        ["Linear"],
    ),
    "einsum of factors": (lambda m, x: torch.einsum("bi,i->bi", x, m.v), ["mul"]),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 1), ["Linear"]),
    "tensordot of dimensions": (
        lambda m, x: torch.tensordot(x, m.w, dims=([-1], [1])),
        ["Linear"],
    ),
    "inner": (lambda m, x: torch.inner(x, m.w), ["Linear"]),
    "multi_dot": (lambda m, x: torch.linalg.multi_dot((x, m.w, m.w)), ["Linear"]),
    "F.bilinear": (
        lambda m, x: F.bilinear(x, m.v.expand(x.size(0), -1), m.t, m.b),
        ["Linear"],
    ),
    "F.bilinear, the other side": (
        lambda m, x: F.bilinear(m.v.expand(x.shape[0], 4), x, m.t),
        ["Linear"],
    ),
    "a vector": (
        lambda m, x: (x @ m.v).unsqueeze(1) + m.b,
        ["Linear", "squeeze", "unsqueeze", "add"],
    ),
    "mv": (lambda m, x: torch.mv(x, m.v)[:, None] + m.b, ["Linear", "add"]),
}  # fmt: skip


# Of (batch, positions, 4).
TOKENS: dict[str, tuple[Forward, list[str]]] = {
    "@": (lambda m, x: x @ m.w, ["Linear"]),
    "@ of a batch of one": (lambda m, x: x @ m.k, ["Linear"]),
    "bmm": (lambda m, x: torch.bmm(x, m.k.expand(x.size(0), -1, -1)), ["Linear"]),
    "bmm of a spread weight": (
        lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], 4, 4)),
        ["Linear"],
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b, x, m.k.expand(x.size(0), -1, -1)),
        ["Linear"],
    ),
    "einsum": (lambda m, x: torch.einsum("btc,co->bto", x, m.w), ["Linear"]),
    "einsum with dots": (lambda m, x: torch.einsum("...c,co->...o", x, m.w), ["Linear"]),
    "heads and back": (
        lambda m, x: torch.einsum("bthd,hdo->bto", torch.einsum("btc,chd->bthd", x, m.h), m.g),
        ["Linear", "Linear"],
    ),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])), ["Linear"]),
    "channels behind": (
        lambda m, x: torch.einsum("btc,co->bot", x, m.w).mT,
        ["Linear"],
    ),
}


# Of (batch, 4, length).
SIGNALS: dict[str, tuple[Forward, list[str]]] = {
    "weight @": (lambda m, x: m.w @ x, ["Conv1d"]),
    "a batch of one @": (lambda m, x: m.k @ x, ["Conv1d"]),
    "einsum": (lambda m, x: torch.einsum("oc,bcl->bol", m.w, x), ["Conv1d"]),
    "bmm": (lambda m, x: torch.bmm(m.k.expand(x.size(0), -1, -1), x), ["Conv1d"]),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b[:, None], m.w.expand(x.size(0), 4, 4), x),
        ["Conv1d"],
    ),
}


# Of (batch, 4, height, width).
IMAGES: dict[str, tuple[Forward, list[str]]] = {
    "einsum": (lambda m, x: torch.einsum("oc,bchw->bohw", m.w, x), ["Conv2d"]),
    "einsum with dots": (lambda m, x: torch.einsum("bc...,co->bo...", x, m.w), ["Conv2d"]),
    "einsum of factors": (lambda m, x: torch.einsum("bchw,c->bchw", x, m.v), ["mul"]),
    "channels last and back": (
        lambda m, x: torch.einsum("bchw,oc->bhwo", x, m.w).permute(0, 3, 1, 2),
        ["Conv2d"],
    ),
    "tensordot": (
        lambda m, x: torch.tensordot(x, m.w, dims=([1], [0])).permute(0, 3, 1, 2),
        ["Conv2d"],
    ),
}
# What tells only by the number of dimensions of its input, which a Linear layer leaves open.
NEEDS_INPUTS = (
    *("features: weight on the left", "features: a vector", "features: mv"),
    *("tokens: @ of a batch of one", "tokens: tensordot"),
    *("tokens: heads and back", "tokens: channels behind"),
)
ALL = [
    pytest.param(*row, shape, dims, id=f"{kind}: {name}")
    for kind, rows, shape, dims in (
        ("features", FEATURES, (3, 4), 0),
        ("tokens", TOKENS, (3, 5, 4), 0),
        ("signals", SIGNALS, (3, 4, 6), 1),
        ("images", IMAGES, (3, 4, 6, 5), 2),
    )
    for name, row in rows.items()
]


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("forward", "expected", "shape", "dims"), ALL)
def test_it_is_called_as_the_layer_that_it_is(
    forward: Forward, expected: list[str], shape: tuple[int, ...], dims: int
) -> None:
    model, x = ready(Holder(forward, dims)), tensor(*shape)
    gm = rmfx.trace(model, x)
    assert called(gm)[1:-2] == expected
    for other in (x, tensor(1, *shape[1:]), tensor(7, *shape[1:])):
        torch.testing.assert_close(gm(other), model(other), rtol=1e-12, atol=1e-12)


class Branch(Holder):
    """The same as a branch."""

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return x + self.last(torch.relu(self.body(self, x)))


PLAIN = {"Linear", "Conv1d", "Conv2d", "mul", "add"}
SPREADS = "features: mv"  # one feature by a bias of several


@pytest.mark.parametrize(
    ("forward", "expected", "shape", "dims"),
    [p for p in ALL if PLAIN.issuperset(p.values[1]) and p.id != SPREADS],
)
def test_a_branch_of_it_is_removed(
    forward: Forward, expected: list[str], shape: tuple[int, ...], dims: int
) -> None:
    model, x = ready(Branch(forward, dims)), tensor(*shape)
    for form in (model, torch.export.export(model, (x,), strict=False)):
        gm = rmfx.remove_residuals(form, x)
        report = rmfx.report(gm)
        assert report.removed, str(report)
        assert not report.adds_left, str(report)
        assert_equivalent(model, gm, x)


@pytest.mark.parametrize("labels", [(26, 1), (1, 26), (0, 51), (51, 25)])
def test_lists_without_a_result_are_in_the_order_of_their_numbers(labels: tuple[int, int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.einsum(x, [labels[0], 30], m.w, [labels[1], 30])

    model, x = ready(Apply(forward, w=nn.Parameter(torch.randn(5, 4)))), tensor(3, 4)
    gm = rmfx.trace(model, x)
    assert "Linear" in called(gm)
    assert gm(x).shape == model(x).shape
    assert_equivalent(model, gm, x)


@pytest.mark.parametrize("name", ["@", "mm", "addmm", "addmm with factors"])
def test_so_is_one_of_a_decomposed_program(name: str) -> None:
    model, x = ready(Branch(FEATURES[name][0], 0)), tensor(3, 4)
    program = torch.export.export(model, (x,), strict=False).run_decompositions()
    gm = rmfx.remove_residuals(program, x)
    assert rmfx.report(gm).removed == 1, str(rmfx.report(gm))
    assert_equivalent(model, gm, x)


@pytest.mark.parametrize(
    ("forward", "expected", "shape", "dims"), [p for p in ALL if p.id not in NEEDS_INPUTS]
)
def test_it_is_known_without_example_inputs_where_the_call_tells(
    forward: Forward, expected: list[str], shape: tuple[int, ...], dims: int
) -> None:
    model, x = ready(Holder(forward, dims)), tensor(*shape)
    gm = rmfx.trace(model)
    assert called(gm)[1:-2] == expected
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["@", "addmm", "einsum", "addmm with factors", "F.bilinear"])
def test_gradients_reach_the_weight(name: str) -> None:
    model, x = ready(Branch(FEATURES[name][0], 0)), tensor(3, 4)
    gm = rmfx.remove_residuals(model, x, differentiable=True)
    assert rmfx.report(gm).removed == 1, str(rmfx.report(gm))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p))
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted, made = (
        torch.autograd.grad(f(x).square().sum(), parameters, allow_unused=True) for f in (model, gm)
    )
    torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-10)


class Sides(nn.Module):
    """Two layers whose sizes differ, one of them of two inputs, around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.two = nn.Linear(3, 4), nn.Bilinear(4, 6, 5)
        self.w, self.side = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.two(x, self.side.expand(len(x), -1))
        return x + torch.relu(y) @ self.w


def test_a_bilinear_layer_with_a_constant_side_is_linear() -> None:
    model, x = ready(Sides()), tensor(3, 3)
    gm = assert_removed(model, x, without_inputs=False)
    assert_equivalent(model, gm, x)


# What is no layer, and a part of the reason.
REFUSED: dict[str, tuple[Forward, tuple[int, ...], str]] = {
    "a weight for each sample": (lambda m, x: torch.bmm(x, m.t), (4, 5, 4), "for each sample"),
    "a weight for each place": (
        lambda m, x: torch.einsum("btc,tco->bto", x, m.t),
        (3, 4, 4),
        "for each sample or place",
    ),
    "sums of what stands apart": (
        lambda m, x: torch.einsum("btc,to->bo", x, m.w).unsqueeze(1),
        (3, 4, 4),
        "",
    ),
    "two values": (lambda m, x: x @ (x.mT @ x), (3, 4, 4), "two matrices that both depend"),
    "one value twice": (lambda m, x: x @ x, (3, 4, 4), "two matrices that both depend"),
}


@pytest.mark.parametrize(("forward", "shape", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_layer_is_refused(forward: Forward, shape: tuple[int, ...], reason: str) -> None:
    model, x = ready(Branch(forward, 0)), tensor(*shape)
    gm = rmfx.remove_residuals(model, x)
    (row,) = rmfx.report(gm).to_dict()["sites"]
    assert reason in row["reason"]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)


class Only(nn.Module):
    """A product and nothing else, with weights of some shapes."""

    def __init__(self, product: Forward, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.product = product
        self.w, self.v = (nn.Parameter(torch.randn(*s).double()) for s in (shapes * 2)[:2])

    def forward(self, x: Tensor) -> Any:
        return self.product(self, x)


# What means different things for different numbers of dimensions or sizes: weights and inputs.
Shapes = tuple[tuple[int, ...], ...]
BY_RANK: dict[str, tuple[Forward, Shapes, Shapes]] = {
    "a batch of weights": (lambda m, x: x @ m.w, ((1, 4, 3),), ((5, 4), (2, 5, 4))),
    "two weights": (lambda m, x: x @ m.w, ((2, 4, 3),), ((5, 4), (2, 5, 4), (1, 5, 4))),
    "heads": (lambda m, x: x @ m.w, ((2, 4, 3),), ((3, 2, 5, 4),)),
    "weight on the left": (
        lambda m, x: m.w @ x,
        ((3, 4),),
        ((4,), (4, 5), (2, 4, 5), (2, 3, 4, 5)),
    ),
    "a vector on the left": (lambda m, x: m.w @ x, ((4,),), ((4,), (4, 5), (2, 4, 5))),
    "a vector": (lambda m, x: x @ m.w, ((4,),), ((4,), (5, 4), (2, 5, 4))),
    "inner": (lambda m, x: torch.inner(x, m.w), ((2, 3, 4),), ((4,), (5, 4), (2, 5, 4))),
    "inner, weight first": (
        lambda m, x: torch.inner(m.w, x),
        ((3, 4),),
        ((4,), (5, 4), (2, 5, 4)),
    ),
    "tensordot": (
        lambda m, x: torch.tensordot(x, m.w, dims=([1], [0])),
        ((4, 3),),
        ((5, 4), (2, 4, 5), (2, 4, 4, 5)),
    ),
    "tensordot of two": (lambda m, x: torch.tensordot(x, m.w), ((5, 4, 3),), ((5, 4), (2, 5, 4))),
    "einsum with dots behind": (
        lambda m, x: torch.einsum("bc...,co->bo...", x, m.w),
        ((4, 3),),
        ((5, 4), (2, 4, 5), (2, 4, 4)),
    ),
    "einsum of factors and dots": (
        lambda m, x: torch.einsum("c...,c->c...", x, m.w),
        ((4,),),
        ((4,), (4, 4), (4, 2, 3)),
    ),
    "einsum of a diagonal": (
        lambda m, x: torch.einsum("bc,cc->bc", x, m.w),
        ((4, 4),),
        ((5, 4), (5, 1)),
    ),
    "einsum that spreads out": (
        lambda m, x: torch.einsum("bc,co->bo", x, m.w),
        ((1, 3),),
        ((5, 4), (5, 1)),
    ),
    "einsum over height": (
        lambda m, x: torch.einsum("bchw,ho->bcow", x, m.w),
        ((3, 4),),
        ((5, 4, 3, 2),),
    ),
    "einsum over all": (
        lambda m, x: torch.einsum("bchw,wcho->bo", x, m.w),
        ((2, 4, 2, 3),),
        ((5, 4, 2, 2),),
    ),
    "einsum over the batch": (
        lambda m, x: torch.einsum("bc,bo->co", x, m.w),
        ((5, 3),),
        ((5, 4),),
    ),
    "einsum of three outputs": (
        lambda m, x: torch.einsum("btc,schd->sbthd", x, m.w),
        ((3, 4, 2, 2),),
        ((2, 5, 4),),
    ),
    "addmm, weight first": (lambda m, x: torch.addmm(m.v, m.w, x), ((3, 4), (3, 1)), ((4, 5),)),
    "addmm of a column": (lambda m, x: torch.addmm(m.v, x, m.w), ((4, 3), (3, 1)), ((3, 4),)),
    "multi_dot": (
        lambda m, x: torch.linalg.multi_dot([m.w, x, m.v]),
        ((3, 5), (4, 2)),
        ((5, 4),),
    ),
    "another size": (
        lambda m, x: x[:1] @ m.w.expand(x.size(0), -1, -1),
        ((1, 4, 3),),
        ((2, 5, 4), (1, 5, 4)),
    ),
    "a fixed size": (
        lambda m, x: x @ m.w.expand(2, -1, -1),
        ((1, 4, 3),),
        ((2, 5, 4), (1, 5, 4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("product", "weights", "shapes"), BY_RANK.values(), ids=BY_RANK)
def test_inputs_of_other_dimensions_are_right_or_refused(
    product: Forward, weights: Shapes, shapes: Shapes, fold: bool
) -> None:
    model = Only(product, weights).eval()
    for example in (None, *shapes):
        gm = rmfx.trace(model, None if example is None else tensor(*example), fold=fold)
        for shape in shapes:
            x = tensor(*shape)
            try:
                made = gm(x)
            except rmfx.ShapeError:
                assert shape != example
                continue
            torch.testing.assert_close(made, model(x), rtol=1e-12, atol=1e-12)
