"""Sizes that follow from those of the inputs are no numbers of channels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_refused, chain, conv, image, ready
from torch import Tensor, fx, nn

import rmfx
from rmfx.ir.open_sizes import OpenSizes, coprime_sizes, largest_number
from rmfx.testing import assert_equivalent

Form = Callable[[Any, Tensor], Tensor]


def swapped(y: Tensor) -> Tensor:
    return y.transpose(1, 2)


# Each adds a value to itself, in another order along what is no channel.
OPEN: dict[str, Form] = {
    "tokens": lambda m, x: (y := swapped(m.conv(x).flatten(2))) + y.flip(1),
    "all in a row": lambda m, x: (y := m.conv(x).reshape(x.shape[0], -1)) + y.flip(1),
    "flattened": lambda m, x: (y := m.conv(x).flatten(1)) + y.roll(1, 1),
    "rows": lambda m, x: (y := m.conv(x).transpose(1, 2)) + y.flip(1),
    "columns": lambda m, x: (y := m.conv(x).permute(0, 3, 1, 2)) + y.roll(2, 1),
    "samples": lambda m, x: (y := m.conv(x).transpose(0, 1)) + y.flip(1),
    "windows": lambda m, x: (y := F.unfold(m.conv(x), 3).transpose(1, 2)) + y.flip(1),
    "rows up to a number": lambda m, x: (y := m.conv(x).transpose(1, 2)[:, :20]) + y.flip(1),
    "rows padded to a multiple": lambda m, x: (
        (y := F.pad(m.conv(x), (0, 0, 0, -x.shape[2] % 256)).transpose(1, 2)) + y.flip(1)
    ),
    "small maps": lambda m, x: (y := F.max_pool2d(m.conv(x), 5, 4).transpose(1, 2)) + y.flip(1),
}
OTHERS = [(2, 4, 11, 8), (3, 4, 8, 13), (1, 4, 5, 5), (2, 4, 40, 9), (2, 4, 300, 8)]


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("verb", [rmfx.remove_residuals, rmfx.merge_branches])
def test_a_size_of_the_image_is_no_number_of_channels(name: str, verb: Any) -> None:
    model = ready(Apply(OPEN[name], conv=conv(4, 4)))
    gm = verb(model, image(2, 4, 8, 8))
    assert rmfx.report(gm).removed == 0
    assert "changes with the size of the inputs" in rmfx.report(gm).rows[0].reason
    for shape in [(2, 4, 8, 8), *OTHERS]:
        assert torch.equal(gm(image(*shape)), model(image(*shape)))


def test_a_program_of_fixed_sizes_is_rewritten() -> None:
    model, x = ready(Apply(OPEN["tokens"], conv=conv(4, 4))), image(2, 4, 8, 8)
    gm = rmfx.remove_residuals(torch.export.export(model, (x,)))
    assert rmfx.report(gm).removed == 1
    assert_equivalent(model, gm, x)
    with pytest.raises(rmfx.ShapeError):
        gm(image(2, 4, 9, 9))


# Whose channels are known though no layer stands beside the sum.
FIXED: dict[str, Form] = {
    "behind a layer": lambda m, x: (y := torch.relu(m.conv(x))) + y.flip(1),
    "behind a mean": lambda m, x: (y := m.conv(x).mean((2, 3))) + y.flip(1),
    "tokens times a number": lambda m, x: (y := swapped(m.conv(x).flatten(2))) + 0.5 * y,
    "behind a shuffle of pixels": lambda m, x: (y := F.pixel_shuffle(m.conv(x), 2)) + 0.5 * y,
    "of a fixed grid": lambda m, x: (
        (y := F.adaptive_avg_pool2d(m.conv(x), (5, 3)).transpose(1, 2)) + y.flip(1)
    ),
    "beside space of the same size": lambda m, x: (y := m.conv(x).softmax(1)) + y.roll(3, 1),
    "beside a gate": lambda m, x: (y := m.conv(x) * m.conv(x).mean(1, True)) + y.flip(1),
}


@pytest.mark.parametrize("name", FIXED)
def test_channels_that_stay_are_channels(name: str) -> None:
    model = ready(Apply(FIXED[name], conv=conv(4, 8)))
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    assert rmfx.report(gm).removed == 1
    for shape in OTHERS:
        assert_equivalent(model, gm, image(*shape))


def test_a_network_of_one_size_has_fixed_tokens() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).flatten(2).transpose(1, 2)
        return m.linear((y + y.flip(1)).flatten(1))  # type: ignore[no-any-return]

    model = ready(Apply(forward, conv=conv(4, 4), linear=nn.Linear(256, 3)))
    x = image(2, 4, 8, 8)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.report(gm).removed == 1
    assert_equivalent(model, gm, x)


def test_a_network_of_few_sizes_holds_for_those_of_the_example() -> None:
    """It takes 6x12 and 4x16, and no size between them, at which a flat map is shorter."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        flat = y.flatten(1)
        z = (flat + flat.flip(1)).reshape(y.shape)
        small = F.max_pool2d(z, 2) + F.max_pool2d(z, 2, ceil_mode=True)  # of even sizes
        return m.linear(F.pad(small, (0, 0, 1, 0)).flatten(1))  # type: ignore[no-any-return]

    model = ready(Apply(forward, conv=conv(4, 4), linear=nn.Linear(96, 3)))
    gm = rmfx.remove_residuals(model, image(2, 4, 6, 12))
    assert rmfx.report(gm).removed == 1
    assert_equivalent(model, gm, image(3, 4, 6, 12))
    model(image(2, 4, 4, 16))
    with pytest.raises(rmfx.ShapeError, match="6"):
        gm(image(2, 4, 4, 16))


