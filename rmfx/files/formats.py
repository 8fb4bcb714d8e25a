"""The kinds of files that networks are written to, and how each is written and read back."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .onnx_model import write_onnx
from .source_lines import shorten_stacks
from .trials import HALVES

Function = Callable[..., Any]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        write: puts a program into a file.
        read: a written file as a function of tensors.
        packages: those it needs besides torch.
        lacks: types of inputs with which it cannot be checked, and why.
        limit: bytes of weights, of which it holds fewer; None where it holds any number.
    """

    write: Callable[[ExportedProgram, Path], None]
    read: Callable[[Path], Function]
    packages: tuple[str, ...] = ()
    lacks: tuple[tuple[torch.dtype, ...], str] = ((), "")
    limit: int | None = None

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def _write_program(program: ExportedProgram, path: Path) -> None:
    # To memory first: where a disk is full, torch's own writer ends the whole process.
    written = io.BytesIO()
    shorten_stacks(program.graph_module)
    torch.export.save(program, written)
    path.write_bytes(written.getbuffer())


def _read_program(path: Path) -> Function:
    return torch.export.load(path).module()


def _read_onnx(path: Path) -> Function:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


FORMATS = {
    ".pt2": Format(_write_program, _read_program),  # torch.export's
    ".onnx": Format(
        write_onnx,
        _read_onnx,
        packages=("onnx", "onnxscript", "onnxruntime"),
        lacks=((torch.float64, *HALVES), "onnxruntime computes convolutions in float32 only"),
        limit=2**31,  # a protobuf message cannot be larger
    ),
}
