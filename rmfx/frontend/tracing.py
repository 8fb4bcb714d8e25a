"""Every way to hold a model becomes one graph in one dialect.

`trace` takes an `nn.Module`, a `GraphModule` or an `ExportedProgram`. In its result
    - layers are `call_module` nodes of ordinary `torch.nn` modules, with their module paths;
    - sums are `torch.add` / `torch.sub`, products `torch.mul` / `torch.div`;
    - nothing writes in place, except nodes marked `frozen` (with the reason in `node.meta`), whose
      aliases could be seen elsewhere;
    - nodes that hold numbers instead of tensors (sizes) are marked `number`;
    - `node.meta["shape"]` holds the shape, if example inputs were given;
    - nodes are marked `guarded` where inputs of other sizes than those noted are refused;
    - what depends on parameters and buffers only has become a constant.
The model itself is never changed; modules and parameters are shared with it.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import fx, nn

from rmfx.errors import TraceError, WeightValueError
from rmfx.files.source_lines import short_path
from rmfx.frontend.idioms.border_fill import pad_before
from rmfx.frontend.idioms.crops import crop_by_numbers
from rmfx.frontend.idioms.filled_operands import numbers_for_fillings
from rmfx.frontend.idioms.returns import without_detours
from rmfx.ir.callees import Calls
from rmfx.ir.conditions import put_conditions, take_conditions
from rmfx.ir.converted import ConvertedModule, copy_graph
from rmfx.ir.facts import facts_of
from rmfx.ir.nodes import replaced_method
from rmfx.ir.notes import FOLLOWED, NAMED, SOURCE
from rmfx.ir.own_types import demand_kinds
from rmfx.ir.ranks import BY_RANK, Snapshot, assumed_ranks, demand_assumed, demand_ranks
from rmfx.ir.threads import alone
from rmfx.options import Inputs, as_inputs, typed, with_article

from .canonicalise import canonicalise
from .checks import (
    check_defaults,
    check_functional_mode,
    check_hooks,
    check_mode,
    check_names,
    check_packed,
    check_rings,
    check_sized,
    check_stars,
    check_weights,
    does_not_run,
    is_script,
    note_switches,
    of_script,
    telling_scripts,
)
from .constants import fold_constants
from .dynamo import check_in_graph, find_lifted, with_weights
from .exported import is_exported, sets_level, unlifted, without_checks
from .exporting import export_model
from .faithful import check_state, records_the_same
from .functionalise import functionalise, mark_numbers
from .inlining import inline_bodies
from .kept_state import KeepsStateError
from .present_weights import read_present_weights
from .products import products_as_layers
from .shapes import find_shapes, mark_guarded
from .symbolic import is_user_file, trace_symbolically


@typed
def trace(model: Any, example_inputs: Any = None, *, fold: bool = True) -> fx.GraphModule:
    """The model's graph in rmfx's dialect.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram`, in eval mode.
        example_inputs: a tensor or a tuple of arguments; shapes are read off them, and they allow
            `torch.export` to take over where symbolic tracing fails.
        fold: compute once what depends on the model's tensors alone.

    Raises:
        TraceError: the model cannot be traced.
        ModeError: batch norm, dropout or the like is in training mode.
        WeightError: a weight is NaN, Inf, on the meta device or not real floating point.
        ShapeError: the model does not run on the example inputs.
    """
    with alone():
        return _traced(model, as_inputs(example_inputs), fold)


def _traced(model: Any, inputs: Inputs | None, fold: bool) -> fx.GraphModule:
    graph = _graph_of(model, inputs)
    named = {n.name for n in graph.graph.nodes} if isinstance(graph, ConvertedModule) else set()
    gm = _private_copy(graph)
    gm.meta[FOLLOWED] = not fold
    if not fold:
        gm.meta[NAMED] = named
    inline_bodies(gm)
    conditions = take_conditions(gm.graph)
    check_weights(gm)
    if fold:
        read_present_weights(gm)
    check_functional_mode(gm)
    _check_levels(gm)
    note_switches(gm)
    mark_numbers(gm.graph)
    _note_sources(gm.graph)
    find_shapes(gm, inputs)
    mark_guarded(gm)
    by_rank = products_as_layers(gm)
    before = Snapshot(gm)
    if fold:
        pad_before(gm)  # before what writes in place is set apart
    functionalise(gm)
    if fold:
        fold_constants(gm)
    canonicalise(gm, named)
    numbers_for_fillings(gm)
    # Without folding the layers' weights would be others.
    by_rank |= fold and without_detours(gm)
    crop_by_numbers(gm)
    if by_rank or before.was_read_by_rank(gm):
        gm.meta[BY_RANK] = True
        facts = facts_of(gm, by_readers=True)
        ranks = {x.name: facts.rank(x) for x in gm.graph.find_nodes(op="placeholder")}
        demand_ranks(conditions, ranks)
        demand_assumed(gm.graph, assumed_ranks(gm.graph, facts.rank, facts.layer))
    demand_kinds(conditions, gm.graph, Calls(gm))
    put_conditions(conditions, gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def _check_levels(gm: fx.GraphModule) -> None:
    """Raise TraceError for vmap and its like, whose levels hold for the nodes between two calls."""
    for node in gm.graph.nodes:
        if sets_level(node):
            raise TraceError(
                f"{node.name}: a part of the network runs under torch.vmap or torch.func.jvp, and a"
                " rewrite would take layers out of it; pass the ExportedProgram or the model, or"
                " write that part for whole batches"
            )


def with_constants(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """A traced graph in which what depends on the model's tensors alone is a buffer, its value now.

    Returns:
        The graph, to be brought into the dialect again, and the nodes of the given graph that make
        the buffers' values, by the names of the buffers.
    """
    folded = _private_copy(gm)
    nodes = dict(zip(folded.graph.nodes, gm.graph.nodes, strict=True))
    made_by = {name: nodes[node] for name, node in fold_constants(folded).items()}
    folded.recompile()
    return folded, made_by


def canonicalise_again(gm: fx.GraphModule) -> None:
    """Bring a graph into the dialect in which functions of constants may be layers now."""
    conditions = take_conditions(gm.graph)
    canonicalise(gm, gm.meta.pop(NAMED, ()))
    with contextlib.suppress(WeightValueError):  # then sizes rest on numbers that may change
        if without_detours(gm):
            gm.meta[BY_RANK] = True
    put_conditions(conditions, gm.graph)


def _note_sources(graph: fx.Graph) -> None:
    """Read source lines off the stack that Dynamo and export note."""
    for node in graph.nodes:
        lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
        own = [f"{short_path(path)}:{line}" for path, line in lines if is_user_file(path)]
        if own and SOURCE not in node.meta:
            node.meta[SOURCE] = own[-1]


# ---- four ways to hold a model ------------------------------------------------------------------
def _graph_of(model: Any, inputs: Inputs | None) -> fx.GraphModule:
    """The model as a graph; what belongs to the caller is not to be written to."""
    if isinstance(model, torch.export.ExportedProgram):
        return unlifted(model)
    if is_script(model):
        raise of_script(type(model).__name__)
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"cannot trace {with_article(model)}; pass an nn.Module, a GraphModule or an "
            "ExportedProgram"
        )
    model = _unwrapped(model)
    check_mode(model)
    check_packed(model)
    check_sized(model)
    check_rings(model)
    if not is_exported(model):
        check_hooks(model)
    check_names(model)
    if not isinstance(model, fx.GraphModule):
        with telling_scripts(model):
            return _graph_of_module(model, inputs)
    if (replaced := replaced_method(model)) is not None:
        raise TraceError(
            f"the {replaced} of this {type(model).__name__} was put in the place of its own, which "
            "the graph would lose; let a module of your own call the graph and do the rest"
        )
    if is_exported(model):
        return without_checks(model)
    lifted = find_lifted(model)
    if not lifted:
        return model
    gm = with_weights(model, lifted, keep_inputs=True)
    check_in_graph(gm.graph, lifted)
    return gm


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile and data parallelism put around it."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(
        model, "_orig_mod"
    ):
        inner: nn.Module | None = getattr(model, "_orig_mod", None)
        model = model.get_submodule("module") if inner is None else inner
    return model


def _graph_of_module(model: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    """By symbolic tracing, which leaves every size open; by torch.export where that fails."""
    name = type(model).__name__
    try:
        found = _symbolic(model, inputs)
    except KeepsStateError as error:
        raise TraceError(f"{name} cannot be traced: {error}") from error
    if isinstance(found, fx.GraphModule):
        return found
    if inputs is None:
        raise TraceError(
            f"{name} cannot be traced symbolically ({found}); pass example_inputs, so that "
            "torch.export can be used"
        )
    try:
        return export_model(model, inputs)
    except KeepsStateError as error:
        raise TraceError(f"{name} cannot be traced: {error}") from error
    except TraceError as error:
        raise TraceError(
            f"{name} can be traced neither by torch.fx ({found}) nor by torch.export ({error}); "
            "pass a GraphModule of your own"
        ) from error


def _symbolic(model: nn.Module, inputs: Inputs | None) -> fx.GraphModule | str:
    """The symbolic trace of a model, or why there is none.

    Raises:
        KeepsStateError: the example inputs show that no other trace can hold either.
    """
    try:
        gm = trace_symbolically(model, twice=inputs is None)
        check_stars(gm)
        if inputs is None:
            check_defaults(gm)
    except TraceError as error:
        if inputs is not None:
            check_state(model, inputs)
        return str(error)
    if inputs is None or _is_faithful(model, gm, inputs):
        return gm
    check_state(model, inputs)
    return "its code does other things with proxies than with tensors"


def _is_faithful(model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> bool:
    check_weights(gm)  # its message is better than that of a model which cannot run
    try:
        return records_the_same(model, gm, inputs)
    except KeepsStateError:
        raise
    # Both run the model's own code, which may raise anything.
    except Exception as error:
        raise does_not_run(inputs, error) from error


def _private_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph and its own module tree, sharing the leaves."""
    copied = fx.GraphModule(gm, copy_graph(gm), type(gm).__name__)
    copied.meta = dict(gm.meta)
    return copied
