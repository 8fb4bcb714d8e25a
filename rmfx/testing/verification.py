"""Conversions check themselves before they leave.

A proof that a rewrite is exact rests on what the compiler believes of every operator around it. So
the result is run beside the original on inputs that nobody converted it for: fresh values, and
every kind of size that the result claims to take (`_trial_inputs` lists them). Outputs are
compared, and the value at each join with its counterpart, since outputs alone are a weak witness
(see `_equivalence`). A size that the original fails on, or the result refuses, says nothing, nor
does a failure where the original has values without numbers.

The limit is the oracle's tolerance in the model's type, relative to the largest number that is
added. Where that is exceeded the original is run again, in float64 and with its inputs moved by one
rounding, and ten times of what that does is allowed too: no rewrite can be nearer to the original
than the original is to what it stands for. So is twice of what rounding its weights does, as new
ones are.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rmfx.algebra.affine import CONVS
from rmfx.algebra.digits import AFFORDED, bits_of
from rmfx.analysis.ranges import check_range
from rmfx.errors import OptionError, VerificationError, first_line
from rmfx.frontend.checks import does_not_run
from rmfx.frontend.dynamo import find_lifted
from rmfx.frontend.effects import shares_memory
from rmfx.interval import Interval
from rmfx.ir.conditions import refuses
from rmfx.ir.converted import computed_tensors
from rmfx.ir.names import module_path
from rmfx.ir.notes import WRITTEN
from rmfx.ir.undisturbed import autocast_of_caller
from rmfx.options import as_tuple, is_number, typed
from rmfx.report import META_KEY, JoinError, SiteReport, Verification, shape_text

from .equivalence import (
    Recorder,
    Traced,
    cloned,
    default_tolerance,
    largest,
    moved_by_one_rounding,
    numbers_of,
    operands_of,
    report_rows,
    structure_change,
    traced,
)
from .trial_inputs import LARGE, SAME, Example, Inputs, candidates

SMALL = 1 << 21  # parameters up to which a network is run at further sizes, and is called
ROUNDINGS = 10  # times the effect of rounding is allowed for
ONCE = 2  # times that of rounding the weights, which are rounded once
COARSE = 100  # times the tolerance: what nobody takes for rounding
MOVES = 4  # of a few numbers one rounding may do little by chance
CALLED = 1 << 11  # positions up to which a small network with a graph is called as well
SUMS = (torch.add, torch.sub)
Shape = tuple[int, ...]
M = TypeVar("M", bound=nn.Module)


@typed
def verify(
    before: nn.Module | ExportedProgram,
    after: nn.Module,
    inputs: Any,
    *,
    tolerance: float | None = None,
    input_range: Interval | None = None,
) -> Verification:
    """Compare what a pass made of a network with the original, at sizes that the result takes.

    Every pass does this with its own result where it is given example inputs (`verify=True`).

    Args:
        before: the original, in eval mode; not changed.
        after: what a pass made of it. Where it carries a report (see `rmfx.report`) the value of
            every join that the report lists is compared with its counterpart.
        inputs: example inputs, a tensor or a tuple of arguments. Values are drawn afresh: normally
            distributed, or uniformly from `input_range`; whole numbers and truth values are drawn
            from those of the example. Sizes are the example's and others, as far as `after` takes
            them.
        tolerance: the largest error relative to the largest value or operand; by default that of
            `rmfx.testing.assert_equivalent` for the coarsest type in use. Ten times what one
            rounding of the inputs does to the original, or rounding to its own values, is allowed
            as well.
        input_range: (low, high) of every input value, where `after` was made for such.

    Returns:
        What was compared, and for which joins a dropped skip would not have been seen.

    Raises:
        VerificationError: a value differs, or `after` fails at a size at which the original runs.
        TraceError: `after` has a report, and the original cannot be traced again.
        OptionError: an argument makes no sense.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    >>> verify(net, net, torch.randn(1, 1, 9, 9)).error
    0.0
    """
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise OptionError(f"tolerance={tolerance!r}: it is a number, not negative")
    check_range(input_range)
    return verified(before, after, inputs, tolerance, input_range, traced)


def verified(
    before: nn.Module | ExportedProgram,
    after: nn.Module,
    inputs: Any,
    tolerance: float | None,
    input_range: Interval | None,
    source_of: Traced,
    batches: Sequence[Any] = (),
) -> Verification:
    """The same, where `source_of` tells the original's graph, which others may need as well.

    Args:
        batches: inputs on which alone they are compared, if there are any.
    """
    given = as_tuple(inputs)
    original = before.module() if isinstance(before, ExportedProgram) else before
    names = {row.join for row in report_rows(after)}
    try:
        source = source_of(original, given, names) if names else None
    except AssertionError as error:
        raise VerificationError(f"{error}: it was not made of this network") from error
    joins = _of_report(after)
    fresh = partial(_original, original, source)
    pair = _Pair("", fresh, source, after, joins, tolerance)
    last = _reads_features(original)
    return pair.run(Example(given, input_range=input_range, last=last), batches)


def checked(
    verb: str,
    model: Any,
    source: fx.GraphModule,
    after: fx.GraphModule,
    inputs: Any,
    *,
    wanted: bool = True,
    input_range: Interval | None = None,
    batches: Sequence[Any] = (),
    reports: bool = False,
) -> fx.GraphModule:
    """The result of a verb, verified where that is wanted and can be; its report says so.

    Args:
        verb: its name, for messages.
        model: what the caller gave to it.
        source: the graph that was traced of it, whose joins the report names.
        after: the result.
        inputs: the example inputs, if there are any.
        wanted: whether the caller wants it verified.
        input_range: of the inputs for which the result holds.
        batches: inputs for which alone it holds, as far as anybody knows, if there are such.
        reports: whether the verb has made a report on the joins; else those are compared that stand
            in both graphs under one name.

    Raises:
        VerificationError: it does not compute what the model computes.
    """
    if not wanted:
        found = Verification(reason="verify=False")
    elif inputs is None:
        found = Verification(reason="there are no example inputs")
    else:
        joins = _of_report(after) if reports else _of_names(source, after)
        fresh = partial(_original, model, source)
        pair = _Pair(verb, fresh, source, after, joins)
        example, trials = _example_of(model, inputs, input_range)
        found = pair.run(example, [as_tuple(batch) for batch in batches] or trials)
    if reports:
        after.meta[META_KEY] = replace(after.meta[META_KEY], verification=found)
    return after


def _example_of(
    model: Any, inputs: Any, input_range: Interval | None
) -> tuple[Example, list[Inputs]]:
    """The example inputs, and those to be run if there is no choice.

    One of Dynamo's graphs is made for the sizes that it was made of, and holds the model's own
    tensors among its inputs, unless they were taken out.
    """
    given = as_tuple(inputs)
    if not _is_of_dynamo(model):
        return Example(given, input_range=input_range, last=_reads_features(model)), []
    lifted = {one.position: one.value for one in find_lifted(model)}
    real = (lifted.get(i, _real(x)) for i, x in enumerate(given))
    example = Example(tuple(real), frozenset(lifted), input_range)
    return example, [example.resized((SAME,) * len(example.sizes), seed=0)]


def _reads_features(model: Any) -> bool:
    """Whether channels are more likely to be the last dimension, as of tokens."""
    modules = () if isinstance(model, ExportedProgram) else model.modules()
    kinds = {type(module) for module in modules}
    return nn.Linear in kinds and kinds.isdisjoint(CONVS[1:])


def _is_of_dynamo(model: Any) -> bool:
    if not isinstance(model, fx.GraphModule):
        return False
    return any("grapharg" in node.meta for node in model.graph.find_nodes(op="placeholder"))


def _real(x: Any) -> Any:
    """What may be run in the place of an input that compilers know in the abstract."""
    if isinstance(x, FakeTensor):
        shape: list[Any] = list(x.shape)
        return torch.zeros([_real(n) for n in shape], dtype=x.dtype, device=x.device)
    return x.node.hint if isinstance(x, torch.SymInt) else x


def _original(model: Any, source: fx.GraphModule | None) -> nn.Module:
    """A copy of what the caller holds, to be run; its graph where it cannot be copied.

    Raises:
        VerificationError: there is no graph either.
    """
    model = model.module() if isinstance(model, ExportedProgram) else model
    try:
        copied: nn.Module = _apart(model, writes=_may_write(source))
    # Copying runs code of the model's own objects, which may raise anything.
    except Exception as error:
        if source is None:
            raise VerificationError(
                f"the original cannot be copied, and running it could change it: {error}"
            ) from error
        return _apart(source, writes=_may_write(source))
    return copied


def _may_write(source: fx.GraphModule | None) -> bool:
    """Whether a model may write to its own tensors, as far as its graph tells."""
    return source is None or any(WRITTEN in node.meta for node in source.graph.nodes)


def _apart(model: M, *, writes: bool) -> M:
    """A copy that may run without the caller's model noticing.

    It shares the parameters, unless it may write to them, and of a graph its nodes, which are many
    more objects than its tensors.
    """
    kept: dict[int, Any] = {} if writes else {id(p): p for p in model.parameters()}
    memo = kept | computed_tensors(model)
    if not isinstance(model, fx.GraphModule):
        return copy.deepcopy(model, memo)
    made = object.__new__(type(model))  # whose class has the code
    memo |= {id(model): made, id(model.graph): model.graph, id(model.meta): model.meta}
    vars(made).update(copy.deepcopy(vars(model), memo))
    return made


def _in_float64(values: Any) -> Any:
    """Floating numbers in float64."""

    def cast(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    return pytree.tree_map_only(Tensor, cast, values)


# ---- joins --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Join:
    """A join and its counterpart.

    Attributes:
        name, node: of the nodes before and after.
        place: the path of the module that adds.
        done: what was done there.
        bits: that a carry loses there.
        cut: whether it may have lost channels, so that nothing can be compared.
    """

    name: str
    node: str
    place: str
    done: str = ""
    bits: float = 0.0
    cut: bool = False


def _of_report(after: nn.Module) -> list[_Join]:
    """The joins of a report that have a counterpart."""
    return [
        _Join(row.join, str(row.node), row.place, _done(row), row.bits)
        for row in report_rows(after)
    ]


def _done(row: SiteReport) -> str:
    ways = ", ".join(filter(None, [row.strategy, row.layout]))
    return f" ({row.status}{f'; {ways}' if ways else ''})"


def _of_names(source: fx.GraphModule, after: fx.GraphModule) -> list[_Join]:
    """The sums of two tensors that both graphs have under the same name."""
    names = {node.name for node in after.graph.nodes if node.target in SUMS}
    return [
        _Join(node.name, node.name, module_path(node), cut=True)
        for node in source.graph.nodes
        if node.name in names and node.target in SUMS and len(operands_of(node)) == 2
    ]


# ---- one pair of networks -----------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Forms:
    """What is run of one side: the network as it is called, and its graph, of which one is enough.

    Attributes:
        module, graph: None for what is not to be run.
        as_it_is: whether the module is not to be copied, as a compiled one.
    """

    module: nn.Module | None
    graph: fx.GraphModule | None
    as_it_is: bool = False

    def apart(self, *, precise: bool = False) -> _Forms:
        """Copies, whose writes these do not see; in float64 if they are to be precise."""
        module, graph = self.module, self.graph and _apart(self.graph, writes=True)
        if module is not None and not self.as_it_is:
            module = _apart(module, writes=True)
        if precise:
            module, graph = module and module.double(), graph and graph.double()
        return _Forms(module, graph, self.as_it_is)

    def move(self, seed: int) -> None:
        """Move all weights by one rounding."""
        for form in filter(None, (self.module, self.graph)):
            held = {id(x): x for x in (*form.parameters(), *form.buffers())}
            tensors = [x for x in held.values() if x.is_floating_point()]
            with torch.no_grad():
                for x, moved in zip(tensors, moved_by_one_rounding((*tensors,), seed), strict=True):
                    x.data.copy_(moved)


@dataclass(frozen=True, eq=False)
class _Run:
    """What a network gave: its output and its values at some nodes, or how it failed."""

    output: Any = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    failure: Exception | None = None


@dataclass(frozen=True, eq=False)
class _Place:
    """A value before and after.

    Attributes:
        text: where it is, and what was done there.
        key: the name of the join, or the number of the output.
        expected, actual: the value before and after.
        scale: the largest number from which it is computed.
        module: the path of the module that adds.
        least: the largest number of the smallest operand, which a dropped skip would leave out.
    """

    text: str
    key: str | int
    expected: Any
    actual: Any
    scale: float
    module: str = ""
    least: float = 0.0

    def error(self) -> float:
        """The largest difference."""
        return _difference(self.expected, self.actual)

    def moved(self, other: _Run) -> float:
        """How far another run of the original is from the first; 0 where it did not get here."""
        return _difference(self.expected, self._in(other), unknown=0.0)

    def where_finite(self, others: Sequence[_Run]) -> _Place:
        """The same without the places where rounding decides whether a number is finite.

        It decides where other runs of the original differ in about as many.
        """
        differ = _not_finite_alike(self.expected, self.actual)
        if differ is None or not bool(differ.any()):
            return self
        found = (_not_finite_alike(self.expected, self._in(other)) for other in others)
        most = max((int(one.sum()) for one in found if one is not None), default=0)
        if int(differ.sum()) > ROUNDINGS * most:
            return self
        kept = [x.masked_fill(differ, 0) for x in (self.expected, self.actual)]
        return replace(self, expected=kept[0], actual=kept[1])

    def _in(self, other: _Run) -> Any:
        """The value of another run, in the type of this one."""
        if isinstance(self.key, str):
            found = other.values.get(self.key)
        else:
            leaves = pytree.tree_leaves(other.output)
            found = leaves[self.key] if self.key < len(leaves) else None
        if isinstance(found, Tensor) and isinstance(self.expected, Tensor):
            return found.to(self.expected.dtype)
        return found


def _not_finite_alike(a: Any, b: Any) -> Tensor | None:
    """Where one value is finite and the other is not, or another infinity."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return None
    if not a.is_floating_point() or a.layout is not torch.strided:
        return None
    one, two = (torch.where(x.isfinite(), 0, x) for x in (numbers_of(a), numbers_of(b)))
    alike: Tensor = one.eq(two) | (one.isnan() & two.isnan())
    return ~alike


