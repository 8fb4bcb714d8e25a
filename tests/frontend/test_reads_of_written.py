"""What is written to is read when the model reads it: not before, not behind, not from a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image
from torch import Tensor, nn

import rmfx

Read = Callable[[Any, Tensor], Any]
VERBS: list[Any] = [
    rmfx.remove_residuals,
    rmfx.fold_batch_norm,
    rmfx.merge_convs,
    rmfx.merge_branches,
    rmfx.remove_noops,
]


def photo() -> Tensor:
    return image(2, 4, 8, 8)


def model_of(forward: Read) -> nn.Module:
    model = Apply(forward, a=conv(), b=conv())
    for name, shape in {"one": (1,), "wide": (4, 1, 1), "full": (4, 8, 8), "row": (4,)}.items():
        model.register_buffer(name, torch.rand(shape) + 0.1)
    model.register_buffer("index", torch.tensor([1, 0, 3, 2]))
    model.register_buffer("mask", torch.rand(8, 8) > 0.5)
    return model.double().eval()


def same_at_every_call(forward: Read, verb: Any = rmfx.remove_residuals) -> None:
    """A conversion with and one without inputs go on as the model does, call after call."""
    model = model_of(forward)
    for inputs in (photo(), None):
        before, after = copy.deepcopy(model), verb(model, inputs)
        for call in range(3):
            mine, theirs = photo(), photo()
            torch.testing.assert_close(
                after(theirs), before(mine), msg=lambda s, n=call: f"{n}: {s}"
            )
            assert torch.equal(mine, theirs)


# ---- a value that is written to between two reads -----------------------------------------------
BETWEEN: dict[str, Callable[[Tensor], Any]] = {
    "channel": lambda y: y[:, 0].mul_(-2.0),
    "filled": lambda y: y[:, 0].fill_(2.0),
    "flat": lambda y: y.view(-1).mul_(-2.0),
    "function": lambda y: torch.relu_(y[:, :2]),
}
LAST: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "where": lambda y, write: torch.where(_first(y > 0, write, y), y, 0.1 * y),
    "atan2": lambda y, write: torch.atan2(_first(torch.round(y * 3), write, y), y + 9),
    "cast": lambda y, write: torch.fmod(_first((y > 0).to(y.dtype), write, y), y + 20),
    "sinc": lambda y, write: torch.copysign(_first(torch.sinc(y), write, y), y),
    "in place": lambda y, write: _first(y.round(), write, y).fmod_(y + 20),
    "module": lambda y, write: torch.hypot(_first(F.hardswish(y), write, y), y),
    "gate": lambda y, write: _first(torch.sigmoid(y), write, y) * y,
    "sum": lambda y, write: _first(torch.sigmoid(y), write, y) + y,
}


def _first(value: Tensor, write: Callable[[Tensor], Any], y: Tensor) -> Tensor:
    write(y)
    return value


@pytest.mark.parametrize("last", LAST.values(), ids=LAST)
@pytest.mark.parametrize("write", BETWEEN.values(), ids=BETWEEN)
def test_no_read_moves_past_a_write(write: Any, last: Any) -> None:
    same_at_every_call(lambda m, x: x + m.b(last(m.a(x), write)))
    same_at_every_call(lambda m, x: last(x, write) + m.a(x))


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_moves_a_read_past_a_write(verb: Any) -> None:
    last, write = LAST["where"], BETWEEN["channel"]
    same_at_every_call(lambda m, x: x + m.b(last(m.a(x), write)), verb)


# ---- a tensor of the model that its forward writes to -------------------------------------------
READS: dict[str, Read] = {
    "atan2": lambda m, y: torch.atan2(y, m.one),
    "hypot": lambda m, y: torch.hypot(y, m.one),
    "clamp": lambda m, y: torch.clamp(y, -m.wide, m.wide),
    "clamp above": lambda m, y: torch.clamp(y, max=m.wide),
    "clamp one": lambda m, y: torch.clamp(y, min=-m.one),
    "maximum": lambda m, y: torch.maximum(y, m.wide),
    "threshold": lambda m, y: torch.where(y > m.one, y, 0.0),
    "choice": lambda m, y: torch.where(y > 0, y, m.one),
    "prelu": lambda m, y: F.prelu(y, m.row),
    "scale": lambda m, y: y * m.wide,
    "shift": lambda m, y: y + m.wide,
    "power": lambda m, y: y.abs() ** m.one,
    "quotient": lambda m, y: y / m.wide,
    "blend": lambda m, y: torch.lerp(y, -y, m.one),
    "linear": lambda m, y: F.linear(y, m.full[:, :8, :].mean(0)),
    "product": lambda m, y: y @ m.full[0],
    "einsum": lambda m, y: torch.einsum("bchw,chw->bchw", y, m.full),
    "batch norm": lambda m, y: F.batch_norm(y, m.row, m.row + 1),
    "of a span": lambda m, y: (y.permute(0, 2, 3, 1) * m.row).permute(0, 3, 1, 2),
    "border": lambda m, y: F.pad(y, (1, 1, 1, 1), value=0.0)[..., 1:-1, 1:-1] * m.one,
    "of a part": lambda m, y: y * m.wide[0],
    "of a computation": lambda m, y: y * (m.wide * 2 + 1),
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "added": lambda m: [getattr(m, name).add_(1) for name in ("one", "wide", "full", "row")],
    "copied": lambda m: [
        getattr(m, name).copy_(getattr(m, name) * 2) for name in ("one", "wide", "full", "row")
    ],
}


def _written_behind(read: Read, write: Callable[[Any], Any]) -> Read:
    def forward(m: Any, x: Tensor) -> Any:
        y = read(m, m.a(x))
        write(m)
        return x + m.b(y)

    return forward


def _written_before(read: Read, write: Callable[[Any], Any]) -> Read:
    def forward(m: Any, x: Tensor) -> Any:
        write(m)
        return x + m.b(read(m, m.a(x)))

    return forward


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize(
    ("write", "order"),
    [
        (WRITES["added"], _written_behind),
        (WRITES["added"], _written_before),
        (WRITES["copied"], _written_behind),
    ],
)
def test_no_value_is_read_before_the_call(read: Read, write: Any, order: Any) -> None:
    same_at_every_call(order(read, write))


def test_an_observer_of_ranges_goes_on_observing() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        m.wide.copy_(torch.maximum(m.wide, y.abs().max()))
        return x + m.b(torch.clamp(y, -m.wide, m.wide))

    same_at_every_call(forward)


@pytest.mark.parametrize(
    ("read", "write"),
    [
        (lambda m, y: y[:, m.index], lambda m: m.index.copy_(m.index.flip(0))),
        (lambda m, y: y.index_select(1, m.index), lambda m: m.index.copy_(m.index.flip(0))),
        (lambda m, y: torch.where(m.mask, y, 0.0), lambda m: m.mask.logical_not_()),
        (lambda m, y: y * m.mask, lambda m: m.mask.logical_not_()),
        (lambda m, y: y.masked_fill(m.mask, 0.5), lambda m: m.mask.logical_not_()),
        (
            lambda m, y: torch.where(y > m.one, F.pad(y, (1, 1), value=0.0)[..., 1:-1], m.one),
            lambda m: m.one.add_(1),
        ),
    ],
)
@pytest.mark.parametrize("order", [_written_behind, _written_before])
def test_no_choice_is_made_before_the_call(read: Read, write: Any, order: Any) -> None:
    same_at_every_call(order(read, write))


# ---- a layer that is put elsewhere --------------------------------------------------------------
def _two_branches(write_first: bool) -> Read:
    def forward(m: Any, x: Tensor) -> Any:
        v = x.relu()
        flat, a = v.view(-1), m.a(v)
        if write_first:
            flat.add_(1)
        b = m.b(v)
        if not write_first:
            flat.add_(1)
        return torch.cat([a, b], 1) * v.mean()

    return forward


@pytest.mark.parametrize("write_first", [True, False])
@pytest.mark.parametrize("verb", [*VERBS, rmfx.fuse_resconv])
def test_branches_of_a_concatenation_are_not_moved_past_a_write(
    verb: Any, write_first: bool
) -> None:
    same_at_every_call(_two_branches(write_first), verb)


def test_branches_before_all_writes_are_still_merged() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        v = x.relu()
        y = torch.cat([m.a(v), m.b(v)], 1)
        v.view(-1).add_(1)
        return y * v.mean()

    same_at_every_call(forward, rmfx.merge_branches)
    merged = rmfx.merge_branches(model_of(forward), photo())
    assert sum(isinstance(module, nn.Conv2d) for module in merged.modules()) == 1


class Carry(nn.Module):
    """A conv that hands its input on, an activation that lets it pass, and a conv that adds it."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.i, self.p, self.o = conv(4, 8), nn.PReLU(8, 0.2), conv(8, 4)
        self.e, self.a = nn.Conv2d(4, 4, 1, bias=False), conv()
        self.function = forward
        with torch.no_grad():
            self.p.weight[4:] = 1.0
            self.i.weight[4:], self.i.bias[4:], self.o.weight[:, 4:] = 0.0, 0.0, 0.0
            for k in range(4):
                self.i.weight[4 + k, k, 1, 1] = self.o.weight[k, 4 + k, 1, 1] = 1.0
            self.e.weight.copy_(torch.eye(4)[:, :, None, None])

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)

    def around(self, x: Tensor, written: Tensor) -> Tensor:
        y = self.p(self.i(x))
        written.view(-1).add_(1)
        return self.o(y)


