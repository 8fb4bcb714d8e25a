"""Fills a model with the weights of a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from rmfx.options import with_article

from .tensors import LoadError, read_tensors

_INSTEAD = "save the weights alone: torch.save(model.state_dict(), other_path)"


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fills a model, in place, from a file that must hold exactly its parameters and buffers.

    Raises:
        LoadError: the file cannot be read or is damaged, or a key is missing, left over or has
            another shape; the model is then as it was.
    """
    path = Path(path)
    found = _strip_prefix(_read_state(path))
    wanted = model.state_dict()
    # Counters of batch norm are bookkeeping of training, and older files do not have them.
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in found if k not in wanted]
    differing = [
        f"{k} is {tuple(found[k].shape)} in the file and {tuple(wanted[k].shape)} in the model"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    faults = [
        _count(missing, "missing key"),
        _count(unexpected, "unexpected key"),
        _count(differing, "wrong shape"),
    ]
    if any(faults):
        raise LoadError(f"{path} does not fit the model: {'; '.join(filter(None, faults))}")
    model.load_state_dict(wanted | dict(found))


def _count(names: list[str], what: str, shown: int = 3) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > shown else ""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} {what}{plural} ({', '.join(names[:shown])}{more})"


def _read_state(path: Path) -> Mapping[str, Tensor]:
    state = read_tensors(path, _INSTEAD)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise LoadError(f"{path} holds {with_article(state)}, no state dict; {_INSTEAD}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise LoadError(
                f"{path} holds no state dict: its entry {name!r} is {with_article(value)}, no"
                f" tensor; {_INSTEAD}"
            )
    return state


def _strip_prefix(state: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Undoes what `nn.DataParallel` adds to each key."""
    whole = all(key.startswith(prefix) for key in state)
    return {key[len(prefix) :] if whole else key: value for key, value in state.items()}
