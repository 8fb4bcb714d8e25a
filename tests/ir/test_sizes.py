"""Sizes of inner maps, and networks that hold for some input sizes only."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_refused, chain, conv, image, ready
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.ir.net import Net
from rmfx.ir.reading import sizes_of
from rmfx.testing import assert_equivalent


def downsampling(stem: nn.Module | None = None) -> nn.Module:
    """A block whose shortcut pools with ceil_mode, as in ResNet-D."""
    pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.stem(x))
        return m.shortcut(y) + F.relu(m.b(F.relu(m.a(y))))

    parts = {"a": conv(4, 6, 3, stride=2), "b": conv(6, 6), "shortcut": chain(pool, conv(4, 6, 1))}
    return ready(Apply(forward, stem=nn.Identity() if stem is None else stem, **parts))


def test_rounding_up_makes_no_difference_where_there_is_nothing_to_round() -> None:
    model, x = downsampling(), image(2, 4, 8, 10)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.report(gm).removed == 1
    for size in ((8, 10), (12, 6), (2, 2)):
        assert_equivalent(model, gm, image(1, 4, *size))


@pytest.mark.parametrize("size", [(9, 10), (8, 7)])
def test_a_size_at_which_it_does_is_an_error(size: tuple[int, int]) -> None:
    model = downsampling()
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 10))
    saved = io.BytesIO()
    torch.save(gm, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for form in (gm, copy.deepcopy(gm), loaded, rmfx.remove_residuals(gm)):
        with pytest.raises(rmfx.ShapeError, match=r"x has shape .*shortcut_0 averages fewer"):
            form(image(2, 4, *size))


@pytest.mark.parametrize("combine", [torch.add, torch.mul, torch.sub])
def test_what_spreads_out_at_other_sizes_on_the_way_is_an_error(combine: Any) -> None:
    """At a width of 1 or 2 the first combination is as wide as b makes it, not as a does."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x = combine(x, m.b(x))
        return m.c(x) + m.d(x)

    kinds = {"a": (1, 0), "b": (1, 1), "c": (1, 0), "d": (2, 1)}
    parts = {name: nn.Conv1d(2, 2, k, 2, padding) for name, (k, padding) in kinds.items()}
    model, x = ready(Apply(forward, **parts)), torch.randn(1, 2, 5, dtype=torch.float64)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.report(gm).rows[-1].status == "removed"
    assert_equivalent(model, gm, [x])
    for width in (1, 2):
        with pytest.raises(rmfx.ShapeError, match="combines equal sizes only where"):
            gm(torch.randn(1, 2, width, dtype=torch.float64))


def test_the_sequential_form_demands_the_same_sizes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool2d(2, ceil_mode=True)
            self.conv = conv(stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x) + self.conv(x)

    gm = rmfx.remove_residuals(ready(Block()), image(1, 4, 8, 8))
    network = rmfx.to_sequential(gm)
    torch.testing.assert_close(network(image(1, 4, 4, 6)), gm(image(1, 4, 4, 6)))
    with pytest.raises(rmfx.ShapeError, match="averages fewer"):
        copy.deepcopy(network)(image(1, 4, 5, 6))


def test_examples_of_such_a_size_are_refused() -> None:
    assert_refused(downsampling(), image(2, 4, 9, 10), reason="maps of size 9")
    assert_refused(downsampling(), image(2, 4, 8, 10), reason="pass example_inputs", example=False)


def test_a_pool_that_stays_asks_for_nothing() -> None:
    model = ready(chain(conv(), nn.AvgPool2d(2, ceil_mode=True), nn.ReLU(), conv()))
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    torch.testing.assert_close(gm(image()), model(image()))


