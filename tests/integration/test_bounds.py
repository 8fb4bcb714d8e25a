"""Every conversion ends, in time that networks of that size deserve, and never in a raw error."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import chain, conv, ready
from torch import Tensor, fx, nn
from torch.export import export

import rmfx
from rmfx import conversion
from rmfx.cli import main
from rmfx.errors import InternalError, OptionError, RmfxError, TraceError, WeightError
from rmfx.ir.net import Net
from rmfx.ir.nodes import between
from rmfx.passes import residual
from rmfx.testing import assert_equivalent


def converted(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    model = ready(model)
    gm = rmfx.remove_residuals(model, inputs)
    assert_equivalent(model, gm, inputs)
    return gm


def removed(gm: fx.GraphModule) -> int:
    return sum(row.status == "removed" for row in rmfx.report(gm).rows)


def picture(batch: int = 2, channels: int = 4, size: int = 7) -> Tensor:
    return torch.randn(batch, channels, size, size + 2, dtype=torch.float64)


# ---- what is read of a branch behind a pool -----------------------------------------------------


class Focal(nn.Module):
    """A sum of gated terms; what stands behind the first sums reads a branch through a pool."""

    def __init__(self, terms: int, pool: Callable[[Tensor], Tensor], act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.pool = nn.Conv2d(4, 6, 1), act, pool
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(terms))

    def forward(self, x: Tensor) -> Tensor:
        h, gates, total = self.first(x), torch.sigmoid(x), torch.zeros((), dtype=x.dtype)
        for i, layer in enumerate(self.layers):
            h = self.act(layer(h))
            term = h * gates[:, i : i + 1]
            total = total + term if i else term
        return total + self.pool(h) * gates[:, -1:]


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean((2, 3), keepdim=True),
    "adaptive": lambda h: F.adaptive_avg_pool2d(h, 1),
    "other axes": lambda h: h.mean((-1, -2), keepdim=True),
}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Identity()], ids=["relu", "linear"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("terms", [2, 3])
def test_a_pool_behind_a_sum_of_gated_terms(terms: int, pool: str, act: nn.Module) -> None:
    """The node behind the join is replaced by the rewrite: it cannot mark the end of the site."""
    assert removed(converted(Focal(terms, POOLS[pool], act), picture())) >= terms - 1


class Centred(nn.Module):
    """A branch that is combined with its own mean over space."""

    def __init__(self, pool: Callable[[Tensor], Tensor], combine: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.pool, self.combine = pool, combine

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(self.combine(h, self.pool(h))) + x


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("combine", [torch.sub, torch.add, torch.mul])
def test_a_branch_is_combined_with_its_own_mean(pool: str, combine: Callable[..., Tensor]) -> None:
    """The mean is made anew for the wide value: the branch must read the new one."""
    assert removed(converted(Centred(POOLS[pool], combine), picture())) == 1


def test_the_end_of_a_site_that_is_gone_is_a_fault_and_no_endless_walk() -> None:
    graph = rmfx.trace(chain(nn.Tanh(), nn.Tanh()).eval()).graph
    first, *_, last = graph.nodes
    assert [node.name for node in between(first, last)] == ["_0", "_1"]
    with pytest.raises(InternalError, match=r"input_1: it does not stand behind _0.*please report"):
        list(between(first.next, first))


# ---- time against size --------------------------------------------------------------------------


class Branches(nn.Module):
    """A sum of many branches of one value."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for layer in self.layers:
            total = total + torch.relu(layer(x))
        return total


class Nested(Branches):
    """Each branch holds the next sum."""

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(torch.relu(layer(values[-1])))
        total = values[-1]
        for value in reversed(values[:-1]):
            total = total + value
        return total


class Doubling(Branches):
    """Each value is read twice by the next sum: 2ⁿ paths."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        for _ in self.layers:
            y = torch.tanh(y) + torch.sigmoid(y)
        return x + self.layers[-1](y)


class Products(Branches):
    """Each value is read twice by the next product: 2ⁿ paths."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = torch.tanh(y) * torch.sigmoid(layer(y))
        return x + y


class Crossed(Branches):
    """Two streams that read each other, by sums and gates."""

    def forward(self, x: Tensor) -> Tensor:
        a = b = x
        for layer in self.layers:
            a, b = b + torch.relu(layer(a)), a * torch.sigmoid(b)
        return a + b + x


