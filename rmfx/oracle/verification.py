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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from rmfx.algebra.affine import CONVS
from rmfx.analysis.ranges import check_range
from rmfx.errors import VerificationError
from rmfx.frontend.dynamo import find_lifted
from rmfx.interval import Interval
from rmfx.options import as_tuple, number_of, typed
from rmfx.report import META_KEY
from rmfx.verified import Verification

from .counterparts import joins_of_names, joins_of_report
from .equivalence import Traced, report_rows, traced
from .pair import Pair
from .runs import copy_of_original, is_of_dynamo
from .trial_inputs import SAME, Example, Inputs


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
    if tolerance is not None:
        tolerance = number_of("tolerance", tolerance, least=0)
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
    joins = joins_of_report(after)
    fresh = partial(copy_of_original, original, source)
    pair = Pair("", fresh, source, after, joins, tolerance)
    last = _reads_features(original)
    return pair.run(Example(given, input_range=input_range, last=last), batches)


@dataclass(frozen=True, eq=False)
class Domain:
    """The inputs for which a result holds.

    Attributes:
        input_range: of all their values.
        batches: inputs for which alone it holds, as far as anybody knows, if there are such.
    """

    input_range: Interval | None = None
    batches: Sequence[Any] = ()


EVERYTHING = Domain()


def checked(
    verb: str,
    model: Any,
    source: fx.GraphModule,
    after: fx.GraphModule,
    inputs: Any,
    *,
    wanted: bool = True,
    domain: Domain = EVERYTHING,
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
        domain: the inputs for which the result holds.
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
        joins = joins_of_report(after) if reports else joins_of_names(source, after)
        fresh = partial(copy_of_original, model, source)
        pair = Pair(verb, fresh, source, after, joins)
        example, trials = _example_of(model, inputs, domain.input_range)
        found = pair.run(example, [as_tuple(batch) for batch in domain.batches] or trials)
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
    if not is_of_dynamo(model):
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


def _real(x: Any) -> Any:
    """What may be run in the place of an input that compilers know in the abstract."""
    if isinstance(x, FakeTensor):
        shape: list[Any] = list(x.shape)
        return torch.zeros([_real(n) for n in shape], dtype=x.dtype, device=x.device)
    return x.node.hint if isinstance(x, torch.SymInt) else x
