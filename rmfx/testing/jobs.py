"""Calls that do not depend on one another, in processes of this machine or on a cluster.

Joblib does it: this says how it is asked, the same way everywhere.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import joblib
import torch

from rmfx.choices import BACKENDS
from rmfx.errors import OptionError


@dataclass(frozen=True)
class Jobs:
    """Where calls are made.

    Attributes:
        count: how many at a time; on a cluster as many as it has workers where it is -1.
        backend: "loky" for processes of this machine, "dask" or "ray" for a cluster, of which the
            package has to be installed.
        address: of the cluster; None for one of this machine.
    """

    count: int = 1
    backend: str = BACKENDS[0]
    address: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise OptionError(f"backend={self.backend!r}: choose from {', '.join(BACKENDS)}")
        if self.count != -1 and self.count < 1:
            raise OptionError(f"jobs={self.count}: give a number from 1, or -1 for all there are")
        if self.address is not None and self.backend == BACKENDS[0]:
            raise OptionError(f"address={self.address!r} is that of a cluster: name its backend")

    @property
    def is_here(self) -> bool:
        """Whether calls are made one by one in this process."""
        return self.count == 1 and self.backend == BACKENDS[0]

    def results(
        self,
        function: Callable[..., Any],
        arguments: Iterable[tuple[Any, ...]],
        *,
        in_order: bool = True,
    ) -> Iterator[Any]:
        """What calls give, in their order or as they end; no more are begun once nobody reads.

        Args:
            function: of a module that the workers can import, where it is called with one thread;
                in this process it is called as it is.
            arguments: of each call, read a few calls ahead.

        Raises:
            OptionError: there is no such cluster.
            Whatever a call raises.
        """
        if self.is_here:
            yield from (function(*given) for given in arguments)
            return
        order = "generator" if in_order else "generator_unordered"
        calls = (joblib.delayed(_with_one_thread)(function, given) for given in arguments)
        with self._cluster():
            with joblib.parallel_config(self.backend, n_jobs=self.count):
                pool = joblib.Parallel(return_as=order, batch_size=1)
            found = pool(calls)
            try:
                for one in found:  # noqa: UP028  (`yield from` would close it before what follows)
                    yield one
            finally:
                with warnings.catch_warnings():  # that calls are given up, which is meant
                    warnings.simplefilter("ignore", UserWarning)
                    found.close()

    def _cluster(self) -> contextlib.AbstractContextManager[Any]:
        """The connection to a cluster, which joblib looks up itself."""
        try:
            if self.backend == "dask":
                import distributed

                return _entered(distributed.Client, self.address)
            if self.backend == "ray":
                import ray
                from ray.util.joblib import register_ray

                register_ray()
                return _entered(ray.init, self.address)
        except (ImportError, OSError, ValueError) as error:
            raise OptionError(f"backend={self.backend!r}: {error}") from error
        return contextlib.nullcontext()


def _entered(connect: Any, address: str | None) -> contextlib.AbstractContextManager[Any]:
    found: contextlib.AbstractContextManager[Any] = connect(address)
    return found


def _with_one_thread(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    return function(*given)
