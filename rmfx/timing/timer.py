"""Times networks in a runtime; what is alike is timed once, with a file once for ever."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.errors import OptionError

from .speed import Settings, compare_speed


class Timer:
    """Times networks in one runtime.

    Args:
        runtime: "eager", "inductor", "onnxruntime" or "openvino".
        cache: a JSON file for the timings, read if it is there and written after each.
        threads: for one inference; by default torch's.
        rounds: how often each form is timed.
        seconds: how long each timing takes at least.
        step: called with a few words before something is timed.

    Attributes:
        known: what was measured, by a hash of what it was measured of and how.

    Raises:
        LatencyError: an option is out of range, or the runtime is not known.
        OptionError: the cache is no file of timings.
    """

    def __init__(
        self,
        runtime: str,
        cache: str | Path | None,
        threads: int | None,
        rounds: int,
        seconds: float,
        step: Callable[[str], object],
    ) -> None:
        self.runtime = runtime
        threads = torch.get_num_threads() if threads is None else threads
        self._settings = Settings((runtime,), threads=threads, rounds=rounds, seconds=seconds)
        self.known: dict[str, Any] = {}
        self._path = None if cache is None else Path(cache)
        self._step = step
        if self._path is not None and not self._path.parent.is_dir():
            raise OptionError(f"cache={cache}: there is no folder {self._path.parent}")
        if self._path is not None and self._path.exists():
            self.known = _read(self._path)

    def once(self, name: str, told: tuple[object, ...], measure: Callable[[], Any]) -> Any:
        """What `measure` gives, unless it is known of the same `told`, runtime and threads."""
        options = (self.runtime, self._settings.threads, torch.__version__)
        key = hashlib.sha256(repr((*told, options)).encode()).hexdigest()[:16]
        if key not in self.known:
            self._step(f"time {name} in {self.runtime}")
            self.known[key] = measure()
            if self._path is not None:
                self._path.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
        return self.known[key]

    def times(
        self, forms: Sequence[nn.Module], inputs: tuple[Tensor, ...]
    ) -> list[tuple[float, ...]]:
        """Seconds of a call of each form, a number for each round."""
        return compare_speed(forms, inputs, self.runtime, self._settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cache={path} cannot be read; delete it ({error})") from error
    if not isinstance(known, dict):
        raise OptionError(f"cache={path} holds no timings; delete it, or name another file")
    return known
