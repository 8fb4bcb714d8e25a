"""torch.compile(model, backend="rmfx"): the same answers, and never those of old weights."""

from __future__ import annotations

import copy
import datetime
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from builders import Residual, adds, basic_branch, chain, conv_branch, image, ready
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import rmfx
from rmfx import backend
from rmfx.frontend import freshness

pytestmark = pytest.mark.oldest


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Two residual blocks, the first of which needs PReLU for its carry."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Residual(basic_branch())
        self.relu = nn.ReLU()
        self.body = Residual(basic_branch())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.relu(self.stem(x)))


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return ready(Net()).requires_grad_(False).to(dtype)


def compiled(
    model: Any, inner: Any = "eager", *, reports: list[rmfx.Report] | None = None, **keywords: Any
) -> Any:
    options = {"backend": inner, **keywords.pop("options", {})}
    if reports is not None:
        options["on_report"] = reports.append
    return torch.compile(model, backend="rmfx", options=options, **keywords)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# ---- what it does -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_the_graph_that_goes_on_has_no_residual_connections(inner: str) -> None:
    seen: list[fx.GraphModule] = []

    def look(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(gm)
        return torch._dynamo.lookup_backend(inner)(gm, inputs)

    model, reports = net(), []
    with torch.no_grad():
        expected = model(image())
        assert close(compiled(model, look, reports=reports)(image()), expected)
    assert [r.removed for r in reports] == [2]
    assert adds(seen[0]) == 0
    assert [n.op for n in seen[0].graph.nodes].count("placeholder") == 1


def test_it_is_found_by_name_without_an_import() -> None:
    assert "rmfx" in torch._dynamo.list_backends()


def test_rows_are_those_of_the_module() -> None:
    model, reports = net(), []
    with torch.no_grad():
        compiled(model, reports=reports)(image())
    direct = rmfx.report(rmfx.remove_residuals(model, image()))
    assert reports[0].rows == direct.rows
    assert [row.place for row in direct.rows] == ["stem", "body"]


def test_options_are_checked_by_name() -> None:
    for options, text in (
        ({"bakend": "eager"}, "no option 'bakend'"),
        ({"backend": "rmfx"}, "itself"),
        ({"policy": "some"}, "policy='some'"),
    ):
        with pytest.raises(Exception, match=text), torch.no_grad():
            torch.compile(net(), backend="rmfx", options=options)(image())
        torch._dynamo.reset()


def test_pass_options_and_strict_reach_the_pass() -> None:
    model = net()
    with torch.no_grad():
        reports: list[rmfx.Report] = []
        options = {"activation": "identity"}
        compiled(model, reports=reports, options=options)(image())
        assert [row.status for row in reports[0].rows] == ["refused", "removed"]
        torch._dynamo.reset()
        with pytest.raises(Exception, match="cannot be removed"):
            compiled(model, options={**options, "strict": True})(image())


def test_a_policy_reaches_the_pass() -> None:
    reports: list[rmfx.Report] = []
    with torch.no_grad():
        compiled(net(), reports=reports, options={"policy": "profitable"})(image())
    assert [row.status for row in reports[0].rows] == ["kept", "kept"]
    assert "would not pay" in reports[0].rows[0].reason


# ---- every kind of graph ------------------------------------------------------------------------


class Breaks(nn.Module):
    """A graph break between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Residual(conv_branch()), Residual(conv_branch())

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)


class Several(nn.Module):
    """Two inputs, one of them optional, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Residual(conv_branch())

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 2.0) -> dict[str, Any]:
        z = self.a(x if y is None else x + y)
        return {"z": z * scale, "both": [z, x]}


def test_each_part_of_a_broken_graph_is_converted() -> None:
    model, reports = ready(Breaks()).requires_grad_(False), []
    with torch.no_grad():
        assert close(compiled(model, reports=reports)(image()), model(image()))
    assert [r.removed for r in reports] == [1, 1]


def test_several_inputs_and_a_dictionary_of_outputs() -> None:
    model, reports = ready(Several()).requires_grad_(False), []
    run = compiled(model, reports=reports)
    with torch.no_grad():
        for arguments in ((image(),), (image(), image() * 2), (image(), image(), 0.5)):
            expected, actual = model(*arguments), run(*arguments)
            assert close(actual["z"], expected["z"])
            assert close(actual["both"][0], expected["both"][0])
    assert min(r.removed for r in reports) == 1


