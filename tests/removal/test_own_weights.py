"""Layers that several calls share: a copy for each call that is rewritten, and a row about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    Residual,
    assert_removed,
    assert_same,
    basic_branch,
    chain,
    conv,
    conv_branch,
    image,
    ready,
    snapshot,
)
from torch import Tensor, fx, nn

import rmfx
from rmfx.testing import assert_equivalent


def block_twice() -> nn.Module:
    block = Residual(basic_branch())
    return chain(block, nn.ReLU(), block)


def layer_twice() -> nn.Module:
    layer = conv()
    return chain(conv(), Residual(chain(layer, nn.ReLU(), layer)), Residual(conv_branch()))


def tied() -> nn.Module:
    model = chain(Residual(conv_branch()), Residual(conv_branch(nn.SiLU())))
    model[0].branch[2].weight = model[0].branch[0].weight  # type: ignore[union-attr]
    return model


def recurrent() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.b(torch.tanh(m.a(x)))
        return x

    return chain(Apply(forward, a=conv(), b=conv()), Residual(conv_branch()))


SHARING = [(block_twice, 2), (layer_twice, 2), (tied, 2), (recurrent, 4)]
sharing = pytest.mark.parametrize(("make", "sites"), SHARING)


@sharing
def test_each_rewritten_call_has_weights_of_its_own(
    make: Callable[[], nn.Module], sites: int
) -> None:
    model = ready(make())
    before = snapshot(model)
    converted = assert_removed(model, image(), sites=sites)
    assert_same(before, snapshot(model))
    held = rmfx.report(converted).held
    assert held
    assert all("share its weights" in row.what for row in held)
    again = rmfx.remove_residuals(converted, image())
    assert not rmfx.report(again).rows


@sharing
def test_gradients_reach_weights_that_stay_shared(
    make: Callable[[], nn.Module], sites: int
) -> None:
    model = ready(make())
    x = image()
    linked = rmfx.remove_residuals(model, x, differentiable=True)
    assert rmfx.report(linked).removed == sites
    assert not rmfx.report(linked).held
    weights = [p for p in model.parameters() if p.requires_grad]
    found = [torch.autograd.grad(m(x).square().sum(), weights) for m in (model, linked)]
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()
    with torch.no_grad():
        weights[0].mul_(1.25)
    assert_equivalent(model, linked, (x,))


def test_calls_that_stay_go_on_sharing() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.block(x)
        return torch.cat([m.head(F.max_pool2d(x, 2)), m.head(F.avg_pool2d(x, 2))])

    head = chain(conv(), nn.ReLU())
    model = ready(Apply(forward, block=Residual(conv_branch()), head=head))
    converted = assert_removed(model, image(2, 4, 8, 8))
    assert not rmfx.report(converted).held
    heads = [n for n in converted.graph.nodes if str(n.target).startswith("head.0")]
    assert [n.target for n in heads] == ["head.0", "head.0"]


def test_a_shared_layer_of_an_exported_network_gets_copies() -> None:
    model = ready(recurrent())
    program = torch.export.export(model, (image(),))
    converted = rmfx.remove_residuals(program, image())
    assert rmfx.report(converted).removed == 4
    assert rmfx.report(converted).held
    assert_equivalent(model, converted, (image(),))


def test_a_compiled_network_notices_that_shared_weights_change() -> None:
    model, x = ready(recurrent()), image()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="rmfx", options={"backend": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        model[0].a.weight.mul_(1.5)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_compiled_network_may_be_told_to_share() -> None:
    found: list[rmfx.Report] = []
    options = {"backend": "eager", "copy_shared": False, "on_report": found.append}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(ready(recurrent()), backend="rmfx", options=options)(image())
    (report,) = found
    assert (report.removed, report.refused) == (1, 3)


@pytest.mark.parametrize("traced", [False, True])
def test_what_reads_a_weight_beside_its_layer_goes_on_reading_it(traced: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.c(x).type_as(m.a.weight)
        return y + m.b(torch.relu(m.a(y)))

    model = ready(Apply(forward, a=conv(), b=conv(), c=conv()))
    gm = rmfx.remove_residuals(fx.symbolic_trace(model) if traced else model)
    assert rmfx.report(gm).removed == 1
    assert_equivalent(model, gm, image())
    kept = rmfx.remove_residuals(model, image(), policy=lambda _: False)
    assert {*dict(kept.named_parameters())} == {*dict(model.named_parameters())}
