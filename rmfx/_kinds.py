"""What a leaf module computes is told by its class, and a subclass is not its base class.

A subclass counts as the layer that it derives from where nothing of what runs is its own: it may
say how it is made and how it is shown, and no more.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

# Libraries whose layers do what their documentation says, to nothing but their input.
KNOWN = ("torch.nn.modules.", "torch.nn.parallel.data_parallel", "torchvision.ops.", "rmfx.")
# What a class may have of its own and still compute what its base class computes.
HARMLESS = frozenset(
    ("__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__constants__")
    + ("__repr__", "extra_repr", "__parameters__", "__orig_bases__", "__slots__", "__dict__")
    + ("__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__")
    + ("__annotations_cache__", "__weakref__", "__abstractmethods__", "_abc_impl")
)
# What a kind of tensor may have of its own, too: how it is made and how it is kept.
OF_KEEPING = frozenset(("__new__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__setstate__"))


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The known class whose forward a module runs, None if it runs code of its own."""
    kind: type[Any] = type(module)
    if kind.__module__ == parametrize.__name__:  # a class that torch makes for one module
        kind = kind.__mro__[1]
    found = _known_base(kind)  # type: ignore[arg-type]
    own = vars(module).keys() - HARMLESS
    return None if any(callable(getattr(found, name, None)) for name in own) else found


def is_a(module: object, kinds: type[Any] | tuple[type[Any], ...]) -> bool:
    """Whether a module is a layer of a kind, as `isinstance`, but for code of its own."""
    kind = kind_of(module) if isinstance(module, nn.Module) else None
    return kind is not None and issubclass(kind, kinds)


@lru_cache(maxsize=1024)
def _known_base(kind: type[Any]) -> type[nn.Module] | None:
    for base in kind.__mro__:
        if base.__module__.startswith(KNOWN):
            return base
        if set(vars(base)) - HARMLESS:
            return None
    return None


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor computes as `torch.Tensor` does, whatever its class adds to that."""
    return _is_ordinary(type(tensor))


@lru_cache(maxsize=1024)
def _is_ordinary(kind: type[Tensor]) -> bool:
    own = (base for base in kind.__mro__ if issubclass(base, Tensor))
    return all(
        base in (Tensor, nn.Parameter)
        or all(name in HARMLESS | OF_KEEPING or not hasattr(Tensor, name) for name in vars(base))
        for base in own
    )
