"""What operators do with tensors as they run: which they write to, whether they draw at random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmfx.errors import TraceError

from .memory import storage_of
from .schemas import draws

LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)  # by torch.tensor


class Watch(TorchDispatchMode):
    """Stops a computation of constants before it draws at random or writes to one of them."""

    def __init__(self, kept: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = (t for t in pytree.tree_leaves(list(kept)) if isinstance(t, Tensor))
        self._kept = set(map(storage_of, tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        schema = func._schema
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        if "empty" not in func._opname and draws(func, given):
            raise RuntimeError(f"{func} draws at random")
        if any(storage_of(tensor) in self._kept for tensor in written_by(func, args, kwargs)):
            raise RuntimeError(f"{func} writes to a constant")
        return func(*args, **(kwargs or {}))


class Outside(TorchDispatchMode):
    """Sees what is computed with tensors while proxies are traced, which becomes a constant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        named = (*model.named_parameters(), *model.named_buffers())
        self._own = {id(tensor): name for name, tensor in named}
        real = (tensor for _, tensor in named if isinstance(tensor, Tensor))  # no proxy of a buffer
        self._parameters = {storage_of(tensor) for tensor in real if not is_lazy(tensor)}
        self.baked: str | None = None
        self._made: dict[int, Tensor] = {}  # by their memory, which is theirs while they live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        has_values = not given or not all(tensor.is_meta for tensor in given)
        if has_values and torch.Tag.nondeterministic_seeded in func.tags:
            raise TraceError(f"it draws random numbers ({func}), of which a trace makes a constant")
        for tensor in given:
            if id(tensor) in self._own:
                name = self._own[id(tensor)]
                raise TraceError(f"it computes with {name} itself ({func}), not with a proxy of it")
        if not all(storage_of(tensor) in self._made for tensor in written_by(func, args, kwargs)):
            raise TraceError(f"it writes to a tensor that it keeps ({func}), which leaves no trace")
        # A parameter in a list is none of the model's; a view is but another name.
        own = [t for t in given if t.requires_grad or storage_of(t) in self._parameters]
        self._parameters.update(map(storage_of, own))
        if own and not func.is_view:
            self.baked = self.baked or str(func)
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        kept = set() if func in LIFTS else {storage_of(tensor) for tensor in given}
        self._made.update((storage_of(t), t) for t in made if storage_of(t) not in kept)
        return result


def written_by(func: Any, args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    """The tensors among an operator's arguments that its schema says it writes to."""
    declared = func._schema.arguments
    named = dict(zip((argument.name for argument in declared), args, strict=False))
    named.update(kwargs or {})
    writes = (a.name for a in declared if a.alias_info is not None and a.alias_info.is_write)
    leaves = pytree.tree_leaves([named.get(name) for name in writes])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
