"""Weights drawn from a ring: the plan, the gradients, and models that are trained and deployed."""

from __future__ import annotations

import copy
import hashlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import rmfx
from rmfx.errors import OptionError, TraceError, WeightError
from rmfx.models import cifar_resnet
from rmfx.modules.ring import FromRing, Ring, plan

pytestmark = pytest.mark.oldest

RESNET18_RING = 512 * 512 * 9  # one convolution of the last stage


def small_resnet() -> nn.Module:
    return cifar_resnet(8, "B", 10).double()


def drawn(model: nn.Module) -> dict[str, FromRing]:
    return {path: m for path, m in model.named_modules() if isinstance(m, FromRing)}


# ---- the plan -----------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 2000), st.integers(0, 2**63 - 1))
def test_each_element_is_used_as_often_as_any_other_or_once_more(
    size: int, more: int, seed: int
) -> None:
    total = size + more
    index, sign = plan(total, size, seed)
    counts = index.long().bincount(minlength=size)
    assert counts.shape == (size,)
    assert counts.min() == total // size
    assert counts.max() == -(-total // size)
    assert set(sign.tolist()) <= {-1, 1}


def test_the_plan_does_not_change_from_version_to_version() -> None:
    index, sign = plan(1000, 37, 5)
    digest = hashlib.sha256(index.numpy().astype("<i4").tobytes() + sign.numpy().tobytes())
    assert digest.hexdigest()[:16] == "819caf4d7ccd7bdb"


def test_signs_and_order_look_random() -> None:
    index, sign = plan(100_000, 1000, 0)
    assert abs(sign.double().mean()) < 0.02
    places = torch.arange(100_000).double()
    assert abs(torch.corrcoef(torch.stack([index.double(), places]))[0, 1]) < 0.02


# ---- weights ------------------------------------------------------------------------------------


def test_layers_start_with_the_deviation_of_kaiming() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3), nn.Conv2d(128, 256, 1)),
        *(nn.Conv2d(256, 256, 5, groups=4), nn.Flatten(), nn.Linear(256, 500)),
    )
    made = rmfx.share_parameters(model, ratio=0.5, include="*")
    for layer in (m for m in made if isinstance(m, (nn.Conv2d, nn.Linear))):
        expected = torch.empty(layer.weight.shape)
        nn.init.kaiming_normal_(expected, mode="fan_out")
        assert float(layer.weight.detach().std()) == pytest.approx(float(expected.std()), rel=0.1)


def test_the_gradient_is_scattered_to_the_ring() -> None:
    model = rmfx.share_parameters(small_resnet().eval(), budget=500, seed=3)
    (ring,) = model.parameter_rings.values()
    with parametrize.cached():  # so that the model reads what is looked at
        weights = {path: model.get_submodule(_owner(path)).weight for path in drawn(model)}
        for weight in weights.values():
            weight.retain_grad()
        model(torch.randn(2, 3, 8, 8).double()).square().sum().backward()
    index, sign = plan(ring.total, 500, 3)
    expected = torch.zeros(500).double()
    for path, parameter in drawn(model).items():
        places = slice(parameter.start, parameter.start + math.prod(parameter.shape))
        scale = model.get_submodule(path.rsplit(".", 1)[0]).original
        gradient = weights[path].grad
        assert gradient is not None
        assert gradient.abs().max() > 0
        expected.index_add_(
            0, index[places].long(), scale * sign[places].double() * gradient.flatten()
        )
    torch.testing.assert_close(ring.numbers.grad, expected, rtol=1e-12, atol=1e-12)


def _owner(path: str) -> str:
    return path.removesuffix(".parametrizations.weight.0")


def test_the_ring_of_the_paper() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18()
    made = rmfx.share_parameters(model, RESNET18_RING)
    (ring,) = made.parameter_rings.values()
    assert ring.total == 11_157_504
    assert len(drawn(made)) == 19
    everything = sum(p.numel() for p in model.parameters())
    stored = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert round(100 * ring.numbers.numel() / ring.total, 1) == 21.1
    assert round(100 * stored / everything, 1) == 24.7


def test_rings_for_blocks_share_the_budget() -> None:
    made = rmfx.share_parameters(small_resnet(), budget=1000, scope="block")
    rings = made.parameter_rings
    assert sum(ring.numbers.numel() for ring in rings.values()) == 1000
    assert len(rings) > 2
    total = sum(ring.total for ring in rings.values())
    for ring in rings.values():
        assert ring.numbers.numel() == pytest.approx(1000 * ring.total / total, abs=1.5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_budgets_are_met_exactly(widths: list[int], data: st.DataObject) -> None:
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[::-1], strict=True)]
    total = sum(layer.weight.numel() for layer in layers)
    budget = data.draw(st.integers(len(layers), total))
    made = rmfx.share_parameters(
        nn.Sequential(*layers), budget, include="*", scope=lambda path: path
    )
    rings = made.parameter_rings.values()
    assert sum(ring.numbers.numel() for ring in rings) == budget
    assert all(1 <= ring.numbers.numel() <= ring.total for ring in rings)


