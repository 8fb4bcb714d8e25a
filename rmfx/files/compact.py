"""Files for the state of a model that hold hardly more than its numbers.

`torch.save` spends some 300 bytes on each tensor. Where hundreds of layers draw their weights from
one ring that is more than the batch norms take. Here all tensors of a type are written as one, with
their names and shapes compressed beside them, in a file of safetensors.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rmfx.errors import RmfxError, WeightError
from rmfx.modules.ring import FromRing
from rmfx.options import typed

from .saving import whole_file
from .tensors import check_kept

LAYOUT, CHECKSUM = "layout", "sha256"
_DAMAGE = (SafetensorError, zlib.error, KeyError, ValueError, TypeError, RuntimeError)
Layout = dict[str, list[tuple[str, list[int]]]]  # by type, names and shapes in the order of numbers


@typed
def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write the state of a model to a file, whole or not at all.

    Args:
        model: whose `state_dict()` holds nothing but tensors.
        path: of the file; what is there is replaced.

    Raises:
        WeightError: something in the state is no tensor, or one that is sparse or complex; or
            weights are drawn from a ring that is not in the model.
        SaveError: the file cannot be written.
    """
    _check_rings(model)
    layout: Layout = defaultdict(list)
    numbers: dict[str, list[Tensor]] = defaultdict(list)
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise WeightError(f"{name} is {type(value).__name__}, no tensor: use torch.save")
        _check_numbers(name, value)
        kind = str(value.dtype).removeprefix("torch.")
        if value.layout is not torch.strided or value.is_complex() or value.is_quantized:
            found = f"{value.layout} and {value.dtype}"
            raise WeightError(f"{name} is {found}, which has no form in this file: use torch.save")
        layout[kind].append((name, list(value.shape)))
        numbers[kind].append(value.detach().cpu().reshape(-1))
    packed = base64.b85encode(zlib.compress(json.dumps(layout).encode(), 9)).decode()
    flat = {kind: torch.cat(parts) for kind, parts in numbers.items()}
    with whole_file(Path(path)) as file:
        file.write_bytes(save(flat, {LAYOUT: packed, CHECKSUM: _checksum(flat)}))


@typed
def load_compact(model: nn.Module, path: str | Path) -> None:
    """Load into a model what `save_compact` wrote of one like it.

    Raises:
        RmfxError: the file is none of `save_compact`'s, is damaged, or is of another model.
    """
    try:
        check_kept(Path(path))
        with safe_open(path, "pt") as file:
            flat = {kind: file.get_tensor(kind) for kind in file.keys()}  # noqa: SIM118
            if LAYOUT not in (file.metadata() or {}):
                raise ValueError("it was written by something else")
            layout = json.loads(zlib.decompress(base64.b85decode(file.metadata()[LAYOUT])))
            if file.metadata()[CHECKSUM] != _checksum(flat):
                raise ValueError("its numbers are not those that were written")
        state = dict(_parts(flat, layout))
    except OSError as error:
        raise RmfxError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise RmfxError(f"{path} is no whole file of save_compact: {error}") from error
    before = dict[str, Any]()
    for name, value in model.state_dict().items():
        _check_numbers(name, value)
        if isinstance(value, Tensor) and (value.is_inference() or _is_spread_out(value)):
            raise WeightError(f"{name} cannot be written to; clone it first")
        before[name] = value.clone() if isinstance(value, Tensor) else value
    try:
        model.load_state_dict(state)
    except Exception as error:
        with contextlib.suppress(Exception):
            model.load_state_dict(before)
        raise RmfxError(f"{path} holds the state of another model: {error}") from error


def _check_numbers(name: str, value: object) -> None:
    """Raise WeightError for a tensor of a model that holds no numbers yet."""
    if isinstance(value, Tensor) and (is_lazy(value) or value.is_meta):
        raise WeightError(f"{name} holds no numbers yet: run the model once, or load weights")


def _is_spread_out(value: Tensor) -> bool:
    """Whether several places of a tensor are one place in memory."""
    pairs = zip(value.shape, value.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in pairs)


def _check_rings(model: nn.Module) -> None:
    known = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        if isinstance(module, FromRing) and id(module.ring) not in known:
            raise WeightError(
                f"{path} draws from a ring that is not in this model: save the whole one, or what "
                "rmfx.materialize makes of it"
            )


def _checksum(flat: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for kind in sorted(flat):
        found.update(flat[kind].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _parts(flat: dict[str, Tensor], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    for kind, entries in layout.items():
        sizes = [math.prod(shape) for _, shape in entries]
        for (name, shape), part in zip(entries, flat[kind].split(sizes), strict=True):
            yield name, part.view(shape)
