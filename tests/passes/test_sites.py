"""Keep, open or cut: the best choice within the budget, and what it makes of the network."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Residual, assert_same, chain, conv, conv_bn, image, ready, snapshot, types
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import rmfx
from rmfx.passes.sites import SiteChoice, knapsack
from rmfx.timing import timer

Times = tuple[float, float, float]


def network() -> Any:
    """Two basic blocks, one with a projection, and a classifier; the same at each call."""
    torch.manual_seed(0)
    first = Residual(chain(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4)))
    branch = chain(conv_bn(4, 6, stride=2), nn.ReLU(), conv_bn(6, 8))
    second = Residual(branch, conv_bn(4, 8, 1, stride=2))
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return ready(chain(conv_bn(3, 4), nn.ReLU(), first, nn.ReLU(), second, *head))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(8, 3, 9, 9, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [(x, torch.arange(8) % 5) for x in draw]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the forms of each site take given times, in the order keep, open, cut."""

    def install(*times: Times) -> list[int]:
        left, counts = list(times), []

        def compare(forms: Any, inputs: Any, *_: Any) -> list[tuple[float, ...]]:
            outputs = [form(*inputs) for form in forms]
            torch.testing.assert_close(outputs[0], outputs[min(1, len(outputs) - 1)])
            assert all(output.shape == outputs[0].shape for output in outputs)
            counts.append(len(forms))
            return [(own,) * 3 for own in left.pop(0)[: len(forms)]]

        monkeypatch.setattr(timer, "compare_speed", compare)
        return counts

    return install


def chosen(**options: Any) -> tuple[Any, rmfx.ChoiceReport]:
    model = network()
    before = snapshot(model)
    result = rmfx.choose_sites(model, image(1, 3, 9, 9), batches(), **options)
    assert_same(before, snapshot(model))
    return result


def test_what_is_faster_open_is_opened_and_the_rest_is_kept(pretend: Any) -> None:
    counts = pretend((2.0, 1.0, 1.5), (2.0, 3.0, 1.5))
    gm, report = chosen(budget=0.0, choices=("keep", "open"))
    assert counts == [2, 2]
    assert [site.choice for site in report.sites] == ["open", "keep"]
    x = image(3, 3, 9, 9)
    torch.testing.assert_close(gm(x), network()(x), rtol=1e-10, atol=1e-10)
    assert rmfx.cost.count(gm, x).adds == 1
    assert types(gm).count("BatchNorm2d") > 0


def test_what_is_cut_has_no_shortcut_and_the_loss_that_was_told(pretend: Any) -> None:
    pretend((2.0, 3.0, 1.0), (2.0, 3.0, 1.9))
    gm, report = chosen(budget=1e9)
    assert [site.choice for site in report.sites] == ["cut", "cut"]
    assert rmfx.cost.count(gm, image(1, 3, 9, 9)).adds == 0
    by_hand = copy.deepcopy(network())
    by_hand[2] = by_hand[2].branch
    by_hand[4] = by_hand[4].branch
    update_bn([x for x, _ in batches()], by_hand)
    losses = [float(F.cross_entropy(by_hand.eval()(x), y).detach()) for x, y in batches()]
    assert report.loss_after == pytest.approx(sum(losses) / 2, rel=1e-9)
    text = str(report)
    assert "cut" in text
    assert "loss by cutting" in text
    assert report.to_dict()["sites"][0]["seconds_cut"] == 1.0


