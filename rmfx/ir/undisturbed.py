"""What holds for every verb: what is switched on outside stays outside, nothing raw leaves it.

The models that it is given are as they were when it returns: their modules, tensors, switches,
hooks and graphs. What the tensors hold is for the tests to look at. A graph that it returns says
what rules have done to it (`rmfx.report.modified`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn

from rmfx.errors import OptionError, fault, reported
from rmfx.options import P, T, declared_arguments, fitting
from rmfx.report import MODIFIED_KEY, REWRITES_KEY

from .threads import alone

_AUTOCAST: ContextVar[dict[str, torch.dtype]] = ContextVar("autocast", default={})  # noqa: B039


def undisturbed(verb: Callable[P, T]) -> Callable[P, T]:
    """Run a verb outside inference mode and autocast, while nobody else traces.

    No errors come out but those of rmfx, and Python's own of a call that does not fit.

    Weights made in inference mode could never be trained or loaded again, and autocast would round
    the algebra. Code that traces in another thread patches what this one would run.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        given = declared_arguments(verb, args, kwargs)
        if given is None:
            return verb(*args, **kwargs)  # Python says why it is no call
        with contextlib.ExitStack() as stack:
            stack.enter_context(reported(verb.__name__))
            stack.enter_context(fitting(verb, given))
            stack.enter_context(alone())
            stack.enter_context(torch.inference_mode(False))
            types = _autocast_types()
            for device in types:
                stack.enter_context(torch.autocast(device, enabled=False))
            if types:
                stack.callback(_AUTOCAST.reset, _AUTOCAST.set(types))
            models = [value for value in given.values() if isinstance(value, nn.Module)]
            _check_default_device(models)
            before = list(map(_outline, models))
            made = verb(*args, **kwargs)
            if before != list(map(_outline, models)):
                raise fault(verb.__name__, "the model that was given to it is another one now")
            _close_count(made)
            return made

    return run


def _check_default_device(models: Iterable[nn.Module]) -> None:
    """Raise OptionError where new tensors would go elsewhere than to the device of a model."""
    default = torch.get_default_device().type
    for model in models:
        tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
        if default != "cpu" and tensor is not None and tensor.device.type != default:
            raise OptionError(
                f"torch's default device is {default}, and the model's weights are on "
                f"{tensor.device.type}; convert it outside of `with torch.device(...)`, or after "
                "torch.set_default_device(None)"
            )


def _close_count(made: object) -> None:
    """Let the result say what rules have done to it, and the next verb count from 0."""
    for gm in made if isinstance(made, tuple) else (made,):
        if isinstance(gm, fx.GraphModule):
            gm.meta[MODIFIED_KEY] = gm.meta.pop(REWRITES_KEY, {})


def _outline(model: nn.Module) -> tuple[list[Any], ...]:
    """All of a model that a verb could change by mistake, but for what its tensors hold."""
    modules = dict(model.named_modules(remove_duplicate=False))
    graphs = [m.graph for m in modules.values() if isinstance(m, fx.GraphModule)]
    return (
        [
            (name, id(m), getattr(m, "training", None), *map(len, _hooks(m)))
            for name, m in modules.items()
        ],
        [
            (name, id(t), t.requires_grad)
            for named in (model.named_parameters, model.named_buffers)
            for name, t in named(remove_duplicate=False)
        ],
        [
            (n.name, n.op, n.target, [x.name for x in n.all_input_nodes], list(n.meta))
            for graph in graphs
            for n in graph.nodes
        ],
    )


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


def _autocast_types() -> dict[str, torch.dtype]:
    """The devices for which autocast is on, with the type it casts to."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return {device: torch.get_autocast_dtype(device) for device in devices}


@contextlib.contextmanager
def autocast_of_caller() -> Iterator[dict[str, torch.dtype]]:
    """Switch autocast on again as the caller of a verb has it; gives the types it casts to."""
    with contextlib.ExitStack() as stack:
        for device, dtype in _AUTOCAST.get().items():
            stack.enter_context(torch.autocast(device, dtype))
        yield _autocast_types()
