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

import keyword
import re
import reprlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    is_fake,
    unset_fake_temporarily,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ._activation import is_activation
from ._affine import CONVS, AffineConv
from ._batches import as_tuple
from ._border_fill import pad_before
from ._conditions import put_conditions, take_conditions
from ._constants import fold_constants, numbers_of
from ._crops import crop_by_numbers
from ._dialect import canonicalise, has_hooks, replaced_method
from ._dynamo import check_in_graph, find_lifted, with_weights
from ._errors import ModeError, Refusal, ShapeError, TraceError, WeightError
from ._exporting import (
    EXPORTED,
    export_model,
    is_exported,
    sets_level,
    unlifted,
    without_checks,
)
from ._functionalise import functionalise, mark_numbers
from ._graph import check_weight, copy_graph
from ._kept import KeepsStateError
from ._meta import GUARDED, noted
from ._ranks import BY_RANK, Snapshot, demand_ranks
from ._rings import FromRing
from ._state import typed
from ._threads import FAKES, alone, without_logs
from ._tracing import OWN_GRADIENT, first_line, is_user_file, trace_symbolically
from ._witness import as_fakes, check_state, records_the_same

Inputs = tuple[Any, ...]
SWITCHES_OF_GRADIENTS = ("_set_grad_enabled", "set_grad_enabled", "wrap_with_set_grad_enabled")
RANKS_OF_NORM: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
MODE_DEPENDENT = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
)


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
    gm = _private_copy(_graph_of(model, inputs))
    conditions = take_conditions(gm.graph)
    check_weights(gm)
    _check_functional_mode(gm)
    _check_levels(gm)
    _note_switches(gm)
    mark_numbers(gm.graph)
    _note_sources(gm.graph)
    _find_shapes(gm, inputs)
    _mark_guarded(gm)
    before = Snapshot(gm)
    if fold:
        pad_before(gm)  # before what writes in place is set apart
    functionalise(gm)
    if fold:
        fold_constants(gm)
    canonicalise(gm)
    crop_by_numbers(gm)
    if before.was_read_by_rank(gm):
        gm.meta[BY_RANK] = True
        shapes = {n.name: n.meta["shape"] for n in gm.graph.nodes if "shape" in n.meta}
        demand_ranks(conditions, {name: len(shape) for name, shape in shapes.items()})
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


