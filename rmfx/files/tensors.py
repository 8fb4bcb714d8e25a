"""Tensors from files of which nothing is ever run: safetensors, numpy's, and torch's own."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rmfx.errors import RmfxError, first_line


class LoadError(RmfxError):
    """What a file or a name stands for cannot be loaded as asked."""


# What readers make of bytes that are not theirs.
_DAMAGED = (
    *(SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, MemoryError),
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    ArithmeticError,
)


def read_tensors(path: Path) -> Any:
    """What a file holds: tensors by name, or whatever made of tensors `torch.save` was given.

    Args:
        path: its suffix tells `.safetensors` and `.npz`; all others are files of torch's.

    Raises:
        LoadError: it cannot be read, is damaged, or holds code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            return _arrays(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"{path} is damaged, or holds more than tensors (only tensors are read, never code)"
        ) from error
    except _DAMAGED as error:
        kind = path.suffix[1:] or "tensor"
        raise LoadError(f"{path} is damaged or no .{kind} file: {first_line(error)}") from error


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file, zipfile.ZipFile(file):  # numpy would read other files, too
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    # Those of other machines may have their bytes the other way round.
    native = {name: x.astype(x.dtype.newbyteorder("=")) for name, x in found.items()}
    return {name: torch.from_numpy(x) for name, x in native.items()}
