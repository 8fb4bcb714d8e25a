"""Models that symbolic tracing cannot trace, by `torch.export`, with the open sizes they allow.

A batch is open, and so are sizes of space and lengths of sequences where the sizes that follow from
them are sums of numbers and of parts, rounded down: what convolutions and pools make of them. Code
that computes with sizes in another way (a padding that depends on the image) would let expressions
grow with every layer, over minutes; there they are those of the example.

What tracing takes apart is no condition of the network: torch.export looks at a batch of one as at
another case than a batch of more. So a batch of one is exported as one of two, and where a
condition excludes a batch of one, the program for such a batch is made as well: if it calls the
same operators with the same numbers, the condition goes. In the same way, code that asks in which
order values lie in memory, which a program does not, is exported for several orders.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from rmfx.errors import TraceError
from rmfx.files.source_lines import at_line, described
from rmfx.ir.notes import OWN_GRADIENT, VAL
from rmfx.ir.threads import alone_exporting, without_warnings
from rmfx.options import Inputs

from .checks import BY_VALUES
from .draws import no_draws
from .exported import guards_of, unlifted
from .kept_state import unchanged
from .symbolic import own_gradients

aten = torch.ops.aten
OF_MEMORY = ("is_contiguous", "stride", "storage_offset", "dim_order", "data_ptr")
COPIES = (aten.clone.default, aten.contiguous.default)
LARGEST = 40  # operations in the expression of a size
OF_BATCH = ".size()[0]"
NO_BATCH_OF_ONE = re.compile(r"[^<>=!]*\.size\(\)\[0\] (>= 2|!= 1|> 1)")
SAME_BATCH = re.compile(r"[^<>=! ]*\.size\(\)\[0\] == [^<>=! ]*\.size\(\)\[0\]")


def export_model(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The model's graph by `torch.export`, with open sizes where its code allows it.

    Raises:
        KeepsStateError: the model draws random numbers that are not torch's.
        TraceError: the model cannot be exported.
    """
    functions: list[str] = []
    with (
        alone_exporting(),
        own_gradients(functions),
        no_draws(lambda: _export(model, inputs, None)),
        _Questions() as asked,
    ):
        gm = _opened(model, inputs)
        if asked.where is not None:
            _check_orders(model, inputs, asked.where)
    if functions:
        gm.meta[OWN_GRADIENT] = functions[0]
    return gm


