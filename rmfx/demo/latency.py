"""Compares the speed of several functions fairly: in turn, many times, by the median.

On one thread, since a busy machine delays several threads far more than one.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latency:
    """Seconds a call takes: the median over all rounds and the quartiles around it."""

    median: float
    low: float
    high: float


def measure(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 15, seconds: float = 0.05
) -> dict[str, Latency]:
    """Measures functions that take no arguments.

    Every round times each function once for about `seconds`, so a slower spell of the machine
    meets all of them. Before that each is called twice, which compiles it if need be.

    Args:
        functions: by the name that the result uses.
        rounds: at least two.
        seconds: how long one round runs each function; at least one call is made.

    Example:
        >>> sorted(measure({"sum": lambda: sum(range(99))}, rounds=3, seconds=0.001))
        ['sum']
    """
    # Importing this takes a second and warns about CUDA toolkits, which others need not see.
    from torch.utils.benchmark import Timer

    times: dict[str, list[float]] = {name: [] for name in functions}
    with _one_thread():
        timers, repeats = {}, {}
        for name, function in functions.items():
            function()
            timers[name] = Timer("function()", globals={"function": function})
            repeats[name] = max(1, int(seconds / timers[name].timeit(1).median))
        for _ in range(rounds):
            for name, timer in timers.items():
                times[name].append(timer.timeit(repeats[name]).median)
    return {name: _summarise(values) for name, values in times.items()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Also for what is compiled in the block: inductor writes the number into its code."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _summarise(values: list[float]) -> Latency:
    low, _, high = statistics.quantiles(values, n=4)
    return Latency(statistics.median(values), low, high)
