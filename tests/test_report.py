"""What the report says, as rows, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Residual, basic_branch, chain, conv, conv_bn, conv_branch, image, ready
from torch import nn

import rmfx
from rmfx.choices import STRATEGIES
from rmfx.cost import counting as cost
from rmfx.report import Timing
from rmfx.words import WAYS


def converted(*, inputs: bool = True) -> torch.fx.GraphModule:
    """Three sites: one removed with, one without batch norm, one refused."""
    projected = Residual(basic_branch(4, 6, stride=2), conv_bn(4, 6, 1, stride=2))
    pooled, gated = Residual(nn.MaxPool2d(3, 1, 1)), Residual(conv_branch(nn.SiLU(), 6))
    model = ready(chain(conv_bn(4, 4), nn.ReLU(), projected, pooled, gated))
    gm: torch.fx.GraphModule = rmfx.remove_residuals(model, image() if inputs else None)
    return gm


def test_rows_name_place_source_join_and_strategy_in_graph_order() -> None:
    gm = converted()
    first, second, third = rmfx.report(gm).rows
    assert [r.place for r in (first, second, third)] == ["2", "3", "4"]
    assert [r.join for r in (first, second, third)] == ["_2_add", "_3_add", "_4_add"]
    assert [r.status for r in (first, second, third)] == ["removed", "refused", "removed"]
    assert [r.strategy for r in (first, second, third)] == ["identity", "", "masked"]
    assert [r.shape for r in (first, second, third)] == [(2, 6, 5, 4)] * 3
    assert first.source is not None
    assert "builders.py:" in first.source
    assert first.reason == ""
    assert "MaxPool2d" in second.reason
    names = {n.name for n in gm.graph.nodes}
    assert all(r.node in names for r in (first, second, third))


def test_rows_count_carry_work_and_parameters_of_the_site() -> None:
    first, second, third = rmfx.report(converted()).rows
    assert first.carry == 4  # x itself travels, the projection stands in the last conv
    # Before: 3x3 4->6, 3x3 6->6 and 1x1 4->6 on 5x4 positions of 2 images, batch norm folded.
    assert first.macs_before == (9 * 24 + 9 * 36 + 24) * 40
    assert first.macs_after == (9 * 10 * 4 + 9 * 10 * 6) * 40
    assert first.params_before == 9 * 24 + 9 * 36 + 24 + 3 * 6
    assert third.carry == 6
    assert third.macs_before == 2 * 9 * 36 * 40
    assert third.macs_after == 2 * 9 * 72 * 40
    assert (second.carry, second.macs_before, second.params_after) == (0, None, None)


def test_work_of_the_sites_agrees_with_the_cost_of_the_network() -> None:
    model = ready(Residual(conv_branch()))
    gm = rmfx.remove_residuals(model, image())
    (row,) = rmfx.report(gm).rows
    assert row.macs_before == cost.count(model, image()).macs
    assert row.macs_after == cost.count(gm, image()).macs
    assert row.params_before == cost.count(model, image()).parameters
    assert row.params_after == cost.count(gm, image()).parameters


def test_a_transposed_convolution_works_where_it_reads() -> None:
    branch = chain(nn.ConvTranspose2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model = ready(Residual(branch))
    (row,) = rmfx.report(rmfx.remove_residuals(model, image())).rows
    assert row.status == "removed"
    assert row.macs_before == cost.count(model, image()).macs


def test_totals() -> None:
    report = rmfx.report(converted())
    assert (report.removed, report.refused, report.adds_left) == (2, 1, 1)


def test_table_has_a_line_for_every_site_and_a_sum() -> None:
    text = str(rmfx.report(converted()))
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["site", "done", "strategy"]
    assert lines[-2] == "2 of 3 residual connections removed"
    assert lines[-1].startswith("verified on random inputs of 2x4x9x7, ")
    for word in ("identity", "masked", "2x6x5x4", "MaxPool2d", "builders.py"):
        assert word in text
    assert "22.6 k -> 36 k" in text
    assert max(len(line) for line in lines) < 220


class Twice(nn.Module):
    """Parallel branches and a residual connection, added by the code of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(kernel=1), conv_branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x) + self.b(x))
        return y + self.c(y)  # type: ignore[no-any-return]