def test_a_function_around_the_model_is_compiled_too() -> None:
    model, reports = net(), []
    with torch.no_grad():
        run = compiled(lambda x: model(x).mean(1), reports=reports)
        assert close(run(image()), model(image()).mean(1))
    assert [(r.removed, r.rows[0].place) for r in reports] == [(2, "stem")]


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["mark_dynamic", "dynamic=True"])
def test_open_sizes_stay_open(how: str, inner: str) -> None:
    model, reports = net(), []
    run = compiled(model, inner, reports=reports, dynamic=True if how == "dynamic=True" else None)
    compilations = 0
    with torch.no_grad():
        for shape in ((3, 4, 9, 7), (5, 4, 12, 8), (2, 4, 7, 31)):
            x = image(*shape)
            if how == "mark_dynamic":
                for dimension in (0, 2, 3):
                    torch._dynamo.mark_dynamic(x, dimension)
            assert close(run(x), model(x))
            compilations = compilations or len(reports)  # inductor asks for two at first
    assert {r.removed for r in reports} == {2}
    assert len(reports) == compilations


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes(mode: Callable[[], Any]) -> None:
    model, reports = ready(Net()), []
    with mode():
        assert close(compiled(model, reports=reports)(image()), model(image()))
    assert [r.removed for r in reports] == [2]


def test_weights_made_in_inference_mode_are_left_alone() -> None:
    with torch.inference_mode():
        model, reports = ready(Net()), []
        run = compiled(model, reports=reports)
        assert close(run(image()), model(image()))
        model.body.branch[0][0].weight.mul_(2)  # type: ignore[index, union-attr]
        assert close(run(image()), model(image()))
    assert [r.removed for r in reports] == [0]