def test_the_budget_decides(pretend: Any) -> None:
    pretend((2.0, 3.0, 1.0), (2.0, 3.0, 1.0))
    _, report = chosen(budget=1e9)
    losses = [site.loss_cut or 0.0 for site in report.sites]
    cheaper = losses.index(min(losses))
    assert max(losses) > max(0.0, min(losses))
    pretend((2.0, 3.0, 1.0), (2.0, 3.0, 1.0))
    _, report = chosen(budget=max(0.0, min(losses)))
    assert report.sites[cheaper].choice == "cut"
    assert report.sites[1 - cheaper].choice == ("cut" if sum(losses) <= 0 else "keep")
    pretend((2.0, 3.0, 1.0), (2.0, 3.0, 1.0))
    gm, report = chosen(choices=("keep",))
    assert [site.choice for site in report.sites] == ["keep", "keep"]
    x = image(3, 3, 9, 9)
    torch.testing.assert_close(gm(x), network()(x), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_cut_is_not(pretend: Any) -> None:
    two_branches = Residual(chain(conv(), nn.ReLU(), conv()), chain(conv(), nn.ReLU(), conv()))
    difference = Residual(chain(conv(), nn.ReLU(), conv()), combine=lambda x, y: x - y)
    model = ready(chain(conv(3, 4), two_branches, difference, nn.Flatten(), nn.Linear(324, 5)))
    counts = pretend((2.0, 3.0, 1.0), (2.0, 3.0, 1.0))
    _, report = rmfx.choose_sites(model, image(1, 3, 9, 9), batches(), budget=1e9)
    assert counts == [2, 2]
    assert [site.loss_cut for site in report.sites] == [None, None]


def test_measured_for_real_and_kept_in_a_file(tmp_path: Path) -> None:
    model = network().float()
    data = [(x.float(), y) for x, y in batches()]
    path = tmp_path / "sites.json"
    steps: list[str] = []
    for _ in range(2):
        _, report = rmfx.choose_sites(
            model,
            image(1, 3, 9, 9, dtype=torch.float32),
            data,
            runtime="eager",
            cache=path,
            rounds=1,
            seconds=0.001,
            step=steps.append,
        )
    assert all(site.seconds > 0 for site in report.sites)
    assert sum("time" in text for text in steps) == 2  # not timed again


class Chosen(nn.Module):
    """What is added was chosen, place by place, by a tensor of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.where(x > 1, x, self.second(x)) + x


def test_a_site_that_reads_truth_values(pretend: Any) -> None:
    pretend((3.0, 1.0, 2.0))
    x = image(2, 3, 8, 8)
    options = {"loss": lambda y, target: y.square().mean(), "choices": ("keep", "open")}
    _, report = rmfx.choose_sites(ready(Chosen()), x, [(x, 0)], **options)
    assert [row.choice for row in report.sites] == ["open"]


def test_a_network_without_sites() -> None:
    model = ready(chain(conv_bn(3, 4), nn.Flatten(), nn.Linear(324, 5)))
    gm, report = rmfx.choose_sites(model, image(1, 3, 9, 9), batches())
    assert str(report) == "no residual connections"
    x = image(2, 3, 9, 9)
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": ("open",)}, "'keep', and any of"),
        ({"choices": ("keep", "burn")}, "'keep', and any of"),
        ({"runtime": "sundial"}, "sundial"),
        ({"budget": -0.1}, "must be a number at least 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(rmfx.RmfxError, match=message):
        chosen(**options)
    with pytest.raises(rmfx.RmfxError, match="no batches"):
        rmfx.choose_sites(network(), image(1, 3, 9, 9), [])
    with pytest.raises(rmfx.ShapeError, match="example inputs"):
        rmfx.choose_sites(network(), None, batches())


NUMBERS = st.integers(-3, 9).map(float)


@given(
    st.lists(st.tuples(NUMBERS, st.none() | NUMBERS, st.none() | NUMBERS), max_size=5),
    st.integers(0, 12),
)
def test_the_knapsack_is_solved_exactly(
    sites: list[tuple[float, float | None, float | None]], budget: int
) -> None:
    rows = [
        SiteChoice("", "", "keep", seconds, opened, None if cut is None else 1.0, cut)
        for seconds, opened, cut in sites
    ]

    def worth(choice: tuple[str, ...]) -> tuple[float, float] | None:
        lost = saved = 0.0
        for row, name in zip(rows, choice, strict=True):
            seconds = {"keep": row.seconds, "open": row.seconds_open, "cut": row.seconds_cut}[name]
            if seconds is None:
                return None
            lost += (row.loss_cut or 0.0) if name == "cut" else 0.0
            saved += row.seconds - seconds
        return lost, saved

    every = [worth(c) for c in itertools.product(("keep", "open", "cut"), repeat=len(rows))]
    best = max(saved for lost, saved in filter(None, every) if lost <= budget)
    found = worth(tuple(knapsack(rows, budget)))
    assert found is not None
    assert found[0] <= budget
    assert found[1] == best
