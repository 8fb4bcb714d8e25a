"""Guards of exported programs, read as nodes; what is not understood is refused, never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import image, ready
from torch import Tensor, fx, nn
from torch.export import Dim

import rmfx
from rmfx.frontend.guards import demand_guard, texts_of


def checked(text: str, *names: str) -> fx.GraphModule:
    """A network of nothing but a guard."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in names}
    demand_guard(graph, text, inputs)
    graph.output(inputs[names[0]])
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("L['x'].size()[0] % 2 == 0", 4, 3),
        ("x.size()[0] % 2 == 0", 4, 3),
        ("256*L['x'].size()[0] <= 600", 2, 3),
        ("((-1) + L['x'].size()[0]) != 1", 3, 2),
        ("L['x'].size(0) > 2 and L['x'].size(0) < 5", 3, 5),
        ("L['x'].size(0) < 2 or not L['x'].size(0) == 5", 3, 5),
        ("2 < L['x'].size()[0] <= 4", 4, 5),
        ("max(L['x'].size()[0], 3) == 3", 2, 4),
        ("math.floor(L['x'].size()[0] / 2) == 2", 5, 6),
        ("-(-L['x'].size()[0] // 2) == 3", 6, 7),
    ],
)
def test_a_guard_is_a_node(text: str, right: int, wrong: int) -> None:
    gm = checked(text, "x")
    for form in (gm, fx.symbolic_trace(gm)):
        assert form(torch.zeros(right)).shape == (right,)
        with pytest.raises(rmfx.ShapeError, match=rf"x has shape \({wrong},\), but .*exported for"):
            form(torch.zeros(wrong))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('pathlib').Path('made').touch() == 1",
        "(lambda: 1)() == L['x'].size()[0]",
        "[n for n in L['x'].size()][0] == 2",
        "L['y'].size()[0] == 2",
        "L['x'].__class__.size()[0] == 2",
        "os.system('touch made') == L['x'].size()[0]",
        "L['x'].size()[0] ==",
    ],
)
def test_other_code_is_refused_and_not_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rmfx.TraceError, match="not understood"):
        checked(text, "x")
    assert not list(tmp_path.iterdir())


def test_sizes_of_several_inputs_in_containers() -> None:
    class Sum(nn.Module):
        def forward(self, x: dict[str, list[Tensor]], y: Tensor) -> Tensor:
            return x["parts"][0][1:] + y

    x, model = image(5, 3), ready(Sum())
    more = Dim("rows")
    shapes = ({"parts": [{0: more + 1}]}, {0: more})
    program = torch.export.export(model, ({"parts": [x]}, x[1:]), dynamic_shapes=shapes)
    for source in (program, program.module()):
        gm = rmfx.trace(source)
        x = image(8, 3)
        assert torch.equal(gm({"parts": [x]}, x[1:]), model({"parts": [x]}, x[1:]))
        with pytest.raises(rmfx.ShapeError):
            gm({"parts": [x]}, x[:1])  # which the sum would spread out


def test_guards_that_cannot_be_read_off_a_module_are_an_error() -> None:
    def check(x: Any) -> None:
        torch._assert(len(x) == 2, "Guard failed: len(x) == 2")

    with pytest.raises(rmfx.TraceError, match="pass the ExportedProgram itself"):
        texts_of(check, 1)
