"""However a model is held, its report says the same: module, trace, exported program, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image, ready
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import rmfx
from rmfx.testing import assert_equivalent

Forward = Callable[[Any, Tensor], Tensor]
Verdicts = list[str]


def three(dims: int, **options: Any) -> dict[str, nn.Module]:
    """A stem and two layers."""
    return {name: conv(dims=dims, **options) for name in ("s", "a", "b")}


def masked(function: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A residual block whose branch is masked, by a mask that is computed of the input."""

    def forward(m: Any, x: Tensor) -> Tensor:
        mask = x[:, :1] > -0.5
        x = m.s(x)
        return x + m.b(function(torch.relu(m.a(x)), mask))

    return Apply(forward, **three(1))


def masked_by(mask: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """The same with a mask that the model holds."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.s(x)
        return x + m.b(function(torch.relu(m.a(x)), m.mask))

    return Apply(forward, mask=mask, **three(1))


HELD = {
    "of places": torch.arange(9).remainder(4).ne(1).view(1, 1, 9),
    "of channels": torch.tensor([True, False, True, True]).view(1, 4, 1),
    "of both": torch.arange(36).remainder(5).ne(1).view(1, 4, 9),
    "of one dimension": torch.arange(9) < 6,
}
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda x, m: torch.where(m, x, 0.0),
    "where, otherwise": lambda x, m: torch.where(~m, 0.0, x),
    "method where": lambda x, m: x.where(m, 0.0),
    "method where of zeros": lambda x, m: x.where(m, torch.zeros_like(x)),
    "where of new zeros": lambda x, m: torch.where(m, x, x.new_zeros(1)),
    "where of full_like": lambda x, m: torch.where(m, x, torch.full_like(x, 0.5)),
    "where of a tensor": lambda x, m: torch.where(m, x, torch.tensor(0.25, dtype=x.dtype)),
    "masked_fill": lambda x, m: x.masked_fill(~m, 0.0),
    "masked_fill by name": lambda x, m: x.masked_fill(mask=~m, value=-1.5),
    "masked_fill of an integer": lambda x, m: torch.masked_fill(x, ~m, 0),
    "masked_fill of a tensor": lambda x, m: x.masked_fill(~m, torch.tensor(2.0, dtype=x.dtype)),
    "product": lambda x, m: x * m,
    "product, mask first": lambda x, m: m * x,
    "mul": lambda x, m: torch.mul(x, m),
    "product of numbers": lambda x, m: x * m.to(x.dtype),
    "product of integers": lambda x, m: x * m.long(),
}
WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill_": lambda x, m: x.masked_fill_(~m, 0.0),
    "masked_fill_ of a clone": lambda x, m: x.clone().masked_fill_(~m, 1.0),
    "mul_": lambda x, m: x.clone().mul_(m),
    "imul": lambda x, m: imul(x, m),
}


def imul(x: Tensor, m: Tensor) -> Tensor:
    x *= m
    return x


def lengths_of(x: Tensor) -> Tensor:
    """A number of positions for each sample, which the input decides."""
    return x[:, 0].gt(0).sum(1) + 3


POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "of lengths": lambda x: (
        torch.arange(x.size(2)).unsqueeze(0) < lengths_of(x).unsqueeze(1)
    ).unsqueeze(1),
    "of lengths by index": lambda x: (
        torch.arange(x.shape[-1])[None, None, :] < lengths_of(x)[:, None, None]
    ),
    "of a number": lambda x: torch.arange(x.shape[2])[None, None] >= 2,
}


def accumulated(start: Callable[[Tensor], Any], *, write: bool = False) -> nn.Module:
    """Skips that are added up from zeros, as in WaveNet."""

    def forward(m: Any, x: Tensor) -> Tensor:
        total = start(x)
        for layer in (m.s, m.a, m.b):
            x = torch.tanh(layer(x))
            if write:
                total += x
            else:
                total = total + x
        return total

    return Apply(forward, **three(1))


STARTS: dict[str, Callable[[Tensor], Any]] = {
    "0": lambda x: 0,
    "zeros_like": torch.zeros_like,
    "zeros_like a slice": lambda x: torch.zeros_like(x[:, :1]),
    "zeros of a shape": lambda x: torch.zeros(x.shape, dtype=x.dtype),
    "zeros of sizes": lambda x: torch.zeros(x.size(0), 4, x.size(2), dtype=x.dtype),
    "new_zeros": lambda x: x.new_zeros(x.shape[0], x.shape[1], x.shape[2]),
    "new_zeros of a list": lambda x: x.new_zeros((x.shape[0], 1, x.size(dim=2))),
    "new_full": lambda x: x.new_full(x.size(), 0.5),
    "full_like": lambda x: torch.full_like(x, fill_value=0.25),
    "ones_like": torch.ones_like,
    "full": lambda x: torch.full(x.shape, 0.0, dtype=x.dtype),
    "zeros of one": lambda x: torch.zeros(1, dtype=x.dtype),
    "a copy": lambda x: torch.zeros_like(x).clone(),
    "empty": lambda x: torch.empty_like(x).zero_(),
    "filled": lambda x: torch.zeros_like(x).fill_(2.0),
}


def causal(pad: Callable[[Tensor], Tensor], dims: int = 1) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.s(x)
        return x + m.a(pad(x))

    layers = {"s": conv(dims=dims), "a": conv(dims=dims, padding=0)}
    return Apply(forward, **layers)


PADS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "pad": (1, lambda x: F.pad(x, (2, 0))),
    "new_zeros before": (1, lambda x: torch.cat([x.new_zeros(x.size(0), 4, 2), x], 2)),
    "new_zeros, last dimension": (1, lambda x: torch.cat([x.new_zeros(*x.shape[:2], 2), x], -1)),
    "zeros on both sides": (
        1,
        lambda x: torch.cat(
            [x.new_zeros((x.shape[0], x.shape[1], 1)), x, x.new_zeros(x.shape[0], x.shape[1], 1)],
            dim=2,
        ),
    ),
    "full behind": (
        1,
        lambda x: torch.cat((x, torch.full((x.size(0), 4, 2), 0.0, dtype=x.dtype)), dim=-1),
    ),
    "rows and columns": (
        2,
        lambda x: rows_and_columns(x),
    ),
}


def rows_and_columns(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    row = x.new_zeros(n, c, 1, w)
    x = torch.cat((row, x, row), 2)
    column = x.new_zeros(n, c, h + 2, 1)
    return torch.cat((column, x, column), 3)


def cropped(crop: Callable[[Tensor, Tensor], Tensor], after: nn.Module | None = None) -> nn.Module:
    """A block without padding, whose shortcut is cut to the size of its branch."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(torch.relu(m.a(x)))
        y = m.after(y)
        return y + crop(x, y)

    layers = {"a": conv(dims=1, padding=0), "b": conv(dims=1, padding=0)}
    return Apply(forward, after=after or nn.Identity(), **layers)


def centred(x: Tensor, y: Tensor) -> Tensor:
    start = (x.size(2) - y.size(2)) // 2
    return x[:, :, start : start + y.size(2)]


CROPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "from the end": lambda x, y: x[:, :, -y.size(2) :],
    "from the start": lambda x, y: x[..., : y.shape[-1]],
    "the middle": centred,
    "narrow": lambda x, y: x.narrow(2, 4, y.size(2)),
    "narrow by name": lambda x, y: torch.narrow(x, dim=-1, start=0, length=y.size(2)),
    "narrow to the end": lambda x, y: x.narrow(-1, x.size(2) - y.size(2), y.size(-1)),
    "narrow by numbers": lambda x, y: x.narrow(2, 2, y.size(dim=2)),
    "a difference": lambda x, y: x[:, :, x.size(2) - y.size(2) :],
    "by halves": lambda x, y: x[:, :, 2 : 2 + (2 * y.size(2)) // 2],
}
NO_OPS: dict[str, nn.Module] = {
    "dropout": nn.Dropout(0.1),
    "identity": nn.Identity(),
    "dropout1d": nn.Dropout1d(0.5),
    "tanh": nn.Tanh(),
    "clone": Apply(lambda m, x: x.clone()),
    "a cast": Apply(lambda m, x: x.to(x.dtype)),
    "contiguous": Apply(lambda m, x: x.contiguous()),
    "a function": Apply(lambda m, x: torch.erf(x)),
    "functional dropout": Apply(lambda m, x: F.dropout(x, 0.5, training=False)),
}


def checkpointed() -> nn.Module:
    def branch(m: Any, x: Tensor) -> Any:
        return m.b(torch.relu(m.a(x)))

    return Apply(
        lambda m, x: x + checkpoint(lambda y: branch(m, y), x, use_reentrant=False), **three(2)
    )


def bordered() -> nn.Module:
    """A padding that is written over with what the layer before it gives for zeros."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, b = F.pad(m.e(x), (1, 1, 1, 1)), m.e.bias.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = b
        y[:, :, -1:, :] = b
        y[:, :, :, 0:1] = b
        y[:, :, :, -1:] = b
        return x + torch.relu(m.c(x) + m.d(y))

    return Apply(forward, e=conv(4, 6, 1), d=conv(6, 4, padding=0), c=conv())


NETWORKS: dict[str, tuple[nn.Module, Tensor]] = {
    **{f"mask: {name}": (masked(f), image(2, 4, 9)) for name, f in {**MASKS, **WRITES}.items()},
    **{
        f"held mask {name}: {how}": (masked_by(mask, MASKS[how]), image(2, 4, 9))
        for name, mask in HELD.items()
        for how in ("where", "masked_fill", "product")
    },
    **{
        f"mask of positions: {name}": (
            Apply(
                lambda m, x, f=f: x + m.b(torch.relu(m.a(x)).masked_fill(~f(x), 0.0)),
                a=conv(dims=1),
                b=conv(dims=1),
            ),
            image(2, 4, 9),
        )
        for name, f in POSITIONS.items()
    },
    "mask of fewer dimensions": (
        Apply(
            lambda m, x: x + m.b(m.a(x) * (torch.arange(x.size(2)) < x.size(2) - 2)),
            a=conv(dims=1),
            b=conv(dims=1),
        ),
        image(2, 4, 9),
    ),
    **{f"start: {name}": (accumulated(f), image(2, 4, 9)) for name, f in STARTS.items()},
    **{
        f"start, written: {name}": (accumulated(STARTS[name], write=True), image(2, 4, 9))
        for name in ("zeros_like", "new_full", "empty")
    },
    **{
        f"pad: {name}": (causal(f, dims), image(2, 4, 9) if dims == 1 else image())
        for name, (dims, f) in PADS.items()
    },
    **{f"crop: {name}": (cropped(f), image(2, 4, 23)) for name, f in CROPS.items()},
    **{
        f"crop behind {name}": (cropped(CROPS["from the end"], layer), image(2, 4, 23))
        for name, layer in NO_OPS.items()
    },
    "checkpoint": (checkpointed(), image()),
    "slice writes": (bordered(), image()),
    "instance norm": (
        Apply(
            lambda m, x: x + m.b(m.n(torch.relu(m.a(x)))),
            n=nn.InstanceNorm3d(4, track_running_stats=True),
            **three(3),
        ),
        image(2, 4, 5, 6, 7),
    ),
}


def by_module(model: nn.Module, x: Tensor) -> Any:
    return rmfx.remove_residuals(model, x)


def by_trace(model: nn.Module, x: Tensor) -> Any:
    return rmfx.remove_residuals(fx.symbolic_trace(model), x)


def by_export(model: nn.Module, x: Tensor) -> Any:
    return rmfx.remove_residuals(torch.export.export(model, (x,)), x)


def verdicts(report: rmfx.Report) -> Verdicts:
    """What became of each site: its strategy, or why it stays, without names of nodes."""
    rows = report.to_dict()["sites"]
    return [row["reason"].partition(": ")[2] or "removed" for row in rows]


def compiled(model: nn.Module, x: Tensor) -> tuple[Tensor, Verdicts]:
    reports: list[rmfx.Report] = []
    torch._dynamo.reset()
    options = {"backend": "eager", "on_report": reports.append}
    with torch.no_grad():
        found = torch.compile(model, backend="rmfx", options=options)(x)
    return found, [one for report in reports for one in verdicts(report)]


def holds_one_size(name: str) -> bool:
    """Whether a network has a mask of one size, and takes no other one itself."""
    return name.startswith("held mask") and "of channels" not in name


def can_be_traced(name: str) -> bool:
    """Whether torch.fx itself can trace a network, and not only rmfx."""
    return name not in ("slice writes", "start: zeros of sizes", "pad: new_zeros, last dimension")


def grown(x: Tensor) -> Tensor:
    """Another batch, and another size of space."""
    return image(3, x.shape[1], *(n + 3 for n in x.shape[2:]))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_site_is_removed_in_every_way(name: str) -> None:
    model, x = NETWORKS[name]
    model = ready(model)
    found = by_module(model, x)
    expected = verdicts(rmfx.report(found))
    assert set(expected) == {"removed"}, rmfx.report(found)
    assert_equivalent(model, found, (x,))
    if not holds_one_size(name):
        assert_equivalent(model, found, (grown(x),))
    if can_be_traced(name):
        assert verdicts(rmfx.report(by_trace(model, x))) == expected
    exported = by_export(model, x)
    assert verdicts(rmfx.report(exported)) == expected
    assert_equivalent(model, exported, (x,))
    result, of_compiled = compiled(model, x)
    assert of_compiled == expected
    assert (result - model(x)).abs().max() <= 1e-10 * model(x).abs().max()
