"""Fashion-MNIST: 60,000 images to train and choose on, 10,000 to test with once."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FOLDER = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "apt install dataset-fashion-mnist, or --data FOLDER with its four .gz files"
HELD_OUT = 5000
MEAN, DEVIATION = 0.2860, 0.3530


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 28, 28), normalised, and classes (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = 500) -> list[tuple[Tensor, Tensor]]:
        """All of it, in order."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))

    def first(self, count: int) -> Split:
        """The first images."""
        return Split(self.images[:count], self.labels[:count])

    def forever(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches, epoch after epoch, shifted by up to two pixels and mirrored at random."""
        while True:
            order = torch.randperm(len(self), generator=generator)
            for chosen in order[: len(self) // size * size].split(size):
                x = functional.pad(self.images[chosen], [2] * 4, value=-MEAN / DEVIATION)
                down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
                mirrored = bool(torch.randint(0, 2, (), generator=generator))
                x = x[..., down : down + 28, right : right + 28]
                yield (x.flip(3) if mirrored else x), self.labels[chosen]


@dataclass(frozen=True)
class FashionMnist:
    """What is trained on, what every choice is made on, and what the results are of."""

    training: Split
    validation: Split
    test: Split


@cache
def load(folder: Path = FOLDER) -> FashionMnist:
    """Reads the four files, once in a process; nobody may write into what it gives."""
    whole = _split(folder, "train")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    return FashionMnist(
        training=Split(whole.images[rest], whole.labels[rest]),
        validation=Split(whole.images[held], whole.labels[held]),
        test=_split(folder, "t10k"),
    )


def _split(folder: Path, name: str) -> Split:
    images = _read(folder / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = _read(folder / f"{name}-labels-idx1-ubyte.gz", 8)
    x = (torch.from_numpy(images).float() / 255 - MEAN) / DEVIATION
    return Split(x, torch.from_numpy(labels).long())


def _read(path: Path, header: int) -> np.ndarray:
    if not path.exists():
        sys.exit(f"{path} is not there: {INSTALL}")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()
