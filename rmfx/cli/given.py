"""What a command is given: a model, what it takes, and data."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rmfx.analysis.ranges import numbers_outside
from rmfx.data.batches import arguments_of, check_batches, inputs_of
from rmfx.errors import RmfxError, check_memory
from rmfx.files.example_inputs import as_types, fault_of, load_inputs, taken_by, takes
from rmfx.files.free_sizes import described_shapes
from rmfx.files.loading import LoadedModel, load_model, named_object
from rmfx.files.saving import as_function
from rmfx.files.source_lines import described
from rmfx.options import as_tuple, with_article

from .values import UsageError

_WAY_OUT = "give --inputs FILE, or give --input-shape, such as 1,3,224,224"
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Given:
    """What a command works with.

    Attributes:
        loaded: the model.
        inputs: example inputs, None where they are not known.
        origin: what their values were taken from, "" where nothing but their shapes is known.
        batches: of the data, pairs of (inputs, targets); the targets are None where they are not
            needed.
    """

    loaded: LoadedModel
    inputs: Inputs | None
    origin: str = ""
    batches: Sequence[tuple[Inputs, Any]] = ()

    @property
    def required(self) -> Inputs:
        """The inputs for a command that cannot do without."""
        if self.inputs is None:
            raise UsageError(f"this model's inputs are not known: {_WAY_OUT}")
        return self.inputs

    def describe(self, options: argparse.Namespace) -> str:
        """A line on what was worked with."""
        weights = "random weights" if self.loaded.random else options.weights or "its own weights"
        head = f"{options.model}, {weights}"
        if self.inputs is None:
            return (
                f"{head}. Nothing was run and nothing was verified, as its inputs are not known:"
                f" {_WAY_OUT}."
            )
        shapes = ", ".join(map(_told, self.inputs))
        origin = f" from {self.origin}" if self.origin else ""
        return f"{head}, input {shapes}{origin}." if shapes else f"{head}."


def load(options: argparse.Namespace, name: str) -> Given:
    """The model and its example inputs, after one run of the one on the other.

    The inputs are those of a file, or zeros of the shapes that were named, or the first batch of
    the data, or those that the source of the model tells.
    """
    # Random weights, where no file is given, are the same in every run.
    torch.manual_seed(0)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    loaded = load_model(name, weights=options.weights, dtype=dtype)
    network = as_function(loaded.model)
    types = [getattr(torch, name) for name in options.input_dtype or ()]

    def typed(given: Inputs) -> Inputs:
        _check_count(len(given), types)
        return as_types(given, types, loaded.dtype)

    inputs, origin = None, ""
    if options.inputs is not None:
        inputs, origin = typed(load_inputs(Path(options.inputs), network)), options.inputs
    elif options.input_shape:
        _check_taken(network, len(options.input_shape))
        inputs = _of_shapes(options.input_shape, types, loaded.dtype)
    found = _batches(options, network, None if inputs is None else len(inputs))
    batches = [(typed(arguments), target) for arguments, target in found]
    if inputs is None and batches:
        inputs, origin = batches[0][0], f"the first batch of {options.data or options.calibration}"
    if inputs is None and loaded.inputs is not None:
        inputs = typed(loaded.inputs) if types else loaded.inputs
    given = Given(loaded, inputs, origin, batches)
    if inputs is not None:
        _check_range(options, inputs, origin)
        _try(network, inputs, _way_out(loaded.model, origin))
    elif types:
        raise UsageError(f"argument --input-dtype: {_WAY_OUT} as well")
    return given


# ---- example inputs -----------------------------------------------------------------------------
def _check_count(count: int, types: Sequence[torch.dtype]) -> None:
    """Finds out that there are types for other inputs than those that there are."""
    if len(types) not in (0, 1, count):
        raise UsageError(
            f"argument --input-dtype: {len(types)} types for {count} inputs; give one for each, or"
            " one for all"
        )


def _check_taken(network: nn.Module, count: int) -> None:
    """Finds out that there are shapes for another number of inputs than the network takes."""
    if not takes(network, count):
        given = f"{count} shape{' was' if count == 1 else 's were'} given"
        raise RmfxError(
            f"the model's inputs are ({taken_by(network)}), and {given}; give one --input-shape for"
            " each"
        )


def _of_shapes(
    shapes: Sequence[tuple[int, ...]], types: Sequence[torch.dtype], own: torch.dtype
) -> Inputs:
    """Inputs that stand for their shapes."""
    _check_count(len(shapes), types)
    each = types if len(types) == len(shapes) else [*types, own][:1] * len(shapes)
    return tuple(_example(shape, dtype) for shape, dtype in zip(shapes, each, strict=True))


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros; of whole numbers, which are indices or truth values, 1 and 0 in turns."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.zeros(shape, dtype=dtype)
    return torch.arange(1, 1 + math.prod(shape)).remainder(2).reshape(shape).to(dtype)


def _check_range(options: argparse.Namespace, inputs: Inputs, origin: str) -> None:
    """Finds out that inputs which were given are not what was said of all."""
    if options.input_range is None or not origin:
        return
    for x in inputs:
        if x.is_floating_point() and (outside := numbers_outside(x, options.input_range)):
            raise UsageError(f"argument --input-range: {origin} holds {outside}")


def _way_out(model: nn.Module | ExportedProgram, origin: str) -> str:
    """What to do where a model fails on its inputs."""
    if isinstance(model, ExportedProgram):
        taken = f"the program was exported for inputs {described_shapes(model)}"
        return f"{taken}; {origin or '--input-shape'} must fit, and --input-dtype gives other types"
    if origin:
        return f"{origin} must hold what it takes; --input-dtype gives other types"
    return "give its --input-shape and --input-dtype (int64 for indices), or --inputs FILE"


def _try(network: nn.Module, inputs: Inputs, way: str) -> None:
    """Finds out early, and says plainly, that a model does not take such inputs."""
    try:
        with torch.no_grad():
            network(*inputs)
    except (Exception, SystemExit) as error:
        check_memory(error)
        shapes = ", ".join(map(_told, inputs))
        raise RmfxError(
            f"the model fails on inputs of shape {shapes} ({described(error)}); {way}"
        ) from error


def _told(x: Tensor) -> str:
    """An input for people: its shape, and its type where that is not the usual one."""
    shape = str(tuple(x.shape))
    return shape if x.is_floating_point() else f"{shape} of {x.dtype}".replace("torch.", "")


# ---- data ---------------------------------------------------------------------------------------
def _batches(
    options: argparse.Namespace, network: nn.Module, count: int | None
) -> list[tuple[Inputs, Any]]:
    """The batches of `--data`, or those of `--calibration`, which need no targets.

    Args:
        count: how many inputs there are, if that is known.
    """
    name = options.data or options.calibration
    if name is None:
        return []

    def fits(inputs: int) -> bool:
        return takes(network, inputs) if count is None else inputs == count

    def split(batch: Any) -> tuple[Any, Any]:
        if options.data:
            return as_tuple(inputs_of(batch)), batch[1]
        return arguments_of(batch, fits), None

    batches = [split(batch) for batch in _called(name, pairs=bool(options.data))]
    tensors = [x for inputs, _ in batches for x in inputs or (None,)]
    if not all(isinstance(x, Tensor) for x in tensors) or not batches:
        wanted = "(inputs, classes)" if options.data else "inputs, or of (inputs, classes)"
        raise RmfxError(f"{name}() must give batches of {wanted}: tensors that the model takes")
    for number, (inputs, _) in enumerate(batches, start=1):
        for fault in filter(None, map(fault_of, inputs)):
            raise RmfxError(f"{name}(): an input of batch {number} {fault}")
    return batches


def _wanted(pairs: bool) -> str:
    """What a function of the caller's is to be."""
    batches = "(inputs, classes)" if pairs else "inputs, or of (inputs, classes)"
    return f"name a function that gives a list of batches of {batches}"


def _called(name: str, *, pairs: bool) -> list[Any]:
    """What a function of the caller's gives, as batches."""
    function = named_object(name)
    if not callable(function):
        raise RmfxError(f"{name} is {with_article(function)}, not a function; {_wanted(pairs)}")
    try:
        made = function()
        if isinstance(made, nn.Module):
            raise RmfxError(f"{name}() gives {with_article(made)}, a model; {_wanted(pairs)}")
        check_batches(f"{name}()", made, pairs=pairs)
        return list(made)
    except RmfxError:
        raise
    # The caller's own code, which may raise anything.
    except (Exception, SystemExit) as error:
        check_memory(error)
        raise RmfxError(f"{name}() raised {described(error)}") from error