@pytest.mark.parametrize("height", range(20, 40))
def test_the_demand_reaches_through_a_stem(height: int) -> None:
    stem = chain(conv(4, 4, 7, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    model = downsampling(stem)
    gm = rmfx.remove_residuals(model, image(1, 4, 32, 32))
    x = image(1, 4, height, 32)
    if stem.eval()(x).shape[2] % 2:
        with pytest.raises(rmfx.ShapeError, match="averages fewer"):
            gm(x)
    else:
        assert_equivalent(model, gm, x)


# ---- sizes at which a sum spreads out one of its operands ---------------------------------------


def halved(**more: nn.Module) -> dict[str, nn.Module]:
    """A branch of ⌊(H + 1)/2⌋ and a pool of ⌊H/2⌋ rows."""
    branch = chain(conv(4, 4, 3, stride=2), nn.ReLU(), conv(4, 4, 1))
    return {"b": branch, "pool": chain(nn.AvgPool2d(2), conv(4, 4, 1)), **more}


def twice(m: Any, x: Tensor) -> Tensor:
    y = m.b(x) + m.pool(x)
    z: Tensor = m.b2(y) + m.pool2(y)
    return z


BROADCASTING: dict[str, tuple[Any, dict[str, Any], int]] = {
    "a sum": (lambda m, x: m.b(x) + m.pool(x), {}, 1),
    "behind a stem": (
        lambda m, x: (lambda y: m.b(y) + m.pool(y))(F.relu(m.stem(x))),
        {"stem": conv(4, 4, 3, stride=2)},
        1,
    ),
    "two of them": (twice, {"b2": halved()["b"], "pool2": halved()["pool"]}, 2),
    "of three operands": (
        lambda m, x: m.b(x) + m.pool(x) + m.s(x),
        {"s": conv(4, 4, 1, stride=2)},
        2,
    ),
    "a sum in a branch": (
        lambda m, x: m.s(x) + m.d(F.relu(m.b(x) + m.pool(x))),
        {"s": conv(4, 4, 1, stride=2), "d": conv(4, 4, 1)},
        2,
    ),
    "a product in a branch": (
        lambda m, x: m.s(x) + m.d(F.relu(m.b(x) * torch.sigmoid(m.pool(x)))),
        {"s": conv(4, 4, 1, stride=2), "d": conv(4, 4, 1)},
        1,
    ),
    "a maximum in a branch": (
        lambda m, x: m.s(x) + m.d(torch.maximum(m.b(x), m.pool(x))),
        {"s": conv(4, 4, 1, stride=2), "d": conv(4, 4, 1)},
        1,
    ),
    "linear branches": (lambda m, x: m.s(x) + m.pool(x), {"s": conv(4, 4, 3, stride=2)}, 1),
}


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("name", BROADCASTING)
def test_other_sizes_are_right_or_refused(name: str, example: bool) -> None:
    forward, more, removed = BROADCASTING[name]
    model = ready(Apply(forward, **halved(**more)))
    verb = rmfx.merge_branches if name == "linear branches" else rmfx.remove_residuals
    gm = verb(model, image(2, 4, 16, 16) if example else None)
    if example:
        assert rmfx.report(gm).removed == removed
    right, refusals = 0, []
    for size in itertools.product(range(1, 10), (1, 2, 3, 8, 16)):
        x = image(2, 4, *size)
        try:
            expected = model(x)
        except RuntimeError:  # sizes that do not fit
            continue
        try:
            found = gm(x)
        except rmfx.ShapeError as error:
            refusals.append(str(error))
            continue
        torch.testing.assert_close(found, expected)
        right += 1
    assert right
    assert refusals or not rmfx.report(gm).removed
    assert all("combines equal sizes only where" in text for text in refusals)


@pytest.mark.parametrize("example", [True, False])
def test_an_inner_sum_that_stays_spreads_nothing_out(example: bool) -> None:
    down = chain(nn.Conv2d(4, 4, 2, stride=2, padding=1), nn.Conv2d(4, 4, 1, padding=2, bias=False))
    parts = {"down": down, "same": nn.Conv2d(4, 4, 3, padding=1, bias=False)}
    model = ready(Apply(lambda m, x: m.same(x) + (x + m.down(x)), **parts))
    gm = rmfx.remove_residuals(model, image(1, 4, 9, 9) if example else None)
    assert rmfx.report(gm).removed >= 1
    for size in (9, 10):  # where ⌊H/2⌋ + 5 is H
        assert_equivalent(model, gm, image(2, 4, size, 9))
    for size in ((1, 1), (1, 9), (9, 1)):  # where the sum spreads one of its operands out
        assert model(image(1, 4, *size)).shape[2:].numel() > 1
        with pytest.raises(rmfx.ShapeError, match="combines equal sizes only where"):
            gm(image(1, 4, *size))


@pytest.mark.parametrize("size", [(1, 2), (2, 1), (2, 2), (3, 3)])
def test_nothing_passes_a_sum_that_spreads_it_out(size: tuple[int, int]) -> None:
    """Behind it a convolution would read neighbours that were not there."""
    parts = {"a": conv(2, 4, 1), "b": conv(2, 2, 3, stride=2), "c": conv(2, 4)}

    def forward(m: Any, x: Tensor) -> Any:
        y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2)) + m.a(x)
        return F.relu(m.c(m.b(x))) + y

    model, x = ready(Apply(forward, **parts)), image(2, 2, *size)
    try:
        expected = model(x)
    except RuntimeError:  # sizes that do not fit
        assert size == (3, 3)
        return
    gm = rmfx.remove_residuals(model, x, verify=False)
    torch.testing.assert_close(gm(x), expected)
    assert_equivalent(model, gm, x)


