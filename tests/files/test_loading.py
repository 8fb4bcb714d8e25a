"""Models by name and weights from files: what loads, and one clear error for what does not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rmfx.files.loading import LoadError, load_model
from rmfx.files.states import load_weights
from rmfx.models import DigitsNet

KEPT = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))  # in training mode
NUMBER = 3


def make_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3))


def make_nothing() -> None:
    return None


def make_trouble() -> nn.Module:
    raise RuntimeError("out of paint\nsecond line")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which this file can be imported."""
    monkeypatch.setitem(sys.modules, "models_of_this_test", sys.modules[__name__])
    return "models_of_this_test"


def test_factory_gives_a_model_in_eval_mode(here: str) -> None:
    loaded = load_model(f"{here}:make_linear")
    assert isinstance(loaded.model, nn.Sequential)
    assert not loaded.model.training
    assert not loaded.random
    assert loaded.inputs is None


def test_a_module_object_is_copied_before_its_mode_is_changed(here: str) -> None:
    loaded = load_model(f"{here}:KEPT")
    assert isinstance(loaded.model, nn.Sequential)
    assert loaded.model is not KEPT
    assert KEPT.training
    assert next(KEPT.parameters()).requires_grad


def test_modules_are_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text("from torch import nn\nnet = lambda: nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(load_model("my_nets:net").model, nn.Linear)


def test_torchvision_model_comes_with_random_weights_and_example_inputs() -> None:
    pytest.importorskip("torchvision")
    loaded = load_model("torchvision:squeezenet1_1", dtype=torch.float64)
    assert loaded.random
    assert loaded.dtype == torch.float64
    assert loaded.inputs is not None
    assert loaded.inputs[0].shape == (1, 3, 224, 224)
    assert loaded.inputs[0].dtype == torch.float64


def test_torchvision_segmentation_model_downloads_no_backbone() -> None:
    pytest.importorskip("torchvision")
    assert load_model("torchvision:lraspp_mobilenet_v3_large").random


@pytest.mark.bench
def test_timm_model_knows_its_input_size() -> None:
    pytest.importorskip("timm")
    loaded = load_model("timm:test_resnet")
    assert loaded.inputs is not None
    assert loaded.inputs[0].shape[:2] == (1, 3)


class Sized(nn.ReLU):
    """Names the size of its inputs as models of timm do."""

    pretrained_cfg = {"input_size": (3, 96, 64)}  # noqa: RUF012


SIZED = Sized()


def test_a_model_that_names_its_size_comes_with_example_inputs(here: str) -> None:
    for name in ("Sized", "SIZED"):
        loaded = load_model(f"{here}:{name}")
        assert loaded.inputs is not None
        assert loaded.inputs[0].shape == (1, 3, 96, 64)
        assert not loaded.random
    assert load_model("torch.nn:ReLU").inputs is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18", "names no model"),
        (":net", "names no model"),
        ("", "names no model: write torchvision:NAME"),
        ("m.pt", "m.pt may hold weights, but no model: .*--weights"),
        ("w.safetensors", "w.safetensors may hold weights, but no model: .*--weights"),
        ("m.onnx", ".onnx files are written, not read"),
        (".", r"\. is a folder: write torchvision:NAME"),
        ("my/nets.py", "holds code: write my.nets:factory"),
        ("my/nets.py:factory", "names a file: write my.nets:factory"),
        ("my.nets.factory", "did you mean my.nets:factory"),
        ("torchvison:resnet18", "no module 'torchvison' .*; did you mean torchvision"),
        ("no_such_package.nets:net", "no module 'no_such_package'"),
        ("rmfx.models:DigitNet", "did you mean DigitsNet"),
        ("{here}:NUMBER", "neither a module nor a function"),
        ("{here}:make_nothing", "gave a NoneType"),
        ("{here}:make_trouble", r"raised RuntimeError: out of paint, at .*, line \d+$"),
        ("missing.pt2", "there is no file missing.pt2"),
    ],
)
def test_a_wrong_model_is_explained(text: str, message: str, here: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_model(text.format(here=here))


@pytest.mark.bench
def test_an_architecture_alone_is_answered_with_its_packages() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    with pytest.raises(LoadError, match=r"mean torchvision:resnet18 or timm:resnet18\?"):
        load_model("resnet18")


@pytest.mark.bench
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_an_unknown_architecture_is_explained(package: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(LoadError, match=f"{package} has no model 'resnet19'; did you mean resnet"):
        load_model(f"{package}:resnet19")


@pytest.mark.bench
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_is_named_with_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LoadError, match=f"pip install {package}"):
        load_model(f"{package}:resnet18")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import absent_thing", "needs another module: No module named 'absent_thing'"),
        ("raise ValueError('no')", "raised ValueError: no"),
    ],
)
def test_a_module_that_does_not_import_is_explained(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_nets.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoadError, match=message):
        load_model("broken_nets:net")


