"""One original and one result, compared at inputs of many sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx.algebra.digits import AFFORDED, bits_of, is_half
from rmfx.errors import VerificationError, first_line
from rmfx.frontend.checks import does_not_run
from rmfx.frontend.memory import shares_memory
from rmfx.ir.conditions import refuses
from rmfx.verified import JoinError, Verification, shape_text

from .counterparts import Counterpart
from .equivalence import default_tolerance, operands_of, structure_change
from .places import ROUNDINGS, Place, difference, has_numbers, scale_of, told
from .runs import Run, Shape, is_of_dynamo, positions_of
from .sides import Sides
from .trial_inputs import LARGE, SAME, Example, Inputs, candidates

ONCE = 2  # times that of rounding the weights, which are rounded once
COARSE = 100  # times the tolerance: what nobody takes for rounding
NO_NUMBERS = "the original gives no finite values to compare with"
MOVES = 4  # of a few numbers one rounding may do little by chance


@dataclass(frozen=True, eq=False)
class _Rounded:
    """The original again, with what it reads rounded anew.

    Attributes:
        once, often: runs on inputs that were rounded once, and several times over.
        of_weights: runs on weights that were rounded once.
        magnified: how much more the result makes of a rounding.
    """

    once: Sequence[Run]
    often: Sequence[Run]
    of_weights: Sequence[Run]
    magnified: float

    def moves(self, place: Place) -> float:
        """How far roundings move what stands at a place."""
        least, far, of_weights = (
            [place.moved(run) for run in runs] for runs in (self.once, self.often, self.of_weights)
        )
        of_inputs = max(ROUNDINGS * max(least), *far)
        return max(of_inputs, ONCE * max(of_weights)) * self.magnified


class Pair:
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
        joins: Sequence[Counterpart] = (),
        tolerance: float | None = None,
    ) -> None:
        self._verb, self._tolerance, self._joins = verb, tolerance, joins
        names = {join.name for join in joins}
        nodes = [] if source is None else [n for n in source.graph.nodes if n.name in names]
        self._operands = {node.name: operands_of(node) for node in nodes}
        operands = (node.name for found in self._operands.values() for node, _ in found)
        noted = ({*self._operands, *operands}, {join.node for join in joins})
        self._sides = Sides(fresh, source, after, noted)
        self._reason = NO_NUMBERS
        self._own: tuple[Shape, ...] = ()
        self._shapes: list[tuple[Shape, ...]] = []
        self._error, self._limit, self._magnified = 0.0, 0.0, 0.0
        self._found: dict[str, JoinError] = {}

    def run(self, example: Example, batches: Sequence[Inputs] = ()) -> Verification:
        """Compare at every kind of size; on batches alone where there are any.

        Raises:
            VerificationError: the result is another function.
        """
        self._sides.fixed = example.fixed
        self._own = self._sides.shapes_of(example.inputs)
        for batch in batches:
            self._compare(batch)
        if not batches and not self._run_at(example):
            self._run_at(replace(example, last=not example.last))
        if not self._shapes:
            self._compare(example.inputs)
        if not is_of_dynamo(self._sides.kept):
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
        if self._sides.shapes_of(inputs) in self._shapes or positions_of(inputs) > LARGE:
            return
        self._sides.begin()
        failure = self._sides.again(inputs).failure
        if failure is not None:
            raise does_not_run(inputs, failure) from failure

    def _run_at(self, example: Example) -> bool:
        """Whether both ran at another size than the example's."""
        several = False
        for seed, choices in enumerate(candidates(example, further=self._sides.is_small)):
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
        self._sides.begin()
        counts = self._counts(inputs)
        if not counts:
            self._sides.undo()
        return counts

    def _counts(self, inputs: Inputs) -> bool:
        """The same, whatever they write."""
        after = self._sides.run(1, inputs)
        if after.failure is not None and refuses(after.failure):
            return False
        before = self._sides.run(0, inputs)
        if before.failure is not None or not has_numbers(before.output):
            return False
        if self._depends_on_calls(inputs, before, after):
            return False
        if after.failure is not None and before.has_empty and self._is_smaller(inputs):
            return False
        if after.failure is not None:
            kind, text = type(after.failure).__name__, first_line(after.failure)
            raise self._error_at(inputs, f"the original runs and the result raises {kind}: {text}")
        if self._agree(inputs, before, after):
            self._shapes.append(self._sides.shapes_of(inputs))
        return True

    def _is_smaller(self, inputs: Inputs) -> bool:
        """Whether inputs are smaller than the example in some dimension: too small, perhaps."""
        both = zip(self._sides.shapes_of(inputs), self._own, strict=False)
        return any(a < b for one, own in both for a, b in zip(one, own, strict=False))

    def _agree(self, inputs: Inputs, before: Run, after: Run) -> bool:
        """Whether joins and outputs are the same; False where chance decides what they are.

        Raises:
            VerificationError: one is not; the first in the order of the graph is named.
        """
        limit = self._limit_at(inputs, before)
        bits, most = self._bits(before)
        # Bits are lost of values of the size of 1: smaller ones are off by as much.
        least = 1.0 if 0 < bits <= most else 0.0
        places = list(self._places(inputs, before, after))
        allowances: dict[str | int, float] = {
            place.key: limit * least for place in places if place.scale < least
        }
        wrong = [p for p in places if not p.error() <= limit * max(p.scale, least)]
        if wrong:
            rounded = self._rounded(inputs, before)
            for whole in wrong:
                place = whole.where_finite(rounded.once)
                places[places.index(whole)] = place
                allowed = limit * max(place.scale, least) + rounded.moves(place)
                allowances[place.key] = allowed
                if place.error() <= allowed:
                    continue
                if self._is_random(inputs, before):
                    self._reason = "the original draws numbers at random"
                    return False
                raise self._error_at(inputs, told(place, allowed))
        self._note(places, limit, allowances)
        return True

    def _limit_at(self, inputs: Inputs, before: Run) -> float:
        """The relative error that is allowed."""
        limit = self._tolerance
        if limit is None:
            with self._sides.autocast() as types:
                used = [torch.empty(0, dtype=dtype) for dtype in types.values()]
            limit = default_tolerance(self._sides.kept, (inputs, before.output, used))
            limit *= 2 ** min(self._bits(before))
        return limit

    def _rounded(self, inputs: Inputs, before: Run) -> _Rounded:
        """The original, run again with roundings of its inputs and weights."""
        sides = self._sides
        once = [sides.again(sides.moved(inputs, seed)) for seed in range(MOVES)]
        if not (sides.writes and shares_memory(sides.kept)):  # which a cast takes apart
            once.append(sides.again(inputs, precise=True))
        # What ten roundings do where a bend is near may be far more than ten times that of one.
        often = [sides.again(sides.moved(inputs, s, times=ROUNDINGS)) for s in range(MOVES)]
        of_weights = [sides.again(inputs, weights=seed) for seed in range(MOVES)]
        if is_half(self._type(before)):
            # Each layer rounds, what it makes of constants, too, which no input moves.
            often += [sides.again(inputs, weights=s, times=ROUNDINGS) for s in range(MOVES)]
        # A carry that loses bits, as far as its type affords it, makes more of each rounding.
        bits, most = self._bits(before)
        return _Rounded(once, often, of_weights, 2**bits if bits <= most else 1)

    def _type(self, before: Run) -> torch.dtype:
        """That of the outputs."""
        floating = (x for x in pytree.tree_leaves(before.output) if isinstance(x, Tensor))
        types = (x.dtype for x in floating if x.is_floating_point())
        return next(types, torch.float32)

    def _bits(self, before: Run) -> tuple[float, float]:
        """The bits that carries lose by the report, and those that the outputs' type affords."""
        most = AFFORDED * bits_of(self._type(before))
        return max((join.bits for join in self._joins), default=0.0), most

    def _places(self, inputs: Inputs, before: Run, after: Run) -> Iterator[Place]:
        """What is compared, in the order of the graph."""
        for join in self._joins:
            text = f"the join {join.name} at {join.place or 'the top level'}{join.done}"
            if join.node not in after.values:
                raise self._error_at(inputs, f"{text} has no counterpart, which the report names")
            expected, actual = before.values[join.name], after.values[join.node]
            if join.cut and expected.shape != actual.shape:
                continue
            operands = self._operands[join.name]
            parts = [abs(c) * scale_of(before.values[n.name]) for n, c in operands]
            scale, least = max(parts, default=0.0), min(parts, default=0.0)
            yield Place(text, join.name, expected, actual, scale, join.place, least)
        change = structure_change(before.output, after.output)
        if change:
            raise self._error_at(inputs, change)
        leaves = (pytree.tree_leaves(run.output) for run in (before, after))
        for i, (a, b) in enumerate(zip(*leaves, strict=True)):
            yield Place(f"output {i}", i, a, b, scale_of(a))

    def _note(
        self, places: Sequence[Place], limit: float, allowances: Mapping[str | int, float]
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

    def _join(self, place: Place, allowed: float) -> JoinError:
        """The largest error at a join so far, and the largest sensitivity."""
        known = self._found.get(str(place.key), JoinError(place.module, 0.0, 0.0))
        scale = place.scale or math.inf
        error = place.error() / scale
        sensitivity = place.least / scale if place.least > allowed else 0.0
        return JoinError(place.module, max(known.error, error), max(known.sensitivity, sensitivity))

    def _depends_on_calls(self, inputs: Inputs, before: Run, after: Run) -> bool:
        """Whether the original has kept something of another size, and gives what it fits to.

        A cache of positions, say. At equal sizes two calls have to agree.
        """
        is_other = self._shapes and self._shapes[0] != self._sides.shapes_of(inputs)
        if not is_other or after.failure is not None or self._outputs_agree(before, after):
            return False
        again = self._sides.anew(inputs)
        return again is not None and again.failure is None and self._outputs_agree(again, after)

    def _outputs_agree(self, before: Run, after: Run) -> bool:
        """Whether two outputs are the same up to coarse rounding."""
        if structure_change(before.output, after.output) is not None:
            return False
        limit = COARSE * default_tolerance(self._sides.kept, before.output)
        leaves = (pytree.tree_leaves(run.output) for run in (before, after))
        return all(difference(a, b) <= limit * scale_of(a) for a, b in zip(*leaves, strict=True))

    def _is_random(self, inputs: Inputs, before: Run) -> bool:
        """Whether the original draws numbers at random: then two runs need not agree."""
        again = self._sides.again(inputs, seed=1)
        pairs = zip(*(pytree.tree_leaves(run.output) for run in (before, again)), strict=True)
        return any(difference(a, b) > 0 for a, b in pairs)

    def _error_at(self, inputs: Inputs, what: str) -> VerificationError:
        sizes = shape_text(self._sides.shapes_of(inputs))
        if not self._verb:
            return VerificationError(f"the networks differ: on random inputs of {sizes} {what}")
        return VerificationError(
            f"{self._verb}: on random inputs of {sizes} {what}; nothing was returned. "
            "This is a bug of rmfx, please report it with the model's code; policy=lambda site: "
            "... can leave single sites as they are, and verify=False returns the result unchecked"
        )