def up_and_down(m: Any, x: Tensor) -> Tensor:
    """As large as x, rounded up to an even number."""
    made: Tensor = m.up(m.down(x))
    return made


SPREAD_LATER: dict[str, tuple[Any, nn.Module]] = {
    "a sum, transposed": (
        lambda m, x: m.same(x) + (x + up_and_down(m, x)),
        nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False),
    ),
    "a sum, interpolated": (
        lambda m, x: m.same(x) + (x + up_and_down(m, x)),
        nn.Upsample(scale_factor=2),
    ),
    "a product": (
        lambda m, x: m.same(x) + x * torch.sigmoid(up_and_down(m, x)),
        nn.Upsample(scale_factor=2),
    ),
}


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (4, 6)])
@pytest.mark.parametrize("name", SPREAD_LATER)
def test_what_may_be_spread_out_at_other_sizes_holds_for_the_example(
    name: str, size: tuple[int, int]
) -> None:
    """One row is spread out over the two of another value, of which no size is known."""
    forward, up = SPREAD_LATER[name]
    parts = {"same": nn.Conv2d(4, 4, 3, padding=1), "down": conv(4, 4, 1, stride=2), "up": up}
    model = ready(Apply(forward, **parts))
    for example in (image(1, 4, 4, 6), None):
        gm = rmfx.remove_residuals(model, example)
        assert rmfx.report(gm).removed == (example is not None)
        x = image(2, 4, *size)
        if example is None or size == (4, 6):
            assert_equivalent(model, gm, x)
        else:
            with pytest.raises(rmfx.ShapeError, match="converted for size 4 and size 6"):
                gm(x)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveMaxPool2d((1, 1)),
        Apply(lambda m, x: x.mean((2, 3), keepdim=True)),
        Apply(lambda m, x: x.amax((2, 3), keepdim=True)),
    ],
    ids=["average", "maximum", "mean", "amax"],
)
def test_gates_of_one_position_leave_all_sizes_open(pool: nn.Module) -> None:
    gate = chain(pool, conv(4, 2, 1), nn.SiLU(), conv(2, 4, 1), nn.Sigmoid())
    parts = {"a": conv(4, 4, 3), "b": conv(4, 4, 3), "gate": gate}
    model = ready(Apply(lambda m, x: x + m.b((lambda y: y * m.gate(y))(m.a(x))), **parts))
    gm = rmfx.remove_residuals(model, image(1, 4, 8, 8))
    assert rmfx.report(gm).removed == 1
    for size in ((8, 8), (1, 1), (1, 5), (7, 3)):
        assert_equivalent(model, gm, image(2, 4, *size))


def test_equal_sizes_of_all_inputs_ask_for_nothing() -> None:
    branch = chain(conv(4, 4, 3, stride=2), nn.ReLU(), conv(4, 4, 1))
    parts = {"b": branch, "s": conv(4, 4, 1, stride=2)}
    gm = rmfx.remove_residuals(
        ready(Apply(lambda m, x: m.b(x) + m.s(x), **parts)), image(2, 4, 8, 8)
    )
    assert rmfx.report(gm).removed == 1
    assert not [n for n in gm.graph.nodes if "inner_size" in n.name]


