"""Graphs of `torch.export`, with the conditions under which they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config

from ._draws import no_draws
from ._errors import TraceError
from ._graph import copy_graph
from ._input_guard import Expected, InputGuard, Size, parameters_of
from ._kept import unchanged
from ._threads import alone_exporting, without_warnings
from ._tracing import OWN_GRADIENT, first_line, own_gradients

GUARD_KEY = "rmfx_input_guard"


def export_model(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    """The model's graph by `torch.export`, with a batch of any size where its code allows it.

    Other sizes are fixed: code that only exporting can trace computes with them, and symbolic
    sizes make such expressions grow with every layer (188 s for an EfficientNet-B0 whose padding
    depends on the image, against 4 s).

    Raises:
        KeepsStateError: the model draws random numbers that are not torch's.
        TraceError: the model cannot be exported.
    """
    functions: list[str] = []
    with (
        alone_exporting(),
        own_gradients(functions),
        no_draws(lambda: _export(model, inputs, None)),
    ):
        gm = _unlifted_of(model, inputs)
    if functions:
        gm.meta[OWN_GRADIENT] = functions[0]
    return gm


def _unlifted_of(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    tensors = all(isinstance(x, Tensor) for x in inputs)
    shapes = tuple({0: Dim.AUTO} if x.dim() > 1 else None for x in inputs) if tensors else None
    try:
        program = _export(model, inputs, shapes)
    except TraceError:
        if shapes is None:
            raise
        program = _export(model, inputs, None)
    return unlifted(program)


def _export(model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    try:
        # Else a batch of one would be taken for a constant.
        with (
            symbolic_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
            unchanged(model, values=True),
            without_warnings(),  # about what `unchanged` takes care of
        ):
            return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    # Exporting runs the model's own code, which may raise anything.
    except Exception as error:
        if "fake tensor in the exported program constant" in str(error):
            raise TraceError(
                "it reads `.data`, whose values a program cannot follow; write `.detach()` there"
            ) from error
        raise TraceError(f"{type(error).__name__}: {first_line(error)}") from error


def unlifted(program: ExportedProgram) -> fx.GraphModule:
    """The program as a graph that owns its weights; `meta[GUARD_KEY]` holds its `InputGuard`."""
    if any(sets_level(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # which computes with whole batches instead
    with without_warnings():  # tensors that are neither parameters nor buffers are fine
        gm: fx.GraphModule = program.module(check_guards=False)
    gm._forward_pre_hooks.clear()  # torch's own check, which the guard replaces
    gm._forward_pre_hooks_with_kwargs.clear()
    conditions = tuple(getattr(program, "_guards_code", None) or ())
    gm.meta[GUARD_KEY] = _guard(gm, program.range_constraints, conditions=conditions)
    return gm


def sets_level(node: fx.Node) -> bool:
    """Whether a node switches a level of `torch.func` (vmap, jvp) for those behind it."""
    place = str(getattr(node.target, "__module__", ""))
    return place.startswith(("torch._functorch.", "torch._C._functorch"))


def is_exported(gm: nn.Module) -> bool:
    """Whether a graph is the `.module()` of an exported program, with torch's check of inputs."""
    names = [getattr(hook, "__name__", "") for hook in gm._forward_pre_hooks.values()]
    return isinstance(gm, fx.GraphModule) and "_check_input_constraints_pre_hook" in names


def without_checks(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of an exported program's `.module()` with an `InputGuard` in place of its checks."""
    gm = fx.GraphModule(module, copy_graph(module), type(module).__name__)
    guards = None
    for node in gm.graph.find_nodes(op="call_module", target="_guards_fn"):
        guards = module.get_submodule("_guards_fn")
        gm.graph.erase_node(node)
    gm.meta = dict(module.meta)
    gm.meta[GUARD_KEY] = _guard(gm, getattr(module, "range_constraints", None) or {}, guards=guards)
    return gm


def _guard(gm: fx.GraphModule, constraints: Mapping[Any, Any], **conditions: Any) -> InputGuard:
    nodes = gm.graph.find_nodes(op="placeholder")
    symbols = {str(symbol): _limits(limits) for symbol, limits in constraints.items()}
    return InputGuard(
        tuple(_expected(node) for node in nodes),
        parameters_of(gm),
        flatten=True,
        ranges={name: limits for name, limits in symbols.items() if limits != (0, math.inf)},
        **conditions,
    )


def _limits(limits: Any) -> tuple[float, float]:
    # torch notes 2 where it means any size: 0 and 1 are what it likes to treat apart.
    low, high = float(limits.lower), float(limits.upper)
    return (low if low > 2 else 0, high if high < 2**62 else math.inf)


def _expected(node: fx.Node) -> Expected:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return Expected(node.name, tuple(_size(n) for n in value.shape))
    if value is None or isinstance(value, (int, float, str, bool)):
        return Expected(node.name, constant=(value,))
    return Expected(node.name)


def _size(n: int | torch.SymInt) -> Size:
    if isinstance(n, int):
        return n
    return str(n) if str(n).isidentifier() else None
