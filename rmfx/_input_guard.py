"""The check of a converted network's inputs: what it was made for, and nothing else.

A graph may hold for some inputs only: `torch.export` fixes sizes and numbers, and every rewrite
relies on the number of dimensions. An `InputGuard` is a forward pre-hook that raises instead of
letting other inputs give wrong numbers. It is no node, so a plain graph stays plain.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

from ._errors import ShapeError

Size = int | str | None


@dataclass(frozen=True)
class Expected:
    """What one input must be like.

    Attributes:
        name: of the input, for messages.
        sizes: of a tensor: a number, the name of a size that may vary, or None for any; None if the
            input need not be a tensor.
        constant: the only value allowed, in a tuple; None if any will do.
    """

    name: str
    sizes: tuple[Size, ...] | None = None
    constant: tuple[object] | None = None


@dataclass(frozen=True)
class SizeCondition:
    """⌊(size + growth)/stride⌋ must be a multiple of a number.

    Attributes:
        position, dim: which input it is, and which of its sizes.
        stride, growth, multiple: the numbers above.
        cause: the layer that demands it.
    """

    position: int
    dim: int
    stride: int
    growth: int
    multiple: int
    cause: str

    def check(self, name: str, value: Any) -> None:
        """Raise ShapeError for an input of another size."""
        if isinstance(value, Tensor) and self._size(value) % self.multiple:
            raise ShapeError(
                f"{name} has shape {tuple(value.shape)}: at size {value.shape[self.dim]} "
                f"{self.cause} averages fewer values at the border, which a convolution cannot do; "
                "use another size, or convert the network again with example inputs of this one"
            )

    def _size(self, value: Tensor) -> int:
        return (value.shape[self.dim] + self.growth) // self.stride


@dataclass(frozen=True)
class InputGuard:
    """A forward pre-hook that raises ShapeError for inputs the graph does not hold for.

    Attributes:
        expected: one entry for each placeholder.
        parameters: of the module's forward; one that starts with a star takes all that is left.
        flatten: whether placeholders are the leaves of the arguments instead of the arguments.
        ranges: lowest and highest value of each size that has a name.
        conditions: expressions of `torch.export` over `L`, the arguments by parameter.
        multiples: sizes that must make some inner size a multiple.
        guards: torch's own check of the placeholders' values, which is lost when pickled.
    """

    expected: tuple[Expected, ...]
    parameters: tuple[str, ...]
    flatten: bool = False
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    multiples: tuple[SizeCondition, ...] = ()
    guards: nn.Module | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # torch makes `guards` of code that cannot be pickled.
        named = (self.expected, self.parameters, self.flatten, self.ranges)
        return InputGuard, (*named, self.conditions, self.multiples)

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGuard:
        return self  # it does not change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self._bind(args, kwargs)
        values = list(bound.values())
        values = pytree.tree_leaves(values) if self.flatten else values
        sizes: dict[str, int] = {}
        for want, value in zip(self.expected, values, strict=False):
            self._check(want, value, sizes)
        for condition in self.multiples:
            if condition.position < len(values):
                condition.check(self.expected[condition.position].name, values[condition.position])
        if self.guards is not None:
            self._run_guards(values)
        if self.conditions:
            self._check_conditions(bound)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by parameter, None for those not given."""
        bound: dict[str, Any] = {}
        takes = len(self.parameters)
        if len(args) > takes and not any(name.startswith("*") for name in self.parameters):
            raise ShapeError(
                f"{len(args)} inputs are given, but the network was converted for {takes}; convert "
                "it again with example inputs like these"
            )
        for i, name in enumerate(self.parameters):
            if name.startswith("**"):
                bound[name[2:]] = {k: v for k, v in kwargs.items() if k not in bound}
            elif name.startswith("*"):
                bound[name[1:]] = args[i:]
            else:
                bound[name] = args[i] if i < len(args) else kwargs.get(name)
        return bound

    def _check(self, want: Expected, value: Any, sizes: dict[str, int]) -> None:
        if want.constant is not None and not _same(value, want.constant[0]):
            raise ShapeError(
                f"{want.name} is {_text(value)}, but the network was exported for "
                f"{want.constant[0]!r}; convert it again with example inputs of that value"
            )
        if want.sizes is not None and value is None:
            raise ShapeError(
                f"{want.name} is not given, but the network was converted for a tensor; convert it "
                "again with example inputs like these"
            )
        # Proxies pass: whoever traces the network checks its inputs when it runs.
        if want.sizes is None or not isinstance(value, Tensor):
            return
        if value.dim() != len(want.sizes):
            raise ShapeError(
                f"{want.name} has {value.dim()} dimensions {tuple(value.shape)}, but the network "
                f"was converted for {len(want.sizes)}; add or remove a batch dimension, or convert "
                "it with example inputs like these"
            )
        for have, size in zip(value.shape, want.sizes, strict=True):
            if size is None:
                continue
            low, high = self.ranges.get(str(size), (0, math.inf))
            known = size if isinstance(size, int) else sizes.setdefault(size, have)
            if have != known or have < low or (high < math.inf and have > high):
                raise ShapeError(
                    f"{want.name} has shape {tuple(value.shape)}, but the network was exported for "
                    f"{self._describe(want.sizes)}; convert it again with example inputs of that "
                    "shape"
                )

    def _describe(self, sizes: Sequence[Size]) -> str:
        often = [n for n in sizes if sizes.count(n) > 1]
        fixed = [n for n in sizes if isinstance(n, int) or n in self.ranges or n in often]
        text = ", ".join(str(n) if n is not None and n in fixed else "any" for n in sizes)
        limits = [
            f"{low} <= {name} <= {high}" if high < math.inf else f"{name} >= {low}"
            for name, (low, high) in self.ranges.items()
            if name in sizes
        ]
        return f"({text})" + (f" with {', '.join(limits)}" if limits else "")

    def _run_guards(self, values: list[Any]) -> None:
        try:
            self.guards(*values)  # type: ignore[misc]
        except AssertionError as error:
            raise ShapeError(
                f"the inputs are not those the network was exported for: {error}"
            ) from error

    def _check_conditions(self, bound: Mapping[str, Any]) -> None:
        scope = {**SYMPY_INTERP, "math": math, "torch": torch, "inf": math.inf, "L": bound}
        for condition in self.conditions:
            # The exported program's own code, which torch.export runs in the same way.
            if not eval(condition, scope):  # noqa: S307
                raise ShapeError(
                    f"the inputs do not fulfil {condition}, for which the network was exported; "
                    "export and convert it with example inputs like these"
                )