def test_sizes_that_do_not_follow_from_the_input_are_refused_where_they_may_differ() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.interpolate(x, scale_factor=1.5)
        z: Tensor = m.b(y) + m.pool(y)
        return z

    model = ready(Apply(forward, **halved()))
    assert_refused(model, image(2, 4, 8, 8), reason="agree for some input sizes only")


def test_sizes_behind_a_resizing_are_compared() -> None:
    branch = chain(conv(4, 4, 3), nn.ReLU(), conv(4, 4, 1))

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.interpolate(x, scale_factor=2.0)
        z: Tensor = m.b(y) + y
        return z

    model = ready(Apply(forward, b=branch))
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    assert rmfx.report(gm).removed == 1
    for size in ((1, 1), (3, 5)):
        assert_equivalent(model, gm, image(2, 4, *size))


@given(
    st.lists(
        st.tuples(st.sampled_from(["conv", "max", "avg", "act", "crop", "pad"]),
                  st.integers(1, 3), st.integers(1, 3), st.integers(0, 1)),
        max_size=5,
    ),
    st.integers(20, 60),
)  # fmt: skip
def test_the_law_gives_the_size_of_every_value(
    layers: list[tuple[str, int, int, int]], size: int
) -> None:
    made: list[nn.Module] = []
    for kind, kernel, stride, padding in layers:
        padding = min(padding, kernel // 2)
        if kind == "conv":
            made.append(nn.Conv1d(2, 2, kernel, stride, padding))
        elif kind == "max":
            made.append(nn.MaxPool1d(kernel, stride, padding))
        elif kind == "avg":
            made.append(nn.AvgPool1d(kernel, stride, padding))
        elif kind == "crop":
            made.append(Apply(lambda m, x: x[:, :, 1:]))
        elif kind == "pad":
            made.append(nn.ZeroPad1d((1, 0)))
        else:
            made.append(nn.ReLU())
    model = nn.Sequential(*made, nn.Conv1d(2, 2, 1)).eval()
    try:
        expected = model(torch.zeros(1, 2, size)).shape[2]
    except RuntimeError:  # nothing is left
        return
    net = Net(rmfx.trace(model, torch.zeros(1, 2, 50)))
    last = next(iter(net.graph.find_nodes(op="output"))).all_input_nodes[0]
    law = sizes_of(net).law(last)
    assert law is not None
    assert (size + law.growth[0]) // law.stride[0] == expected


def test_sizes_of_two_inputs_are_demanded_to_be_equal_where_they_are_added() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = conv(4, 4, 3, padding=0), conv()

        def forward(self, x: Tensor, y: Tensor) -> Any:
            z = self.stem(x)
            return z + self.a(z + y)

    model = ready(Two())
    inputs = (image(2, 4, 9, 8), image(2, 4, 7, 6))
    gm = rmfx.remove_residuals(model, inputs)
    assert rmfx.report(gm).removed >= 1
    with pytest.raises(rmfx.ShapeError, match="combines equal sizes only where"):
        gm(image(2, 4, 3, 8), image(2, 4, 7, 6))  # which the original spreads out


@pytest.mark.parametrize(
    "join",
    [torch.add, torch.mul, torch.maximum, torch.minimum, lambda a, b: torch.where(a > 0, a, b)],
    ids=["add", "mul", "maximum", "minimum", "where"],
)
def test_sizes_are_known_behind_everything_that_combines_place_by_place(join: Any) -> None:
    pool = nn.AvgPool2d(2, 2, ceil_mode=True)
    parts = {
        "a": conv(),
        "b": conv(),
        "f": conv(4, 4, 3, stride=2),
        "g": conv(),
        "p": conv(4, 4, 1),
    }

    def forward(m: Any, x: Tensor) -> Any:
        y = join(m.a(x), m.b(x))
        return m.p(m.pool(y)) + m.g(torch.relu(m.f(y)))

    model, x = ready(Apply(forward, pool=pool, **parts)), image(1, 4, 8, 8)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.report(gm).rows[-1].status == "removed"
    assert_equivalent(model, gm, image(2, 4, 6, 10))
    with pytest.raises(rmfx.ShapeError):
        gm(image(2, 4, 7, 10))
