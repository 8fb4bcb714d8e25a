"""The oracle: two networks compared at their outputs and at every join that a pass has touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx.errors import TraceError
from rmfx.frontend.tracing import trace
from rmfx.options import as_tuple
from rmfx.report import report
from rmfx.verified import JoinError

# The graph of an original that runs on such inputs and has joins of these names.
Traced = Callable[[nn.Module, tuple[Any, ...], Set[str]], fx.GraphModule]
_TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}


@dataclass(frozen=True)
class Equivalence:
    """What `assert_equivalent` measured.

    Attributes:
        error: the largest error of an output, max |before - after| / max |before|.
        joins: one entry for every join of the report that has a counterpart.
    """

    error: float
    joins: tuple[JoinError, ...] = ()

    @property
    def sensitivity(self) -> float:
        """The smallest sensitivity of a join; infinite where no join was compared."""
        return min((join.sensitivity for join in self.joins), default=math.inf)


def assert_equivalent(
    before: nn.Module, after: nn.Module, inputs: Any, *, tolerance: float | None = None
) -> Equivalence:
    """Demand that two networks compute the same, at their outputs and at every join.

    Outputs alone are a weak witness: dropping one whole skip of a random MobileNetV2 moves its
    logits by as little as 4e-7. So where `after` carries a report (see `rmfx.report`) the
    value of every join it lists is compared with the node that holds it now.

    Args:
        before: the original, in eval mode.
        after: what a pass made of it.
        inputs: a tensor or a tuple of tensors; neither network gets to change them.
        tolerance: the largest relative error allowed. By default that of the coarsest floating type
            among parameters, inputs and outputs: 1e-10 for float64; for float32, float16 and
            bfloat16 1e-5, 1e-2 and 8e-2, times max(1, √depth / 4) where depth counts the
            weights of two dimensions or more in `before`, since rounding adds up like a random
            walk over the layers.

    Returns:
        The errors measured, and the sensitivity of the comparison.

    Raises:
        AssertionError: the outputs differ in structure, shape, dtype, device or value, or a
            join differs; the message names each and its error. Also where `before` gives
            values that are not finite and `after` does not give the very same: such inputs are
            outside the promise.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).double().eval()
    >>> assert_equivalent(net, net, torch.randn(1, 1, 5, 5, dtype=torch.float64)).error
    0.0
    """
    return compared(before, after, as_tuple(inputs), tolerance, traced)


def compared(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[Any, ...],
    tolerance: float | None,
    source: Traced,
) -> Equivalence:
    """The same, where `source` tells the original's graph, which others may need as well."""
    rows = report_rows(after)
    with torch.no_grad():
        expected, actual = before(*cloned(inputs)), after(*cloned(inputs))
        change = structure_change(expected, actual)
        if change is not None:
            raise AssertionError(change)
        if tolerance is None:
            tolerance = default_tolerance(before, (inputs, expected))
        problems: list[str] = []
        joins = tuple(_compare_joins(before, after, inputs, rows, tolerance, problems, source))
        error = _compare_outputs(expected, actual, tolerance, problems)
    if problems:
        raise AssertionError("\n".join(["the networks differ", *problems]))
    return Equivalence(error, joins)


