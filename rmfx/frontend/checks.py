"""What a model must be to be traced: in eval mode, with weights that have values, and running."""

from __future__ import annotations

import contextlib
import keyword
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    is_fake,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from rmfx.errors import ModeError, ShapeError, TraceError, WeightError, first_line
from rmfx.files.source_lines import at_line
from rmfx.ir.functions import SWITCHES_OF_GRADIENTS
from rmfx.ir.kinds import MODE_DEPENDENT
from rmfx.ir.nodes import has_global_hooks, has_hooks
from rmfx.ir.notes import OWN_GRADIENT
from rmfx.ir.weights import check_weight
from rmfx.modules.ring import FromRing
from rmfx.options import Inputs, has_arrays, shapes_shown

from .calls import CALLS, arguments_of, batch_norm, gives_several

BY_VALUES = (
    *(DynamicOutputShapeException, DataDependentOutputException),
    GuardOnDataDependentSymNode,
)


def note_switches(gm: fx.GraphModule) -> None:
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


def check_hooks(model: nn.Module) -> None:
    """Raise TraceError for hooks around a model's code, or around that of all modules."""
    if has_global_hooks():
        raise TraceError(
            "a hook for all modules is registered (torch.nn.modules.module.register_module_"
            "forward_hook or the like), which a trace would lose; remove it for the conversion"
        )
    if has_hooks(model):
        raise TraceError(
            f"{type(model).__name__} has hooks of its own, which a trace would lose; remove "
            "them, wrap the model in a module without hooks, or, if torch.export made it, pass "
            "the ExportedProgram itself"
        )


@contextlib.contextmanager
def telling_scripts(model: nn.Module) -> Iterator[None]:
    """Say of a model that cannot be traced which part of it is TorchScript, if one is."""
    try:
        yield
    except TraceError as error:
        for path, module in model.named_modules():
            if is_script(module):
                raise of_script(path or type(model).__name__) from error
        raise


def is_script(model: object) -> bool:
    """Whether a model was made by `torch.jit`."""
    return isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction))


def of_script(name: str) -> TraceError:
    """The error for what was made by `torch.jit`."""
    return TraceError(
        f"{name} is TorchScript, of which torch.fx makes no graph; pass the nn.Module that it was "
        "made from"
    )


def check_packed(model: nn.Module) -> None:
    """Raise TraceError for a layer whose weights are packed integers."""
    for path, module in model.named_modules():
        if hasattr(module, "_packed_params"):
            raise TraceError(
                f"{path or 'the model'} ({type(module).__module__}.{type(module).__name__}) has "
                "weights in integers, packed for one kind of machine; convert the network in "
                "floating point, and quantise the result"
            )


def check_sized(model: nn.Module) -> None:
    """Raise WeightError for a weight whose shape the first call would decide."""
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(weight):
            raise WeightError(
                f"{name}: the layer is lazy, its weight has no shape before the first call; run the"
                " model once on example inputs"
            )


def check_mode(model: nn.Module) -> None:
    """Raise ModeError if a layer of `model` would behave differently in eval mode."""
    for name, module in model.named_modules():
        if isinstance(module, MODE_DEPENDENT) and module.training:
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
            if own.endswith("running_var") and bool(
                (statistic < -getattr(module, "eps", 0.0)).any()
            ):
                raise WeightError(
                    f"{own}: a variance below 0, of which batch norm makes NaN; load or measure "
                    "these statistics again"
                )
        weight = module._parameters.get("weight")  # as an attribute it may be computed
        if weight is not None and not weight.is_floating_point():
            raise WeightError(
                f"{name}.weight: {weight.dtype} weights are not supported; convert the model "
                "with model.float()"
            )


def check_functional_mode(gm: fx.GraphModule) -> None:
    """Raise ModeError where a graph calls batch norm so that it updates running statistics."""
    for node in gm.graph.nodes:
        call = CALLS.get(node.target)
        if call is None or call.build is not batch_norm or gives_several(node.target):
            continue
        given = arguments_of(node, *call.names)
        if given.get("training") is True and isinstance(given.get("running_mean"), fx.Node):
            raise ModeError(
                f"{node.name}: batch norm is called in training mode; call model.eval() before "
                "tracing or exporting"
            )


def check_rings(model: nn.Module) -> None:
    """Raise TraceError for weights of a ring, which would be lost behind the graph."""
    for path, module in model.named_modules():
        if isinstance(module, FromRing):
            layer = path.partition(".parametrizations.")[0]
            raise TraceError(
                f"the weight of {layer} is drawn from a ring, which a graph would lose; make "
                "ordinary weights of it first, by rmfx.materialize(model)"
            )


def check_names(model: nn.Module) -> None:
    """Raise TraceError for a name that torch.fx cannot write down."""
    for path, _ in model.named_modules():
        if keyword.iskeyword(path.rpartition(".")[2]):
            raise TraceError(
                f"{path}: torch.fx writes a network as Python code, in which this name, a keyword, "
                "cannot stand; rename the module"
            )


def check_stars(gm: fx.GraphModule) -> None:
    """Raise TraceError where code reads any number of arguments: of a proxy nobody knows it."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*") and node.users:
            raise TraceError(f"it reads any number of arguments, as {node.target}")


def check_defaults(gm: fx.GraphModule) -> None:
    """Raise TraceError where code may ask whether an argument is None: of a proxy it never is."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.args and node.args[0] is None:
            raise TraceError(f"its argument {node.target} may be None, which a proxy never is")


def does_not_run(inputs: Inputs, error: Exception) -> ShapeError:
    """The error for a model that fails on its example inputs."""
    if isinstance(error, BY_VALUES):
        return ShapeError(
            f"the model's sizes or ways depend on values ({first_line(error)}), of which example "
            "inputs are an example only; leave them out, or convert the part before"
        )
    hint = ""
    if has_arrays(inputs):
        hint = "; pass tensors: torch.from_numpy(array)"
    elif len(inputs) == 1 and isinstance(inputs[0], Mapping):
        hint = "; a dict is one argument: pass a tuple in the order of the arguments"
    return ShapeError(
        f"the model does not run on the example inputs {shapes_shown(inputs)}: "
        f"{first_line(error)}{at_line(error)}{hint}"
    )
