"""What a call is, by what it dispatches to.

One operator goes by many names: `torch.arctan`, `x.arctan()` and `torch.special`'s are `aten.atan`.
A call that no table knows runs on tensors without values, of several sizes, and what arrives at
PyTorch's dispatcher is written down. What holds for each of these runs is taken to hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmfx.ir.callees import Calls
from rmfx.ir.facts import Inference
from rmfx.ir.functions import WRITING, is_torchs
from rmfx.ir.kinds import overloads
from rmfx.ir.nodes import attribute, run_node
from rmfx.ir.notes import gives_container, gives_number, shape_of, type_of, why_frozen
from rmfx.ir.open_sizes import coprime_sizes
from rmfx.ir.own_types import OwnTypes
from rmfx.ir.threads import FAKES, without_logs, without_warnings

ABOVE = (10, 28)  # sizes of a value are primes above one number, then above the other
RANKS = (2, 3, 4)
MOST_DIMS = 6
OTHER_TYPES = (torch.float16, torch.float32, torch.float64, torch.complex64, torch.uint8)
QUESTIONS = ("prim",)  # operators that ask a tensor about itself
Shape = tuple[int, ...]
Known = Callable[[OpOverload], Any]
Call = tuple[OpOverload, Any, Any]  # with its arguments by place and by name


@dataclass(frozen=True)
class Step:
    """An operator that ran: its arguments and its result, tensors as they were."""

    operator: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def tensors(self) -> list[Tensor]:
        """Those that it reads."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def made(self) -> list[Tensor]:
        """Those that it gives."""
        return [leaf for leaf in pytree.tree_leaves(self.result) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Writes down the operators that run; those that are not known run as what they are made of.

    Args:
        known: whether an operator is to be written down as it is.
    """

    def __init__(self, known: Known) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self.steps: list[Step] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        made_of = None if self._known(func) else decomposition_table.get(func)
        if made_of is not None:
            with self:
                return made_of(*args, **given)
        result = func(*args, **given)
        if func.namespace not in QUESTIONS:
            self.steps.append(Step(func, args, given, result))
        return result


def is_open(node: fx.Node) -> bool:
    """Whether a node calls torch, which may be asked what it does."""
    if why_frozen(node) or any(gives_container(n) for n in node.all_input_nodes):
        return False
    if node.op != "call_function":
        return node.op == "call_method"
    name = str(getattr(node.target, "__name__", ""))
    is_symbol = getattr(node.target, "__module__", None) == "_operator" and name not in WRITING
    return is_symbol or is_torchs(node.target)


def families(nodes: Sequence[fx.Node], facts: Inference) -> Iterator[list[list[Shape]]]:
    """Families of shapes that values may have together, of which all but some sizes differ.

    In the first nothing is common to all; in the others the channels, in dimension 1 or the last.
    """
    shapes = [shape_of(n) for n in nodes]
    if len(nodes) == 1 and facts.rank(nodes[0]) is None:
        yield [[tuple(islice(coprime_sizes(n), rank))] for rank in RANKS for n in ABOVE]
        return
    if len(nodes) > 1 and not all(shape is not None and None not in shape for shape in shapes):
        return
    given = [
        shape or (None,) * (facts.rank(n) or 0) for n, shape in zip(nodes, shapes, strict=True)
    ]
    if any(len(shape) > MOST_DIMS for shape in given):
        return
    for kept in (None, 1, -1):
        yield [_others(given, kept, coprime_sizes(above)) for above in ABOVE]


def _others(given: Sequence[Any], kept: int | None, fresh: Iterator[int]) -> list[Shape]:
    """Shapes in which all sizes but those of a dimension are others, equal ones the same again."""
    known: dict[int, int] = {} if len(given) == 1 else {1: 1}
    found = []
    for shape in given:
        made = []
        for dim, size in enumerate(shape):
            is_kept = size is not None and kept is not None and dim == kept % len(shape)
            other = size if is_kept else known.get(size) or next(fresh)
            made.append(other)
            if size is not None and not is_kept:
                known[size] = other
        found.append(tuple(made))
    return found


def types_for(node: fx.Node) -> tuple[torch.dtype, ...]:
    """The type of a value, or two that it may have."""
    kind = type_of(node)
    return (torch.float32, torch.float64) if kind is None else (kind[0],)


class Probes:
    """Values without numbers for the nodes that a call reads.

    Args:
        gm: the graph.
        facts: what is known of its values.
    """

    def __init__(self, gm: fx.GraphModule, facts: Inference) -> None:
        self._gm, self._facts = gm, facts
        self._ran: dict[tuple[fx.Node, Any], list[Run]] = {}  # of calls as they are
        self._has_own_type = OwnTypes(Calls(gm))

    @cached_property
    def _mode(self) -> FakeTensorMode:
        """Made when something is asked: it loads the settings of torch's compiler."""
        return FakeTensorMode(allow_non_fake_inputs=True)

    def of(
        self, node: fx.Node, types: Callable[[fx.Node], Sequence[torch.dtype]] = types_for
    ) -> Iterator[Iterator[dict[fx.Node, Any]]]:
        """Families of values of the nodes that a call reads, and its constants with each.

        They are made when they are asked for, since most calls fail on the first of a family.
        """
        data = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if not data or any(gives_number(n) for n in data):
            return
        constants = {n: attribute(self._gm, n) for n in node.all_input_nodes if n.op == "get_attr"}
        kinds = list(zip(*map(types, data), strict=False))
        for family in families(data, self._facts):
            yield (
                {**dict(zip(data, map(self.empty, shapes, some), strict=True)), **constants}
                for shapes in family
                for some in kinds
            )

    def empty(self, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        """A value that has a shape and a type, and nothing else."""
        with self._mode:
            return torch.empty(shape, dtype=kind)

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any], known: Known) -> Ran | None:
        return self.run(known, partial(run_node, node, values, self._gm.get_submodule))

    def run(self, known: Known, call: Callable[[], Any]) -> Ran | None:
        """The operators of a call and what it gives, None where it does not run."""
        recorder = Recorder(known)
        try:
            with self._mode, torch.no_grad(), recorder, without_warnings(), without_logs(FAKES):
                result = call()
        # What does not run on tensors without values, or of these sizes, stays as it is.
        except Exception:  # noqa: BLE001  (operators raise whatever they like)
            return None
        return recorder.steps, result

    def _runs(self, node: fx.Node, known: Known) -> list[Run]:
        """The operators, result and values of the first family at all of which a call runs."""
        for family in self.of(node):
            found: list[Run] = []
            for values in family:
                ran = self._run(node, values, known)
                if ran is None:
                    break
                found.append((*ran, values))
            else:
                return found
        return []

    def _in_other_forms(self, node: fx.Node) -> bool:
        """Whether a call hands on, too, what other inputs would give it.

        These are values of other types, and conjugates and negatives that torch has yet to compute.
        """

        def is_fixed(n: fx.Node) -> bool:
            return self._has_own_type(n) and (n.op == "get_attr" or type_of(n) is not None)

        for kind in (None,) if all(map(is_fixed, node.all_input_nodes)) else (None, *OTHER_TYPES):

            def types(n: fx.Node, kind: torch.dtype | None = kind) -> Sequence[torch.dtype]:
                return types_for(n)[:1] if kind is None or is_fixed(n) else (kind,)

            for values in itertools.chain.from_iterable(self.of(node, types)):
                for given in (values, self._marked(values)):
                    ran = self._run(node, given, bool)
                    if ran is not None and ran[0]:
                        return False
        return True

    def _marked(self, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Values that only bits tell from their conjugates, or their negatives."""

        def marked(x: Tensor) -> Tensor:
            return x.conj() if x.is_complex() else torch._neg_view(x)

        with self._mode:
            return {n: x if n.op == "get_attr" else marked(x) for n, x in values.items()}

    def meaning(self, node: fx.Node, known: Known) -> Call | fx.Node | None:
        """The one operator that a call amounts to, or the value that it gives as it is, if any.

        What acts on each value alone and is not known is what it is made of, if that is one.
        """
        call = node, node.target
        if call not in self._ran:
            self._ran[call] = self._runs(node, bool)
        runs = self._ran[call]
        if runs and not any(steps for steps, *_ in runs):
            source = _handed_on(runs)
            return source if source is None or self._in_other_forms(node) else None
        found = _agreed(runs)
        if found is None or known(found[0]) or not is_pointwise(found[0]):
            return found
        return _agreed(self._runs(node, known))


Ran = tuple[list[Step], Any]  # operators, and the result
Run = tuple[list[Step], Any, dict[fx.Node, Any]]  # the same, and what was given


def _handed_on(runs: Sequence[Run]) -> fx.Node | None:
    """The value that is the result of every run."""
    sources = {
        next((n for n, value in values.items() if value is result), None)
        for _, result, values in runs
    }
    return sources.pop() if len(sources) == 1 else None


def _agreed(runs: Sequence[Run]) -> Call | None:
    """The one operator that all runs consist of."""
    found = [_only_step(*run) for run in runs]
    return found[0] if found and all(one == found[0] for one in found) else None


def _only_step(steps: Sequence[Step], result: Any, values: Mapping[fx.Node, Any]) -> Call | None:
    """The one operator that has run, reading nodes; None if there are others or other tensors."""
    if len(steps) != 1 or steps[0].result is not result or steps[0].operator._schema.is_mutable:
        return None
    names = {id(value): node for node, value in values.items()}
    if any(id(tensor) not in names for tensor in steps[0].tensors):
        return None
    given = (steps[0].args, steps[0].kwargs)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: names[id(t)], given)
    return steps[0].operator, args, kwargs


def is_pointwise(op: OpOverload) -> bool:
    """Whether an operator computes each value from those at its place alone."""
    if torch.Tag.nondeterministic_seeded in op.tags:
        return False
    return torch.Tag.pointwise in op.tags or op in UNTAGGED or op._schema.name in QUANTISING


# Of each value alone, though torch does not tag them so.
UNTAGGED = frozenset(
    overloads(
        *("_to_copy", "alias", "detach", "lift_fresh", "lift_fresh_copy", "scalar_tensor"),
        *("zeros_like", "ones_like", "full_like", "fake_quantize_per_tensor_affine_cachemask"),
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        *("quantize_per_tensor", "quantize_per_tensor.tensor_qparams", "dequantize.self"),
    )
)
QUANTISING = (
    "quantized_decomposed::quantize_per_tensor",
    "quantized_decomposed::dequantize_per_tensor",
)