def _text(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _same(value: object, constant: object) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if type(value) is not type(constant):
        return False
    return value == constant or (value != value and constant != constant)


def guard_of(module: nn.Module) -> InputGuard | None:
    """The guard that a module carries, if any."""
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, InputGuard)), None)


def set_guard(module: nn.Module, guard: InputGuard | None) -> None:
    """Let a module carry a guard, in place of the one it has."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, InputGuard):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    if guard is not None and any(e != Expected(e.name) for e in guard.expected):
        module.register_forward_pre_hook(guard, with_kwargs=True)


def parameters_of(module: fx.GraphModule) -> tuple[str, ...]:
    """The parameters of a graph's forward, with their stars."""
    return tuple(
        str(p.replace(annotation=p.empty, default=p.empty))
        for p in inspect.signature(module.forward).parameters.values()
    )


def with_ranks(
    guard: InputGuard | None, module: fx.GraphModule, ranks: Mapping[str, int | None]
) -> InputGuard:
    """A guard that also demands numbers of dimensions, by placeholder."""
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    if guard is None:
        guard = InputGuard(tuple(map(Expected, names)), parameters_of(module))
    expected = tuple(
        e if e.sizes is not None or ranks.get(name) is None else _of_rank(e, ranks[name])
        for e, name in zip(guard.expected, names, strict=True)
    )
    return replace(guard, expected=expected)


def with_multiples(guard: InputGuard, conditions: Iterable[SizeCondition]) -> InputGuard:
    """A guard that also demands that sizes be right."""
    return replace(guard, multiples=tuple(dict.fromkeys((*guard.multiples, *conditions))))


def _of_rank(expected: Expected, rank: int | None) -> Expected:
    return replace(expected, sizes=(None,) * (rank or 0))