# ---- models -------------------------------------------------------------------------------------


def test_the_callers_model_is_untouched() -> None:
    model = small_resnet()
    before = copy.deepcopy(model.state_dict())
    rmfx.share_parameters(model, ratio=0.1)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


def test_a_trained_model_is_deployed_with_ordinary_weights() -> None:
    model = trained(rmfx.share_parameters(small_resnet(), ratio=0.1))
    x = torch.randn(2, 3, 16, 16).double()
    made = rmfx.materialize(model)
    assert list(made.state_dict()) == list(small_resnet().state_dict())
    assert all(p.requires_grad for p in made.parameters())
    assert torch.equal(made(x), model(x))
    plain = rmfx.remove_residuals(made, x, strict=True)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-10, atol=1e-10)


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    model = copy.deepcopy(model).train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16).double()).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_training_changes_the_ring_and_nothing_that_is_drawn_stays_behind() -> None:
    start = rmfx.share_parameters(small_resnet(), ratio=0.1)
    end = trained(start)
    assert not torch.equal(end.parameter_rings["all"].numbers, start.parameter_rings["all"].numbers)
    (parameter, *_) = drawn(end).values()
    layer = end.get_submodule(_owner(next(iter(drawn(end)))))
    index, sign = plan(parameter._ring[0].total, end.parameter_rings["all"].numbers.numel(), 0)
    stop = math.prod(parameter.shape)
    scale = layer.get_submodule("parametrizations.weight").original
    numbers = end.parameter_rings["all"].numbers[index[:stop].long()] * sign[:stop]
    assert torch.equal(layer.weight, scale * numbers.view(parameter.shape))


def test_copies_have_rings_of_their_own() -> None:
    model = rmfx.share_parameters(small_resnet().eval(), ratio=0.1)
    x = torch.randn(1, 3, 16, 16).double()
    before = model(x)
    made = copy.deepcopy(model)
    assert torch.equal(made(x), before)
    with torch.no_grad():
        made.parameter_rings["all"].numbers.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(made(x), before)


def test_the_seed_comes_with_the_state() -> None:
    saved = rmfx.share_parameters(small_resnet().eval(), budget=300, seed=11)
    other = rmfx.share_parameters(small_resnet().eval(), budget=300, seed=12)
    x = torch.randn(1, 3, 16, 16).double()
    assert not torch.equal(other(x), saved(x))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), saved(x))


def test_a_pruned_ring() -> None:
    model = rmfx.share_parameters(small_resnet().eval(), ratio=0.1)
    prune.l1_unstructured(model.parameter_rings["all"], "numbers", amount=0.5)
    model = trained(model)
    made = rmfx.materialize(model)
    x = torch.randn(2, 3, 16, 16).double()
    assert torch.equal(made(x), model(x))
    weight = made.get_submodule(_owner(next(iter(drawn(model))))).weight
    assert 0.3 < float((weight == 0).double().mean()) < 0.7


class FourBits(nn.Module):
    """Rounds to 15 values, with the gradient of what it rounds."""

    def forward(self, values: Tensor) -> Tensor:
        step = values.detach().abs().max() / 7
        return values + ((values / step).round() * step - values).detach()


def test_a_quantised_ring() -> None:
    model = rmfx.share_parameters(small_resnet().eval(), ratio=0.1)
    parametrize.register_parametrization(model.parameter_rings["all"], "numbers", FourBits())
    model = trained(model)
    made = rmfx.materialize(model)
    x = torch.randn(2, 3, 16, 16).double()
    assert torch.equal(made(x), model(x))
    weight = made.get_submodule(_owner(next(iter(drawn(model))))).weight
    assert weight.abs().unique().numel() <= 15


PARALLEL = """
import sys
import rmfx, torch
from torch import nn
from rmfx.models import cifar_resnet

folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
)
model = rmfx.share_parameters(cifar_resnet(8, "B", 10), ratio=0.1)
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 0.05)
torch.manual_seed(rank)
for _ in range(2):
    optimizer.zero_grad()
    parallel(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
torch.save(model.state_dict(), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_data_parallel_training_keeps_the_rings_alike(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARALLEL, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start = rmfx.share_parameters(cifar_resnet(8, "B", 10), ratio=0.1).state_dict()
    name = "parameter_rings.all.numbers"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], start[name])


BEFORE = """
if rank == 0:
    model.load_state_dict(torch.load(f"{folder}/start.pt"))
