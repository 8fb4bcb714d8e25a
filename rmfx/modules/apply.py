"""A function of one value as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Apply(nn.Module):
    """A function of one tensor with constant options, as a module.

    Args:
        function: a function, or the name of a tensor method.
        args, kwargs: its arguments; the tensor goes where `args` holds `Apply.INPUT`.
    """

    INPUT = "<input>"

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, x: Tensor) -> Any:
        args = [x if isinstance(a, str) and a == self.INPUT else a for a in self.args]
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **self.kwargs)
        return self.function(*args, **self.kwargs)

    def extra_repr(self) -> str:
        name = getattr(self.function, "__name__", self.function)
        return ", ".join([str(name), *map(repr, self.args), *map(str, self.kwargs.items())])
