"""Files that hold hardly more than the numbers of a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rmfx
from rmfx.errors import RmfxError, WeightError
from rmfx.models import cifar_resnet

KIB = 1024


def size_of(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def test_a_ring_and_what_layers_have_of_their_own(tmp_path: Path) -> None:
    """No more than 4 KiB above the numbers, for the ResNet-18 of the paper."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18()
    made = rmfx.share_parameters(model, 512 * 512 * 9)
    names = {f"{path}.weight" for path, m in made.named_modules() if hasattr(m, "parametrizations")}
    own = [value for name, value in model.state_dict().items() if name not in names]
    rmfx.save_compact(made, tmp_path / "made")
    size = (tmp_path / "made").stat().st_size
    assert size <= size_of(made.parameter_rings["all"].numbers, *own) + 4 * KIB
    torch.save(model.state_dict(), tmp_path / "whole")
    assert size < 0.26 * (tmp_path / "whole").stat().st_size


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    model = rmfx.share_parameters(cifar_resnet(8, "B", 10).eval(), ratio=0.1, seed=5)
    x = torch.randn(2, 3, 16, 16)
    rmfx.save_compact(model, tmp_path / "model")
    torch.save(x, tmp_path / "x")
    script = f"""
import rmfx, torch
from rmfx.models import cifar_resnet
model = rmfx.share_parameters(cifar_resnet(8, "B", 10).eval(), ratio=0.1)
rmfx.load_compact(model, {str(tmp_path / "model")!r})
torch.save(model(torch.load({str(tmp_path / "x")!r})), {str(tmp_path / "y")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert torch.equal(torch.load(tmp_path / "y"), model(x))


def test_types_and_shapes_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(2, 2).double(), nn.Linear(3, 1).bfloat16())
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("empty", torch.zeros(0, 3))
    rmfx.save_compact(model, tmp_path / "model")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    rmfx.load_compact(model, tmp_path / "model")
    for name, value in model.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name])


def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = tmp_path / "model"
    rmfx.save_compact(model, path)
    content = path.read_bytes()
    other_number = content[:-1] + bytes([content[-1] ^ 1])
    other_head = content[:20] + b"\0" + content[21:]
    for damaged in (content[:-4], b"x" * 100, other_head, other_number):
        path.write_bytes(damaged)
        with pytest.raises(RmfxError, match="is no whole file of save_compact"):
            rmfx.load_compact(model, path)
    path.write_bytes(b"")
    with pytest.raises(RmfxError, match="model is empty"):
        rmfx.load_compact(model, path)
    with pytest.raises(RmfxError, match="none cannot be read: No such file or directory"):
        rmfx.load_compact(model, tmp_path / "none")
    with pytest.raises(RmfxError, match="cannot be read: Is a directory"):
        rmfx.load_compact(model, tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(RmfxError, match="is no whole file of save_compact"):
        rmfx.load_compact(model, path)


def test_a_file_of_another_model(tmp_path: Path) -> None:
    rmfx.save_compact(nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(RmfxError, match="another model"):
        rmfx.load_compact(nn.Linear(2, 3), tmp_path / "model")


def test_what_is_no_tensor_cannot_be_written(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(WeightError, match="_extra_state is dict, no tensor"):
        rmfx.save_compact(Odd(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64)])
def test_sparse_and_complex_tensors_cannot_be_written(tmp_path: Path, value: torch.Tensor) -> None:
    model = nn.Module()
    model.register_buffer("own", value)
    with pytest.raises(WeightError, match=r"own is .* use torch.save"):
        rmfx.save_compact(model, tmp_path / "model")


def test_a_part_without_its_ring_is_not_written(tmp_path: Path) -> None:
    model = rmfx.share_parameters(cifar_resnet(8, "B", 10), ratio=0.1)
    with pytest.raises(WeightError, match="draws from a ring that is not in this model"):
        rmfx.save_compact(model.layer2, tmp_path / "part")
    rmfx.save_compact(nn.Sequential(model), tmp_path / "whole")


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    rmfx.save_compact(
        rmfx.share_parameters(cifar_resnet(8, "B", 10), ratio=0.2, seed=4), tmp_path / "other"
    )
    model = rmfx.share_parameters(cifar_resnet(8, "B", 10).eval(), ratio=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RmfxError, match="holds the state of another model"):
        rmfx.load_compact(model, tmp_path / "other")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


class Picky(nn.Module):
    """A module whose own way to load fails in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("own")


def spread_out() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("b", torch.zeros(1).expand(3))
    return model


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(2, 2)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    "make",
    [Picky, spread_out, made_in_inference_mode, on_meta, lambda: nn.LazyLinear(2)],
)
def test_a_model_that_nothing_can_be_loaded_into(tmp_path: Path, make: Any) -> None:
    rmfx.save_compact(nn.Linear(2, 2), tmp_path / "net")
    with pytest.raises(RmfxError):
        rmfx.load_compact(make(), tmp_path / "net")


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
@pytest.mark.parametrize("make", [on_meta, lambda: nn.LazyLinear(2), lambda: quantised()])
def test_a_model_without_numbers_is_not_written(tmp_path: Path, make: Any) -> None:
    with pytest.raises(WeightError):
        rmfx.save_compact(make(), tmp_path / "net")


def quantised() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("q", torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8))
    return model