@torch.no_grad()
def noise_floor(before: nn.Module, after: nn.Module, inputs: Any, *, seed: int = 0) -> float:
    """How far one rounding of the inputs moves the original, where `assert_equivalent` compares.

    A pass that changes the order of sums cannot be nearer to the original than the original is to
    itself. Most networks stay far below the tolerance, but a plain chain with batch norm and
    random weights magnifies what reaches it with every layer (Yang et al., A Mean Field Theory of
    Batch Normalization, 2019): over 133 layers from 1e-16 to 1e-9. Compare its errors with this.

    Args:
        before: the original, in eval mode.
        after: what a pass made of it; its report says which joins are looked at.
        inputs: a tensor or a tuple of tensors.
        seed: of the way in which each number moves.

    Returns:
        The largest max |moved - unmoved| / max |unmoved| of an output or of a join, where every
        floating number of the inputs moves to one of its two neighbours, at random.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).double().eval()
    >>> 0 < noise_floor(net, net, torch.randn(1, 1, 5, 5, dtype=torch.float64)) < 1e-15
    True
    """
    inputs = as_tuple(inputs)
    joins = {row.join for row in report_rows(after)}
    source = traced(before, inputs, joins)
    places = joins | {source.graph.output_node().name}
    moved = moved_by_one_rounding(inputs, seed)
    values, others = (values_at(source, given, places) for given in (inputs, moved))
    pairs = zip(pytree.tree_leaves(values), pytree.tree_leaves(others), strict=True)
    changes = [
        _relative_error(a, b, "the inputs moved")
        for a, b in pairs
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    return max(changes, default=0.0)


def moved_by_one_rounding(
    inputs: tuple[Any, ...], seed: int = 0, *, times: int = 1
) -> tuple[Any, ...]:
    """Inputs of which every floating number is moved to one of its two neighbours, at random.

    Args:
        times: how much farther than to the neighbour.
    """
    generator = torch.Generator().manual_seed(seed)

    def neighbour(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        up = torch.rand(x.shape, generator=generator).to(x.device) < 0.5
        one = x.nextafter(torch.where(up, math.inf, -math.inf).to(x.dtype))
        return one if times == 1 else x + times * (one - x)

    moved: tuple[Any, ...] = pytree.tree_map(neighbour, inputs)
    return moved


def report_rows(after: nn.Module) -> list[Any]:
    """The rows of joins that have a counterpart, none where the pass left no report."""
    if not isinstance(after, fx.GraphModule) or "rmfx_report" not in after.meta:
        return []
    return [row for row in report(after).rows if row.node is not None]


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes, and whether any holds no numbers."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names
        self.values: dict[str, Any] = {}
        self.has_empty = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.has_empty |= isinstance(result, Tensor) and not result.numel()
        if n.name in self.names:
            self.values[n.name] = cloned(result)  # an in-place op may change it later
        return result


def values_at(module: fx.GraphModule, inputs: tuple[Any, ...], names: set[str]) -> dict[str, Any]:
    """The values of the named nodes."""
    recorder = Recorder(module, names)
    recorder.run(*cloned(inputs))
    return recorder.values


def cloned(values: Any) -> Any:
    """The same with copies of its tensors."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, values)


def _compare_joins(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[Any, ...],
    rows: list[Any],
    tolerance: float,
    problems: list[str],
    source: Traced,
) -> Iterator[JoinError]:
    """Compare every join with its counterpart; `problems` gets a line for each that differs."""
    if not rows or not isinstance(after, fx.GraphModule):
        return
    joins = {row.join for row in rows}
    graph = source(before, inputs, joins)
    operands = {node.name: operands_of(node) for node in graph.graph.nodes if node.name in joins}
    names = {operand.name for pairs in operands.values() for operand, _ in pairs} | joins
    values = values_at(graph, inputs, names)
    counterparts = values_at(after, inputs, {row.node for row in rows})
    for row in rows:
        where = f"join {row.join} at {row.place or 'the top level'} (node {row.node})"
        if row.node not in counterparts:
            raise AssertionError(f"{where}: the converted graph has no node of that name")
        expected, actual = values[row.join], counterparts[row.node]
        if expected.shape != actual.shape:
            shapes = f"{tuple(expected.shape)} became {tuple(actual.shape)}"
            problems.append(f"{where}: {shapes}")
            continue
        error = _relative_error(expected, actual, where)
        if not error <= tolerance:
            problems.append(f"{where}: relative error {error:.3g} exceeds {tolerance:.3g}")
        parts = [abs(scale) * largest(values[node.name]) for node, scale in operands[row.join]]
        whole = largest(expected)
        yield JoinError(row.place, error, min(parts) / whole if whole and parts else 0.0)


def traced(before: nn.Module, inputs: tuple[Any, ...], names: Set[str]) -> fx.GraphModule:
    """The traced original, which has joins of these names.

    Shapes are not needed here, so the quick trace without example inputs comes first.
    """
    for arguments in ((before,), (before, inputs)):
        try:
            source = trace(*arguments)
        except TraceError:
            if len(arguments) == 2:
                raise
            continue
        missing = ", ".join(sorted(names - {node.name for node in source.graph.nodes}))
        if not missing:
            return source
    raise AssertionError(f"the report names joins that the original does not have: {missing}")


def operands_of(join: fx.Node) -> list[tuple[fx.Node, float]]:
    """The operands of an add or sub, each with the factor that `alpha` gives it."""
    alpha = join.kwargs.get("alpha", 1)
    given = [*join.args, *(value for name, value in join.kwargs.items() if name != "alpha")]
    factors = [1.0, float(alpha) if isinstance(alpha, (int, float)) else 1.0]
    pairs = zip(given, factors, strict=False)
    return [(node, factor) for node, factor in pairs if isinstance(node, fx.Node)]


def _compare_outputs(expected: Any, actual: Any, tolerance: float, problems: list[str]) -> float:
    """The largest error of an output; `problems` gets a line for each that differs."""
    largest = 0.0
    leaves = pytree.tree_leaves(actual)
    for (path, a), b in zip(pytree.tree_leaves_with_path(expected), leaves, strict=True):
        where = f"output{pytree.keystr(path)}"
        if isinstance(a, Tensor):
            error = _relative_error(a, b, where)
        else:
            error = 0.0 if a == b else math.inf
        if not error <= tolerance:
            problems.append(f"{where}: relative error {error:.3g} exceeds {tolerance:.3g}")
        largest = max(largest, error)
    return largest


def structure_change(expected: Any, actual: Any) -> str | None:
    """What differs in containers or in a tensor's shape, dtype or device; None if nothing does."""
    a_leaves, a_structure = pytree.tree_flatten(expected)
    b_leaves, b_structure = pytree.tree_flatten(actual)
    if a_structure != b_structure:
        return f"output structure {a_structure} became {b_structure}"
    kinds = ((_kind(a), _kind(b)) for a, b in zip(a_leaves, b_leaves, strict=True))
    return next((f"an output of {a} became one of {b}" for a, b in kinds if a != b), None)


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"shape {tuple(leaf.shape)}, {leaf.dtype} on {leaf.device}"
    return type(leaf).__name__


def _relative_error(expected: Tensor, actual: Tensor, where: str) -> float:
    """Give max |a - b| / max |a|: 0 for identical values, infinite where only one side is zero.

    Integers and booleans are identical or infinitely far apart.
    """
    if torch.equal(expected.isnan(), actual.isnan()) and torch.equal(
        expected.nan_to_num(), actual.nan_to_num()
    ):
        return 0.0
    if not expected.isfinite().all():
        raise AssertionError(
            f"{where}: the original gives values that are not finite, so these inputs are "
            "outside the promise; use smaller inputs"
        )
    if not (expected.is_floating_point() or expected.is_complex()) or not actual.isfinite().all():
        return math.inf
    precise = torch.complex128 if expected.is_complex() else torch.float64
    difference = largest(expected.to(precise) - actual.to(precise))
    whole = largest(expected)
    return difference / whole if whole else math.inf


def largest(x: Tensor) -> float:
    """The largest number of a tensor of any type, by amount."""
    return float(numbers_of(x).abs().max()) if x.numel() else 0.0


def numbers_of(x: Tensor) -> Tensor:
    """The values of a tensor of any type and layout, as one with which can be computed."""
    x = x.detach()
    if x.is_quantized:
        return x.dequantize()
    if x.layout is not torch.strided:
        x = x.to_dense()
    is_real = x.is_floating_point() and x.itemsize > 1  # with bytes nothing is computed
    return x if is_real or x.is_complex() else x.double()


def default_tolerance(before: nn.Module, values: Any) -> float:
    """The tolerance of the coarsest floating type in use, with the factor for depth."""
    tensors = [*before.parameters(), *pytree.tree_leaves(values)]
    types = {x.dtype for x in tensors if isinstance(x, Tensor) and x.dtype in _TOLERANCES}
    coarsest = max((_TOLERANCES[dtype] for dtype in types), default=_TOLERANCES[torch.float64])
    if coarsest == _TOLERANCES[torch.float64]:
        return coarsest
    depth = sum(parameter.dim() > 1 for parameter in before.parameters())
    return coarsest * max(1.0, math.sqrt(depth) / 4)
