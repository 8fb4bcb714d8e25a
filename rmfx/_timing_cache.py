"""Timings that are kept, in a file if wanted, so that what is alike is timed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class TimingCache:
    """Whatever was measured, by a hash of what was measured.

    Args:
        path: a JSON file that is read if it is there and written after each measurement.

    Attributes:
        known: the measurements.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.known: dict[str, Any] = {}
        self._path = None if path is None else Path(path)
        if self._path is not None and self._path.exists():
            self.known = json.loads(self._path.read_text(encoding="utf-8"))

    def get(self, told: tuple[object, ...], measure: Callable[[], Any]) -> Any:
        """What `measure` gives, unless it is known of the same `told`."""
        key = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = measure()
            if self._path is not None:
                self._path.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
        return self.known[key]
