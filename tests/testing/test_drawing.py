"""Whatever a table of the drawing holds gives networks that run, wherever the row says it suits."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from rmfx.testing import FEATURES, NetworkSpec, Opaque, random_network
from rmfx.testing.drawing import constructs
from rmfx.testing.drawing.constructs import CONSTRUCTS, UNUSUAL
from rmfx.testing.drawing.draws import Draws
from rmfx.testing.drawing.sampler import Sampler
from rmfx.testing.drawing.things import Thing, anywhere, draw_one, on_maps, simplest_first
from rmfx.testing.drawing.values import Path
from rmfx.testing.shrink import runs

ROWS = dict.fromkeys((*CONSTRUCTS, *UNUSUAL))


def drawn_alone(thing: Thing, seed: int) -> NetworkSpec | None:
    """A network of one thing, if it suits the input that is drawn."""
    sampler = Sampler(Random(seed))
    path = sampler.start()
    if not thing.suits(sampler, path):
        return None
    shape = path.value.shape
    thing.draw(sampler, path)
    assert path.value.shape == shape
    return sampler.finish(path)


@pytest.mark.parametrize("thing", ROWS, ids=lambda thing: str(thing.draw.__name__))
def test_a_row_alone_gives_networks_that_run_and_keeps_the_shape(thing: Thing) -> None:
    specs = [spec for seed in range(24) if (spec := drawn_alone(thing, seed))]
    assert specs
    assert all(map(runs, specs))


def mark(sampler: Draws, path: Path) -> None:
    sampler.put(path, Opaque("a new thing"))


def test_a_new_row_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constructs, "CONSTRUCTS", (*CONSTRUCTS, Thing(mark, on_maps)))
    networks = (random_network(Random(seed)) for seed in range(200))
    assert any("a new thing" in repr(network) for network in networks)


def test_rows_are_drawn_as_often_as_they_say_and_only_where_they_suit() -> None:
    found: Counter[str] = Counter()
    things = (
        Thing(lambda sampler, path: found.update(["once"])),
        Thing(lambda sampler, path: found.update(["thrice"]), anywhere, 3),
        Thing(lambda sampler, path: found.update(["never"]), lambda sampler, path: False),
    )
    sampler = Sampler(Random(0))
    path = sampler.start()
    for _ in range(1000):
        draw_one(sampler, path, things)
    assert set(found) == {"once", "thrice"}
    assert 2 < found["thrice"] / found["once"] < 4


def test_what_suits_anywhere_comes_first_and_the_rest_keeps_its_order() -> None:
    rows = [Thing(mark, on_maps), Thing(mark), Thing(mark, on_maps, 2), Thing(mark, times=2)]
    assert simplest_first(rows[:1], rows[1:]) == (rows[1], rows[3], rows[0], rows[2])


def test_everything_that_is_counted_of_a_network_is_drawn() -> None:
    seen: set[str] = set()
    for seed in range(3000):
        seen |= random_network(Random(seed)).features()
        if seen == FEATURES:
            return
    assert seen == FEATURES