class _Pair:
    """An original and what became of it.

    Args:
        verb: the pass that has just made it, for messages; "" if the caller brought it.
        fresh: makes a copy of the original, which may be run.
        source: its graph, if joins are to be compared.
        after: the result.
        joins: those to be compared.
        tolerance: the relative error that is allowed, None for that of the types in use.
    """

    def __init__(
        self,
        verb: str,
        fresh: Callable[[], nn.Module],
        source: fx.GraphModule | None,
        after: nn.Module,
        joins: Sequence[_Join] = (),
        tolerance: float | None = None,
    ) -> None:
        self._fresh, self._verb, self._tolerance = fresh, verb, tolerance
        self._joins = joins
        self._fixed: frozenset[int] = frozenset()
        self._operands: dict[str, list[tuple[fx.Node, float]]] = {}
        graphs: tuple[fx.GraphModule | None, ...] = (None, None)
        if source is not None and isinstance(after, fx.GraphModule):
            names = {join.name for join in joins}
            nodes = [node for node in source.graph.nodes if node.name in names]
            self._operands = {node.name: operands_of(node) for node in nodes}
            graphs = source, after
        self._writes = _may_write(source)
        self._is_small = sum(p.numel() for p in after.parameters()) <= SMALL
        calls = self._is_small or graphs[0] is None
        self._forms = (
            _Forms(fresh() if calls else None, graphs[0]),
            _Forms(after if calls else None, graphs[1], not isinstance(after, fx.GraphModule)),
        )
        # What holds the original's tensors.
        self._kept: Any = self._forms[0].module if source is None else source
        self._reason = "the original gives no finite values to compare with"
        self._shapes: list[tuple[Shape, ...]] = []
        self._error, self._limit, self._magnified = 0.0, 0.0, 0.0
        self._found: dict[str, JoinError] = {}

    def run(self, example: Example, batches: Sequence[Inputs] = ()) -> Verification:
        """Compare at every kind of size; on batches alone where there are any.

        Raises:
            VerificationError: the result is another function.
        """
        self._fixed = example.fixed
        for batch in batches:
            self._compare(batch)
        if not batches and not self._run_at(example):
            self._run_at(replace(example, last=not example.last))
        if not self._shapes:
            self._compare(example.inputs)
        if not _is_of_dynamo(self._kept):
            self._check_example(example.inputs)
        if not self._shapes:
            return Verification(reason=self._reason)
        return Verification(
            shapes=tuple(self._shapes),
            error=self._error,
            limit=self._limit,
            joins=tuple(self._found.values()),
            magnified=self._magnified,
        )

    def _check_example(self, inputs: Inputs) -> None:
        """Raise ShapeError if nothing was compared at the example's size as the original fails."""
        if self._shapes_of(inputs) in self._shapes or _positions(inputs) > LARGE:
            return
        failure = self._again(self._forms[0], inputs).failure
        if failure is not None:
            raise does_not_run(inputs, failure) from failure

    def _run_at(self, example: Example) -> bool:
        """Whether both ran at another size than the example's."""
        several = False
        for seed, choices in enumerate(candidates(example, further=self._is_small)):
            for sizes in choices:
                if self._compare(example.resized(sizes, seed)):
                    several = several or any(size != SAME for size in sizes)
                    break
        return several

    def _compare(self, inputs: Inputs) -> bool:
        """Whether both run on some inputs, and give the same.

        What they write is kept for the next inputs if these count.

        Raises:
            VerificationError: both run and give something else, or only the original runs.
        """
        start = self._forms
        if self._writes:
            self._forms = (start[0].apart(), start[1].apart())
        counts = self._counts(start[0], inputs)
        if not counts:
            self._forms = start
        return counts

    def _counts(self, start: _Forms, inputs: Inputs) -> bool:
        """The same, where the original was `start` before."""
        after = self._run(1, inputs)
        if after.failure is not None and refuses(after.failure):
            return False
        before = self._run(0, inputs)
        if before.failure is not None or not _has_numbers(before.output):
            return False
        if self._depends_on_calls(inputs, before, after):
            return False
        if after.failure is not None and _has_empty(before):
            return False
        if after.failure is not None:
            kind, text = type(after.failure).__name__, first_line(after.failure)
            raise self._error_at(inputs, f"the original runs and the result raises {kind}: {text}")
        if self._agree(start, inputs, before, after):
            self._shapes.append(self._shapes_of(inputs))
        return True

    def _run(self, side: int, inputs: Inputs) -> _Run:
        """Run one side, 0 for the original and 1 for the result."""
        return self._run_forms(self._forms[side], inputs, self._names(side))

    def _again(
        self,
        start: _Forms,
        inputs: Inputs,
        *,
        precise: bool = False,
        weights: int | None = None,
        seed: int = 0,
    ) -> _Run:
        """Run the original once more from where it was.

        Args:
            start: what it was like.
            inputs: which may be others than before.
            precise: whether in float64.
            weights: a seed, with which its weights are moved by one rounding.
            seed: of the numbers that it draws at random.
        """
        as_it_was = not (self._writes or precise or weights is not None)
        forms = start if as_it_was else start.apart(precise=precise)
        if weights is not None:
            forms.move(weights)
        inputs = _in_float64(inputs) if precise else inputs
        return self._run_forms(forms, inputs, self._names(0), precise=precise, seed=seed)

    def _run_forms(
        self,
        forms: _Forms,
        inputs: Inputs,
        names: set[str],
        *,
        precise: bool = False,
        seed: int = 0,
    ) -> _Run:
        """Run a network as it is called, unless that takes long, and for the values its graph."""
        output, values = None, dict[str, Any]()
        module, graph = forms.module, forms.graph
        if graph is not None and _positions(inputs) > CALLED:
            module = None
        casts = contextlib.nullcontext() if precise else self._autocast()
        try:
            with torch.no_grad(), casts:
                if module is not None:
                    with _seeded(seed):
                        output = _call(module, self._copies(inputs))
                if graph is not None:
                    recorder = Recorder(graph, names)
                    with _seeded(seed):
                        found = recorder.run(*self._copies(inputs))
                    output, values = found if output is None else output, recorder.values
        # Both run the model's own operations, which may raise anything.
        except Exception as failure:  # noqa: BLE001
            return _Run(failure=failure)
        return _Run(output, values)

    def _copies(self, inputs: Inputs) -> Inputs:
        """Copies of inputs, which a network may write to, and weights as they are."""
        return tuple(x if i in self._fixed else cloned(x) for i, x in enumerate(inputs))

    def _moved(self, inputs: Inputs, seed: int) -> Inputs:
        """Inputs, without weights, moved by one rounding."""
        moved = moved_by_one_rounding(inputs, seed)
        return tuple(inputs[i] if i in self._fixed else x for i, x in enumerate(moved))

    def _autocast(self) -> contextlib.AbstractContextManager[dict[str, torch.dtype]]:
        """Autocast as the caller has it, where the original is a graph that was made under it."""
        return autocast_of_caller() if _is_of_dynamo(self._kept) else contextlib.nullcontext({})

    def _names(self, side: int) -> set[str]:
        """The nodes whose values are compared."""
        if side:
            return {join.node for join in self._joins}
        operands = (node.name for found in self._operands.values() for node, _ in found)
        return {*self._operands, *operands}

    def _agree(self, start: _Forms, inputs: Inputs, before: _Run, after: _Run) -> bool:
        """Whether joins and outputs are the same; False where chance decides what they are.

        Raises:
            VerificationError: one is not; the first in the order of the graph is named.
        """
        limit = self._tolerance
        if limit is None:
            with self._autocast() as types:
                used = [torch.empty(0, dtype=dtype) for dtype in types.values()]
            limit = default_tolerance(self._kept, (inputs, before.output, used))
            limit *= 2 ** self._bits(before)
        places = list(self._places(inputs, before, after))
        wrong = [place for place in places if not place.error() <= limit * place.scale]
        allowances: dict[str | int, float] = {}
        if wrong:
            roundings = [self._again(start, self._moved(inputs, seed)) for seed in range(MOVES)]
            if not (self._writes and shares_memory(self._kept)):  # which a cast takes apart
                roundings.append(self._again(start, inputs, precise=True))
            rounded = [self._again(start, inputs, weights=seed) for seed in range(MOVES)]
            for whole in wrong:
                place = whole.where_finite(roundings)
                places[places.index(whole)] = place
                floor = max(place.moved(other) for other in roundings)
                of_weights = max(place.moved(other) for other in rounded)
                allowed = limit * place.scale + max(ROUNDINGS * floor, ONCE * of_weights)
                allowances[place.key] = allowed
                if place.error() <= allowed:
                    continue
                if self._is_random(start, inputs, before):
                    self._reason = "the original draws numbers at random"
                    return False
                raise self._error_at(inputs, _told(place, allowed))
        self._note(places, limit, allowances)
        return True

    def _bits(self, before: _Run) -> float:
        """The bits that carries lose by the report, as far as the outputs' type affords it."""
        floating = (x for x in pytree.tree_leaves(before.output) if isinstance(x, Tensor))
        types = (x.dtype for x in floating if x.is_floating_point())
        most = AFFORDED * bits_of(next(types, torch.float32))
        return min(most, max((join.bits for join in self._joins), default=0.0))

    def _places(self, inputs: Inputs, before: _Run, after: _Run) -> Iterator[_Place]:
        """What is compared, in the order of the graph."""
        for join in self._joins:
            text = f"the join {join.name} at {join.place or 'the top level'}{join.done}"
            if join.node not in after.values:
                raise self._error_at(inputs, f"{text} has no counterpart, which the report names")
            expected, actual = before.values[join.name], after.values[join.node]
            if join.cut and expected.shape != actual.shape:
                continue
            operands = self._operands[join.name]
            parts = [abs(c) * _scale(before.values[n.name]) for n, c in operands]
            scale, least = max(parts, default=0.0), min(parts, default=0.0)
            yield _Place(text, join.name, expected, actual, scale, join.place, least)
        change = structure_change(before.output, after.output)
        if change:
            raise self._error_at(inputs, change)
        leaves = (pytree.tree_leaves(run.output) for run in (before, after))
        for i, (a, b) in enumerate(zip(*leaves, strict=True)):
            yield _Place(f"output {i}", i, a, b, _scale(a))

    def _note(
        self, places: Sequence[_Place], limit: float, allowances: Mapping[str | int, float]
    ) -> None:
        """Note what was compared, and whether it would have shown a dropped skip."""
        self._limit = max(self._limit, limit)
        for place in places:
            error, allowed = place.error() / (place.scale or 1.0), allowances.get(place.key)
            if allowed is None:
                self._error = max(self._error, error)
            else:
                self._magnified = max(self._magnified, error)
            if isinstance(place.key, str):
                self._found[place.key] = self._join(place, allowed or 0.0)

    def _join(self, place: _Place, allowed: float) -> JoinError:
        """The largest error at a join so far, and the largest sensitivity."""
        known = self._found.get(str(place.key), JoinError(place.module, 0.0, 0.0))
        scale = place.scale or math.inf
        error = place.error() / scale
        sensitivity = place.least / scale if place.least > allowed else 0.0
        return JoinError(place.module, max(known.error, error), max(known.sensitivity, sensitivity))

    def _shapes_of(self, inputs: Inputs) -> tuple[Shape, ...]:
        """The shapes of what the caller gives, without weights."""
        return _shapes(tuple(x for i, x in enumerate(inputs) if i not in self._fixed))

    def _depends_on_calls(self, inputs: Inputs, before: _Run, after: _Run) -> bool:
        """Whether the original has kept something of another size, and gives what it fits to.

        A cache of positions, say. At equal sizes two calls have to agree.
        """
        is_other = self._shapes and self._shapes[0] != self._shapes_of(inputs)
        if not is_other or after.failure is not None or self._outputs_agree(before, after):
            return False
        if self._forms[0].module is None:
            return False
        fresh = replace(self._forms[0], module=self._fresh())
        again = self._run_forms(fresh, inputs, self._names(0))
        return again.failure is None and self._outputs_agree(again, after)

    def _outputs_agree(self, before: _Run, after: _Run) -> bool:
        """Whether two outputs are the same up to coarse rounding."""
        if structure_change(before.output, after.output) is not None:
            return False
        limit = COARSE * default_tolerance(self._kept, before.output)
        leaves = (pytree.tree_leaves(run.output) for run in (before, after))
        return all(_difference(a, b) <= limit * _scale(a) for a, b in zip(*leaves, strict=True))

    def _is_random(self, start: _Forms, inputs: Inputs, before: _Run) -> bool:
        """Whether the original draws numbers at random: then two runs need not agree."""
        again = self._again(start, inputs, seed=1)
        pairs = zip(*(pytree.tree_leaves(run.output) for run in (before, again)), strict=True)
        return any(_difference(a, b) > 0 for a, b in pairs)

    def _error_at(self, inputs: Inputs, what: str) -> VerificationError:
        sizes = shape_text(self._shapes_of(inputs))
        if not self._verb:
            return VerificationError(f"the networks differ: on random inputs of {sizes} {what}")
        return VerificationError(
            f"{self._verb}: on random inputs of {sizes} {what}; nothing was returned. "
            "This is a bug of rmfx, please report it with the model's code; policy=lambda site: "
            "... can leave single sites as they are, and verify=False returns the result unchecked"
        )