parallel = """
AFTER = """
torch.save(model.eval()(torch.ones(1, 3, 8, 8)), f"{folder}/y{rank}")
torch.save(model"""
LOADED_BY_ONE = PARALLEL.replace("\nparallel = ", BEFORE).replace("\ntorch.save(model", AFTER)


@pytest.mark.slow
def test_a_seed_that_one_process_loads_goes_to_all(tmp_path: Path) -> None:
    state = rmfx.share_parameters(cifar_resnet(8, "B", 10), ratio=0.1, seed=7).state_dict()
    torch.save(state, tmp_path / "start.pt")
    command = [sys.executable, "-c", LOADED_BY_ONE, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first if "ring" in name)
    assert int(second["parameter_rings.all.seed"]) == 7
    # Statistics of batch norm are those of each process's own images, but for the last broadcast.
    model = rmfx.share_parameters(cifar_resnet(8, "B", 10), ratio=0.1)
    for rank, state in enumerate((first, second)):
        model.load_state_dict(state)
        expected = torch.load(tmp_path / f"y{rank}")
        torch.testing.assert_close(model.eval()(torch.ones(1, 3, 8, 8)), expected)


def test_a_sequential_of_layers_runs() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    made = rmfx.share_parameters(model, ratio=0.25)
    x = torch.randn(2, 1, 8, 8)
    assert made(x).shape == (2, 8, 4, 4)
    assert torch.equal(rmfx.materialize(made)(x), made(x))
    assert len(rmfx.materialize(made)) == 3


@pytest.mark.parametrize("other", [{"b": 2, "a": 1}, {"a": 1, "c": 2}])
def test_a_state_of_other_layers_or_of_another_order_is_refused(other: dict[str, int]) -> None:
    def of(names: dict[str, int]) -> nn.Module:
        layers = nn.ModuleDict({name: nn.Conv2d(4, 4, 1, bias=False) for name in names})
        return rmfx.share_parameters(layers, ratio=0.5, include="*")

    with pytest.raises(RuntimeError, match="other layers draw from parameter_rings"):
        of(other).load_state_dict(of({"a": 1, "b": 2}).state_dict(), strict=False)


def test_rings_of_other_layers_are_told_apart() -> None:
    def of(scope: str) -> nn.Module:
        return rmfx.share_parameters(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
            ratio=0.5,
            include="*",
            scope=lambda path: "pq"[int(path)] if scope == "pq" else "qp"[int(path)],
        )

    with pytest.raises(RuntimeError, match="other layers draw"):
        of("qp").load_state_dict(of("pq").state_dict())


@pytest.mark.parametrize(
    "verb",
    [
        rmfx.remove_residuals,
        rmfx.fold_batch_norm,
        rmfx.insert_resconv,
        rmfx.merge_branches,
        rmfx.trace,
        rmfx.cost.count,
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_would_lose_a_ring_is_refused(verb: Callable[..., object], wrapped: bool) -> None:
    model: nn.Module = rmfx.share_parameters(small_resnet(), ratio=0.1).eval()
    model = nn.Sequential(model, nn.ReLU()) if wrapped else model
    with pytest.raises(TraceError, match=r"conv1 is drawn from a ring.*rmfx\.materialize"):
        verb(model, torch.randn(1, 3, 8, 8).double())
    verb(rmfx.materialize(model), torch.randn(1, 3, 8, 8).double())


def test_what_has_rings_inside_is_materialised() -> None:
    model = rmfx.share_parameters(small_resnet().eval(), ratio=0.1)
    x = torch.randn(1, 3, 16, 16).double()
    for held in (nn.Sequential(model, nn.ReLU()), nn.DataParallel(model)):
        made = rmfx.materialize(held)
        assert not drawn(made)
        assert "ring" not in str(list(made.state_dict()))
        assert torch.equal(made(x), held(x))
    part = rmfx.materialize(model.layer2)
    y = torch.randn(1, 16, 8, 8).double()
    assert torch.equal(part(y), model.layer2(y))


def test_scales_are_not_trained() -> None:
    model = rmfx.share_parameters(small_resnet(), ratio=0.1).requires_grad_(True)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("original")}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model(torch.randn(2, 3, 8, 8).double()).sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_frozen_stays_frozen() -> None:
    model = rmfx.share_parameters(small_resnet().requires_grad_(False), ratio=0.1)
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert not any(p.requires_grad for p in rmfx.materialize(model).parameters())


def test_looking_before_training_does_no_harm() -> None:
    model = rmfx.share_parameters(small_resnet(), ratio=0.1)
    x = torch.randn(2, 3, 8, 8).double()
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert model.parameter_rings["all"].numbers.grad is not None


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 traces no seed")
@pytest.mark.parametrize("warm", [False, True])
def test_compilers_follow_the_seed(warm: bool) -> None:
    model = rmfx.share_parameters(small_resnet().eval(), ratio=0.1, seed=1)
    other = rmfx.share_parameters(small_resnet().eval(), ratio=0.1, seed=2)
    x = torch.randn(2, 3, 8, 8).double()
    if warm:
        model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    model.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))
    for strict in (False, True):
        program = torch.export.export(copy.deepcopy(other), (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), other(x))
        assert torch.equal(other(x), model(x))


def test_transposed_layers_draw_where_they_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 4, 2))
    made = rmfx.share_parameters(model, ratio=0.5, include="1")
    assert torch.equal(rmfx.materialize(made)[1].weight, made[1].weight)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either budget=.* or ratio="),
        ({"budget": 3, "ratio": 0.5}, "either budget=.* or ratio="),
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": 1.5}, "at most 1"),
        ({"budget": 0}, "budget=0"),
        ({"budget": 10**9}, "budget=1000000000"),
        ({"ratio": 0.5, "seed": -1}, "seed=-1"),
        ({"ratio": 0.5, "scope": "stage"}, "scope='stage'"),
        ({"ratio": 0.5, "include": "nothing.*"}, "is of no layer that could be meant"),
        ({"ratio": 0.5, "include": ["conv1", "nowhere*"]}, "'nowhere\\*' is of no layer"),
        ({"ratio": 0.5, "include": lambda path, layer: False}, "no layer is left to draw"),
        ({"ratio": 0.5, "seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"ratio": "half"}, "ratio='half' must be a number"),
        ({"budget": True}, "budget=True must be a whole number"),
        ({"ratio": 0.5, "scope": lambda path: "a.b" if "1" in path else "a_b"}, "the name a_b"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rmfx.share_parameters(small_resnet(), **options)  # type: ignore[arg-type]


def test_weights_that_cannot_be_drawn() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(WeightError, match=r"0\.weight and 1\.weight are one parameter"):
        rmfx.share_parameters(tied, ratio=0.5, include="*")
    with pytest.raises(WeightError, match="0 has no weight yet"):
        rmfx.share_parameters(nn.Sequential(nn.LazyLinear(3)), ratio=0.5, include="*")
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
    with pytest.raises(WeightError, match="several kinds"):
        rmfx.share_parameters(mixed, ratio=0.5, include="*")
    pruned = nn.Sequential(nn.Linear(3, 3))
    prune.l1_unstructured(pruned[0], "weight", amount=0.5)
    with pytest.raises(WeightError, match="0: a hook computes its weight"):
        rmfx.share_parameters(pruned, ratio=0.5, include="*")
    with pytest.raises(WeightError, match="the model cannot be copied"):
        rmfx.share_parameters(nn.Sequential(pruned, nn.Linear(3, 3)), ratio=0.5, include="1")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(WeightError, match="0: its weight is parametrized"):
        rmfx.share_parameters(nn.Sequential(normed), ratio=0.5, include="*")


def test_a_layer_with_other_parametrizations() -> None:
    model = rmfx.share_parameters(nn.Sequential(nn.Linear(3, 3)), ratio=0.5, include="*")
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    made = rmfx.materialize(model)
    assert torch.equal(made[0].weight, model[0].weight)
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    with pytest.raises(WeightError, match="0: its bias is parametrized as well"):
        rmfx.materialize(model)


def test_rings_are_made_once_and_unmade_where_they_are() -> None:
    model = rmfx.share_parameters(small_resnet(), ratio=0.5)
    with pytest.raises(OptionError, match="has parameter_rings already"):
        rmfx.share_parameters(model, ratio=0.5)
    with pytest.raises(OptionError, match="no weight of the model is drawn"):
        rmfx.materialize(small_resnet())


def test_a_weight_that_is_drawn_cannot_be_set() -> None:
    model = rmfx.share_parameters(small_resnet(), ratio=0.5)
    layer = model.get_submodule(_owner(next(iter(drawn(model)))))
    with pytest.raises(RuntimeError, match="right_inverse"):
        layer.weight = torch.zeros_like(layer.weight)


def test_a_ring_says_what_it_is() -> None:
    assert "5 for 12, seed=3" in str(Ring(torch.zeros(5), 12, 3))


def test_rings_may_be_called_after_any_layer() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.keys, self.values = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.q(x)
            y: Tensor = self.keys(x) * self.values(x)
            return y

    small = rmfx.share_parameters(Named(), ratio=0.5, scope="block")
    assert list(small.parameter_rings) == ["keys_ring", "values_ring"]
    assert small(torch.randn(1, 4, 3, 3)).shape == (1, 4, 3, 3)
    with pytest.raises(OptionError, match="scope gives 3 for keys"):
        rmfx.share_parameters(Named(), ratio=0.5, scope=lambda path: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(OptionError, match=r"budget=7\.5 must be a whole number"):
        rmfx.share_parameters(Named(), budget=7.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="linear layers want to be named"):
        rmfx.share_parameters(nn.Linear(2, 2), ratio=0.5)
