"""Example inputs from files of tensors.

| file | holds |
|---|---|
| `.pt` | a tensor, a list or tuple of tensors, or a dict of them by name |
| `.npz` | arrays by name; those that numpy has named (`arr_0`, `arr_1`) go by their order |
| `.safetensors` | tensors by name |

Names are those of the arguments of the network. Nothing that stands in a file is run.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rmfx.options import with_article

from .tensors import LoadError, read_tensors

_INSTEAD = "save tensors alone: torch.save([x], other_path)"
_NUMBERED = re.compile(r"arr_\d+")


def load_inputs(path: Path, network: nn.Module) -> tuple[Tensor, ...]:
    """The tensors of a file, in the order of the network's arguments.

    Raises:
        LoadError: the file cannot be read, is damaged, or holds something else than tensors of
            finite numbers; their number or their names do not fit the network.
    """
    found = read_tensors(path, _INSTEAD)
    if isinstance(found, Tensor):
        found = [found]
    if isinstance(found, Mapping) and all(_NUMBERED.fullmatch(str(name)) for name in found):
        found = [found[name] for name in sorted(found, key=lambda name: int(name[4:]))]
    if isinstance(found, Mapping):
        values = {name: _checked(path, str(name), x) for name, x in found.items()}
        return _by_name(path, values, network)
    if not isinstance(found, (list, tuple)):
        raise LoadError(
            f"{path} holds {with_article(found)}; store a tensor, a list of them, or a dict of"
            " them by name"
        )
    tensors = tuple(_checked(path, f"number {i}", x) for i, x in enumerate(found, start=1))
    _check_count(path, len(tensors), network)
    return tensors


def as_types(
    inputs: Sequence[Tensor], types: Sequence[torch.dtype], own: torch.dtype
) -> tuple[Tensor, ...]:
    """Inputs in some types.

    Args:
        inputs: in any.
        types: one of each, or of all; without any, floating-point numbers get the network's own.
        own: that of the network's weights.

    Raises:
        LoadError: a type cannot hold the numbers.
    """
    wanted: list[torch.dtype] = [x.dtype if not x.is_floating_point() else own for x in inputs]
    if types:
        wanted = list(types) * (len(inputs) if len(types) == 1 else 1)
    return tuple(_cast(i, x, to) for i, (x, to) in enumerate(zip(inputs, wanted, strict=True), 1))


def _cast(number: int, x: Tensor, to: torch.dtype) -> Tensor:
    made = x if x.is_complex() and not to.is_complex else x.to(to)
    if to.is_floating_point:
        kept = made.dtype == to and (made.isfinite() == x.isfinite()).all()
    else:
        kept = made.dtype == to and (made.to(x.dtype) == x).all()
    if not kept:
        has, wanted = (str(kind).removeprefix("torch.") for kind in (x.dtype, to))
        raise LoadError(
            f"input {number} holds {has} numbers that {wanted} cannot hold; give it another"
            " --input-dtype"
        )
    return made


# ---- files --------------------------------------------------------------------------------------
def _checked(path: Path, name: str, x: object) -> Tensor:
    """A tensor that networks can be given, as a tensor of its own."""
    fault = fault_of(x)
    if fault or not isinstance(x, Tensor):
        raise LoadError(f"{path}: {name} {fault}")
    return x.detach().clone()


def fault_of(x: object) -> str:
    """Why networks cannot be given something as an input, "" if they can."""
    if not isinstance(x, Tensor):
        return f"is {with_article(x)}, no tensor"
    if x.layout is not torch.strided or x.is_quantized or x.is_meta:
        return "is sparse, quantised or without numbers; give an ordinary tensor"
    if not x.numel():
        return "is empty"
    return "" if x.isfinite().all() else "holds NaN or Inf"


# ---- arguments ----------------------------------------------------------------------------------
def _arguments(network: nn.Module) -> tuple[dict[str, bool], bool]:
    """The names of a network's arguments, whether each must be given, and whether more may be."""
    kinds = inspect.Parameter
    parameters = inspect.signature(network.forward).parameters.values()
    named = {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    }
    return named, any(p.kind is kinds.VAR_POSITIONAL for p in parameters)


def takes(network: nn.Module, count: int) -> bool:
    """Whether a network may be called with so many inputs."""
    named, more = _arguments(network)
    return sum(named.values()) <= count <= (math.inf if more else len(named))


def _check_count(path: Path, count: int, network: nn.Module) -> None:
    if not takes(network, count):
        held = f"{count} tensor{'' if count == 1 else 's'}"
        raise LoadError(f"{path} holds {held}, where the network takes {taken_by(network)}")


def taken_by(network: nn.Module) -> str:
    """The arguments of a network in words, those in brackets that need not be given."""
    named, more = _arguments(network)
    parts = [name if needed else f"[{name}]" for name, needed in named.items()]
    return ", ".join([*parts, *["any number of tensors"] * more]) or "none"


def _by_name(path: Path, given: Mapping[str, Tensor], network: nn.Module) -> tuple[Tensor, ...]:
    """Tensors in the order of arguments, as far as the last that is given."""
    named, _ = _arguments(network)
    taken = f"the network takes {taken_by(network)}"
    if strange := [name for name in given if name not in named]:
        raise LoadError(
            f"{path} holds {', '.join(map(repr, strange))}, where {taken}; name the tensors"
            " like the arguments, or store a list"
        )
    if missing := list(_missing(named, given)):
        raise LoadError(f"{path} lacks {', '.join(map(repr, missing))}; {taken}, by place")
    return tuple(given[name] for name in named if name in given)


def _missing(named: Mapping[str, bool], given: Mapping[str, Tensor]) -> Iterator[str]:
    """Arguments that must be given, or stand before one that is."""
    last = max((i for i, name in enumerate(named) if name in given), default=-1)
    return (n for i, (n, need) in enumerate(named.items()) if n not in given and (need or i < last))