def test_autocast_rounds_the_network_but_not_the_algebra() -> None:
    model, reports = net(torch.float32), []
    x = image().float()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model(x)
            actual = compiled(model, reports=reports)(x)
    assert [r.removed for r in reports] == [2]
    assert actual.dtype == expected.dtype
    assert close(expected, exact, 2**-7)  # bfloat16 has 8 bits
    assert close(actual, exact, 2**-7)
    assert not close(actual, exact, 2**-12)
    converted = rmfx.remove_residuals(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = rmfx.remove_residuals(model, x)
    for a, b in zip(converted.parameters(), within.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    model, reports = net(dtype), []
    x = image().to(dtype)
    with torch.no_grad():
        expected = model.to(torch.float64)(x.double())
        model.to(dtype)
        actual = compiled(model, reports=reports)(x)
    assert [r.removed for r in reports] == [2]
    assert actual.dtype == dtype
    assert close(actual.double(), expected, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_channels_last(inner: str) -> None:
    model, reports = net(torch.float32).to(memory_format=torch.channels_last), []
    x = image().float().to(memory_format=torch.channels_last)
    with torch.no_grad():
        actual = compiled(model, inner, reports=reports)(x)
        assert close(actual, model(x), 1e-5)
    assert [r.removed for r in reports] == [2]
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_a_user_input_that_is_a_parameter_is_no_weight() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Residual(conv_branch())

        def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
            return torch.conv2d(self.a(x), kernel)

    model, reports = ready(Scaled()).requires_grad_(False), []
    run = compiled(model, reports=reports)
    with torch.no_grad():
        for factor in (1.0, 2.0):
            kernel = nn.Parameter(torch.full((4, 4, 1, 1), factor, dtype=torch.float64), False)
            assert close(run(image(), kernel), model(image(), kernel))
    assert [r.removed for r in reports] == [1]


def test_a_buffer_that_forward_writes_is_still_written() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Residual(conv_branch())
            self.register_buffer("n", torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.n.add_(1)
            return self.a(x) * self.n

    model, twin = ready(Counts()).requires_grad_(False), ready(Counts()).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    run = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            assert close(run(image()), twin(image()))
    assert torch.equal(model.n, twin.n)


# ---- never stale --------------------------------------------------------------------------------


def _load(model: nn.Module) -> None:
    state = model.state_dict()
    model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in state.items()})


def _optimise(model: nn.Module) -> None:
    model.requires_grad_(True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.enable_grad():
        model(image().to(next(model.parameters()).dtype)).square().mean().backward()
    optimiser.step()
    model.requires_grad_(False)


def _convert(model: nn.Module) -> None:
    with torch.no_grad():
        model.body.branch[0][0].weight.mul_(3)  # type: ignore[index, union-attr]
    model.to(torch.float32)


def _write(model: nn.Module) -> None:
    model.stem.branch[0][1].running_mean.add_(1)  # type: ignore[index, union-attr]


def _replace(model: nn.Module) -> None:
    layer: Any = model.body.branch[0][0]  # type: ignore[index, union-attr]
    layer.weight = nn.Parameter(layer.weight * 2, False)


CHANGES = {
    "load_state_dict": _load,
    "an optimiser step": _optimise,
    "to another type": _convert,
    "written in place": _write,
    "a parameter replaced": _replace,
}


def _own_backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
    return rmfx.remove_residuals(gm, inputs).forward


def _own_aot_backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
    return torch._dynamo.lookup_backend("aot_eager")(rmfx.remove_residuals(gm, inputs), inputs)


def _own_inductor(gm: fx.GraphModule, inputs: list[Any]) -> Any:
    return torch._dynamo.lookup_backend("inductor")(rmfx.remove_residuals(gm, inputs), inputs)


WAYS: dict[str, dict[str, Any]] = {
    "backend": {"backend": "rmfx", "options": {"backend": "aot_eager"}},
    "backend with inductor": {"backend": "rmfx"},
    "backend with open sizes": {
        "backend": "rmfx",
        "options": {"backend": "eager"},
        "dynamic": True,
    },
    "own backend": {"backend": _own_backend},
    "own backend with AOT": {"backend": _own_aot_backend},
    "own backend with inductor": {"backend": _own_inductor},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:rmfx. the weights have changed")
def test_weights_are_never_stale(change: str, way: str) -> None:
    model = net()
    run = torch.compile(model, **WAYS[way])
    with torch.no_grad():
        before = run(image())
        assert close(before, model(image()))
        CHANGES[change](model)
        x = image().to(next(model.parameters()).dtype)
        expected = model(x)
        assert not close(before.to(expected), expected, 1e-3)  # a stale answer would show
        if way.startswith("own") and x.dtype == image().dtype:  # another type compiles anew
            with pytest.raises(RuntimeError, match="weights have changed"):
                run(x)
        else:
            assert close(run(x), expected, 1e-10 if x.dtype == torch.float64 else 1e-5)


def _step(model: nn.Module, kind: Any, **options: Any) -> None:
    model.requires_grad_(True)
    optimiser = kind(model.parameters(), lr=0.05, **options)
    with torch.enable_grad():
        model(image()).square().mean().backward()
    optimiser.step()
    model.requires_grad_(False)


def _train_statistics(model: nn.Module) -> None:
    model.train()
    model(3 * image() + 1)
    model.eval()


def _by_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def _by_numpy(model: nn.Module) -> None:
    for p in model.parameters():
        p.numpy()[...] *= 1.5


def _assign_data_twice(model: nn.Module) -> None:
    for _ in range(2):  # so that the first memory may be used again
        for p in model.parameters():
            p.data = p.data * 1.2


def _swap(model: nn.Module) -> None:
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p * 1.5, False))


def _swap_in_loading(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        _load(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _all_reduce(model: nn.Module) -> None:
    """Two ranks in two threads; the other one holds the same weights."""
    store = torch.distributed.HashStore()
    weights = list(model.parameters())
    others = [p.clone() for p in weights]

    def work(rank: int, mine: list[Tensor]) -> None:
        minute = datetime.timedelta(seconds=60)
        group = torch.distributed.ProcessGroupGloo(store, rank, 2, minute)
        for tensor in mine:
            group.allreduce([tensor]).wait()

    other = threading.Thread(target=work, args=(1, others))
    other.start()
    work(0, weights)
    other.join()


def _multiply_shared(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def _another_process(model: nn.Module) -> None:
    process = torch.multiprocessing.get_context("fork").Process(
        target=_multiply_shared, args=(model,)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


UNCOUNTED: dict[str, Callable[[nn.Module], None]] = {
    "a fused Adam": lambda m: _step(m, torch.optim.Adam, fused=True),
    "a fused SGD": lambda m: _step(m, torch.optim.SGD, fused=True),
    "a fused Adagrad": lambda m: _step(m, torch.optim.Adagrad, fused=True),
    "a foreach Adam": lambda m: _step(m, torch.optim.Adam, foreach=True),
    "a forward in training mode": _train_statistics,
    "a write to .data": _by_data,
    "a write by numpy": _by_numpy,
    ".data assigned twice": _assign_data_twice,
    "swapped tensors": _swap,
    "swapped in loading": _swap_in_loading,
    "a collective": _all_reduce,
    "another process": _another_process,
}


@pytest.mark.parametrize("way", ["backend", "own backend", "own backend with AOT"])
@pytest.mark.parametrize("change", UNCOUNTED)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12
def test_writes_that_torch_does_not_count_are_seen(
    change: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change.startswith("swapped") and way.startswith("own"):
        pytest.skip("a backend of one's own keeps Dynamo's graph, which forbids swapping")
    if change.startswith("swapped") and torch.__version__ < "2.11":
        pytest.skip("Dynamo before torch 2.11 forbids swapping")
    monkeypatch.setitem(CHANGES, change, UNCOUNTED[change])
    if change == "another process":
        monkeypatch.setattr(nn.Module, "requires_grad_", _shared(nn.Module.requires_grad_))
    test_weights_are_never_stale(change, way)


def _shared(requires_grad: Any) -> Any:
    """Lets `net` put its weights into shared memory."""
    return lambda model, value=True: requires_grad(model, value).share_memory()


@pytest.mark.parametrize("way", ["backend with inductor", "own backend with inductor"])
def test_fused_optimisers_are_seen_through_inductor(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHANGES, "a fused Adam", UNCOUNTED["a fused Adam"])
    test_weights_are_never_stale("a fused Adam", way)


def _between_the_samples(model: nn.Module) -> None:
    weight = model.body.branch[2][0].weight
    written = np.ones(weight.numel(), bool)
    written[freshness.sampled_positions(weight.numel())] = False
    weight.numpy().reshape(-1)[written] += 1


@pytest.mark.parametrize(("mode", "stale"), [("sampled", True), ("checked", False)])
def test_what_each_mode_sees(mode: str, stale: bool) -> None:
    model = net()
    run = compiled(model, options={"weights": mode})
    with torch.no_grad():
        before = run(image())
        _between_the_samples(model)
        expected = model(image())
        assert not close(before, expected, 1e-3)
        assert close(run(image()), expected) is not stale


def test_frozen_weights_are_not_looked_at_but_numbers_are() -> None:
    class Scaled(Net):
        factor = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    model, reports = ready(Scaled()).requires_grad_(False), []
    run = compiled(model, reports=reports, options={"weights": "frozen"})
    with torch.no_grad():
        for factor in (2.0, 3.0, -0.0):
            model.factor = factor
            assert close(run(image()), model(image()))
        model.factor = 3.0
        before = run(image())
        converted = len(reports)
        _load(model)
        run(image())
        model.factor = 4.0
        assert not close(before * 4 / 3, model(image()), 1e-3)
    assert len(reports) == converted


def test_modes_are_checked_by_name() -> None:
    with pytest.raises(Exception, match="weights='thawed': choose from sampled, checked, frozen"):
        compiled(net(), options={"weights": "thawed"})(image())


@pytest.mark.parametrize("mode", ["checked", "frozen"])
def test_weights_made_in_inference_mode_can_be_checked_or_promised(mode: str) -> None:
    with torch.inference_mode():
        model, reports = ready(Net()), []
        run = compiled(model, reports=reports, options={"weights": mode})
        assert close(run(image()), model(image()))
        if mode == "checked":
            _between_the_samples(model)
            assert close(run(image()), model(image()))
    assert {r.removed for r in reports} == {2}


# ---- renewals -----------------------------------------------------------------------------------


class Fails:
    """An inner backend that raises when it is told to, such as one whose disk is full."""

    def __init__(self) -> None:
        self.fails = False

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        if self.fails:
            raise OSError("no space left on device")
        return gm.forward


def test_a_renewal_that_fails_is_tried_again_and_never_answers() -> None:
    model, inner = net(), Fails()
    run = compiled(model, inner)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # of too many renewals
        run(image())
        for _ in range(backend.MAX_RENEWALS - 1):
            _load(model)
            inner.fails = True
            for _ in range(3):
                with pytest.raises(OSError, match="no space left"):
                    run(image())
            inner.fails = False
            assert close(run(image()), model(image()))


def test_a_strict_renewal_raises_until_the_weights_are_right() -> None:
    model = net()
    run = compiled(model, options={"strict": True})
    weight = model.body.branch[0][0].weight
    with torch.no_grad():
        run(image())
        weight[0, 0, 0, 0] = float("nan")
        for _ in range(2):
            with pytest.raises(rmfx.WeightError, match="holds NaN"):
                run(image())
        weight[0, 0, 0, 0] = 3
        assert close(run(image()), model(image()))


def test_the_old_state_answers_again_when_the_old_weights_are_back() -> None:
    model, inner = net(), Fails()
    run = compiled(model, inner)
    layer = model.body.branch[0][0]
    old, new = layer.weight, nn.Parameter(layer.weight * 2, False)
    with torch.no_grad():
        run(image())
        inner.fails = True
        layer.weight = new
        with pytest.raises(OSError, match="no space left"):
            run(image())
        layer.weight = old
        assert close(run(image()), model(image()))


def test_threads_wait_for_a_renewal_and_never_get_the_old_answer() -> None:
    model, entered, go_on = net(), threading.Event(), threading.Event()
    compilations = []

    def slow(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        compilations.append(gm)
        if len(compilations) > 1:
            entered.set()
            assert go_on.wait(60)
        return gm.forward

    run, x = compiled(model, slow), image()
    with torch.no_grad():
        run(x)
        _load(model)
        expected = model(x)

    def call() -> Tensor:
        with torch.no_grad():
            return run(x)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(call)
        assert entered.wait(60)
        others = [pool.submit(call) for _ in range(3)]
        early = [call.done() for call in others]
        go_on.set()
        answers = [call.result(60) for call in (first, *others)]
    assert not any(early)
    assert all(close(answer, expected) for answer in answers)
    assert len(compilations) == 2


def test_inductor_freezes_no_weights_of_a_graph_that_is_not_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(gm: fx.GraphModule, inputs: Any, **options: Any) -> None:
        raise rmfx.WeightError("no")

    monkeypatch.setattr(backend, "remove_residuals", refuse)
    model, x = net(torch.float32), image().float()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # weights stay in the graph
        run = compiled(model, "inductor")
        with pytest.warns(UserWarning, match="keeps its residual connections: no"):
            before = run(x)
        _load(model)
        expected = model(x)
        assert not close(before, expected, 1e-3)
        assert close(run(x), expected, 1e-5)


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "to another type"])
def test_weights_are_never_stale_with_inductors_freezing(change: str) -> None:
    with torch._inductor.config.patch(freezing=True):  # Dynamo then leaves weights in the graph
        test_weights_are_never_stale(change, "backend")


def test_a_broken_guard_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freshness.Snapshot, "holds", lambda self, tensors: True)
    for way in ("backend", "own backend"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_weights_are_never_stale("load_state_dict", way)
        torch._dynamo.reset()


def test_weights_that_keep_changing_run_the_graph_as_it_was() -> None:
    model = net()
    run = compiled(model)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(backend.MAX_RENEWALS + 3):
            assert close(run(image()), model(image()))
            _write(model)
    texts = [str(w.message) for w in caught]
    assert sum("have changed 8 times" in text for text in texts) == 1


def test_nothing_is_converted_again_while_the_weights_stay() -> None:
    model, reports = net(), []
    counter = CompileCounterWithBackend("eager")
    run = compiled(model, counter, reports=reports)
    with torch.no_grad():
        for _ in range(3):
            run(image())
    assert (counter.frame_count, len(reports)) == (1, 1)


# ---- gradients ----------------------------------------------------------------------------------


def test_a_graph_whose_gradients_are_asked_for_stays_as_it_is() -> None:
    model, reports = ready(Net()), []
    run = compiled(model, "aot_eager", reports=reports)
    with pytest.warns(UserWarning, match="gradients are asked for"):
        actual = run(image())
    expected = model(image())
    assert torch.equal(actual, expected)
    weights = tuple(model.parameters())
    for a, b in zip(
        torch.autograd.grad(actual.sum(), weights),
        torch.autograd.grad(expected.sum(), weights),
        strict=True,
    ):
        assert torch.allclose(a, b)
    assert not reports
    with torch.no_grad():  # another graph, converted
        assert close(run(image()), expected)
    assert [r.removed for r in reports] == [2]


def test_gradients_for_the_input_alone_count() -> None:
    model = net()
    x = image().requires_grad_()
    with pytest.warns(UserWarning, match="gradients are asked for"):
        actual = compiled(model)(x)
    (gradient,) = torch.autograd.grad(actual.sum(), x)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(gradient, expected)


# ---- what cannot be converted -------------------------------------------------------------------


def test_a_graph_that_cannot_be_converted_runs_as_it_is() -> None:
    model = net()
    model.body.branch[0][0].weight.view(-1)[0] = float("nan")  # type: ignore[index, union-attr]
    with torch.no_grad():
        with pytest.warns(UserWarning, match="body.branch.0.0.weight: the weight holds NaN"):
            actual = compiled(model)(image())
        assert torch.equal(actual.isnan(), model(image()).isnan())
        torch._dynamo.reset()
        with pytest.raises(Exception, match="holds NaN"):
            compiled(model, options={"strict": True})(image())


def test_batch_norm_in_training_is_not_converted() -> None:
    model = net()
    model.body.train()
    expected = copy.deepcopy(model)(image())  # which writes to the statistics
    with torch.no_grad(), pytest.warns(UserWarning, match="in training mode"):
        actual = compiled(model)(image())
    assert close(actual, expected)


# ---- inside one's own backend -------------------------------------------------------------------


def test_the_calling_convention_of_dynamo_is_kept() -> None:
    graphs: list[tuple[fx.GraphModule, fx.GraphModule]] = []

    def own(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append((gm, rmfx.remove_residuals(gm, inputs)))
        return graphs[-1][1].forward

    model = net()
    with torch.no_grad():
        assert close(torch.compile(model, backend=own)(image()), model(image()))
    before, after = graphs[0]
    names = [[n.name for n in gm.graph.nodes if n.op == "placeholder"] for gm in (before, after)]
    assert names[0] == names[1]
    assert adds(before) == 2
    assert adds(after) == 0
    assert rmfx.report(after).removed == 2
    assert rmfx.report(rmfx.remove_residuals(after)).removed == 0


@pytest.mark.parametrize("verb", [rmfx.fold_batch_norm, rmfx.merge_convs, rmfx.remove_noops])
def test_other_passes_read_dynamos_graph_too(verb: Any) -> None:
    model = ready(chain(Residual(basic_branch()), nn.Dropout())).requires_grad_(False)
    with torch.no_grad():
        run = torch.compile(model, backend=lambda gm, inputs: verb(gm, inputs).forward)
        assert close(run(image()), model(image()))
        _load(model)
        with pytest.raises(RuntimeError, match="weights have changed"):
            run(image())


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")  # inductor's own
def test_differentiable_graphs_are_converted_and_never_stale(inner: str, freezing: bool) -> None:
    if inner == "inductor" and torch.__version__ < "2.13":
        pytest.skip("inductor before torch 2.13 has no gradient for computed weights")
    model, reports = ready(Net()), []
    with torch._inductor.config.patch(freezing=freezing):
        run = compiled(model, inner, reports=reports, options={"differentiable": True})
        for change in (lambda m: None, _load, _optimise, _write, _replace):
            change(model)
            model.requires_grad_(True)
            weights = tuple(model.parameters())
            actual, expected = run(image()), model(image())
            assert close(actual, expected)
            pairs = zip(
                torch.autograd.grad(actual.square().sum(), weights),
                torch.autograd.grad(expected.square().sum(), weights),
                strict=True,
            )
            assert all(torch.allclose(a, b) for a, b in pairs)
    assert {r.removed for r in reports} == {2}


def test_differentiable_in_ones_own_backend() -> None:
    graphs: list[fx.GraphModule] = []

    def own(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(rmfx.remove_residuals(gm, inputs, differentiable=True))
        return graphs[-1].forward

    model = net()
    run = torch.compile(model, backend=own)
    assert close(run(image()), model(image()))
    _load(model)
    assert close(run(image()), model(image()))
    assert adds(graphs[0]) == 0
    assert not any(p.requires_grad for p in graphs[0].parameters())  # those are constants


def test_two_models_in_one_function_with_layers_of_the_same_names() -> None:
    first, second, reports = net(), net(), []
    with torch.no_grad():
        run = compiled(lambda x: second(first(x)), reports=reports)
        assert close(run(image()), second(first(image())))
    assert [r.removed for r in reports] == [4]
