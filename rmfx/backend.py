"""The torch.compile backend: `torch.compile(model, backend="rmfx", options={...})`.

Each of Dynamo's graphs has its residual connections removed and goes on to another backend. The
weights that were baked are compared at every call with those that Dynamo hands over, in a way that
`Options` says; after `load_state_dict`, an optimiser step or any other change the graph is made
again. A graph whose gradients are asked for is passed on as it is, with a warning, unless
`differentiable` is set.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from rmfx.analysis.ranges import check_range
from rmfx.choices import TARGETS
from rmfx.errors import OptionError, RmfxError, WeightError
from rmfx.frontend.dynamo import Lifted, can_be_seen, find_lifted, snapshot, with_weights
from rmfx.frontend.freshness import MODES, Mode, Snapshot
from rmfx.interval import Interval
from rmfx.ir.notes import EXAMPLE_VALUE
from rmfx.options import check_choice, check_classes
from rmfx.removal.policy import Policy, check_policy
from rmfx.removal.strategy import allowed_ways

from .passes.residual import remove_residuals
from .report import Report, report

Compiled = Callable[..., Any]
MAX_RENEWALS = 8  # then the weights are being trained, and converting at each call does not pay


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="rmfx", options={...})` understands.

    Attributes:
        backend: name of the backend that compiles the converted graph, or a function.
        backend_options: its options; for inductor its configuration.
        strict: raise where a residual connection is refused or a graph cannot be converted.
        activation, input_range, policy, minimise, copy_shared: as for `rmfx.remove_residuals`.
        differentiable: convert graphs whose gradients are asked for too; their weights are computed
            in the graph, at every call.
        weights: how a graph notices that weights have changed since they were baked. Every mode but
            "frozen" sees each write that torch counts (in-place operators, optimisers,
            `load_state_dict`) and each tensor or memory that takes another's place. Of the writes
            that torch does not count (fused optimisers, collectives, batch norm in training, other
            processes, `.data`, numpy),
            "sampled" sees those that change one of 64 values spread over each tensor; it can miss
                one that changes a few single values, or less than 1/32 of a tensor in one piece;
            "checked" sees all, but for one in 2^32, since it reads every byte at every call;
            "frozen" sees none and does not look: it is for whoever promises not to touch them.
        on_report: called with the `rmfx.Report` of every graph.
    """

    backend: str | Callable[..., Compiled] = "inductor"
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    activation: str | Collection[str] = "auto"
    input_range: Interval | None = None
    policy: Policy = "all"
    minimise: str = "time"
    copy_shared: bool = True
    differentiable: bool = False
    weights: Mode = "sampled"
    on_report: Callable[[Report], object] | None = None

    @staticmethod
    def of(given: Mapping[str, Any]) -> Options:
        """Options from a mapping.

        Raises:
            RmfxError: there is no such option, or it makes no sense.
        """
        names = [f.name for f in fields(Options)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise OptionError(
                f"backend='rmfx' has no option {unknown[0]!r}; it has {', '.join(names)}"
            )
        check_classes(Options, given)
        options = Options(**given)
        if options.backend == "rmfx":
            raise OptionError("backend='rmfx' cannot compile with itself; name another backend")
        check_choice("weights", options.weights, MODES)
        check_policy(options.policy)
        check_choice("minimise", options.minimise, TARGETS)
        check_range(options.input_range)
        allowed_ways(options.activation)
        return options


def rmfx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile one of Dynamo's graphs without its residual connections.

    Args:
        gm: Dynamo's graph; not changed.
        example_inputs: its inputs, as Dynamo hands them to a backend.
        options: see `Options`.
        mode: of torch.compile; passed on to inductor.

    Raises:
        OptionError: an option is not known.
        RmfxError: with `strict`, the graph cannot be converted.
    """
    chosen = Options.of(options or {})
    if mode is not None:
        chosen = replace(chosen, backend_options=_of_mode(mode) | dict(chosen.backend_options))
    if torch.is_grad_enabled() and any(_requires_grad(x) for x in example_inputs):
        differentiable: Compiled = _inner(chosen, baked=False)(
            _differentiable(gm, chosen, example_inputs), list(example_inputs)
        )
        return differentiable
    return _Converted(gm, example_inputs, chosen)


def _differentiable(gm: fx.GraphModule, options: Options, inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph through which gradients may flow: converted if that is asked for."""
    if not options.differentiable:
        _warn(
            "gradients are asked for, so the graph keeps its residual connections; call the "
            "compiled model under torch.no_grad(), freeze its parameters, or set the option "
            "differentiable"
        )
        return gm
    return _converted(gm, options, inputs, differentiable=True) or gm


def _converted(
    gm: fx.GraphModule,
    options: Options,
    inputs: Sequence[Any],
    *,
    differentiable: bool = False,
    verify: bool = True,
) -> fx.GraphModule | None:
    """The graph without residual connections; None, with a warning, where that cannot be.

    Args:
        gm: the graph.
        options: how to convert it.
        inputs: its example inputs, on whose sizes the result is verified.
        differentiable: whether its weights stay inputs.
        verify: whether to verify it.

    Raises:
        RmfxError: the same with `strict`.
    """
    try:
        if not differentiable:  # else no weight is baked
            _check_seen([*gm.parameters(), *gm.buffers()], options.weights)
        converted: fx.GraphModule = remove_residuals(
            gm,
            tuple(inputs),
            strict=options.strict,
            activation=options.activation,
            input_range=options.input_range,
            policy=options.policy,
            minimise=options.minimise,
            copy_shared=options.copy_shared,
            differentiable=differentiable,
            verify=verify,
        )
    except RmfxError as error:
        if options.strict:
            raise
        _warn(f"a graph keeps its residual connections: {error}")
        return None
    if options.on_report is not None:
        options.on_report(report(converted))
    return converted


def _of_mode(mode: str) -> dict[str, Any]:
    return dict(torch._inductor.list_mode_options(mode))


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _warn(text: str) -> None:
    warnings.warn(f"rmfx: {text}", stacklevel=2)


def _inner(options: Options, *, baked: bool) -> Compiled:
    """The backend behind this one, as a function of graph and inputs.

    Args:
        options: which backend, and its options.
        baked: whether the graph's own tensors will not change.
    """
    given = dict(options.backend_options)
    if options.backend == "inductor":
        return lambda gm, inputs: _inductor(gm, inputs, given, baked=baked)
    found: Any = options.backend
    if isinstance(options.backend, str):
        found = torch._dynamo.lookup_backend(options.backend)
    return lambda gm, inputs: found(gm, inputs, **({"options": given} if given else {}))


def _inductor(
    gm: fx.GraphModule, inputs: list[Any], config: dict[str, Any], *, baked: bool
) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    # Freezing folds constants into the code, of which those of a graph that was not converted may
    # still change. Inductor cannot freeze float64: its CPU kernels with packed weights do not know
    # the type.
    freezing = baked and all(p.dtype != torch.float64 for p in gm.parameters())
    return cast("Compiled", compile_fx(gm, inputs, config_patches={"freezing": freezing, **config}))


@dataclass(frozen=True)
class _State:
    """What answers, and what the weights were like of which it was made.

    Attributes:
        run: takes the inputs without the weights, or all of them where nothing was converted.
        weights: None where nothing was converted, so that nothing was baked.
    """

    run: Compiled
    weights: Snapshot | None


class _Converted:
    """A compiled graph without residual connections, which knows the weights it was made of.

    Its state is made aside and put in place at once: an exception on the way leaves the old one, of
    which the next call finds again that it is too old.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> None:
        self._gm = gm
        lifted = find_lifted(gm, uncounted=options.weights != "sampled")
        # Without the tensors, which may be replaced and then need not be kept.
        self._lifted = [replace(one, value=torch.empty(0)) for one in lifted]
        self._options = options
        self._renewals = 0
        self._renewing = threading.Lock()
        self._is_dynamic = _has_open_sizes(gm.graph)
        self._baked = [one.position for one in lifted]
        self._kept = [i for i in range(len(inputs)) if i not in set(self._baked)]
        # With inductor's freezing switched on Dynamo leaves the weights in the graph.
        self._held = [*gm.parameters(), *gm.buffers()]
        self._state = self._compile(inputs, lifted)

    def _compile(
        self, inputs: Sequence[Any], lifted: Sequence[Lifted], *, again: bool = False
    ) -> _State:
        # Before the weights are read: a write meanwhile is found at the next call.
        held = [w for w in self._held if can_be_seen(w)]  # the others will be refused
        weights = snapshot(lifted, held, self._options.weights)
        given = [inputs[i] for i in self._kept]
        owning = with_weights(self._gm, lifted, keep_inputs=False)
        # Once: what is made again is made in the same way.
        converted = _converted(owning, self._options, given, verify=not again)
        is_eager = again and self._is_dynamic
        inner = _eager if is_eager else _inner(self._options, baked=converted is not None)
        if converted is None:
            return _State(inner(self._gm, list(inputs)), None)
        converted.requires_grad_(False)
        with torch.no_grad():
            compiled: Compiled = inner(converted, given)
        return _State(compiled, weights)

    def __call__(self, *args: Any) -> Any:
        state = self._state
        if not self._is_fresh(state, args):
            if self._renewals >= MAX_RENEWALS:
                return self._gm(*args)
            state = self._renewed(args)
        if state.weights is None:
            return state.run(*args)
        return state.run(*[args[i] for i in self._kept])

    def _is_fresh(self, state: _State, args: Sequence[Any]) -> bool:
        """Whether the weights are those that were baked."""
        if state.weights is None:
            return True
        return state.weights.holds([*map(args.__getitem__, self._baked), *self._held])

    def _renewed(self, args: Sequence[Any]) -> _State:
        """The state of the weights as they are now; whoever comes meanwhile waits for it."""
        with self._renewing:
            if self._is_fresh(self._state, args):  # another thread was here before
                return self._state
            lifted = [replace(one, value=args[one.position]) for one in self._lifted]
            state = self._compile(args, lifted, again=True)
            self._state = state
            self._renewals += 1
            renewals = self._renewals
        if self._is_dynamic:
            # Dynamo's knowledge of the sizes is gone; a compiler would take those of this call.
            _warn("the weights have changed: this graph, of open sizes, now runs uncompiled")
        if renewals == MAX_RENEWALS:
            _warn(
                f"the weights have changed {MAX_RENEWALS} times since this graph was compiled; "
                "after the next change it runs as it was written, with its residual connections. "
                "Compile the model again (torch._dynamo.reset()) when its weights stay"
            )
        return state


def _check_seen(weights: Sequence[Tensor], mode: Mode) -> None:
    if not all(map(can_be_seen, weights)):
        raise WeightError(
            "a weight is a tensor subclass, sparse or quantised, so its changes cannot be seen; "
            "convert the model with rmfx.remove_residuals before you compile it"
        )
    if mode == "sampled" and any(w.is_inference() for w in weights):
        raise WeightError(
            "the weights were made in inference mode, where their changes are not counted; make "
            "the model outside torch.inference_mode(), or pass weights='checked' or 'frozen'"
        )


def _eager(gm: fx.GraphModule, inputs: list[Any]) -> Compiled:
    return gm.forward


def _has_open_sizes(graph: fx.Graph) -> bool:
    values = [n.meta.get(EXAMPLE_VALUE) for n in graph.nodes if n.op == "placeholder"]
    return any(
        isinstance(size, torch.SymInt)
        for value in values
        for size in (value.shape if isinstance(value, Tensor) else (value,))
    )
