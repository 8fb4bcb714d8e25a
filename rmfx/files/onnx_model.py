"""An exported program as an ONNX model that holds the network and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from .free_sizes import free_batch

BATCH = "batch"  # the name of the axis
STACK = "pkg.torch.onnx.stack_trace"  # which files of whose machine a node comes from


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write a program as an ONNX file.

    Equal constants are one. Where the first size of all inputs is free, it is called `batch`.

    Args:
        program: what is written; its weights are less than 2 GB, which protobuf allows.
        path: of the file, which holds the weights, too.
    """
    import onnx_ir
    from onnx_ir.passes.common import DeduplicateHashedInitializersPass

    made: Any = torch.onnx.export(program, (), verbose=False)
    model: Any = made.model
    _lay_out(model)
    DeduplicateHashedInitializersPass()(model)
    if free_batch(program):
        symbol = re.compile(rf"\b{re.escape(str(model.graph.inputs[0].shape[0]))}\b")
        for value in _values(model):
            if value.shape is not None:
                value.shape = onnx_ir.Shape(
                    [n if isinstance(n, int) else symbol.sub(BATCH, str(n)) for n in value.shape]
                )
    for node in model.graph.all_nodes():
        node.metadata_props.pop(STACK, None)
    made.save(path, external_data=False)


def _lay_out(model: Any) -> None:
    """Lay out constants that are views, as transposed weights are: hashes are of whole memory."""
    import onnx_ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            array = value.const_value.numpy()
            if not array.flags.c_contiguous:
                kind = value.const_value.dtype
                made = onnx_ir.Tensor(np.ascontiguousarray(array), dtype=kind, name=value.name)
                value.const_value = made


def _values(model: Any) -> Iterator[Any]:
    """All tensors that a model computes with."""
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs
