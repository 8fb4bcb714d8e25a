"""What `rmfx models` lists: the networks that come with rmfx, and what they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rmfx import models
from rmfx.ir.functions import is_in_place
from rmfx.table import Column, table

_FREE = ("N", "H", "W")


@dataclass(frozen=True)
class OwnModel:
    """A network that the command can be given by its name alone.

    Attributes:
        name: as other commands take it.
        channels: of the images that it takes.
        what: it is.
    """

    name: str
    channels: int
    what: str

    @property
    def shape(self) -> str:
        """Of its input, with letters for the sizes that are free."""
        batch, height, width = _FREE
        return f"{batch},{self.channels},{height},{width}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self) | {"input_shape": self.shape}


def own_models() -> list[OwnModel]:
    """All networks of `rmfx.models` that can be made without arguments, by name."""
    makers = {name: getattr(models, name) for name in models.__all__}
    return [
        OwnModel(f"{models.__name__}:{name}", _channels(make), _first_line(make))
        for name, make in makers.items()
        if not _needs_arguments(make)
    ]


def listed(rows: list[OwnModel]) -> str:
    """The networks as a table, with what the letters in it mean."""
    columns = (
        *(Column("MODEL", "name"), Column("--input-shape", "shape")),
        Column("what it is", "what"),
    )
    example = rows[0].shape
    for letter, size in zip(_FREE, ("1", "64", "64"), strict=True):
        example = example.replace(letter, size)
    free = f"{', '.join(_FREE[:-1])} and {_FREE[-1]}"
    return f"{table(rows, columns)}\n\n{free} are free, such as --input-shape {example}."


def _needs_arguments(make: Callable[..., nn.Module]) -> bool:
    parameters = inspect.signature(make).parameters.values()
    return any(p.default is p.empty for p in parameters)


def _channels(make: Callable[[], nn.Module]) -> int:
    """How many channels the images have, by the network's first layer."""
    with torch.device("meta"), _WithoutNumbers():
        weight = next(make().parameters())
    return weight.shape[1]


class _WithoutNumbers(TorchFunctionMode):
    """Leaves out what fills weights, for which torch would load its compiler on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if is_in_place(getattr(func, "__name__", "")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _first_line(make: Callable[..., nn.Module]) -> str:
    return (inspect.getdoc(make) or "").partition("\n")[0]