def test_parallel_branches_are_not_called_residual_connections() -> None:
    model = ready(chain(Twice(), nn.ReLU(), Residual(conv_branch())))
    report = rmfx.report(rmfx.remove_residuals(model, image()))
    kinds = ["parallel branches", "residual connection", "residual connection"]
    assert [row.kind for row in report.rows] == kinds
    assert [row.status for row in report.rows] == ["removed"] * 3
    assert [row.done for row in report.rows] == ["merged", "removed", "removed"]
    told = "2 of 2 residual connections removed, 1 of 1 sums of parallel branches merged"
    assert told in str(report).splitlines()
    merged = rmfx.report(rmfx.merge_branches(model, image()))
    assert [row.kind for row in merged.rows] == kinds
    assert merged.total == told.replace("2 of 2", "0 of 2")


def test_two_branches_with_activations_are_parallel() -> None:
    """None of both is a shortcut: they stand side by side."""
    model = ready(Residual(conv_branch(), conv_branch()))
    (row,) = rmfx.report(rmfx.remove_residuals(model, image())).rows
    assert (row.status, row.kind) == ("removed", "parallel branches")


def test_rows_that_share_a_name_have_an_index() -> None:
    twice = Twice()
    model = ready(chain(twice, twice, Residual(conv_branch())))
    report = rmfx.report(rmfx.remove_residuals(model, image()))
    names = [f"0 #{i}" for i in (1, 2, 3, 4)]
    assert [row.name for row in report.rows] == [*names, "2"]
    assert [row.place for row in report.rows] == ["0"] * 4 + ["2"]
    assert [row["index"] for row in report.to_dict()["sites"]] == [1, 2, 3, 4, 0]
    assert [line[:4].strip() for line in str(report).splitlines()[2:7]] == [*names, "2"]
    joins = {node.name for node in rmfx.trace(model, image()).graph.nodes}
    assert len({row.join for row in report.rows} & joins) == 5


def test_rows_of_the_root_are_called_by_their_nodes() -> None:
    report = rmfx.report(rmfx.remove_residuals(ready(Twice()), image()))
    assert [(row.name, row.index) for row in report.rows] == [("add", 0), ("add_1", 0)]


def test_the_next_best_layout_is_told_on_demand() -> None:
    branch = chain(conv(20, 8, 1), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 20, 1))
    report = rmfx.report(rmfx.remove_residuals(ready(Residual(branch)), image(1, 20, 6, 6)))
    (row,) = report.rows
    assert row.layout == "carried past 3 layers, inner ones grouped, carry padded to whole groups"
    assert row.alternative.startswith("carried past 3 layers, inner ones full: ")
    assert row.alternative not in str(report)
    header, _, line, *_ = report.details().splitlines()
    assert "the next best, times the multiply-adds" in header
    assert all(text in line for text in ("add", "inner ones grouped", row.alternative))
    assert report.to_dict()["sites"][0]["alternative"] == row.alternative


def test_the_table_says_where_a_conversion_is_dear_and_what_is_cheaper() -> None:
    act, depthwise = nn.SiLU(), conv(192, 192, groups=192)
    body = chain(conv(32, 192, 1), act, depthwise, act, conv(192, 32, 1))
    model, x = ready(Residual(body)), image(1, 32, 5, 4)
    dear = rmfx.report(rmfx.remove_residuals(model, x, activation="relu"))
    (row,) = dear.rows
    assert row.macs_before is not None
    assert dear.times == (row.macs_after or 0) / row.macs_before > 8
    cheap = rmfx.report(rmfx.remove_residuals(model, x))
    assert "times the multiply-adds" not in str(cheap)
    assert rmfx.report(rmfx.remove_residuals(model)).times is None
    told = f"1 of 1 residual connections removed; their sites take {dear.times:.1f} times the mult"
    assert told in str(dear)
    assert "activation='auto' takes no pairs" in str(dear)


def test_the_table_tells_gain_and_bits() -> None:
    slope = nn.LeakyReLU(-0.75)
    model = ready(chain(Residual(conv_branch(slope)), Residual(nn.MaxPool2d(3, 1, 1))))
    report = rmfx.report(rmfx.remove_residuals(model, image(), activation="odd-pair"))
    removed, refused = report.rows
    assert (removed.gain, refused.gain) == (4, None)
    assert removed.bits == pytest.approx(2.807, abs=1e-3)  # log2 of (1 + 0.75) / (1 - 0.75)
    header, _, first, *_ = str(report).splitlines()
    assert header.split().index("gain") == header.split().index("carry") - 1
    assert "rounding (loses 2.8 bits)" in first
    assert first[header.index("gain")] == "4"
    assert rmfx.report(converted()).rows[0].bits == 0


