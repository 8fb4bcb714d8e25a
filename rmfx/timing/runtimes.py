"""Runtimes: how each prepares a network to be run, and how several are timed in turn."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], object]


class RuntimeFailure(Exception):  # noqa: N818  (not an error of rmfx: it becomes a row)
    """What one runtime raised, or why its numbers are wrong."""


@dataclass(eq=False)
class Form:
    """One form of a network, and the inputs it is run on."""

    gm: nn.Module
    inputs: tuple[Tensor, ...]

    @cached_property
    def onnx(self) -> bytes:
        """The network as an ONNX model of this batch size; two runtimes read it."""
        program = torch.onnx.export(self.gm, self.inputs, dynamo=True, verbose=False)
        if program is None:
            raise RuntimeFailure("torch.onnx.export gave no program")
        made: bytes = program.model_proto.SerializeToString()
        return made

    @cached_property
    def arrays(self) -> list[Any]:
        return [x.numpy() for x in self.inputs]


def run_eagerly(form: Form, threads: int) -> Run:
    """The graph as PyTorch runs it, operator by operator."""
    return lambda: form.gm(*form.inputs)


def _inductor(form: Form, threads: int) -> Run:
    compiled = torch.compile(form.gm, dynamic=False)
    return lambda: compiled(*form.inputs)


def _onnxruntime(form: Form, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(form.onnx, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feeds = dict(zip(names, form.arrays, strict=True))
    return lambda: session.run(None, feeds)


def run_in_openvino(form: Form, threads: int) -> Run:
    """The ONNX model, compiled by OpenVINO for the CPU."""
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(form.onnx), "CPU", options)
    request = compiled.create_infer_request()
    return lambda: request.infer(form.arrays, share_inputs=True, share_outputs=True).to_tuple()


@contextlib.contextmanager
def _freezing() -> Iterator[None]:
    """Inductor with weights as constants; nothing that was compiled outlives the block."""
    import torch._inductor.config

    try:
        with torch._inductor.config.patch(freezing=True):
            yield
    finally:
        torch._dynamo.reset()


@dataclass(frozen=True)
class Runtime:
    """One way of running a network.

    Attributes:
        prepare: makes a function that runs one form on its inputs.
        packages: those it needs besides torch.
        scope: a context in which it is prepared and run.
    """

    prepare: Callable[[Form, int], Run]
    packages: tuple[str, ...] = ()
    scope: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


RUNTIMES = {
    "eager": Runtime(run_eagerly),
    "inductor": Runtime(_inductor, scope=_freezing),
    "onnxruntime": Runtime(_onnxruntime, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Runtime(run_in_openvino, ("onnx", "onnxscript", "openvino")),
}


@contextlib.contextmanager
def as_failure() -> Iterator[None]:
    """Turns whatever a runtime raises into a failure with a reason of one line."""
    try:
        yield
    except RuntimeFailure:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise RuntimeFailure(f"{type(error).__name__}: {lines[0].strip()[:200]}") from error


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Also for what is compiled in the block: inductor writes the number into its code."""
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def times_of(
    runs: Sequence[Run], *, threads: int, rounds: int, seconds: float
) -> list[tuple[float, ...]]:
    """Seconds of a call of each function, one number for each round."""
    # Importing this takes a second and warns about CUDA toolkits, which others need not see.
    from torch.utils.benchmark import Timer

    timers = [Timer("run()", globals={"run": r}, num_threads=threads) for r in runs]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for side in range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs))):
            # Begins with untimed calls, in which the threads of the other form fall asleep.
            found = timers[side].blocked_autorange(min_run_time=seconds)
            times[side].append(found.median)
    return [tuple(each) for each in times]
