"""Calls of a network that torch.compile gave to rmfx, with changes of its weights in between.

What a compiled graph has baked must never be stale, whatever wrote: torch counts only some of these
writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.oracle.equivalence import Equivalence, assert_equivalent, cloned
from rmfx.report import Report, SiteReport

from .compare import SHIFTED

MOVED = "statistics moved in training mode"
MOST_CHANGES = 3


def compare_compiled(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    changes: tuple[str, ...],
    options: Mapping[str, Any],
) -> tuple[tuple[SiteReport, ...], Equivalence]:
    """Demand that the compiled network answers as it does uncompiled, after every change.

    Args:
        model: its weights are changed.
        inputs: of every call.
        changes: keys of `CHANGES`.
        options: of `backend="rmfx"`.

    Returns:
        The rows of the reports on all graphs, and the largest error.

    Raises:
        AssertionError: an answer differs.
    """
    torch._dynamo.reset()
    reports: list[Report] = []
    given = {"backend": "eager", **options, "on_report": reports.append}
    compiled: Any = torch.compile(model, backend="rmfx", options=given)
    found = assert_equivalent(model, compiled, inputs, tolerance=SHIFTED)
    for change in changes:
        CHANGES[change](model)
        again = assert_equivalent(model, compiled, inputs, tolerance=SHIFTED)
        found = max(found, again, key=lambda one: one.error)
    torch._dynamo.reset()  # the graphs and what they hold would stay
    return tuple(row for report in reports for row in report.rows), found


def compiles(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether Dynamo can hold a network at all."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend="eager")(*cloned(inputs))
    # Dynamo runs code of the network's own, which may raise anything.
    except Exception:  # noqa: BLE001
        return False
    return True


def _step(kind: Any) -> Callable[[nn.Module], None]:
    """A step of a fused optimiser, which moves every weight."""

    def step(model: nn.Module) -> None:
        weights = list(model.parameters())
        for weight in weights:
            weight.grad = torch.linspace(-1, 2, weight.numel()).to(weight).view_as(weight)
        if weights:
            kind(weights, lr=0.05, fused=True).step()
        for weight in weights:
            weight.grad = None

    return step


def _write_data(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data.mul_(1.1)


def _replace_data(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 0.9


def _write_numpy(model: nn.Module) -> None:
    for weight in model.parameters():
        array = weight.detach().numpy()
        array *= 1.1


@torch.no_grad()
def _write_foreach(model: nn.Module) -> None:
    weights: list[Tensor] = list(model.parameters())
    if weights:
        torch._foreach_add_(weights, 0.05)


@torch.no_grad()
def _move_statistics(model: nn.Module) -> None:
    """As a forward in training mode does, without the rest of the network."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            rank = {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[type(layer)]
            x = torch.arange(8.0 * layer.num_features).reshape(8, -1, *(1,) * rank)
            layer.train()
            layer(x.to(layer.running_mean) / layer.num_features)
            layer.eval()


def _load(model: nn.Module) -> None:
    state = model.state_dict()
    model.load_state_dict(
        {k: v * 0.9 if v.is_floating_point() else v.clone() for k, v in state.items()}
    )


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "fused SGD step": _step(torch.optim.SGD),
    "fused Adam step": _step(torch.optim.Adam),
    "write to .data": _write_data,
    "new .data": _replace_data,
    "write through numpy": _write_numpy,
    "torch._foreach_add_ to weights": _write_foreach,
    MOVED: _move_statistics,
    "load_state_dict": _load,
}