class Dense(nn.Module):
    """Everything that was computed is concatenated before each layer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 * i, 4, 1) for i in range(1, n + 1))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(torch.relu(layer(torch.cat(found, 1))))
        return x + found[-1]


FAMILIES: list[Callable[[int], nn.Module]] = [Branches, Nested, Doubling, Products, Crossed, Dense]
MOST = 30.0  # seconds of a processor, where they take 2 at most; an exponential one takes years


@pytest.mark.parametrize("family", FAMILIES)
def test_time_does_not_explode_with_depth(family: Callable[[int], nn.Module]) -> None:
    start = time.process_time()
    assert removed(converted(family(24), picture(size=3))) >= 1
    assert time.process_time() - start < MOST


@pytest.mark.parametrize("verb", ["merge_convs", "merge_branches", "eliminate_dead_channels"])
@pytest.mark.parametrize("family", [Doubling, Crossed, Dense])
def test_the_other_verbs_end_too(verb: str, family: Callable[[int], nn.Module]) -> None:
    start = time.process_time()
    getattr(rmfx, verb)(family(24).eval(), (picture(size=3).float(),))
    assert time.process_time() - start < MOST


# ---- numbers, constants, levels -----------------------------------------------------------------


class Detector(nn.Module):
    """A residual block before code that only torch.export traces, and a number of a buffer."""

    def __init__(self, last: Callable[[Detector, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.body = conv(4, 6), conv(6, 6)
        self.strides: Tensor
        self.register_buffer("strides", torch.tensor([3.0, 7.0]))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.relu(y + self.body(y))
        if y.shape[2] > 4:
            y = y * 1.5
        return self.last(self, y.flatten(2))


HEADS: dict[str, Callable[[Detector, Tensor], Tensor]] = {
    "full": lambda m, y: y * torch.full((1, y.shape[2]), m.strides[1], dtype=y.dtype),
    "item": lambda m, y: y * m.strides[0].item() + m.strides.sum().item(),
    "of an input": lambda m, y: y * y.mean().item(),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_number_out_of_a_tensor_refuses_no_network(head: str) -> None:
    gm = converted(Detector(HEADS[head]), picture(size=9))
    assert removed(gm) == 1


def test_a_number_of_a_buffer_that_is_written_is_read_behind_the_write() -> None:
    def last(m: Detector, y: Tensor) -> Tensor:
        m.strides.add_(1.0)
        return y * m.strides[0].item()

    model, x = ready(Detector(last)), picture(size=9)
    gm = rmfx.remove_residuals(model, (x,))
    for _ in range(2):
        assert torch.allclose(gm(x), model(x), rtol=1e-12)


def test_a_number_that_is_kept_from_the_call_before_is_refused() -> None:
    kept: list[float] = []

    def last(m: Detector, y: Tensor) -> Tensor:
        mean = y.mean()
        if not kept:
            kept.append(mean.item())
        return y * kept[0]

    with pytest.raises(TraceError, match="computes with it at the next call"):
        rmfx.remove_residuals(ready(Detector(last)), (picture(size=9),))


@pytest.mark.parametrize("head", ["full", "item"])
def test_a_number_of_a_buffer_is_not_fixed_where_weights_may_change(head: str) -> None:
    model = ready(Detector(HEADS[head]))
    inputs = (picture(size=9),)
    converted = rmfx.remove_residuals(model, inputs, differentiable=True)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.mul_(1.5)
    assert_equivalent(model, converted, inputs)


class Lost(nn.Module):
    """What it reads by `.data` is a constant without a value, for a strict torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(4, 6, stride=2), conv(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, 1, 2)
        z = torch.zeros(y.size(0), 2, y.size(2), y.size(3), dtype=y.dtype)
        return self.last(torch.relu(self.first(x))) + torch.cat([y.data, z], 1)


@pytest.mark.filterwarnings("ignore")
def test_a_constant_without_a_value_is_the_cause() -> None:
    x = picture(size=8).float()
    program = export(Lost().eval(), (x,), strict=True)
    for held in (program, program.module()):
        with pytest.raises(WeightError, match=r"lifted_tensor_0: .* lost its value.*detach"):
            rmfx.remove_residuals(held, (x,))
    with pytest.raises(TraceError, match=r"reads `\.data`.*detach"):
        rmfx.remove_residuals(Lost().eval(), (x,))


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.mapped = conv(4, 4), conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.last(torch.relu(self.first(x)))
        return torch.vmap(lambda row: row + self.mapped(row[None])[0])(y)


@pytest.mark.filterwarnings("ignore")
def test_vmap_computes_with_whole_batches() -> None:
    model, x = Mapped().double().eval(), picture(3)
    program = export(model, (x,))
    for gm in (rmfx.remove_residuals(model, (x,)), rmfx.remove_residuals(program)):
        assert_equivalent(model, gm, (x,))
        assert removed(gm) == 2
    with pytest.raises(TraceError, match=r"torch\.vmap .*pass the ExportedProgram"):
        rmfx.remove_residuals(program.module(), (x,))


# ---- the last net -------------------------------------------------------------------------------


def fails(*given: Any, **named: Any) -> Any:
    raise KeyError("what nobody\nforesaw")


def test_an_unexpected_error_in_a_rule_names_rule_and_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual.ResidualRule, "rewrite", fails)
    with pytest.raises(InternalError) as caught:
        rmfx.remove_residuals(Branches(1).eval())
    assert isinstance(caught.value.__cause__, KeyError)
    text = str(caught.value)
    assert text.startswith("ResidualRule at add: KeyError: ")
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert all(word in text for word in ("report", "rmfx ", "Python 3", "--traceback"))
    assert "\n" not in text


@pytest.mark.parametrize("verb", ["remove_residuals", "merge_convs", "fold_batch_norm"])
def test_an_unexpected_error_in_a_verb_names_the_verb(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Net, "finish", fails)
    with pytest.raises(InternalError, match=f"^{verb}: KeyError"):
        getattr(rmfx, verb)(Branches(1).eval())


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RmfxError("of our own")])
def test_other_errors_pass(
    error: BaseException | type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any) -> None:
        raise error

    monkeypatch.setattr(residual.ResidualRule, "match", stop)
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind) as caught:
        rmfx.remove_residuals(Branches(1).eval())
    assert type(caught.value) is kind


def test_a_call_that_does_not_fit_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match=r"remove_residuals\(\) got an unexpected keyword"):
        rmfx.remove_residuals(Branches(1).eval(), size=3)  # type: ignore[call-arg]


def test_a_policy_that_raises_is_blamed() -> None:
    with pytest.raises(OptionError, match="policy raised KeyError on add"):
        rmfx.remove_residuals(Branches(1).eval(), policy=fails)


def test_the_command_shows_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conversion, "count", fails)
    command = ["report", "rmfx.models:DigitsNet", "--input-shape", "1,1,28,28"]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert message.startswith("rmfx: the command: KeyError")
    assert message.count("\n") == 1
    with pytest.raises(InternalError):
        main([*command, "--traceback"])