def test_a_network_of_multiples_is_tried_at_multiples() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        small = F.max_pool2d(m.conv(x), 8)
        z = F.interpolate(small, scale_factor=8) + m.conv(x)  # of multiples of 8 only
        y = z.transpose(1, 2)
        return y + y.flip(1)

    model = ready(Apply(forward, conv=conv(4, 4)))
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    assert_equivalent(model, gm, image(1, 4, 24, 16))


@pytest.mark.parametrize(
    ("shrink", "shape", "others"),
    [
        # ⌈(n + 2)/2⌉ and n - 1 agree at 4 and 5, and at 2, where one row is spread.
        (lambda m, x: m.padded(x)[:, :, ::2, ::2] + m.crop(x), (1, 4, 2, 4), [(1, 4, 5, 5)]),
        # ⌈(n - 2)/2⌉ and ⌈n/3⌉ agree from 5 to 8; 5 and 6 give the same size.
        (lambda m, x: m.small(x)[:, :, ::2] + x[:, :, ::3], (2, 4, 6), [(1, 4, 5), (1, 4, 8)]),
        # ⌈n/6⌉ and ⌈⌈n/2⌉/2⌉ are 1 from 1 to 4, and 2 at 7 and 8.
        (lambda m, x: x[:, :, ::6] + x[:, :, ::2][:, :, ::2], (1, 4, 1, 1), [(1, 4, 7, 1)]),
    ],
)
def test_tokens_of_a_network_that_takes_few_sizes(
    shrink: Form, shape: tuple[int, ...], others: list[tuple[int, ...]]
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = shrink(m, x).flatten(2).transpose(1, 2)
        return y + y.flip(1)

    layers = {"crop": nn.Conv2d(4, 4, 2), "small": nn.Conv1d(4, 4, 3)}
    model = ready(Apply(forward, **layers, padded=nn.Conv2d(4, 4, 1, padding=1)))
    gm = rmfx.remove_residuals(model, image(*shape))
    assert "changes with the size of the inputs" in rmfx.report(gm).rows[-1].reason
    for other in (shape, *others):
        assert_equivalent(model, gm, image(*other))


def test_sizes_at_which_a_product_spreads_one_token_are_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).transpose(1, 2)
        return (y + 0.5 * y.flip(1)) * m.gain

    model = ready(Apply(forward, conv=nn.Conv1d(4, 4, 3), gain=nn.Parameter(torch.rand(7, 1))))
    gm = rmfx.remove_residuals(model, image(1, 4, 9))
    assert rmfx.report(gm).removed == 1
    assert_equivalent(model, gm, image(3, 4, 9))
    assert model(image(1, 4, 3)).shape == (1, 7, 4)
    with pytest.raises(rmfx.ShapeError, match="was converted for size 9"):
        gm(image(1, 4, 3))


