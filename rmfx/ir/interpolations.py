"""Reading what resizes values by interpolation: channel by channel, in every mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from .functions import torch_name
from .kinds import is_a

Signature = tuple[object, ...]  # equal for nodes that do the same
NAMES = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
_OPERATOR = "upsample_"  # with the mode and the number of dimensions behind it


def interpolation(node: fx.Node, module: nn.Module | None) -> Signature | None:
    """How a node resizes: mode, size, factors, and further options; None if it does not.

    Or if something that is no constant tells it how.
    """
    given = _options(node, module)
    if given is None or any(isinstance(v, fx.Node) for v in _leaves(given)):
        return None
    size, factors = (_each(given.get(name)) for name in ("size", "scale_factor"))
    options = (bool(given.get(name)) for name in ("align_corners", "antialias"))
    return (given.get("mode", "nearest"), size, factors, *options, _recomputes(given))


def whole_factors(found: Signature | None) -> tuple[int, ...] | None:
    """By how much a node copies the nearest pixel, None if it does something else."""
    if found is None or found[:2] != ("nearest", None) or found[3:] != (False, False, False):
        return None
    factors: Any = found[2]
    if not all(n > 0 and n == int(n) for n in factors or (0,)):
        return None
    return tuple(map(int, factors))


def _options(node: fx.Node, module: nn.Module | None) -> Mapping[str, Any] | None:
    if module is not None:
        is_one = is_a(module, nn.Upsample)
        return {name: getattr(module, name, None) for name in NAMES} if is_one else None
    name = torch_name(node).partition(".")[0]
    if name == "interpolate":
        return {**dict(zip(NAMES, node.args[1:], strict=False)), **_without_input(node.kwargs)}
    if not name.startswith(_OPERATOR):
        return None
    schema: Any = getattr(node.target, "_schema", None)
    names = [] if schema is None else [one.name for one in schema.arguments[1:]]
    given = {**dict(zip(names, node.args[1:], strict=False)), **_without_input(node.kwargs)}
    if set(given) - {"output_size", "scale_factors", "align_corners"}:
        return None
    return {
        "mode": name.removeprefix(_OPERATOR)[:-2],
        "size": given.get("output_size"),
        "scale_factor": given.get("scale_factors"),
        "align_corners": given.get("align_corners"),
    }


def _without_input(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("input", "self")}


def _leaves(given: Mapping[str, Any]) -> list[Any]:
    lists = [v if isinstance(v, (list, tuple)) else [v] for v in given.values()]
    return [leaf for one in lists for leaf in one]


def _each(value: Any) -> tuple[float, ...] | None:
    """One number for every dimension, or a single one where they are equal."""
    if value is None:
        return None
    given = tuple(map(float, value if isinstance(value, (list, tuple)) else (value,)))
    return given[:1] if len(set(given)) == 1 else given


def _recomputes(given: Mapping[str, Any]) -> bool:
    return bool(given.get("recompute_scale_factor"))
