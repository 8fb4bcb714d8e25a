"""Tensors from files of which nothing is ever run: safetensors, numpy's, and torch's own."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
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


_READ = "only tensors are read, never code"
_ZIP, _PICKLE = b"PK", b"\x80"  # with which files of torch begin, the former ones second


def read_tensors(path: Path, instead: str) -> Any:
    """What a file holds: tensors by name, or whatever made of tensors `torch.save` was given.

    Args:
        path: its suffix tells `.safetensors` and `.npz`; all others are files of torch's.
        instead: what to save where a file holds something else.

    Raises:
        LoadError: it cannot be read, is damaged, or holds code.
    """
    try:
        check_kept(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            return _arrays(path)
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        raise LoadError(f"{path} {_fault(path, error, instead)}") from error


def check_kept(path: Path) -> None:
    """Raise LoadError for an empty file, OSError for a folder or no file at all."""
    with path.open("rb") as file:
        if not file.read(1):
            raise LoadError(f"{path} is empty")


def _check_archive(path: Path) -> None:
    """Raise LoadError for archives of torch's other writers, of which torch.load advises to run."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in entries:
        raise LoadError(
            f"{path} is TorchScript, which holds code; write the state of the model alone:"
            " torch.save(torch.jit.load(path).state_dict(), other_path)"
        )
    if "archive_format" in entries and "data.pkl" not in entries:
        raise LoadError(f"{path} is an exported program; let its name end in .pt2")


def _fault(path: Path, error: Exception, instead: str) -> str:
    """What is wrong with a file that could not be read."""
    if path.suffix in (".npz", ".safetensors"):
        return f"is damaged or no {path.suffix} file: {first_line(error)}"
    with path.open("rb") as file:
        begin = file.read(2)
    if begin != _ZIP and begin[:1] != _PICKLE:
        return "is no file of torch.save"
    if begin == _ZIP and not isinstance(error, pickle.UnpicklingError):
        return "is damaged, or a zip file of something else"
    # The text of the error is all that torch tells; nothing of such a file is run to know more.
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None:
        return f"is damaged, or holds more than tensors ({_READ}); {instead}"
    return f"holds {named.group(1)}, which is no tensor ({_READ}); {instead}"


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file, zipfile.ZipFile(file):  # numpy would read other files, too
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: _array(path, name, arrays) for name in arrays.files}
    # Those of other machines may have their bytes the other way round.
    native = {name: x.astype(x.dtype.newbyteorder("=")) for name, x in found.items()}
    return {name: torch.from_numpy(x) for name, x in native.items()}


def _array(path: Path, name: str, arrays: Mapping[str, Any]) -> Any:
    """An array of numbers, whatever bytes they have."""
    try:
        found = arrays[name]
    except ValueError as error:  # numpy reads no objects, which are pickles
        if "allow_pickle" not in str(error):
            raise
        raise LoadError(f"{path}: {name} holds Python objects; store numbers") from error
    if found.dtype.kind not in "biufc":
        raise LoadError(f"{path}: {name} holds {found.dtype}; store numbers")
    return found