def _call(module: nn.Module, inputs: Inputs) -> Any:
    """What a network gives; without what torch.fx prints where one of its graphs fails."""
    call: Any = nn.Module.__call__ if isinstance(module, fx.GraphModule) else type(module).__call__
    return call(module, *inputs)


def _told(place: _Place, allowed: float) -> str:
    scale = place.scale or 1.0
    return (
        f"{place.text} differs by {place.error() / scale:.2g}, relative to the largest number it "
        f"is computed from, where {allowed / scale:.2g} would be rounding"
    )


def _difference(expected: Any, actual: Any, unknown: float = math.inf) -> float:
    """The largest difference; `unknown` where there is no such number.

    Of whole numbers and truth values it is the share of those that differ. What is not finite, such
    as the mask of an attention, has to be so on both sides.
    """
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return 0.0 if expected is actual or expected == actual else unknown
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return unknown
    is_discrete = not (expected.is_floating_point() or expected.is_complex())
    expected, actual = numbers_of(expected), numbers_of(actual)
    if torch.equal(expected, actual):
        return 0.0
    if is_discrete:
        return float((expected != actual).double().mean())
    finite = expected.isfinite()
    if not bool(finite.all()):
        same = torch.equal(expected.nan_to_num()[~finite], actual.nan_to_num()[~finite])
        nans = torch.equal(expected.isnan(), actual.isnan())
        if not (same and nans):
            return unknown
        expected, actual = expected[finite], actual[finite]
    found = largest(expected - actual)
    return found if math.isfinite(found) else unknown


def _scale(x: Any) -> float:
    """The largest finite number, 0 of values that are no numbers or whole ones."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return 0.0
    x = numbers_of(x)
    return largest(x[x.isfinite()])


def _has_numbers(output: Any) -> bool:
    """Whether some value is finite, or there is none."""
    tensors = [numbers_of(x) for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    filled = [x for x in tensors if x.numel()]
    return not filled or any(bool(x.isfinite().any()) for x in filled)


def _has_empty(run: _Run) -> bool:
    """Whether a network gives values without numbers: of maps too small for it, say."""
    tensors = [x for x in pytree.tree_leaves([run.output, run.values]) if isinstance(x, Tensor)]
    return any(x.numel() == 0 for x in tensors)


def _shapes(inputs: Inputs) -> tuple[Shape, ...]:
    return tuple(tuple(x.shape) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))


def _positions(inputs: Inputs) -> int:
    """The most positions, batch and space, of an input."""
    return max((math.prod((*shape[:1], *shape[2:])) for shape in _shapes(inputs)), default=0)


@contextlib.contextmanager
def _seeded(seed: int = 0) -> Iterator[None]:
    """Let what is drawn at random be the same each time, and afterwards as if nothing was."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
