"""Small networks and questions about them that several test files share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import rmfx
from rmfx.ir.conditions import take_conditions
from rmfx.ir.converted import copy_graph
from rmfx.testing import assert_equivalent, random_statistics

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
Combine = Callable[[Any, Any], Any]


class Residual(nn.Module):
    """combine(shortcut(x), branch(x)), by default their sum."""

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        combine: Combine = lambda x, y: x + y,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.combine = combine

    def forward(self, x: Any) -> Any:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.combine(shortcut, self.branch(x))


class Apply(nn.Module):
    """A function of some tensors, with modules it may use as `m.name`."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | Tensor) -> None:
        super().__init__()
        for name, value in modules.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def conv(
    n_in: int = 4,
    n_out: int = 4,
    kernel: int | tuple[int, ...] = 3,
    *,
    dims: int = 2,
    **options: Any,
) -> nn.Module:
    """A conv whose padding keeps the size at stride 1, unless told otherwise."""
    if isinstance(kernel, int):
        options.setdefault("padding", options.get("dilation", 1) * (kernel - 1) // 2)
    kind: Any = CONVS[dims]
    layer: nn.Module = kind(n_in, n_out, kernel, **options)
    return layer


def conv_bn(
    n_in: int = 4, n_out: int = 4, kernel: int = 3, *, dims: int = 2, **options: Any
) -> nn.Sequential:
    return chain(conv(n_in, n_out, kernel, dims=dims, bias=False, **options), NORMS[dims](n_out))


def basic_branch(
    n_in: int = 4,
    n_out: int = 4,
    *,
    dims: int = 2,
    act: nn.Module | None = None,
    stride: int = 1,
    **options: Any,
) -> nn.Sequential:
    """conv, BN, activation, conv, BN."""
    return chain(
        conv_bn(n_in, n_out, dims=dims, stride=stride, **options),
        nn.ReLU() if act is None else act,
        conv_bn(n_out, n_out, dims=dims, **options),
    )


def conv_branch(act: nn.Module | None = None, channels: int = 4) -> nn.Sequential:
    """conv, activation, conv without batch norm."""
    act = nn.ReLU() if act is None else act
    return chain(conv(channels, channels), act, conv(channels, channels))


def ready(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """The model in eval mode with random batch norm statistics; any type, to reach into it."""
    return random_statistics(model, seed=1).to(dtype).eval()


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random input, by default two images of 4 channels and odd size."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape or (2, 4, 9, 7), generator=generator, dtype=torch.float64).to(dtype)


def types(model: nn.Module) -> list[str]:
    """Type names of the layers that a graph calls, in order."""
    if not isinstance(model, fx.GraphModule):
        return [type(m).__name__ for m in model.modules() if not list(m.children())]
    calls = [n for n in model.graph.nodes if n.op == "call_module"]
    return [type(model.get_submodule(str(n.target))).__name__ for n in calls]


def called(gm: fx.GraphModule) -> list[str]:
    """What the graph calls, conditions aside: module types, or names of functions and methods."""
    names, graph = [], copy_graph(gm)
    take_conditions(graph)
    for node in graph.nodes:
        if node.op == "call_module":
            names.append(type(gm.get_submodule(str(node.target))).__name__)
        elif node.op in ("call_function", "call_method"):
            names.append(getattr(node.target, "__name__", str(node.target)))
    return names


def shapes(model: fx.GraphModule) -> list[tuple[int, ...]]:
    """Weight shapes of the convolutions and Linear layers, in order of the calls."""
    modules = [
        model.get_submodule(str(n.target)) for n in model.graph.nodes if n.op == "call_module"
    ]
    layers: list[Any] = [m for m in modules if isinstance(m, (nn.Linear, *CONVS.values()))]
    return [tuple(layer.weight.shape) for layer in layers]


@dataclass(frozen=True)
class Block:
    """What stands between fences in a Markdown page.

    Attributes:
        kind: its language.
        text: without the fences.
        line: where it begins.
        needs: packages that a comment above it, or above one before it, says that it needs:
            `<!-- needs: timm, captum -->`. The blocks of a page are one script.
    """

    kind: str
    text: str
    line: int
    needs: tuple[str, ...]


def fenced_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a Markdown page, in order."""
    text, found = page.read_text(), []
    needs: tuple[str, ...] = ()
    pattern = r"^<!-- needs: (?P<needs>.*) -->$|^```(?P<kind>.*)\n(?P<text>(?:.*\n)*?)^```$"
    for match in re.finditer(pattern, text, re.M):
        if match["needs"]:
            needs += tuple(match["needs"].split(", "))
        else:
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(match["kind"], match["text"], line, needs))
    return found


def python_blocks(page: Path) -> list[str]:
    """The Python code that stands in a Markdown page, block by block."""
    return [block.text for block in fenced_blocks(page) if block.kind == "python"]


def variables_of(page: Path, folder: Path) -> dict[str, Any]:
    """What the code of a page leaves behind, run in order in a folder."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in python_blocks(page):
            exec(compile(code, str(page), "exec"), names)
    return names


def adds(model: fx.GraphModule) -> int:
    """Calls that add or subtract, counted without help of the library; not those of conditions."""
    names = ("add", "iadd", "sub", "isub", "add_", "sub_", "rsub")
    demanded: set[fx.Node] = set()
    for node in reversed(model.graph.nodes):
        if node in demanded or getattr(node.target, "__name__", "") == "demand":
            demanded.update(node.all_input_nodes)
    nodes = [n for n in model.graph.nodes if n not in demanded]
    called = [n.target for n in nodes if n.op in ("call_function", "call_method")]
    return sum(getattr(t, "__name__", t) in names for t in called)


def assert_removed(
    model: nn.Module, *inputs: Any, sites: int = 1, strategy: str | None = None, **options: Any
) -> fx.GraphModule:
    """Convert with and without example inputs; both must be exact and leave no add."""
    options_without = options.pop("without_inputs", True)
    converted: fx.GraphModule = rmfx.remove_residuals(model, inputs, **options)
    assert_all_gone(model, converted, inputs, sites, strategy)
    if options_without:
        assert_all_gone(model, rmfx.remove_residuals(model, **options), inputs, sites, strategy)
    return converted


def assert_all_gone(
    model: nn.Module,
    converted: fx.GraphModule,
    inputs: tuple[Any, ...],
    sites: int,
    strategy: str | None,
) -> None:
    report = rmfx.report(converted)
    assert (report.removed, report.adds_left) == (sites, 0), str(report)
    assert adds(converted) == 0, converted.code
    if strategy is not None:
        assert [row.strategy for row in report.rows] == [strategy] * sites, str(report)
    assert_equivalent(model, converted, inputs)


def assert_refused(
    model: nn.Module,
    *inputs: Any,
    reason: str,
    sites: int = 1,
    example: bool = True,
    **options: Any,
) -> rmfx.Report:
    """Every site is refused for this reason, and the result still computes the same."""
    converted = rmfx.remove_residuals(model, inputs if example else None, **options)
    report = rmfx.report(converted)
    assert (report.removed, report.refused) == (0, sites), str(report)
    for row in report.rows:
        assert reason in row.reason, row.reason
        assert row.node in {node.name for node in converted.graph.nodes}
    assert_equivalent(model, converted, inputs)
    return report


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a pass must leave alone."""
    return (
        {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta},
        [id(value) for value in (*model.parameters(), *model.buffers())],
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [getattr(m, "inplace", None) for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        str(model.graph) if isinstance(model, fx.GraphModule) else None,
        [sorted(n.meta) for n in model.graph.nodes] if isinstance(model, fx.GraphModule) else None,
    )


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    """Two snapshots are equal."""
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]) or value.isnan().any(), name
    assert before[1:] == after[1:]


def mark(path: Path, folder: Path) -> tuple[Path, int]:
    """Makes a file, and says how many there were; here, where another process can import it."""
    before = len(list(folder.iterdir()))
    path.touch()
    return path, before


def doubled_unless_negative(number: int) -> tuple[int, int]:
    """Twice a number, and the process that has found it; for other processes, as `mark`."""
    if number < 0:
        raise ValueError(f"{number} is negative")
    return 2 * number, os.getpid()


def refuses_slopes(model: nn.Module, inputs: object) -> nn.Module:
    """A pass that fails on a network with a PReLU; for other processes, as `mark`."""
    if any(isinstance(one, nn.PReLU) for one in model.modules()):
        raise ValueError("no PReLU")
    return model