def _identity_behind(m: Any, x: Tensor) -> Tensor:
    v = torch.relu(m.o(m.p(m.i(F.hardtanh(x)))))
    flat, y = v.view(-1), m.e(v)
    flat.add_(1)
    return m.a(y) * v.mean()


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.around(x, x) * x.mean(),
        lambda m, x: (lambda v: m.around(v, v) * v.mean())(torch.relu(x)),
        _identity_behind,
    ],
)
def test_a_skip_is_not_read_behind_a_write(forward: Any) -> None:
    model = Carry(forward).double().eval()
    for verify in (True, False):
        closed = rmfx.close_carries(model, photo(), verify=verify)
        torch.testing.assert_close(closed(photo()), model(photo()))


# ---- memory that is written to by another name --------------------------------------------------
def weight_normed(m: Any) -> Tensor:
    nn.utils.weight_norm(m.a)
    return m.a.weight_g


def parametrized(m: Any) -> Tensor:
    nn.utils.parametrizations.weight_norm(m.a)
    return m.a.parametrizations.weight.original0


def pruned(m: Any) -> Tensor:
    nn.utils.prune.random_unstructured(m.a, "weight", 0.5)
    return m.a.weight_mask


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("compute", [weight_normed, parametrized, pruned])
@pytest.mark.parametrize("by", ["object", "data"])
def test_a_computed_weight_follows_what_it_is_made_of(compute: Any, by: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        m.alias.mul_(0.9)
        return x + m.b(torch.relu(m.a(x)))

    model = Apply(forward, a=conv(), b=conv()).double().eval().requires_grad_(False)
    held = compute(model)
    model.register_buffer("alias", held.data if by == "data" else held.detach())
    if isinstance(held, nn.Parameter):
        with pytest.raises(rmfx.RmfxError, match="a copy would part them"):
            rmfx.remove_residuals(model, photo())
        return
    converted = rmfx.remove_residuals(model, photo())
    for _ in range(3):
        torch.testing.assert_close(converted(photo()), model(photo()))


@pytest.mark.parametrize("verb", VERBS)
def test_a_parameter_in_memory_that_is_written_to_is_refused(verb: Any) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        m.alias.mul_(0.9)
        return x + m.b(torch.relu(m.a(x)))

    model = Apply(forward, a=conv(), b=conv()).double().eval()
    model.register_buffer("alias", model.a.weight.data)
    with pytest.raises(rmfx.RmfxError, match="a copy would part them"):
        verb(model, photo())


def test_a_constant_in_memory_that_is_written_to_is_not_cut() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x) * m.scale)
        m.alias.mul_(0.9)
        return y

    model = Apply(forward, a=conv(4, 8), b=conv(8, 4)).double().eval()
    model.register_buffer("scale", torch.rand(1, 8, 1, 1, dtype=torch.float64))
    model.register_buffer("alias", model.scale.view(8))
    with torch.no_grad():
        model.b.weight[:, :4] = 0
    smaller = rmfx.eliminate_dead_channels(model, photo())
    for _ in range(3):
        torch.testing.assert_close(smaller(photo()), model(photo()))


