"""The guards of an exported program, Python in words, as nodes.

    L['x'].size()[0] % 2 == 0

They are read, not run: a file that was saved may hold any text.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from rmfx.errors import TraceError
from rmfx.ir.conditions import demand_that

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Not: torch.sym_not,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("max", "torch.sym_max"), torch.sym_max),
    **dict.fromkeys(("min", "torch.sym_min"), torch.sym_min),
    "float": torch.sym_float,
    "torch.sym_float": torch.sym_float,
    "math.floor": torch.sym_int,
    "math.trunc": torch.sym_int,
}
_ASSERTED = "Guard failed: "


def demand_guard(graph: fx.Graph, text: str, inputs: Mapping[str, Any]) -> None:
    """Let a graph demand what a guard says.

    Args:
        graph: the graph.
        text: the guard.
        inputs: nodes, or containers of nodes, by the names of the parameters.

    Raises:
        TraceError: the guard says something that is not known.
    """
    reader = _Reader(graph, {**inputs, "L": inputs})
    try:
        condition = reader.value(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, IndexError, TypeError) as error:
        raise TraceError(
            f"the network was exported for inputs with {text}, which is not understood ({error}); "
            "export it with other dynamic shapes"
        ) from error
    if isinstance(condition, fx.Node) and reader.read:
        message = (
            f"the network was exported for inputs with {text.strip()}; export and convert it with "
            "example inputs like these"
        )
        demand_that(graph, condition, reader.read[0], message)


class _Reader:
    """Reads an expression, and writes nodes that compute it.

    Attributes:
        read: the inputs that it reads.
    """

    def __init__(self, graph: fx.Graph, names: Mapping[str, Any]) -> None:
        self._graph, self._names = graph, names
        self.read: list[fx.Node] = []

    def value(self, part: ast.expr) -> Any:
        """A node, or a constant or container where no node is needed."""
        match part:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return self._names[name]
            case ast.Subscript(held, index):
                return self._item(self.value(held), self.value(index))
            case ast.BinOp(left, sign, right):
                return self._call(OPERATORS[type(sign)], self.value(left), self.value(right))
            case ast.UnaryOp(sign, operand):
                return self._call(OPERATORS[type(sign)], self.value(operand))
            case ast.BoolOp(sign, parts):
                both = functools.partial(self._call, OPERATORS[type(sign)])
                return functools.reduce(both, map(self.value, parts))
            case ast.Compare(left, signs, others):
                return self._comparison([left, *others], signs)
            case ast.Call(ast.Attribute(x, "size"), arguments):
                return self._size(self.value(x), *map(self.value, arguments))
            case ast.Call(function, arguments):
                return self._call(FUNCTIONS[ast.unparse(function)], *map(self.value, arguments))
        raise TypeError(f"{ast.unparse(part)} is neither a size nor a number")

    def _comparison(self, parts: list[ast.expr], signs: list[ast.cmpop]) -> Any:
        values = [self.value(part) for part in parts]
        found = [
            self._call(OPERATORS[type(sign)], a, b)
            for sign, a, b in zip(signs, values, values[1:], strict=False)
        ]
        return functools.reduce(functools.partial(self._call, operator.and_), found)

    def _size(self, x: Any, *dim: int) -> fx.Node:
        if not isinstance(x, fx.Node):
            raise TypeError("only tensors have sizes")
        self.read.append(x)
        return self._graph.call_method("size", (x, *dim))

    def _item(self, held: Any, index: Any) -> Any:
        return self._call(operator.getitem, held, index)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if not any(isinstance(a, fx.Node) for a in arguments):
            return function(*arguments)
        self.read += [a for a in arguments if isinstance(a, fx.Node) and a.op == "placeholder"]
        return self._graph.call_function(function, arguments)


class _Recorder(fx.Tracer):
    """Goes on where code asks whether something holds: the texts are wanted, not the answers."""

    def to_bool(self, obj: fx.Proxy) -> bool:
        return True


def texts_of(check: Callable[..., None], inputs: int) -> list[str]:
    """The guards that the check of an exported module asserts.

    Args:
        check: the module's function.
        inputs: how many inputs it takes.

    Raises:
        TraceError: they cannot be read off it.
    """
    recorder = _Recorder()
    recorder.graph = fx.Graph(tracer_cls=_Recorder)
    proxies = [recorder.create_proxy("placeholder", f"x{i}", (), {}) for i in range(inputs)]
    try:
        check(*proxies)
    # It is code that torch wrote for tensors, which may do anything with proxies.
    except Exception as error:
        raise TraceError(
            f"the guards of this exported module cannot be read ({error}); pass the "
            "ExportedProgram itself"
        ) from error
    asserted = recorder.graph.find_nodes(op="call_function", target=torch._assert)
    return [str(node.args[1]).removeprefix(_ASSERTED) for node in asserted]
