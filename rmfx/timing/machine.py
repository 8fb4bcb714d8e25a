"""On what was measured: what must be known of a machine to read times of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from .speed import Settings

# How long idle threads of torch spin before they sleep, and how many there are: both move times.
_THREAD_VARIABLES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")


def machine_of(settings: Settings, runtimes: Iterable[str]) -> dict[str, str]:
    """What must be known to read measurements: threads, rounds, CPU, versions, as text by name."""
    packages = ["torch", *(name for name in ("onnxruntime", "openvino") if name in runtimes)]
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "threads": str(settings.threads),
        "rounds": str(settings.rounds),
        "precision": "float32",
        "CPU": f"{cpu_name()} ({capability})",
        **{name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        **{name: importlib.metadata.version(name) for name in packages},
    }


def cpu_name() -> str:
    """The processor by its maker's name for it."""
    with contextlib.suppress(OSError):  # there on Linux only
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
