"""Graphs with places: what is drawn, stage by stage, and where."""

from __future__ import annotations

import functools

import pytest
from builders import Apply, Residual, basic_branch, chain, conv, image, ready
from torch import nn

import rmfx
from rmfx.cli.drawing import Drawing, draw
from rmfx.cli.stages import LIMIT, divide, follow, shown_nodes

pytest.importorskip("igraph")


def drawing(model: nn.Module) -> Drawing:
    x = image()
    gm = rmfx.trace(model, x)
    costs = {row.node: row for row in rmfx.cost.nodes(gm, x)}
    (found,) = draw([shown_nodes(gm.graph)], costs, {})
    assert found is not None
    return found


def test_nodes_do_not_overlap_and_edges_run_down() -> None:
    model = ready(
        Apply(lambda m, x: m.c(m.a(x) + m.b(x)) + x, a=conv(), b=basic_branch(), c=conv())
    )
    check_places(found := drawing(model))
    assert sum(line.skip for line in found.lines) == 2  # x, and the short branch
    wide = [Apply(lambda m, x: m.a(x) + m.b(x) + m.c(x) + m.d(x) + m.e(x) + x) for _ in range(4)]
    for block in wide:
        for name in "abcde":
            setattr(block, name, conv())
    check_places(drawing(ready(chain(*wide))))


def check_places(found: Drawing) -> None:
    places = [(box.x, box.y) for box in found.boxes]
    width, height = found.size
    for i, (x, y) in enumerate(places):
        assert all(abs(x - u) >= width or abs(y - v) >= height for u, v in places[:i])
        assert 0 <= x <= found.width - width
        assert 0 <= y <= found.height - height
    for line in found.lines:
        heights = [float(point.split(",")[1]) for point in line.points.split()]
        assert heights == sorted(heights)
        assert len(set(heights)) == len(heights)


def test_a_deep_network_is_drawn_in_stages() -> None:
    gm = rmfx.trace(ready(chain(*(Residual(conv()) for _ in range(150)))), image())
    shown = shown_nodes(gm.graph)
    stages = divide(shown)
    assert [node for stage in stages for node in stage.nodes] == shown
    assert len(shown) == 302
    assert 302 / LIMIT <= len(stages) <= 12
    assert all(len(stage.nodes) <= LIMIT for stage in stages)
    assert stages[0].title == "0 – 13"
    assert stages[1].title == "14 – 28"
    drawings = draw([stage.nodes for stage in stages], {}, {})
    for i, found in enumerate(drawings, start=1):
        assert found is not None
        check_places(found)
        beyond = [box.label for box in found.boxes if box.kind == "passage"]
        ways = [f"from stage {i - 1}"] * (i > 1) + [f"to stage {i + 1}"] * (i < len(stages))
        assert beyond == ways
        skips = sum(line.skip for line in found.lines)
        assert skips == sum(box.kind == "add" for box in found.boxes)


def test_a_long_module_is_divided_where_its_parts_begin() -> None:
    model = chain(conv(), chain(*(basic_branch() for _ in range(20))), conv())
    titles = [stage.title for stage in divide(shown_nodes(rmfx.trace(ready(model), image()).graph))]
    assert titles[0] == "0"
    assert titles[1].startswith("1.0 – 1.")
    assert titles[-2].endswith(" – 1.19")
    assert titles[-1] == "2"


def test_a_graph_without_modules_is_divided_by_number() -> None:
    gm = rmfx.trace(Apply(lambda m, x: functools.reduce(lambda y, _: y.flip(2), range(70), x)))
    stages = divide(shown_nodes(gm.graph))
    assert [len(stage.nodes) for stage in stages] == [30, 30, 12]
    assert stages[0].title == "x – flip_28"


def test_edges_over_several_stages_name_both_ends() -> None:
    gm = rmfx.trace(ready(chain(*(Residual(conv()) for _ in range(4)))), image())
    shown = shown_nodes(gm.graph)
    pieces = [shown[:2], shown[2:3], shown[3:]]  # the second is an addition alone
    first, second, third = draw(pieces, {}, {})
    assert first is not None
    assert second is not None
    assert third is not None
    assert [box.label for box in first.boxes][-1] == "to stage 2"
    names = [line.partition(",")[0] for line in second.boxes[0].detail.splitlines()]
    assert names == ["from stage 1", *(node.name for node in shown[:2])]
    assert third.boxes[0].stage == 2


def test_the_other_form_is_divided_alike() -> None:
    x = image()
    model = ready(chain(*(Residual(basic_branch()) for _ in range(12))))
    before, after = rmfx.trace(model, x), rmfx.trace(rmfx.remove_residuals(model, x), x)
    stages = divide(shown_nodes(before.graph))
    shown = shown_nodes(after.graph)
    parts = follow(shown, stages)
    assert [node for part in parts for node in part] == shown
    turned = follow(shown, stages[::-1])  # no edge leads back, whatever the order
    assert [node for part in turned for node in part] == shown
    assert len(parts) == len(stages)
    for part, stage in zip(parts, stages, strict=True):
        assert {node.name for node in part} & {node.name for node in stage.nodes}
