"""What a command is given: a model, what it takes, and data."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from rmfx.errors import RmfxError
from rmfx.files.loading import LoadedModel, load_model, named_object
from rmfx.files.saving import as_function

from .arguments import UsageError

_WAY_OUT = "give --input-shape, such as 1,3,224,224"


def load(options: argparse.Namespace, name: str) -> tuple[LoadedModel, tuple[Tensor, ...] | None]:
    """The model and its example inputs, after one run of the one on the other."""
    # Random weights, where no file is given, are the same in every run.
    torch.manual_seed(0)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    loaded = load_model(name, weights=options.weights, dtype=dtype)
    inputs = loaded.inputs
    if options.input_shape:
        inputs = tuple(torch.zeros(shape, dtype=loaded.dtype) for shape in options.input_shape)
    if inputs is not None:
        _try(loaded, inputs)
    return loaded, inputs


def required(inputs: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """The inputs of a model for a command that cannot do without."""
    if inputs is None:
        raise UsageError(f"this model's inputs are not known: {_WAY_OUT}")
    return inputs


def _try(loaded: LoadedModel, inputs: tuple[Tensor, ...]) -> None:
    """Finds out early, and says plainly, that a model does not take such inputs."""
    try:
        with torch.no_grad():
            as_function(loaded.model)(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        reason = f"{type(error).__name__}: {error}"
        raise RmfxError(
            f"the model fails on inputs of shape {shapes} ({reason}); give its --input-shape"
        ) from error


def describe(
    options: argparse.Namespace, loaded: LoadedModel, inputs: tuple[Tensor, ...] | None
) -> str:
    """A line on what was worked with."""
    weights = "random weights" if loaded.random else options.weights or "its own weights"
    head = f"{options.model}, {weights}"
    if inputs is None:
        return f"{head}. Nothing is run on inputs, which are not known: {_WAY_OUT}."
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    return f"{head}, input {shapes}." if shapes else f"{head}."


def batches_of(name: str) -> list[Any]:
    """What a function gives, as batches of (inputs, classes)."""
    function = named_object(name)
    if not callable(function):
        raise RmfxError(f"{name} is a {type(function).__name__}, not a function")
    try:
        batches = list(function())
    # The caller's own code, which may raise anything.
    except Exception as error:
        raise RmfxError(f"{name}() raised {type(error).__name__}: {error}") from error
    pairs = [isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in batches]
    if not batches or not all(pairs):
        raise RmfxError(f"{name}() must give batches of (inputs, classes)")
    return batches