def _opened(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The first graph that can be made, of those from many open sizes to none."""
    batches = [_of_batch(inputs, 2), inputs] if _is_batch_of_one(inputs) else [inputs]
    for every, given in itertools.product((True, False), batches):
        found = _attempt(model, given, every=every, needs_one=given is not inputs)
        if found is not None:
            return found
    return unlifted(_export(model, inputs, None))


def _attempt(
    model: nn.Module, inputs: Inputs, *, every: bool, needs_one: bool
) -> fx.GraphModule | None:
    """The graph with some open sizes; None if there is none, or none that takes a batch of one."""
    try:
        program = _export(model, inputs, _open_dims(model, inputs, every=every))
        dropped = _needless(model, inputs, program, every=every)
        takes = not needs_one or _takes_one(program, dropped)
        return unlifted(program, dropped) if takes else None
    except TraceError:
        return None


def _export(model: nn.Module, inputs: Inputs, shapes: Any) -> ExportedProgram:
    try:
        # Else a batch of one would be taken for a constant.
        with (
            symbolic_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
            unchanged(model, values=True),
            torch.no_grad(),  # as at inference, for code that asks
            without_warnings(),  # about what `unchanged` takes care of
            _PlainSizes(),
        ):
            return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    # Exporting runs the model's own code, which may raise anything.
    except Exception as error:
        if "fake tensor in the exported program constant" in str(error):
            raise TraceError(
                "it reads `.data`, whose values a program cannot follow; write `.detach()` there"
            ) from error
        if isinstance(error, BY_VALUES):
            raise TraceError(
                f"its code computes sizes, or decides, by values{at_line(error)}"
            ) from error
        raise TraceError(described(error)) from error


class _PlainSizes(TorchFunctionMode):
    """Ends an export in which a size is more than sums and parts, rounded down."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not all(map(_is_plain, found.shape)):
            raise TraceError(f"a size is computed in another way than layers do: {found.shape}")
        return found


def _is_plain(size: int | torch.SymInt) -> bool:
    if isinstance(size, int):
        return True
    expression = size.node.expr
    parts = list(_parts(expression))
    plain = all(p.is_Add or p.is_Mul or p.is_Atom or isinstance(p, FloorDiv) for p in parts)
    return plain and len(parts) <= LARGEST


def _parts(expression: Any) -> Iterator[Any]:
    yield expression
    for part in expression.args:
        yield from _parts(part)


# ---- orders in memory --------------------------------------------------------------------------
class _Questions(TorchFunctionMode):
    """Takes note that the model's own code asks in which order a value lies in memory.

    Attributes:
        where: what it asks, if it does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.where: str | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in OF_MEMORY and not _is_of_torch(sys._getframe(1)):
            self.where = self.where or name
        return func(*args, **(kwargs or {}))


def _is_of_torch(frame: types.FrameType | None) -> bool:
    """Whether torch's own code calls, which decides by it how to compute, not what."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "torch"


def _check_orders(model: nn.Module, inputs: Inputs, question: str) -> None:
    """Raise TraceError if other operators run where values lie in memory in another order."""
    calls = []
    for given in (inputs, *_reordered(inputs)):
        program = _export(model, given, None)
        calls.append(_Calls(program, copies=_writes(program)).found)
    if any(other != calls[0] for other in calls):
        raise TraceError(
            f"its code decides by the order of a value in memory ({question}), which a graph does "
            "not keep; compute the same in every order"
        )


@torch.no_grad()
def _reordered(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with each dimension as the innermost one in memory, then with gaps."""

    def innermost(x: Tensor, dim: int) -> Tensor:
        return x if x.dim() <= dim else x.movedim(dim, -1).contiguous().movedim(-1, dim)

    for dim in range(max((x.dim() for x in _tensors(inputs)), default=0)):
        yield pytree.tree_map_only(Tensor, functools.partial(innermost, dim=dim), inputs)
    yield pytree.tree_map_only(
        Tensor, lambda x: x.repeat_interleave(2, -1)[..., 1::2] if x.dim() else x, inputs
    )


def _writes(program: ExportedProgram) -> bool:
    """Whether an operator writes, so that it matters what a copy of a value is read by."""
    called = (n.target for n in program.graph.nodes if n.op == "call_function")
    return any(isinstance(op, OpOverload) and op._schema.is_mutable for op in called)


# ---- open sizes ---------------------------------------------------------------------------------
def _open_dims(model: nn.Module, inputs: Inputs, *, every: bool, batch: bool = True) -> Any:
    """The dimensions of tensors that may have other sizes than they have, by forward's arguments.

    Args:
        model: whose forward takes them.
        inputs: the example.
        every: whether all may of which there is more than 1.
        batch: whether the first may.
    """

    def dims(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        first = {0} if batch and x.dim() > (0 if every else 1) else set()
        others = {d for d, n in enumerate(x.shape) if d and n > 1} if every else set()
        return dict.fromkeys(sorted(first | others), Dim.AUTO)

    # As torch.export sees them, for which the rest of a forward(x, *rest) is one argument.
    given = inspect.signature(model.forward).bind(*inputs).arguments
    return pytree.tree_map(dims, dict(given))


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]


def _is_batch_of_one(inputs: Inputs) -> bool:
    tensors = _tensors(inputs)
    return bool(tensors) and all(x.dim() > 1 and x.shape[0] == 1 for x in tensors)


@torch.no_grad()
def _of_batch(inputs: Inputs, count: int) -> Inputs:
    """The inputs with the first thing of their batch so many times."""
    found: Inputs = pytree.tree_map_only(Tensor, lambda x: torch.cat([x[:1]] * count), inputs)
    return found


# ---- a batch of one -----------------------------------------------------------------------------
def _needless(
    model: nn.Module, inputs: Inputs, program: ExportedProgram, *, every: bool
) -> list[str]:
    """Conditions that exclude a batch of one, for which the program is the same all the same."""
    found = [text for text in guards_of(program) if NO_BATCH_OF_ONE.fullmatch(text.strip())]
    if not found or not all(x.dim() for x in _tensors(inputs)):
        return []
    one = _of_batch(inputs, 1)
    try:
        other = _export(model, one, _open_dims(model, one, every=every, batch=False))
    except TraceError:
        return []
    return found if _Calls(program).found == _Calls(other).found else []


def _takes_one(program: ExportedProgram, dropped: list[str]) -> bool:
    """Whether a program that was exported for a batch of two says nothing against one of one."""
    guards = [text for text in guards_of(program) if text not in dropped]
    sizes = _batch_sizes(program)
    ranges = {str(symbol): limits for symbol, limits in program.range_constraints.items()}
    limits = [ranges[str(n)] for n in sizes if str(n) in ranges]
    return (
        all(isinstance(n, torch.SymInt) for n in sizes)
        and all(OF_BATCH not in text or SAME_BATCH.fullmatch(text.strip()) for text in guards)
        and all(one.lower <= 2 < one.upper for one in limits)  # 2 is what torch says for any
    )


def _batch_sizes(program: ExportedProgram) -> list[int | torch.SymInt]:
    names = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.find_nodes(op="placeholder") if n.name in names]
    values = [n.meta.get(VAL) for n in nodes]
    return [x.shape[0] for x in values if isinstance(x, Tensor) and x.dim()]


class _Calls:
    """What a program calls, with numbers as they are for a batch of one, and its constants.

    Args:
        program: what was exported.
        copies: whether copies count.

    Attributes:
        found: a text for each call that gives tensors, one of its own where that is not known.
    """

    def __init__(self, program: ExportedProgram, *, copies: bool = True) -> None:
        self._copies = () if copies else COPIES
        sizes = [n for n in _batch_sizes(program) if isinstance(n, torch.SymInt)]
        self._one = {n.node.expr: 1 for n in sizes}
        self._places: dict[fx.Node, int] = {}
        self._number = 0
        self._constants = _constants_of(program)
        self.found = [self._text(node) for node in program.graph.nodes if self._counts(node)]

    def _counts(self, node: fx.Node) -> bool:
        """Whether a node is no number, nor a check of one, nor all that another one is."""
        if node.op != "call_function":
            return True
        whole = node.target is aten.slice.Tensor and node.args[2:] == (0, sys.maxsize)
        if whole or node.target in self._copies:
            self._places[node] = self._places[node.args[0]]  # type: ignore[index]
            return False
        leaves = pytree.tree_leaves(node.meta.get(VAL))
        return isinstance(node.target, HigherOrderOperator) or any(
            isinstance(x, Tensor) for x in leaves
        )

    def _text(self, node: fx.Node) -> str:
        self._places[node] = self._number = self._number + 1
        if isinstance(node.target, HigherOrderOperator):
            return f"{id(node)}"  # which may hold any graph
        if node.op == "placeholder":
            return f"{node.target} {self._constants.get(node.name)}"
        given = fx.map_arg((node.args, node.kwargs), self._shown)
        return f"{node.op} {node.target} {given}"

    def _shown(self, node: fx.Node) -> Any:
        if node in self._places:
            return _Text(f"%{self._places[node]}")
        value = node.meta.get(VAL)
        if isinstance(value, torch.SymInt):
            return _Text(str(value.node.expr.xreplace(self._one)))
        return _Text(str(value))


def _constants_of(program: ExportedProgram) -> dict[str, str]:
    """What the constants hold that the code makes, in one text each, by their placeholders."""
    names = program.graph_signature.inputs_to_lifted_tensor_constants
    found = {name: program.constants[path] for name, path in names.items()}
    return {name: f"{x.dtype} {x.tolist()}" for name, x in found.items()}


class _Text(str):
    """Text that is shown as it is."""

    __slots__ = ()
    __repr__ = str.__str__
