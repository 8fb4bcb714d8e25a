"""Spans between a rearrangement and its return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_same, chain, conv, image, ready, snapshot, types
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

Forward = Callable[[Any, Tensor], Tensor]


def tokens(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.view(n, c, h * w).permute(0, 2, 1)
    return m.l2(F.gelu(m.l(x))).permute(0, 2, 1).reshape(n, c, h, w)


def tokens_first(m: Any, x: Tensor) -> Tensor:
    size = x.shape[2:]
    x = m.l(x.flatten(2).permute(2, 0, 1))
    return x.permute(1, 2, 0).unflatten(2, (size[0], size[1]))


def rows(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = torch.relu(m.n1(m.l(x.permute(0, 2, 3, 1).reshape(-1, c))))
    return m.l2(x).reshape(n, h, w, c).permute(0, 3, 1, 2)


def squeezed(m: Any, x: Tensor) -> Tensor:
    y = m.l2(torch.relu(m.l(x.mean((2, 3))))).sigmoid()
    return x * y[:, :, None, None]


def squeezed_by_view(m: Any, x: Tensor) -> Tensor:
    n, c = x.size(0), x.size(1)
    y = m.l(F.adaptive_avg_pool2d(x, 1).view(n, c)).sigmoid()
    return x * y.view(n, c, 1, 1)


def last(m: Any, x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    return (m.gamma * m.l2(F.gelu(m.l(x)))).permute(0, 3, 1, 2)


def last_gated(m: Any, x: Tensor) -> Tensor:
    x = m.l(x.movedim(1, -1))
    x = x * torch.sigmoid(m.l2(x.mean((1, 2), keepdim=True))) + m.shift
    return torch.movedim(x, -1, 1)


def residual_tokens(m: Any, x: Tensor) -> Tensor:
    y = x.flatten(2).transpose(1, 2)
    y = y + m.l2(torch.relu(m.l(y)))
    return y.transpose(1, 2).reshape(x.shape)


def per_sample_and_row(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = m.c1(x.transpose(1, 2).reshape(n * h, c, w))
    return torch.relu(y).view(n, h, c, w).transpose(1, 2)


def bordered(m: Any, x: Tensor) -> Tensor:
    y = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2, 3, 1))
    return torch.relu(m.l(y))[:, 3:-1, 1:-2].permute(0, 3, 1, 2)


SPANS: dict[str, Forward] = {
    "bordered": bordered,
    "transposed": lambda m, x: m.c(x.transpose(2, 3)).transpose(3, 2),
    "transposed, kernel of two sizes": lambda m, x: m.c35(x.transpose(-1, -2)).transpose(-1, -2),
    "mT": lambda m, x: torch.relu(m.c35(x.mT)).swapaxes(2, 3),
    "channels last": last,
    "channels last, gated": last_gated,
    "tokens": tokens,
    "tokens first": tokens_first,
    "rows": rows,
    "tokens with a shortcut of their own": residual_tokens,
    "flat tokens": lambda m, x: m.l(x.flatten(2).mT).transpose(1, 2).reshape(x.shape),
    "flat": lambda m, x: m.c1(x.flatten(2)).view(x.shape),
    "flat, like": lambda m, x: torch.relu(m.n1(m.c1(x.flatten(start_dim=2)))).view_as(x),
    "unsqueezed": lambda m, x: m.c3d(x.unsqueeze(2)).squeeze(2),
    "unsqueezed by index": lambda m, x: torch.relu(m.c3d(x[..., None])[..., 0]),
    "one position": lambda m, x: m.c(x.reshape(x.size(0), 4, -1, 1)).reshape_as(x),
    "divided": lambda m, x: torch.relu(x.unflatten(1, (2, 2)) * m.halves).flatten(1, 2),
    "squeezed": squeezed,
    "squeezed by view": squeezed_by_view,
    "per row": per_sample_and_row,
}
GATED = ("squeezed", "squeezed by view", "channels last, gated")  # whose sizes have to be known
PARTS: dict[str, Any] = {
    "a": conv,
    "b": conv,
    "c": lambda: conv(4, 4, 1),
    "c35": lambda: nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=2),
    "c1": lambda: conv(4, 4, 1, dims=1),
    "c3d": lambda: conv(4, 4, 1, dims=3),
    "n1": lambda: nn.BatchNorm1d(4),
    "l": lambda: nn.Linear(4, 4),
    "l2": lambda: nn.Linear(4, 4, bias=False),
    "gamma": lambda: nn.Parameter(torch.rand(4) + 0.5),
    "shift": lambda: nn.Parameter(torch.rand(1, 1, 1, 4)),
    "halves": lambda: nn.Parameter(torch.rand(2, 1, 1, 1) + 0.5),
}


def block(name: str) -> Any:
    """A residual block with a span in its branch, behind a stem."""
    forward = SPANS[name]

    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        return torch.relu(m.b(x + forward(m, torch.relu(m.a(x)))))

    parts = {key: make() for key, make in PARTS.items()}
    return ready(Apply(run, stem=conv(3, 4, padding=0), **parts))


X = image(2, 3, 9, 8)
OTHERS = (image(1, 3, 9, 8), image(3, 3, 7, 12), image(1, 3, 5, 5), image(2, 3, 8, 9))


@pytest.mark.parametrize("name", SPANS)
def test_a_span_that_returns_is_removed_at_all_sizes(name: str) -> None:
    model = block(name)
    converted = rmfx.remove_residuals(model, X)
    assert rmfx.report(converted).refused == 0, str(rmfx.report(converted))
    assert rmfx.report(converted).removed > 0
    for x in (X, *OTHERS):
        assert_equivalent(model, converted, (x,))


@pytest.mark.parametrize("name", [one for one in SPANS if one not in GATED])
def test_it_is_removed_without_example_inputs(name: str) -> None:
    model = block(name)
    converted = rmfx.remove_residuals(model)
    assert rmfx.report(converted).refused == 0, str(rmfx.report(converted))
    for x in (X, *OTHERS):
        assert_equivalent(model, converted, (x,))


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("name", SPANS)
def test_it_is_removed_from_an_exported_program(name: str, is_open: bool) -> None:
    model = block(name)
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},) if is_open else None
    program = torch.export.export(chain(model), (X,), dynamic_shapes=shapes)
    converted = rmfx.remove_residuals(program)
    assert rmfx.report(converted).refused == 0, str(rmfx.report(converted))
    for x in (X, *(OTHERS if is_open else ())):
        torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SPANS)
def test_gradients_reach_the_weights_of_its_layers(name: str) -> None:
    model = block(name)
    converted = rmfx.remove_residuals(model, X, differentiable=True)
    assert rmfx.report(converted).refused == 0, str(rmfx.report(converted))
    model(X).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    converted(X).square().sum().backward()
    own = dict(converted.named_parameters())
    for name, gradient in wanted.items():
        torch.testing.assert_close(own[name].grad, gradient, rtol=1e-8, atol=1e-8)


def test_what_is_left_are_layers_on_the_value_as_it_was() -> None:
    gm = rmfx.trace(block("channels last"))
    called = types(gm)
    assert called == [
        "Conv2d",
        "ReLU",
        "Conv2d",
        "ReLU",
        "Conv2d",
        "GELU",
        "Conv2d",
        "Conv2d",
        "ReLU",
    ]
    assert not any(node.op == "call_method" for node in gm.graph.nodes)
    again = rmfx.trace(gm)
    assert types(again) == called


def test_the_model_keeps_its_layers() -> None:
    model = block("channels last")
    before = snapshot(model)
    rmfx.remove_residuals(model, X)
    assert_same(before, snapshot(model))


# ---- what does not return -----------------------------------------------------------------------
def other_order(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return m.c(x.flatten(2).view(n, c, w, h).transpose(2, 3))


def other_channels(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return m.c(x.reshape(n, h, w, c).permute(0, 3, 1, 2))


def along_space(m: Any, x: Tensor) -> Tensor:
    return m.wide(x.transpose(1, 3)).transpose(1, 3)


DETOURS: dict[str, Forward] = {
    "sizes in another order": other_order,
    "channels of what was space": other_channels,
    "a layer along space": along_space,
    "a kernel over two axes at once": lambda m, x: m.c13(x.flatten(2)).view(x.shape),
    "numbers per position": lambda m, x: (x.flatten(2) * m.positions).view(x.shape),
}


@pytest.mark.parametrize("name", DETOURS)
def test_what_does_not_return_stays(name: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        return torch.relu(x + DETOURS[name](m, torch.relu(m.a(x))))

    further = {"c13": conv(4, 4, 3, dims=1), "positions": nn.Parameter(torch.rand(56))}
    parts = {"stem": conv(3, 4), "a": conv(), "c": conv(4, 4, 1), "wide": conv(8, 8, 1)}
    model = ready(Apply(run, **parts, **further))
    x = image(2, 3, 7, 8)
    converted = rmfx.remove_residuals(model, x)
    assert_equivalent(model, converted, (x,))
    assert rmfx.report(converted).removed == 0


def test_a_value_that_is_also_read_as_it_stands_keeps_its_layout() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.l(x.flatten(2).transpose(1, 2))
        return x + y.transpose(1, 2).reshape(x.shape), torch.softmax(y, 1)

    model = ready(Apply(run, l=nn.Linear(4, 4)))
    gm = rmfx.trace(model, image())
    assert "Linear" in types(gm)
    for x in (image(), image(1, 4, 5, 6)):
        for one, other in zip(gm(x), model(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_sizes_of_a_value_in_another_layout_are_read_where_it_is_as_it_was() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = torch.relu(m.l(x.flatten(2).transpose(1, 2)))
        n, length, c = y.shape
        y = y / length
        return x + m.b(y.transpose(1, 2).reshape(n, c, x.size(2), x.size(3)))

    model = ready(Apply(run, l=nn.Linear(4, 4), b=conv()))
    converted = rmfx.remove_residuals(model, image(), strict=False)
    assert "Linear" not in types(converted)
    for x in (image(), image(1, 4, 5, 6)):
        torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)


def test_layers_that_are_called_twice_stay() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return x + m.l(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), m.l(x.mean((2, 3)))

    model = ready(Apply(run, l=nn.Linear(4, 4)))
    assert types(rmfx.trace(model, image())) == ["Linear", "Linear"]


def test_a_grouped_convolution_of_features_is_no_linear_layer() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.b(torch.relu(m.g(m.a(x)[:, :, None]).squeeze(2)))

    grouped = nn.Conv1d(8, 8, 1, groups=2)
    model = ready(Apply(forward, a=nn.Linear(8, 8), g=grouped, b=nn.Linear(8, 8)))
    x = image(3, 8)
    converted = rmfx.remove_residuals(model, x)
    assert_equivalent(model, converted, (x,))