def _note_switches(gm: fx.GraphModule) -> None:
    """Note whether a part has a gradient of its own; raise TraceError for autocast of a part."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name in ("_enter_autocast", "_exit_autocast"):
            raise TraceError(
                f"{node.name}: the code switches autocast for a part of the network, and a rewrite "
                "would take layers out of it; take the switch out, or convert what is inside of it"
            )
        if node.meta.get(OWN_GRADIENT) or name in SWITCHES_OF_GRADIENTS:
            gm.meta.setdefault(OWN_GRADIENT, node.name)


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
    canonicalise(gm)
    put_conditions(conditions, gm.graph)


def _note_sources(graph: fx.Graph) -> None:
    """Read source lines off the stack that Dynamo and export note."""
    for node in graph.nodes:
        lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
        own = [f"{path}:{line}" for path, line in lines if is_user_file(path)]
        if own and "source" not in node.meta:
            node.meta["source"] = own[-1]


def as_inputs(example_inputs: Any) -> Inputs | None:
    """Example inputs as a tuple of arguments."""
    return None if example_inputs is None else as_tuple(example_inputs)


def check_mode(model: nn.Module) -> None:
    """Raise ModeError if a layer of `model` would behave differently in eval mode."""
    for name, module in model.named_modules():
        if module.training and isinstance(module, MODE_DEPENDENT):
            raise ModeError(
                f"{name or type(module).__name__} ({type(module).__name__}) is in training mode; "
                "call model.eval() first"
            )


def check_weights(gm: fx.GraphModule) -> None:
    """Raise WeightError for a parameter or batch statistic that cannot be computed with."""
    for name, value in gm.named_parameters():
        check_weight(name, value)
    for name, buffer in gm.named_buffers():
        if is_fake(buffer):
            raise WeightError(
                f"{name}: torch.export kept the shape of this constant, and lost its value, which "
                "is so where the code reads `.data`; write `.detach()` there and export it again"
            )
        if buffer.requires_grad and not buffer.is_leaf:
            raise WeightError(
                f"{name}: this buffer was computed with gradients on and cannot be copied; replace "
                f"it by itself without them: model.{name} = model.{name}.detach()"
            )
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
    for name, module in gm.named_modules():
        if not isinstance(module, kinds):
            continue
        for own, statistic in module.named_buffers(name, recurse=False):
            check_weight(own, statistic)
        weight = module.weight
        if weight is not None and not weight.is_floating_point():
            raise WeightError(
                f"{name}.weight: {weight.dtype} weights are not supported; convert the model "
                "with model.float()"
            )


def _check_functional_mode(gm: fx.GraphModule) -> None:
    """Raise ModeError where a graph calls batch norm so that it updates running statistics."""
    calls = (
        (F.batch_norm, 1, 5),
        (torch.batch_norm, 3, 5),
        (torch.ops.aten.batch_norm.default, 3, 5),
    )
    for node in gm.graph.nodes:
        for target, mean, training in calls:
            if node.target is not target:
                continue
            given = dict(enumerate(node.args))
            is_training = node.kwargs.get("training", given.get(training, False))
            if is_training is True and isinstance(
                node.kwargs.get("running_mean", given.get(mean)), fx.Node
            ):
                raise ModeError(
                    f"{node.name}: batch norm is called in training mode; call model.eval() before "
                    "tracing or exporting"
                )


# ---- four ways to hold a model ------------------------------------------------------------------


def _graph_of(model: Any, inputs: Inputs | None) -> fx.GraphModule:
    """The model as a graph; what belongs to the caller is not to be written to."""
    if isinstance(model, torch.export.ExportedProgram):
        return unlifted(model)
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"cannot trace a {type(model).__name__}; pass an nn.Module, a GraphModule or an "
            "ExportedProgram"
        )
    model = _unwrapped(model)
    check_mode(model)
    _check_rings(model)
    if has_hooks(model) and not is_exported(model):
        raise TraceError(
            f"{type(model).__name__} has hooks of its own, which a trace would lose; remove "
            "them, wrap the model in a module without hooks, or, if torch.export made it, pass "
            "the ExportedProgram itself"
        )
    _check_names(model)
    if not isinstance(model, fx.GraphModule):
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
        _check_stars(gm)
        if inputs is None:
            _check_defaults(gm)
    except TraceError as error:
        if inputs is not None:
            check_state(model, inputs)
        return str(error)
    if inputs is None or _is_faithful(model, gm, inputs):
        return gm
    check_state(model, inputs)
    return "its code does other things with proxies than with tensors"


def _check_rings(model: nn.Module) -> None:
    """Raise TraceError for weights of a ring, which would be lost behind the graph."""
    for path, module in model.named_modules():
        if isinstance(module, FromRing):
            layer = path.partition(".parametrizations.")[0]
            raise TraceError(
                f"the weight of {layer} is drawn from a ring, which a graph would lose; make "
                "ordinary weights of it first, by rmfx.materialize(model)"
            )


def _check_names(model: nn.Module) -> None:
    """Raise TraceError for a name that torch.fx cannot write down."""
    for path, _ in model.named_modules():
        if keyword.iskeyword(path.rpartition(".")[2]):
            raise TraceError(
                f"{path}: torch.fx writes a network as Python code, in which this name, a keyword, "
                "cannot stand; rename the module"
            )


def _check_stars(gm: fx.GraphModule) -> None:
    """Raise TraceError where code reads any number of arguments: of a proxy nobody knows it."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*") and node.users:
            raise TraceError(f"it reads any number of arguments, as {node.target}")


