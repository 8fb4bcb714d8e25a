"""Rows of the report: what is expected of a plan is what its layers cost once they are built."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import Residual, chain, conv, conv_bn, image, ready
from torch import nn

import rmfx
from rmfx.analysis.multiply_adds import Expense
from rmfx.errors import Refusal
from rmfx.ir.net import Net
from rmfx.removal.assembly import build
from rmfx.removal.columns import Built
from rmfx.removal.plan import plans
from rmfx.removal.rows import expected_expense, row_of_refusal, with_expense
from rmfx.removal.site import Site, find_sites
from rmfx.removal.target import MACS, TIME, Target

BLOCKS: dict[str, Any] = {
    "basic": lambda: Residual(chain(conv(8, 8), nn.ReLU(), conv(8, 8))),
    "bottleneck": lambda: Residual(
        chain(conv(8, 4, 1), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 8, 1))
    ),
    "depthwise": lambda: Residual(
        chain(conv(8, 8, groups=8), nn.ReLU(), conv(8, 16, 1), nn.ReLU(), conv(16, 8, 1))
    ),
    "strided": lambda: Residual(
        chain(conv(8, 6, stride=2), nn.ReLU(), conv(6, 12)), conv(8, 12, 1, stride=2)
    ),
    "two branches": lambda: Residual(
        chain(conv(8, 6), nn.ReLU(), conv(6, 8)), chain(conv(8, 6), nn.ReLU(), conv(6, 8))
    ),
}


def site_of(block: nn.Module) -> Site:
    net = Net(rmfx.trace(ready(block), image(2, 8, 8, 6)))
    join = next(node for node in net.graph.nodes if node.target is torch.add)
    sites = find_sites(net, join, keep_norms=False)
    assert isinstance(sites, list)
    return sites[0]


@pytest.mark.parametrize("target", [TIME, MACS], ids=["time", "macs"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_plan_costs_what_is_expected_of_it(name: str, target: Target) -> None:
    site = site_of(BLOCKS[name]())
    found = plans(site, target)
    assert not isinstance(found, Refusal)
    for plan in found:
        whole = plan.with_weights()
        assert not isinstance(whole, Refusal)
        columns = build(whole)
        assert not isinstance(columns, Refusal)
        size, work, positions = 0, 0, 2 * 8 * 6
        for column in columns:
            if isinstance(column, Built):
                for step in column.layer.stride:
                    positions //= step
                size += column.layer.weight.numel()
                work += column.layer.multiply_adds(positions)
        expense = expected_expense(site, whole)
        assert (expense.parameters, expense.macs) == (size, work)


@pytest.mark.parametrize("minimise", ["time", "macs"])
def test_what_a_policy_is_told_is_what_the_report_says(minimise: str) -> None:
    layers = (
        conv_bn(8, 8),
        nn.ReLU(),
        Residual(chain(conv(8, 8), nn.SiLU(), conv(8, 8))),
        nn.ReLU(),
    )
    told: list[rmfx.SiteReport] = []

    def policy(row: rmfx.SiteReport) -> bool:
        told.append(row)
        return True

    plain = rmfx.remove_residuals(
        ready(chain(*layers)), image(2, 8, 9, 7), policy=policy, minimise=minimise
    )
    (row,) = rmfx.report(plain).rows
    assert told[-1].macs_after == row.macs_after
    assert (
        (told[-1].macs_before, told[-1].carry)
        == (row.macs_before, row.carry)
        == (2 * 63 * 2 * 8 * 8 * 9, 8)
    )


def test_a_row_takes_what_its_site_costs_now_and_nothing_else() -> None:
    plain = rmfx.remove_residuals(ready(BLOCKS["basic"]()), image(2, 8, 9, 7))
    (row,) = rmfx.report(plain).rows
    changed = with_expense(row, Expense(1, 2, 3))
    assert (changed.macs_after, changed.moved_after, changed.params_after) == (1, 2, 3)
    before = {"macs_after": row.macs_after, "moved_after": row.moved_after}
    assert replace(changed, **before, params_after=row.params_after) == row


@pytest.mark.parametrize("by_choice", [True, False])
def test_a_refusal_is_a_row_with_its_reason(by_choice: bool) -> None:
    net = Net(rmfx.trace(ready(BLOCKS["basic"]()), image(2, 8, 8, 6)))
    join = next(node for node in net.graph.nodes if node.target is torch.add)
    for whole in (True, False):
        row = row_of_refusal(net, join, Refusal("so it is", by_choice=by_choice), whole=whole)
        assert row.status == ("kept" if by_choice else "refused")
        assert row.kind == "residual connection"
        assert row.node == (join.name if whole else None)
        assert row.reason == "so it is"
        assert row.macs_after is None