# ---- what verbs run leaves the model as it is ---------------------------------------------------
def counting(m: Any, x: Tensor) -> Any:
    m.one.mul_(0.9)
    return x + m.b(torch.relu(m.a(x))) * m.one


@pytest.mark.parametrize(
    "verb",
    [
        lambda m, batches: rmfx.remove_residuals(m, photo(), calibration=batches),
        lambda m, batches: rmfx.remove_residuals(
            m, photo(), calibration=batches, activation="shift", verify=False
        ),
        lambda m, batches: rmfx.insert_batch_norm(m, batches),
        lambda m, batches: rmfx.prune_channels(
            m,
            photo(),
            target=0.9,
            data=[(x, x) for (x,) in batches],
            loss=F.mse_loss,
            importance="taylor",
        ),
        lambda m, batches: rmfx.choose_sites(
            m, photo(), data=[(x, x) for (x,) in batches], loss=F.mse_loss, rounds=1, seconds=0.01
        ),
    ],
)
def test_data_moves_no_state_of_the_caller(verb: Any) -> None:
    model = model_of(counting)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        made = verb(model, [(photo(),), (photo() + 1,)])
    except rmfx.RmfxError:
        made = None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    found = made[0] if isinstance(made, tuple) else made
    if found is not None:
        assert float(dict(found.named_buffers())["one"]) == float(before["one"])
