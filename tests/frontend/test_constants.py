"""What follows from the model's own tensors alone is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_removed, conv, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.ir.conditions import take_conditions
from rmfx.ir.converted import copy_graph
from rmfx.testing import assert_equivalent


class StandardisedConv(nn.Conv2d):
    """A convolution that normalises its weight at every call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


def standardised() -> nn.Module:
    parts: dict[str, Any] = {"a": StandardisedConv(4, 4, 3, padding=1), "b": conv()}
    scale = nn.Parameter(torch.rand(4) + 0.5)
    return ready(
        Apply(
            lambda m, x: x + m.scale.view(1, -1, 1, 1) * m.b(F.relu(m.a(x))), scale=scale, **parts
        )
    )


def test_a_weight_standardised_conv_is_a_conv() -> None:
    gm = assert_removed(standardised(), image())
    graph = copy_graph(gm)
    take_conditions(graph)
    assert [n.op for n in graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]


def test_every_front_end_sees_the_same() -> None:
    model, x = standardised(), image()
    program = torch.export.export(model, (x,))
    for form in (torch.fx.symbolic_trace(model), program, program.run_decompositions()):
        gm = rmfx.remove_residuals(form, x)
        assert rmfx.report(gm).removed == 1, str(rmfx.report(gm))
        assert_equivalent(model, gm, x)


def test_with_differentiable_weights_the_computation_stays_in_the_graph() -> None:
    model, x = standardised(), image()
    gm = rmfx.remove_residuals(model, x, differentiable=True)
    assert rmfx.report(gm).removed == 1
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p))
    expected, found = model(x), gm(x)
    torch.testing.assert_close(found, expected)
    grads = [
        torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (expected, found)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.conv2d(x, m.w * torch.rand(1), padding=1) + x,
        lambda m, x: F.conv2d(x, F.dropout(m.w, 0.5, True), padding=1) + x,
        lambda m, x: F.conv2d(x, m.w.add_(0), padding=1) + x,
    ],
)
def test_what_is_random_or_written_to_is_no_constant(forward: Any) -> None:
    model = Apply(forward, w=nn.Parameter(torch.rand(4, 4, 3, 3, dtype=torch.float64))).eval()
    gm = rmfx.remove_residuals(model.requires_grad_(False), image())
    assert rmfx.report(gm).removed == 0
    assert "conv2d" in gm.code


def test_a_constant_that_another_one_is_made_of_is_kept_too() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w * 2
        y = F.conv2d(x, w, padding=1)
        return x + F.conv2d(F.relu(y), F.relu(w), padding=1)

    w = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.float64))
    assert_removed(Apply(forward, w=w).eval(), image())


def test_a_constant_that_is_written_to_keeps_what_was_read_before() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w * 2
        y = F.conv2d(x, w, padding=1)
        return x + F.conv2d(F.relu(y), F.relu(w, inplace=True), padding=1)

    w = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.float64), requires_grad=False)
    model = Apply(forward, w=w).eval()
    gm = rmfx.remove_residuals(torch.fx.symbolic_trace(model), image())
    assert_equivalent(model, gm, image())


def test_a_constant_that_grows_is_left_in_the_graph() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return x.mean() + m.s.expand(4, 300, 300).sum(0)

    gm = rmfx.trace(Apply(forward, s=nn.Parameter(torch.rand(1))).eval())
    assert sum(b.numel() for b in gm.buffers()) == 300 * 300


def test_the_sum_of_a_product_is_two_operations() -> None:
    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.rand(1, 1, 4) + 0.5)
            self.beta = nn.Parameter(torch.rand(1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addcmul(self.beta, self.alpha, x)

    parts = {"n": Affine(), "a": nn.Linear(4, 8), "b": nn.Linear(8, 4)}
    model = ready(Apply(lambda m, x: x + m.b(F.gelu(m.a(m.n(x)))), **parts))
    assert_removed(model, image(2, 5, 4), without_inputs=False)


@pytest.mark.parametrize("value", [1, 2.5])
def test_the_third_operand_of_addcmul_is_scaled(value: float) -> None:
    model = ready(
        Apply(lambda m, x: torch.addcmul(x, m.a(x), torch.tanh(x), value=value), a=conv())
    )
    gm = rmfx.trace(model, image())
    torch.testing.assert_close(gm(image()), model(image()))


# Channels that a constant mask keeps (4 of 6), as networks that are slimmed choose them.
CHOICES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mask": lambda m, x: x[:, m.keep],
    "whole index": lambda m, x: x[:, m.keep, :, :],
    "mask with dots": lambda m, x: x[:, m.keep, ...],
    "mask of weights": lambda m, x: x[:, m.gate > 0],
    "nonzero": lambda m, x: x[:, m.keep.nonzero().squeeze(1)],
    "nonzero as a tuple": lambda m, x: x[:, torch.nonzero(m.gate > 0, as_tuple=True)[0]],
    "index_select": lambda m, x: x.index_select(1, torch.nonzero(m.keep).flatten()),
    "where": lambda m, x: x[:, torch.where(m.keep)[0]],
    "masked numbers": lambda m, x: x[:, m.order.masked_select(m.keep)],
}


def choosing(choose: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.first(x)
        return x + m.last(F.relu(m.middle(choose(m, F.relu(x)))))

    keep = torch.tensor([True, False, True, True, False, True])
    gate = nn.Buffer(torch.where(keep, 1.0, -1.0))
    parts: dict[str, Any] = {"order": nn.Buffer(torch.arange(6)), "first": conv(3, 6)}
    parts |= {"middle": conv(4, 5), "last": conv(5, 6)}
    return ready(Apply(forward, keep=nn.Buffer(keep), gate=gate, **parts))


@pytest.mark.parametrize("name", CHOICES)
def test_constants_whose_size_follows_from_values_are_computed(name: str) -> None:
    model, x = choosing(CHOICES[name]), image(2, 3, 9, 7)
    for form in (model, torch.export.export(model, (x,), strict=False)):
        gm = rmfx.remove_residuals(form, x)
        assert rmfx.report(gm).removed == 1, str(rmfx.report(gm))
        assert_equivalent(model, gm, x)


# What the input's values decide the size of, beside a residual connection.
BESIDE: dict[str, Callable[[Tensor], Any]] = {
    "a mask of the input": lambda x: x[x > 0].sum(),
    "places": torch.nonzero,
    "masked values": lambda x: torch.masked_select(x, x > 0),
    "unique values": lambda x: torch.unique(x.round()),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_size_that_the_inputs_decide_refuses_no_network(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.first(x)
        y = x + m.last(F.relu(m.middle(x)))
        return y, BESIDE[name](x)

    parts: dict[str, Any] = {"first": conv(3, 4), "middle": conv(), "last": conv()}
    model, x = ready(Apply(forward, **parts)), image(2, 3, 9, 7)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.report(gm).removed == 1, str(rmfx.report(gm))
    for value in (x, image(1, 3, 6, 5)):
        torch.testing.assert_close(gm(value), model(value), rtol=1e-10, atol=1e-10)


def test_a_size_that_the_inputs_decide_and_a_layer_asks_for_says_so() -> None:
    model = ready(Apply(lambda m, x: m.last(x[:, x.sum((0, 2, 3)) > 0]), last=conv()))
    with pytest.raises(rmfx.ShapeError, match="depend on values"):
        rmfx.trace(model, image().abs())
