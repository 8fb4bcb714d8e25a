"""While one thread converts, others go on: nothing that tracing patches reaches them."""

from __future__ import annotations

import builtins
import collections
import contextlib
import math
import queue
import random
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from builders import Apply, Residual, conv, conv_branch, image, ready
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as symbolic

import rmfx
from rmfx.ir import threads
from rmfx.ir.threads import alone, for_this_thread, without_warnings
from rmfx.testing import assert_equivalent

CONVERSIONS = 6
CALL, GETATTR = nn.Module.__call__, nn.Module.__getattr__
ENTER, APPLY = torch.autocast.__enter__, torch.autograd.Function.__dict__["apply"]

# Until then one flag tells all threads alike that torch.fx traces somewhere.
traces_apart = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="before 2.14 torch.fx does not know which thread traces"
)


def outcome(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:  # noqa: BLE001  (whatever another thread has done to this one)
        return f"{type(error).__name__}: {error}"
    return "fine"


@contextlib.contextmanager
def meanwhile(*works: Callable[[], object]) -> Iterator[collections.Counter[str]]:
    """Other threads, each of which does one thing again and again; counts what comes of it."""
    seen: collections.Counter[str] = collections.Counter()
    stop = threading.Event()

    def repeat(work: Callable[[], object]) -> None:
        while not stop.is_set():
            seen[outcome(work)] += 1

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(seen) == {"fine"}


def residual_net() -> nn.Module:
    return ready(nn.Sequential(Residual(conv_branch()), nn.ReLU(), Residual(conv_branch())))


def exported_net() -> nn.Module:
    """One that only torch.export can trace."""
    return ready(
        Apply(lambda m, x: m.a(x) if isinstance(x, Tensor) else x, a=Residual(conv_branch()))
    )


def convert(make: Callable[[], nn.Module], x: Tensor, times: int = CONVERSIONS) -> None:
    for _ in range(times):
        model = make()
        converted = rmfx.remove_residuals(model, x)
        assert rmfx.report(converted).removed > 0
        torch.testing.assert_close(converted(x), model(x), rtol=1e-9, atol=1e-9)


def assert_nothing_is_patched() -> None:
    assert (nn.Module.__call__, nn.Module.__getattr__) == (CALL, GETATTR)
    assert torch.autocast.__enter__ is ENTER
    assert torch.autograd.Function.__dict__["apply"] is APPLY
    assert symbolic.CURRENT_PATCHER is None
    assert symbolic._new_patcher.__module__ == symbolic.__name__
    assert type(builtins.max) is type(builtins.min) is type(math.pow) is type(len)


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


def _serve(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(model(x), expected)


def _autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def _builtins() -> None:
    assert type(math.pow(2, 3)) is float
    assert max(1, 2) == 2


def _gradients() -> None:
    x = torch.ones(1, requires_grad=True)
    (grad,) = torch.autograd.grad(Negated.apply(x), x)
    assert grad == -1


@pytest.mark.slow
@pytest.mark.parametrize("make", [residual_net, exported_net])
def test_inference_and_autocast_go_on_while_a_thread_converts(
    make: Callable[[], nn.Module],
) -> None:
    model, x = residual_net(), image()
    expected = model(x)
    works = (lambda: _serve(model, x, expected), _autocast, _builtins, _gradients)
    with meanwhile(*works):
        convert(make, x)
    assert_nothing_is_patched()


def test_the_model_that_is_converted_serves_meanwhile() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.cache = Residual(conv_branch()), {}

        def forward(self, x: Tensor) -> Tensor:
            self.called = True
            self.cache.setdefault("scale", 2.0)
            return self.block(x) * self.cache["scale"]  # type: ignore[no-any-return]

    model, x = ready(Caches()), image()
    expected = model(x)
    with meanwhile(lambda: _serve(model, x, expected)):
        convert(lambda: model, x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("make", [residual_net, exported_net])
def test_threads_convert_at_once(make: Callable[[], nn.Module]) -> None:
    x = image()
    outcomes: list[str] = []

    def work() -> None:
        outcomes.append(outcome(lambda: convert(make, x, 3)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["fine"] * 3
    assert_nothing_is_patched()


def _trace_by_fx(x: Tensor) -> None:
    model = ready(Residual(conv_branch()))
    gm = fx.symbolic_trace(model)
    assert [n.op for n in gm.graph.nodes].count("call_module") == 3
    torch.testing.assert_close(gm(x), model(x))


def _compile(x: Tensor) -> None:
    model = residual_net()
    torch.testing.assert_close(
        torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x)
    )


@traces_apart
@pytest.mark.filterwarnings("ignore")  # of caches that are full, after many networks
@pytest.mark.parametrize("work", [_trace_by_fx, _compile])
def test_other_code_traces_while_a_thread_converts(work: Callable[[Tensor], None]) -> None:
    x = image()
    with torch.no_grad(), meanwhile(lambda: work(x)):
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            # Not called: torch.fx patches this thread's modules, too, outside of conversions.
            assert rmfx.report(rmfx.remove_residuals(residual_net(), x)).removed == 2
    assert_nothing_is_patched()


@pytest.mark.slow
def test_nobody_compiles_meanwhile_though_the_compiler_was_not_loaded() -> None:
    """In a fresh process with another thread, which could load it."""
    code = """
        import queue, threading, torch, rmfx
        from torch import nn
        taken, end = queue.SimpleQueue(), threading.Event()  # lists are put back
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(4, 4, 1)
            def forward(self, x):
                from torch._dynamo.convert_frame import compile_lock
                other = threading.Thread(target=lambda: taken.put(compile_lock.acquire(False)))
                other.start()
                other.join()
                return x + self.conv(torch.relu(x))
        threading.Thread(target=end.wait).start()
        done = rmfx.report(rmfx.remove_residuals(Block().eval())).removed
        end.set()
        assert (done, taken.get(timeout=1)) == (1, False)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


@traces_apart
def test_code_inside_a_trace_may_start_threads() -> None:
    other, x = residual_net(), image()
    answers: list[Tensor] = []

    def forward(m: Any, given: Any) -> Any:
        thread = threading.Thread(target=lambda: answers.append(other(x)))
        thread.start()
        thread.join()
        return m.a(given)

    model = ready(Apply(forward, a=Residual(conv_branch())))
    converted = rmfx.remove_residuals(model)
    assert rmfx.report(converted).removed == 1
    assert_equivalent(model, converted, x)
    torch.testing.assert_close(answers[0], other(x))


def test_a_conversion_that_the_tracing_thread_waits_for_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "STUCK", 0.5)
    other, outcomes = residual_net(), queue.SimpleQueue[str]()  # lists are put back

    def convert_another() -> None:
        outcomes.put(outcome(lambda: rmfx.remove_residuals(other)))

    def forward(m: Any, x: Any) -> Any:
        thread = threading.Thread(target=convert_another)
        thread.start()
        thread.join()
        return m.a(x)

    model = ready(Apply(forward, a=Residual(conv_branch())))
    assert rmfx.report(rmfx.remove_residuals(model)).removed == 1
    assert "waits for a thread that wants to trace" in outcomes.get(timeout=1)


def test_a_conversion_inside_of_a_trace_is_one_of_the_same_thread() -> None:
    other, found = residual_net(), queue.SimpleQueue[int]()  # lists are put back

    def forward(m: Any, x: Any) -> Any:
        converted = rmfx.remove_residuals(other)
        found.put(rmfx.report(converted).removed)
        return m.a(x)

    model = ready(Apply(forward, a=Residual(conv_branch())))
    assert rmfx.report(rmfx.remove_residuals(model)).removed == 1
    assert found.get(timeout=1) == 2


@traces_apart
def test_a_trace_that_has_begun_is_waited_for() -> None:
    began, end = threading.Event(), threading.Event()

    class Slow(fx.Tracer):
        def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
            began.set()
            end.wait(10)
            return super().create_node(*args, **kwargs)

    graphs: list[fx.Graph] = []
    thread = threading.Thread(target=lambda: graphs.append(Slow().trace(nn.Sequential(conv()))))
    thread.start()
    began.wait(10)
    threading.Timer(0.3, end.set).start()
    convert(residual_net, image(), 1)
    thread.join()
    assert [n.op for n in graphs[0].nodes] == ["placeholder", "call_module", "output"]
    assert_nothing_is_patched()


@traces_apart
def test_a_trace_that_never_ends_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "PATIENCE", 0.05)
    monkeypatch.setattr(symbolic, "CURRENT_PATCHER", symbolic._Patcher())
    with pytest.raises(rmfx.TraceError, match="another thread has been tracing"):
        rmfx.trace(residual_net())


def test_what_is_for_one_thread_is_passed_by_in_others() -> None:
    def others() -> str:
        return "others"

    chosen, found = for_this_thread(lambda: "own", others), []
    thread = threading.Thread(target=lambda: found.append(chosen()))
    with alone():
        thread.start()
        thread.join()
        assert chosen() == "own"
    assert found == ["others"]


# ---- other things that a process has one of -----------------------------------------------------


def test_warnings_of_other_threads_are_heard() -> None:
    heard: list[int] = []

    def warn() -> None:
        with pytest.warns(UserWarning, match="of another thread"):
            warnings.warn("of another thread", stacklevel=1)
        heard.append(1)

    thread = threading.Thread(target=warn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with without_warnings():
            warnings.warn("of this one", stacklevel=1)
            thread.start()
            thread.join()
        assert warnings.filters == before
        with pytest.raises(UserWarning, match="afterwards"):
            warnings.warn("afterwards", stacklevel=1)
    assert heard


def test_filters_that_are_put_back_late_do_not_stay_silent() -> None:
    """Another thread's `catch_warnings` begins inside and ends outside."""
    catching = warnings.catch_warnings()
    with without_warnings():
        catching.__enter__()
    catching.__exit__(None, None, None)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def _settings() -> tuple[object, ...]:
    return (
        *(random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        *(torch.is_autocast_enabled("cpu"), list(warnings.filters)),
    )


@pytest.mark.parametrize("given", [(), (image(),)])
@pytest.mark.parametrize(
    "factor",
    [
        lambda: 2.0,
        random.random,
        lambda: float(np.random.rand()),
        lambda: torch.rand(4, 1, 1, dtype=torch.float64),
    ],
)
def test_settings_and_generators_are_as_they_were(given: Any, factor: Any) -> None:
    model = ready(Apply(lambda m, x: x + m.a(torch.relu(x)) * factor(), a=conv()))
    before = _settings()
    with contextlib.suppress(rmfx.TraceError):
        rmfx.remove_residuals(model, *given)
    assert _settings() == before