@pytest.mark.parametrize(
    ("forward", "shape", "other"),
    [
        (lambda m, x: x + x.flip(1), (2, 4, 8, 8), (2, 6, 8, 8)),
        (lambda m, x: x + torch.relu(2 * x.roll(1, 1)), (2, 4, 8, 8), (2, 1, 8, 8)),
        (lambda m, x: x + x.flip(1), (2, 5), (2, 7)),
        (lambda m, x: x + x.flip(1), (2, 9, 4), (2, 7, 4)),
    ],
)
def test_channels_that_only_the_input_fixes_are_demanded(
    forward: Form, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    model = ready(Apply(forward))
    gm = rmfx.remove_residuals(model, image(*shape))
    assert rmfx.report(gm).removed == 1
    assert_equivalent(model, gm, image(*shape))
    assert_equivalent(model, gm, image(3, shape[1], *[n + 3 for n in shape[2:]]))
    with pytest.raises(rmfx.ShapeError, match="convert the network again"):
        gm(image(*other))


def test_other_channels_pass_where_nothing_was_rewritten() -> None:
    model = ready(Apply(lambda m, x: x + torch.softmax(x, 1)))
    gm = rmfx.remove_residuals(model, image())
    assert torch.equal(gm(image(2, 7, 5, 5)), model(image(2, 7, 5, 5)))


def test_halves_of_an_input_are_halves_at_other_sizes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)

    model = ready(Apply(forward))
    gm = rmfx.trace(model, image(2, 4, 8, 8))
    assert torch.equal(gm(image(2, 6, 8, 8)), model(image(2, 6, 8, 8)))


def test_features_of_one_size_do_not_cut_a_network_of_all() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.linear(m.conv(x).flatten(1)[:, :100])  # type: ignore[no-any-return]

    model = ready(Apply(forward, conv=conv(4, 6), linear=nn.Linear(100, 3)))
    # At 8 by 8 they reach into the second channel, at 12 by 12 they end in the first one.
    with pytest.raises(rmfx.OptionError, match="held by flatten"):
        rmfx.prune_channels(model, image(2, 4, 8, 8), target=0.5, importance="l2")


def test_other_arguments_than_tensors_are_given_as_they_were() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).flatten(2).transpose(1, 2)
        return y + y.flip(1)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Apply(forward, conv=conv(4, 4))

        def forward(self, x: Tensor, factor: float) -> Any:
            return self.inner(x * factor)

    gm = rmfx.remove_residuals(ready(Scaled()), (image(2, 4, 8, 8), 2.0))
    assert "changes with the size" in rmfx.report(gm).rows[0].reason


def test_the_refusal_says_what_is_right() -> None:
    model = ready(Apply(OPEN["tokens"], conv=conv(4, 4)))
    assert_refused(model, image(2, 4, 8, 8), reason="no layer fixes its channels", example=True)


def test_sizes_are_prime_and_above() -> None:
    sizes = list(itertools.islice(coprime_sizes(20), 4))
    assert sizes == [23, 29, 31, 37]
    assert all(math.gcd(a, b) == 1 for a, b in itertools.combinations(sizes, 2))
    assert next(coprime_sizes(0)) == 2


def test_numbers_are_found_wherever_they_stand() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method("roll", (x, [3, -70]), {"dims": (1, 2)})
    part = graph.call_function(torch.add, (node, 1), {"other": {"a": slice(None, 90)}})
    assert largest_number([node]) == 70
    assert largest_number([node, part]) == 90
    assert largest_number([x]) == 0


def test_nothing_is_run_where_layers_tell() -> None:
    model = ready(chain(conv(3, 4), nn.ReLU(), conv(4, 4)))
    gm = rmfx.trace(model, image(2, 3, 8, 8))
    sizes, names = OpenSizes(gm), [node.name for node in gm.graph.nodes]
    assert not any(sizes(name, 1) for name in names[:-1])
    assert "_changes" not in vars(sizes)
