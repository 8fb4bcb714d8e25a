"""Draws of residual sites, and of blocks that only look like one."""

from __future__ import annotations

from rmfx.testing.networks.forms import IN_PLACE
from rmfx.testing.networks.joins import Join
from rmfx.testing.networks.layers import Act

from .branches import branch
from .constructs import construct, unusual
from .draws import Draws
from .gates import CHOICES
from .joins import broadcast, double, join, more_input, recall
from .layers import act_args, layer, repeat
from .shortcuts import fit
from .steps import constant, opaque
from .things import Thing, draw_one, on_maps
from .values import INPUT, Path
from .windows import pool_or_pad_alike


def any_block(sampler: Draws, path: Path) -> None:
    """A residual site, or now and then something that only looks like one."""
    if sampler.one_in(5):
        draw_one(sampler, path, _LOOKALIKES)
    else:
        residual(sampler, path)


def residual(sampler: Draws, path: Path) -> None:
    """A join of a main branch and of one or more other operands that fit its shape."""
    shortcut_first = sampler.one_in(3)
    visible = dict(sampler.saved)
    main = path.operand()
    branch(sampler, main)
    made = {name: v for name, v in sampler.saved.items() if name not in visible}
    if shortcut_first:  # what the main branch saves does not exist yet when the others run
        sampler.saved = visible
    others = []
    for _ in range(sampler.pick((1, 1, 1, 1, 2, 3))):
        other = path.operand()
        if sampler.one_in(4) and not sampler.is_large:
            branch(sampler, other)
        fit(sampler, other, main.value.shape)
        others.append(other)
    if main.value.is_map and sampler.one_in(12):
        pool_or_pad_alike(sampler, [main, *others])
    sampler.saved = {**sampler.saved, **made}
    join(sampler, path, [*others, main] if shortcut_first else [main, *others])


# What only looks like a residual site
def _opaque_branch(sampler: Draws, path: Path) -> None:
    """A site whose branch mixes positions or channels in a way that depends on the data."""
    main, shortcut = path.operand(), path.operand()
    layer(sampler, main)
    opaque(sampler, main)
    if sampler.one_in(2):
        layer(sampler, main)
    fit(sampler, shortcut, main.value.shape)
    join(sampler, path, [main, shortcut])


def _late_read(sampler: Draws, path: Path) -> None:
    """A value is changed in place after it was saved, and read again later."""
    if path.value.storage == INPUT:
        layer(sampler, path)
    name = sampler.save(path)
    if path.value.storage == INPUT or sampler.one_in(2):
        residual(sampler, path)
    else:
        kind = sampler.pick(IN_PLACE)
        form = sampler.pick(("module in-place", "functional in-place"))
        sampler.put(path, Act(kind, form, act_args(sampler, kind, path.value)), alias=True)
    if sampler.one_in(2):
        layer(sampler, path)
    recall(sampler, path, name)


def _product(sampler: Draws, path: Path) -> None:
    """Two branches joined by something that is not an addition."""
    main, other = path.operand(), path.operand()
    branch(sampler, main)
    fit(sampler, other, main.value.shape)
    forms = ["torch.stack([a, b]).sum(0)", *CHOICES]
    if sampler.spends_product():
        forms.insert(0, "a * b")
    node = Join((tuple(main.nodes), tuple(other.nodes)), (sampler.pick(forms),))
    sampler.put(path, node, main.value.shape)


def _concatenate(sampler: Draws, path: Path) -> None:
    """The value next to what a branch makes of it, as in a dense net."""
    fork = path.value
    main, other = path.operand(), path.operand()
    branch(sampler, main)
    fit(sampler, other, (fork.channels, *main.value.size))
    node = Join((tuple(other.nodes), tuple(main.nodes)), ("torch.cat([a, b], 1)",))
    sampler.put(path, node, (fork.channels + main.value.channels, *main.value.size))
    if path.value.channels > 6:
        layer(sampler, path, 4, "point")


_LOOKALIKES = (
    *map(Thing, (double, _opaque_branch, constant, _product, repeat, recall, more_input)),
    Thing(_late_read),
    Thing(broadcast, on_maps, times=2),
    Thing(_concatenate, on_maps),
    Thing(construct, on_maps),
    Thing(unusual, times=3),
)
