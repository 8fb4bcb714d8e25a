"""Draws of joins: of several chains, with values from elsewhere, with further inputs."""

from __future__ import annotations

from dataclasses import replace

from rmfx.testing.networks.forms import INTO_A
from rmfx.testing.networks.joins import Join, Recall

from .draws import CONSTANTS, Draws
from .layers import affine, layer
from .shortcuts import fit
from .values import INPUT, Path, Value
from .windows import pool_all

_OUT_OF_PLACE = (
    *("a + b", "a + b", "b + a", "torch.add(a, b)", "a.add(b)", "a - b", "b - a"),
    *("a + c * b", "c * a + b", "torch.add(a, b, alpha=c)", "torch.sub(a, b, alpha=c)"),
    *("torch.add(input=a, other=b)", "sum([a, b])"),
)


def join(sampler: Draws, path: Path, operands: list[Path], form: str = "") -> None:
    """End the operands in one join, in the form given where it is allowed."""
    joined = Path(operands[0].value)
    several = len(operands) > 2  # equal ones of opposite signs would cancel to mere rounding
    forms = tuple(
        _combine(sampler, joined, operand.value, form, adds=several) for operand in operands[1:]
    )
    chains = tuple(tuple(operand.nodes) for operand in operands)
    constants = [c for c in CONSTANTS if c > 0] if several else CONSTANTS
    path.nodes.append(Join(chains, forms, sampler.pick(constants)))
    path.value = joined.value


def _combine(
    sampler: Draws, path: Path, other: Value, wanted: str = "", *, adds: bool = False
) -> str:
    """How to join the path's value a with b, of the same shape; the result's memory is set.

    Args:
        wanted: a form to take where it is allowed.
        adds: whether to leave out subtractions.
    """
    value = path.value
    forms = list(_OUT_OF_PLACE)
    if value.storage != other.storage:
        if value.storage != INPUT:
            forms += INTO_A
        if other.storage != INPUT:
            forms += ["b += a", "b += a"]
    if adds:
        forms = [form for form in forms if "-" not in form and "sub" not in form]
    form: str = wanted if wanted in forms else sampler.pick(forms)
    if form in INTO_A:
        return form
    storage = sampler.new_storage()
    path.value = replace(value, storage=other.storage if form == "b += a" else storage)
    return form


# Values from elsewhere
def recall(sampler: Draws, path: Path, name: str = "") -> None:
    """A value from elsewhere joins in, or another input of the network."""
    value = path.value
    names = [known for known, saved in sampler.saved.items() if saved.suits(value)]
    if not name and (not names or (len(sampler.shapes) < 3 and sampler.one_in(5))):
        more_input(sampler, path)
        return
    name = name or sampler.pick(names)
    other = Path(sampler.saved[name])
    fit(sampler, other, value.shape)
    _put_recall(sampler, path, name, other)


def more_input(sampler: Draws, path: Path) -> None:
    """Another input of the network is added or concatenated."""
    if len(sampler.shapes) == 3:
        return
    value = path.value
    name = f"input{len(sampler.shapes)}"
    sampler.shapes.append((sampler.batch, *value.shape))
    other = Path(replace(value, storage=INPUT))
    if value.is_map and value.channels < 5 and sampler.one_in(3):
        form = "torch.cat([a, b], 1)"
        sampler.put(path, Recall(name, (), form), (2 * value.channels, *value.size))
        return
    if sampler.one_in(2):
        layer(sampler, other)
        fit(sampler, other, value.shape)
    _put_recall(sampler, path, name, other)


def _put_recall(sampler: Draws, path: Path, name: str, other: Path) -> None:
    form = _combine(sampler, path, other.value)
    path.nodes.append(Recall(name, tuple(other.nodes), form, sampler.pick(CONSTANTS)))


# Joins that are no residual sites
def double(sampler: Draws, path: Path) -> None:
    """The value and itself."""
    forms = [form for form in _OUT_OF_PLACE if "-" not in form]
    sampler.put(path, Join(((), ()), (sampler.pick(forms),)))


def broadcast(sampler: Draws, path: Path) -> None:
    """One operand has one channel, or one position."""
    main, other = path.operand(), path.operand()
    layer(sampler, main)
    shape = main.value.shape
    if sampler.one_in(2):
        affine(sampler, other, 1, "point")
        fit(sampler, other, (1, *shape[1:]))
    else:
        pool_all(sampler, other)
        affine(sampler, other, shape[0], "point")
    operands = (tuple(main.nodes), tuple(other.nodes))
    sampler.put(path, Join(operands, (sampler.pick(_OUT_OF_PLACE),)), shape)