def test_exported_program_comes_with_its_inputs(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    inputs = (torch.zeros(3, 2),)
    torch.export.save(torch.export.export(make_linear().eval(), inputs), path)
    loaded = load_model(str(path))
    assert isinstance(loaded.model, torch.export.ExportedProgram)
    assert loaded.inputs is not None
    assert loaded.inputs[0].shape == (3, 2)
    assert loaded.dtype == torch.float32


def test_weights_of_an_exported_program_cannot_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="holds its weights"):
        load_model(str(tmp_path / "net.pt2"), weights="w.safetensors")


@pytest.mark.parametrize(("content", "told"), [(b"", "empty"), (b"PK\x03\x04 no", "damaged")])
def test_a_corrupt_program_is_explained(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=rf"net\.pt2 is {told}"):
        load_model(str(path))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "wrapped.pt", "parallel.pt"])
def test_weights_are_read_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    source, target = DigitsNet(), DigitsNet()
    state = source.state_dict()
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    elif name == "wrapped.pt":
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / name)
    elif name == "parallel.pt":
        torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    load_weights(target, tmp_path / name)
    assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())


def test_weights_without_batch_counters_are_complete(tmp_path: Path) -> None:
    state = {k: v for k, v in DigitsNet().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pt")
    load_weights(DigitsNet(), tmp_path / "old.pt")


def test_weights_that_do_not_fit_are_listed_and_change_nothing(tmp_path: Path) -> None:
    source, target = DigitsNet().state_dict(), DigitsNet()
    del source["conv.weight"]
    source["extra"] = torch.zeros(1)
    source["classifier.bias"] = torch.zeros(7)
    torch.save(source, tmp_path / "other.pt")
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(LoadError) as caught:
        load_weights(target, tmp_path / "other.pt")
    message = str(caught.value)
    assert "1 missing key (conv.weight)" in message
    assert "1 unexpected key (extra)" in message
    assert "classifier.bias is (7,) in the file and (10,) in the model" in message
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _garble(path: Path) -> None:
    path.write_bytes(b"\x00\x01 this is no weights file \xff" * 20)


def _scramble(path: Path) -> None:
    path.write_bytes(b"abc")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _garble, _scramble, _empty])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_corrupt_weights_file_is_explained(damage: object, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    state = DigitsNet().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert callable(damage)
    damage(path)
    told = "damaged|empty|no file of torch.save"
    with pytest.raises(LoadError, match=rf"weights{suffix} is ({told})") as caught:
        load_weights(DigitsNet(), path)
    assert suffix == ".safetensors" or "file: " not in str(caught.value)  # torch's own words


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_of_other_writers_of_torch_are_told_from_states(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 2), tmp_path / "weights.pt"
    torch.jit.trace(model, torch.zeros(1, 2)).save(path)  # type: ignore[no-untyped-call]
    with pytest.raises(LoadError, match="is TorchScript, which holds code; write the state"):
        load_weights(model, path)
    torch.export.save(torch.export.export(model, (torch.zeros(1, 2),)), tmp_path / "net.pt2")
    (tmp_path / "net.pt2").rename(path)
    with pytest.raises(LoadError, match=r"is an exported program; let its name end in \.pt2"):
        load_weights(model, path)


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from a weights file ran')",)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"conv.weight": _Attack()}, tmp_path / "attack.pt")
    with pytest.raises(LoadError, match="never code"):
        load_weights(DigitsNet(), tmp_path / "attack.pt")


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(LoadError, match="holds a list, no state dict; save the weights alone"):
        load_weights(DigitsNet(), tmp_path / "list.pt")
    torch.save({"conv.weight": torch.zeros(1), "epoch": 3}, tmp_path / "more.pt")
    with pytest.raises(
        LoadError, match=r"its entry 'epoch' is an int, no tensor; .*state_dict\(\)"
    ):
        load_weights(DigitsNet(), tmp_path / "more.pt")


@pytest.mark.parametrize("former", [False, True])
def test_what_is_no_tensor_in_a_checkpoint_is_named(former: bool, tmp_path: Path) -> None:
    model, path = DigitsNet(), tmp_path / "weights.pt"
    more = {"model": model.state_dict(), "args": argparse.Namespace(epochs=3)}
    for held, name in ((model, r"rmfx\.models\.digits\.DigitsNet"), (more, r"argparse\.Namespace")):
        torch.save(held, path, _use_new_zipfile_serialization=not former)
        told = rf"holds {name}, which is no tensor .*torch\.save\(model\.state_dict\(\), other_path"
        with pytest.raises(LoadError, match=told):
            load_weights(model, path)


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.pt"):
        with pytest.raises(LoadError, match=f"{name} cannot be read"):
            load_weights(DigitsNet(), tmp_path / name)
