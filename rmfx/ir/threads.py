"""Tracing patches torch for the whole process; threads that do not trace must not notice.

While `torch.fx` traces (and `torch.export` by way of it), `nn.Module.__call__` and `__getattr__`
are its own, for everybody, and two traces at once put each other's patches back. So here one thread
traces at a time, and what is patched is so for that thread alone: the calls of others go straight
on. What other code begins meanwhile in another thread, by `torch.compile` or `torch.fx` itself,
waits for its turn; what has begun is waited for.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch.fx import _symbolic_trace as symbolic

from rmfx.errors import TraceError

REPLACED = ((builtins, "max"), (builtins, "min"), (math, "pow"))  # by torch.export
PATIENCE = 60.0  # seconds that a trace of other code may take before a conversion gives up
FAKES = "torch._subclasses.fake_tensor"  # the logger of what fails on fake tensors
SYMBOLS = "torch.fx.experimental.symbolic_shapes"  # that of what depends on values
# Loaded when they are needed: to load them, with all of Dynamo, takes nearly as long as torch.
COMPILER, EXPORTER = "torch._dynamo.convert_frame", "torch.export._trace"
STUCK = 5.0  # seconds after which a thread that traces and waits is taken to wait for its waiters


class _Turn:
    """A re-entrant lock that ends in an error where the thread that has it waits for this one.

    Who has it has Dynamo's, too, in this order: no network is compiled meanwhile. A thread that is
    alone leaves Dynamo out where nothing has loaded it: there is nobody who could compile.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._taken: list[list[Any]] = []  # all locks, once for each time
        self._owner: int | None = None

    def __enter__(self) -> None:
        locks = self._locks()
        with contextlib.ExitStack() as taken:
            for lock in locks:
                self._take(lock)
                taken.callback(lock.release)
            taken.pop_all()
        self._taken.append(locks)
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        locks = self._taken.pop()
        if not self._taken:
            self._owner = None
        for lock in reversed(locks):
            lock.release()

    def _locks(self) -> list[Any]:
        first = self._owner != threading.get_ident()
        if first and (COMPILER in sys.modules or len(sys._current_frames()) > 1):
            return [importlib.import_module(COMPILER).compile_lock, self._lock]
        return [self._lock]

    def _take(self, lock: Any) -> None:
        since = time.monotonic()
        while not lock.acquire(timeout=STUCK / 5):
            if not self._owner_waits():
                since = time.monotonic()
            if time.monotonic() - since > STUCK:
                raise TraceError(
                    "the thread that traces a model waits for a thread that wants to trace one, "
                    "too; convert a model outside of another one's forward()"
                )

    def _owner_waits(self) -> bool:
        """Whether its owner is inside `Thread.join`, `Future.result` or the like."""
        frame = sys._current_frames().get(self._owner or 0)
        return frame is not None and frame.f_code.co_filename == threading.__file__


_turn = _Turn()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let nobody else trace meanwhile, and let no other thread see what tracing patches.

    Raises:
        TraceError: other code does not come to the end of a trace of its own.
    """
    with _turn, replaced(symbolic, "_new_patcher", _patcher_of_this_thread):
        _wait_for_other_code()
        yield


@contextlib.contextmanager
def alone_exporting() -> Iterator[None]:
    """The same for `torch.export`, which replaces functions of Python, too."""
    with alone():
        exporter = importlib.import_module(EXPORTER)
        override = functools.partial(_in_this_thread, exporter._override_builtin_ops)
        with (
            replaced(exporter, "_override_builtin_ops", override),
            without_logs(SYMBOLS),
            _unprinted(exporter),
        ):
            yield


@contextlib.contextmanager
def _unprinted(module: Any) -> Iterator[None]:
    """Keep a module's code from printing in this thread: what fails is in its error."""
    module.print = for_this_thread(lambda *_, **__: None, print)
    try:
        yield
    finally:
        del module.print


@contextlib.contextmanager
def _in_this_thread(override: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    functions = [(owner, name, getattr(owner, name)) for owner, name in REPLACED]
    with override():
        for owner, name, others in functions:
            setattr(owner, name, for_this_thread(getattr(owner, name), others))
        yield


def _wait_for_other_code() -> None:
    since = time.monotonic()
    while _other_code_traces():
        if time.monotonic() - since > PATIENCE:
            raise TraceError(
                f"another thread has been tracing with torch.fx for {PATIENCE:.0f} s, which "
                "patches torch for all threads; convert when it is done"
            )
        time.sleep(0.001)


def _other_code_traces() -> bool:
    """Whether another thread is inside a trace that has begun before this one."""
    patcher = symbolic.CURRENT_PATCHER
    foreign = patcher is not None and not isinstance(patcher, _OfThisThread)
    return foreign and not symbolic.is_fx_tracing()


class _OfThisThread(symbolic._Patcher):
    """What `torch.fx` patches with, for the methods of classes in one thread only."""

    def patch_method(
        self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        super().patch_method(cls, name, for_this_thread(new_fn, getattr(cls, name)), deduplicate)


@contextlib.contextmanager
def _patcher_of_this_thread() -> Iterator[_OfThisThread]:
    """In the place of what `torch.fx` enters for each trace, whoever traces."""
    patcher = _OfThisThread()
    with _turn, replaced(symbolic, "CURRENT_PATCHER", patcher), patcher:
        yield patcher


def for_this_thread(own: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is `own` in the thread that asks for it, and `others` in all others."""
    thread = threading.get_ident()

    @functools.wraps(others)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (own if threading.get_ident() == thread else others)(*args, **kwargs)

    return chosen


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something else in the place of an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _OneThread:
    """In the place of a filter's pattern: matches what one thread warns of, until it ends."""

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()

    def match(self, _: str) -> bool:
        return threading.get_ident() == self.thread


@contextlib.contextmanager
def without_logs(name: str) -> Iterator[None]:
    """Keep a logger from writing what this thread tells it."""
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger = logging.getLogger(name)
    logger.addFilter(is_of_others)
    try:
        yield
    finally:
        logger.removeFilter(is_of_others)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Keep this thread from warning.

    `warnings.catch_warnings` keeps all of them from it, and two that overlap leave their filters.
    """
    mine, filters = _OneThread(), warnings.filters
    entry: Any = ("ignore", mine, Warning, None, 0)
    filters.insert(0, entry)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        mine.thread = None  # for copies that somebody has made of the filters
        for held in (filters, warnings.filters):
            with contextlib.suppress(ValueError):
                held.remove(entry)  # type: ignore[attr-defined]