@pytest.mark.parametrize("bits", [0.0, 0.04, -2.6])
def test_no_bits_are_told_where_none_are_lost(bits: float) -> None:
    row = dataclasses.replace(rmfx.report(converted()).rows[0], exactness="rounding", bits=bits)
    text = str(rmfx.Report((row,)))
    assert "rounding" in text
    assert "bits" not in text


def test_a_ratio_of_few_rounds_is_not_called_noise() -> None:
    told = {rounds: str(_timing(rounds)) for rounds in (None, 5, 6)}
    assert told[5].endswith("1.80 (1.79 to 1.83), too few rounds to tell (it takes 6)")
    assert told[6] == told[None]
    assert told[6].endswith("1.80 (1.79 to 1.83), not beyond the noise")


def _timing(rounds: int | None) -> Timing:
    spread = (1.8, 1.79, 1.83)
    return Timing("converted", "eager", *spread, beyond_noise=False, rounds=rounds)


def test_a_line_below_the_table_explains_its_words() -> None:
    assert set(WAYS) == {*STRATEGIES, "linear"}
    lines = str(rmfx.report(converted())).splitlines()
    (legend,) = (line for line in lines if line.startswith("carry: channels"))
    assert lines.index(legend) == len(lines) - 3
    assert "gain: the largest factor" in legend
    assert "identity (unchanged), masked (a mask lets it by)" in legend
    assert "odd-pair" not in legend
    model = ready(Residual(conv_branch(nn.LeakyReLU(0.5))))
    report = rmfx.report(rmfx.remove_residuals(model, image(), activation="odd-pair"))
    assert "odd-pair (as x and -x)" in str(report)


def test_sources_name_no_folders() -> None:
    module = ready(Residual(conv_branch()))
    for model in (module, torch.export.export(module, (image(),))):
        for row in rmfx.report(rmfx.remove_residuals(model, image())).rows:
            assert row.source is not None
            assert not Path(row.source).is_absolute()
            assert row.source.rpartition(":")[0].endswith("builders.py")


def test_dict_survives_json() -> None:
    report = rmfx.report(converted())
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["removed"], data["refused"]) == (2, 1)
    assert len(data["sites"]) == 3
    assert data["sites"][0]["shape"] == [2, 6, 5, 4]
    assert set(data["sites"][0]) == {f.name for f in dataclasses.fields(rmfx.SiteReport)}


def test_without_example_inputs_there_are_no_shapes_and_no_work() -> None:
    report = rmfx.report(converted(inputs=False))
    assert [row.status for row in report.rows] == ["removed", "refused", "removed"]
    assert all(row.shape is None and row.macs_after is None for row in report.rows)
    assert report.rows[0].params_after is not None
    json.dumps(report.to_dict())
    assert "removed" in str(report)


def test_symbolic_sizes_show_as_question_marks() -> None:
    program = torch.export.export(
        ready(Residual(conv_branch())),
        (image(),),
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}},
    )
    report = rmfx.report(rmfx.remove_residuals(program))
    assert report.rows[0].shape == (None, 4, 9, 7)
    assert "?x4x9x7" in str(report)
    assert report.to_dict()["sites"][0]["shape"] == [None, 4, 9, 7]


def test_network_without_residuals_says_so() -> None:
    report = rmfx.report(rmfx.remove_residuals(ready(chain(conv(), nn.ReLU()))))
    assert (report.rows, report.removed, report.refused, report.adds_left) == ((), 0, 0, 0)
    assert str(report).startswith("no residual connections")


def test_report_is_immutable() -> None:
    report = rmfx.report(converted())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows[0].status = "refused"  # type: ignore[misc]


def test_every_add_that_stays_is_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.add(x, self.conv(x), alpha=x.size(0))

    report = rmfx.report(rmfx.remove_residuals(ready(Odd()), image()))
    assert report.adds_left == 1
    assert "alpha" in report.rows[0].reason


def test_other_modules_carry_no_report() -> None:
    others: list[Any] = [rmfx.trace(ready(conv())), nn.ReLU()]
    for other in others:
        with pytest.raises(rmfx.RmfxError, match=r"pass the result of rmfx.remove_residuals"):
            rmfx.report(other)