def _check_defaults(gm: fx.GraphModule) -> None:
    """Raise TraceError where code may ask whether an argument is None: of a proxy it never is."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.args and node.args[0] is None:
            raise TraceError(f"its argument {node.target} may be None, which a proxy never is")


def _is_faithful(model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> bool:
    check_weights(gm)  # its message is better than that of a model which cannot run
    try:
        return records_the_same(model, gm, inputs)
    except KeepsStateError:
        raise
    # Both run the model's own code, which may raise anything.
    except Exception as error:
        raise does_not_run(inputs, error) from error


def does_not_run(inputs: Inputs, error: Exception) -> ShapeError:
    """The error for a model that fails on its example inputs."""
    if isinstance(error, (DynamicOutputShapeException, DataDependentOutputException)):
        return ShapeError(
            f"the model's sizes or ways depend on values ({first_line(error)}), of which example "
            "inputs are an example only; leave them out, or convert the part before"
        )
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else reprlib.repr(x) for x in inputs]
    return ShapeError(f"the model does not run on the example inputs {shapes}: {first_line(error)}")


def _private_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph and its own module tree, sharing the leaves."""
    copied = fx.GraphModule(gm, copy_graph(gm), type(gm).__name__)
    copied.meta = dict(gm.meta)
    return copied


# ---- shapes -------------------------------------------------------------------------------------


class _ShapeRecorder(fx.Interpreter):
    """Notes shapes; the common layers are known by their laws, which is far quicker than fakes."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self._mode = mode
        self._numbers = numbers_of(gm)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        # A graph may write to a parameter: let it write to a fake.
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            shape = shape_after(module, args[0])
            if shape is not None:
                return args[0].new_empty(shape) if shape != args[0].shape else args[0]
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is F.batch_norm and isinstance(args[0] if args else None, Tensor):
            return args[0]
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = self._numbers[n] if n in self._numbers else super().run_node(n)
        if isinstance(value, Tensor):
            note_shape(n, value)
        elif isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            n.meta["container"] = True
        if n.op == "placeholder" and not isinstance(value, Tensor):
            n.meta["given"] = value
        return value


def shape_after(module: nn.Module, x: Tensor) -> tuple[int, ...] | None:
    """Shape behind a common layer, None where only running it can tell (or would fail)."""
    shape = tuple(x.shape)
    if is_activation(module) and not isinstance(module, nn.PReLU):
        return shape
    ranks = RANKS_OF_NORM.get(type(module))
    if ranks is not None:
        fits = len(shape) in ranks and shape[1] == module.num_features
        return shape if fits else None
    if type(module) not in CONVS or x.dtype != module.weight.dtype:
        return None
    if isinstance(module, nn.Linear):
        return (*shape[:-1], module.out_features) if shape[-1] == module.in_features else None
    with unset_fake_temporarily():  # fakes of its weights would take ten times as long
        layer = AffineConv.from_conv(module)
    if isinstance(layer, Refusal) or len(shape) != layer.dims + 2 or shape[1] != layer.in_channels:
        return None
    size = layer.output_size(shape[2:])
    return (shape[0], layer.out_channels, *size) if min(size) > 0 else None


def note_shape(node: fx.Node, value: Tensor) -> None:
    """Keep shape (None where a size is symbolic), type and device of a node's value."""
    node.meta["shape"] = tuple(n if isinstance(n, int) else None for n in value.shape)
    node.meta["dtype"] = (value.dtype, value.device)


def _find_shapes(gm: fx.GraphModule, inputs: Inputs | None) -> None:
    """Note every tensor's shape: from a run on fake tensors, or as Dynamo or export noted it."""
    by_dynamo = any("example_value" in n.meta for n in gm.graph.nodes if n.op == "placeholder")
    if inputs is None or by_dynamo:
        for node in gm.graph.nodes:
            value = noted(node)
            if isinstance(value, Tensor):
                note_shape(node, value)
        return
    expected = sum(node.op == "placeholder" for node in gm.graph.nodes)
    if len(inputs) > expected:
        raise ShapeError(
            f"the model does not run on the example inputs: it takes {expected}, not {len(inputs)}"
        )
    # Numbers that depend on the inputs' values are unknown, and so are sizes that depend on those.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    try:
        with mode, torch.no_grad(), without_logs(FAKES):  # the error says it
            _ShapeRecorder(gm, mode).run(*as_fakes(mode, inputs))
    # The graph runs the model's own operations, which may raise anything.
    except Exception as error:
        raise does_not_run(inputs, error) from error


def _mark_guarded(gm: fx.GraphModule) -> None:
    """Mark what exporting and Dynamo noted, which check their inputs."""
    key = "val" if gm.meta.pop(EXPORTED, False) else "example_value"
    for node in gm.graph.nodes:
        if key in node.meta:
            node.meta[GUARDED] = True
