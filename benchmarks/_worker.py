"""A process that does one job after another, and whose end is not the end of the run."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class WorkerError(Exception):
    """The process died, or took too long and was ended."""


class Worker:
    """Calls a function in another process, and starts a new one where that ends.

    Args:
        function: of a module, which the process imports.
        seconds: the longest a call may take.
        gigabytes: of memory that the process may take; beyond, allocations fail with an error.
    """

    def __init__(self, function: Callable[..., Any], seconds: float, gigabytes: float) -> None:
        self._function, self._seconds = function, seconds
        self._bytes = int(gigabytes * 2**30)
        self._process: Any = None
        self._line: Connection | None = None

    def __call__(self, *arguments: object) -> Any:
        """The function's result.

        Raises:
            WorkerError: there is none. What the function raises ends the process as well.
        """
        line = self._line or self._start()
        try:
            line.send(arguments)
            if line.poll(self._seconds):
                return line.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise WorkerError(f"the process died (exit code {code})") from error
        self.close()
        raise WorkerError(f"ended after {self._seconds:.0f} seconds")

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._line is not None:
            self._line.close()
        self._process = self._line = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # a fork inherits locks of torch's threads
        self._line, theirs = context.Pipe()
        given = (self._function, theirs, torch.get_num_threads(), self._bytes)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        theirs.close()
        return self._line


def _serve(function: Callable[..., Any], line: Connection, threads: int, memory: int) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(ValueError, OSError):  # a lower limit may be in force already
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    while True:
        try:
            arguments = line.recv()
        except EOFError:
            return
        line.send(function(*arguments))
