"""Data and losses of callers: whatever is wrong with them is said in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import image, ready
from torch import nn

import rmfx
from rmfx.data.batches import arguments_of
from rmfx.errors import OptionError
from rmfx.models import cifar_resnet

X, CLASSES = image(2, 3, 8, 8).float(), torch.tensor([0, 1])
VERBS: dict[str, Callable[..., Any]] = {
    "prune_channels": lambda data, **options: rmfx.prune_channels(
        net(), X, target=0.5, data=data, **options
    ),
    "choose_sites": lambda data, **options: rmfx.choose_sites(
        net(), X, data, runtime="eager", rounds=1, seconds=0.0, **options
    ),
}


def net() -> nn.Module:
    model: nn.Module = ready(cifar_resnet(8, "A", 4, widths=(8, 8, 16))).float()
    return model


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (X, OptionError, "data is a tensor; pass a list of batches"),
        (3, OptionError, "data=3: pass a list of batches"),
        ([X], OptionError, "pairs of"),
        ([(X[:0], CLASSES[:0])], OptionError, "an empty batch"),
        ([(X, CLASSES + 9)], OptionError, "cannot be taken of an output of shape .2, 4. and .* 9 "),
        ([(X, torch.tensor([1]))], OptionError, "a target of shape .1,."),
        ([(X[:, :1], CLASSES)], rmfx.ShapeError, "does not run on a batch of data .*2, 1, 8, 8"),
    ],
)
def test_bad_data_are_refused(verb: str, data: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        VERBS[verb](data)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "gives shape .2,., not a tensor of one number"),
        (lambda output, target: 1.0, "gives float, not a tensor"),
        (lambda output, target: output.nothing, "has no attribute 'nothing'"),
    ],
)
def test_bad_losses_are_refused(verb: str, loss: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        VERBS[verb]([(X, CLASSES)], loss=loss)


def test_data_of_one_pass() -> None:
    """What is gone through twice must be a list, what once is may be a generator."""
    with pytest.raises(OptionError, match="data is an iterator"):
        VERBS["prune_channels"](iter([(X, CLASSES)]))
    rmfx.insert_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), iter([X]))
    with pytest.raises(OptionError, match="data=None: pass a list of batches of inputs"):
        rmfx.insert_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "inputs", "count"),
    [
        (X, 1, 1),
        ([X], 1, 1),
        ((X, CLASSES), 1, 1),  # the classes are none of the inputs
        ([X, CLASSES], 2, 2),
        (((X, X), CLASSES), 2, 2),
        (((X, X), None), 2, 2),
        ((X, X, X), 3, 3),
        ((X, X, X), 1, 0),
        ({"x": X}, 1, 0),
        ((X, "name"), 1, 1),
        ((X, "name"), 2, 0),
        (3, 1, 0),
    ],
)
def test_a_batch_is_read_as_a_pair_or_as_inputs_alone(batch: Any, inputs: int, count: int) -> None:
    found = arguments_of(batch, lambda n: n == inputs)
    assert [x is X for x in found[:1]] == [True] * (count > 0)
    assert len(found) == count
