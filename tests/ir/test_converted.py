"""Generated code looks up modules once, and still finds those that were put there later."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import rmfx
from rmfx.ir.converted import share_lookups

pytestmark = pytest.mark.oldest


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class Deep(nn.Module):
    """Modules under numbers, under names that nodes have too, and parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(Scaled(), nn.ReLU(), Scaled(), nn.ReLU()), nn.Sequential(Scaled())
        )
        self.blocks_0 = nn.Linear(3, 3)

    def forward(self, blocks: Tensor, stages: Tensor) -> Tensor:
        return self.blocks(blocks) + self.blocks_0(stages)


def converted(model: nn.Module, *x: Tensor) -> fx.GraphModule:
    gm: fx.GraphModule = rmfx.remove_noops(model.eval().double(), x)
    return gm


def test_a_module_on_the_way_to_several_is_looked_up_once() -> None:
    x = torch.randn(2, 3).double()
    gm = converted(Deep(), x, x)
    assert gm.code.count("self.blocks\n") == 1
    assert "self.blocks," not in gm.code
    assert gm.code.count("self.") == 2  # the other one is blocks_0


def test_the_code_computes_what_the_graph_says() -> None:
    x, y = torch.randn(2, 2, 3).double()
    model = Deep()
    gm = converted(model, x, y)
    expected = model(x, y)
    for form in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), fx.symbolic_trace(gm)):
        assert torch.allclose(form(x, y), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(fx.Interpreter(gm).run(x, y), gm(x, y))


def test_numbers_at_the_top() -> None:
    x = torch.randn(2, 3).double()
    model = nn.Sequential(nn.Sequential(Scaled(), Scaled()), nn.Sequential(Scaled(), Scaled()))
    gm = converted(model, x)
    assert gm.code.count('getattr(self, "0")') == 1
    assert torch.allclose(gm(x), model(x), rtol=1e-12, atol=1e-12)


def test_modules_that_were_put_there_later_are_found() -> None:
    x = torch.randn(2, 3).double()
    gm = converted(Deep(), x, x)
    before = gm(x, x)
    blocks = gm.get_submodule("blocks.0")
    for name, module in blocks.named_children():
        blocks.add_module(name, copy.deepcopy(module))
    for p in gm.get_submodule("blocks").parameters():
        p.data.zero_()
    assert not torch.allclose(gm(x, x), before)
    assert torch.allclose(gm(x, x), gm.get_submodule("blocks_0")(x))


def test_code_is_written_anew_after_an_edit() -> None:
    x = torch.randn(2, 3).double()
    gm = converted(Deep(), x, x)
    add = gm.graph.output_node().args[0]
    add.replace_all_uses_with(add.args[1])
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    assert not hasattr(gm, "blocks")
    assert torch.equal(gm(x, x), gm.get_submodule("blocks_0")(x))


def test_a_transformer_of_the_caller_is_kept() -> None:
    x = torch.randn(2, 3).double()
    gm = converted(Deep(), x, x)
    gm.graph.on_generate_code(lambda _: lambda body: ["mark = 1\n", *body])
    gm.recompile()
    assert "mark = 1" in gm.code
    assert gm.code.count("self.blocks\n") == 1


PATHS = st.lists(st.sampled_from(["a", "b", "0", "1", "a_b", "a-b", "ä b"]), min_size=1, max_size=4)


@given(st.lists(PATHS, min_size=1, max_size=8))
def test_every_path_leads_to_the_same_module(paths: list[list[str]]) -> None:
    """A line gets the object that it got before, and no fork is passed twice."""

    class Place:
        def __init__(self, path: tuple[str, ...] = ()) -> None:
            self.path = path

        def __getattr__(self, name: str) -> Place:
            if name.startswith("__"):
                raise AttributeError(name)
            seen[(*self.path, name)] += 1
            return Place((*self.path, name))

    def line(i: int, path: list[str]) -> str:
        text = "self"
        for name in path:
            text = f"{text}.{name}" if name.isidentifier() else f'getattr({text}, "{name}")'
        return f"n{i} = {text};  a = None\n"

    seen: Counter[tuple[str, ...]] = Counter()
    body = [line(i, path) for i, path in enumerate(paths)]
    found: dict[str, Place] = {}
    exec("".join(share_lookups(body)), {"self": Place()}, found)
    assert [found[f"n{i}"].path for i in range(len(paths))] == [tuple(path) for path in paths]
    forks = {tuple(p[:i]) for p in paths for i in range(1, len(p))}
    for fork in forks:
        onward = {p[len(fork)] for p in paths if tuple(p[: len(fork)]) == fork and p[len(fork) :]}
        if len(onward) > 1:
            assert seen[fork] <= 1 + sum(tuple(path) == fork for path in paths)


@pytest.mark.parametrize(
    "line",
    ["# code: x = self.a.b(x)\n", 'y = torch.f(x, mode = "self.a.b");  x = None\n', "return x"],
)
def test_nothing_else_in_the_code_is_touched(line: str) -> None:
    assert share_lookups([line, "y = self.a.c(x)\n", "z = self.a.d(x)\n"])[1] == line
