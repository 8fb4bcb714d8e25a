"""The latency report: what is compared, what is noted, what is written. No test looks at a time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from rmfx import latency
from rmfx.files.figures import PlotError
from rmfx.latency import Latency, LatencyReport, Network, measure_latency
from rmfx.timing import runtimes
from rmfx.timing.machine import cpu_name
from rmfx.timing.speed import LatencyError, Settings

FAST = {"batches": (1,), "threads": 1, "rounds": 2, "seconds": 0.001}


class Residual(nn.Module):
    """One residual connection, whose carry needs bounds per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(nn.functional.relu6(self.bn(self.expand(x))))


def residual() -> Network:
    return Network("residual", Residual().eval(), (torch.zeros(1, 3, 8, 8),))


def measure(*runtimes: str, network: Network | None = None) -> LatencyReport:
    return measure_latency([network or residual()], Settings(runtimes=runtimes, **FAST))


def example_report() -> LatencyReport:
    rows = (
        Latency("a", "eager", 1, 1.1, 1e-6, (1.0, 2.0, 4.0), (1.5, 2.0, 8.0)),
        Latency("a", "onnxruntime", 1, failure="Fail: no <such> kernel"),
        Latency("a", "eager", 8, 1.1, 1e-6, (1.0,), (3.0,)),
        Latency("a", "onnxruntime", 8, 1.1, 1e-6, (2.0, 2.0), (3.0, 3.0)),
    )
    return LatencyReport(rows, ("a note",), {"threads": "2", "CPU": "abacus", "torch": "2.0"})


# ---- what is measured ---------------------------------------------------------------------------


def test_eager_gives_ratios() -> None:
    report = measure("eager")
    (row,) = report.rows
    assert len(row.original) == len(row.converted) == 2
    assert all(seconds > 0 for seconds in row.original + row.converted)
    assert all(ratio > 0 for ratio in row.ratios)
    median, low, high = row.ratio
    assert low <= median <= high
    assert row.error is not None
    assert row.error < 1e-5
    assert row.macs is not None
    assert row.macs > 1
    assert report.failures == report.notes == ()


@pytest.mark.bench
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_that_read_onnx_give_ratios(runtime: str) -> None:
    for package in runtimes.RUNTIMES[runtime].packages:
        pytest.importorskip(package)
    report = measure(runtime)
    (row,) = report.rows
    assert row.failure == ""
    assert all(ratio > 0 for ratio in row.ratios)
    assert report.machine[runtime]


@pytest.mark.slow
def test_inductor_gives_ratios_and_its_settings_come_back() -> None:
    import torch._inductor.config

    (row,) = measure("inductor").rows
    assert row.failure == ""
    assert all(ratio > 0 for ratio in row.ratios)
    assert not torch._inductor.config.freezing


def test_rounds_alternate_which_form_goes_first() -> None:
    order: list[str] = []

    def runner(name: str) -> Callable[[], object]:
        return lambda: order.append(name) if order[-1:] != [name] else None

    settings = Settings(runtimes=("eager",), threads=1, rounds=4, seconds=0.0)
    original, converted = settings.times([runner("original"), runner("converted")])
    assert len(original) == len(converted) == 4
    # original converted | converted original | original converted | converted original
    assert order == ["original", "converted", "original", "converted", "original"]


def test_every_batch_size_is_measured_on_that_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(form: runtimes.Form, threads: int) -> runtimes.Run:
        seen.append(form.inputs[0].shape[0])
        return runtimes.run_eagerly(form, threads)

    monkeypatch.setitem(runtimes.RUNTIMES, "eager", runtimes.Runtime(spy))
    settings = Settings(**{**FAST, "runtimes": ("eager",), "batches": (1, 3)})
    report = measure_latency([residual()], settings)
    assert [row.batch for row in report.rows] == [1, 3]
    assert seen == [1, 1, 3, 3]


def test_the_original_is_without_batch_norm_and_keeps_its_add(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forms: list[fx.GraphModule] = []

    def spy(form: runtimes.Form, threads: int) -> runtimes.Run:
        forms.append(form.gm)
        return runtimes.run_eagerly(form, threads)

    monkeypatch.setitem(runtimes.RUNTIMES, "eager", runtimes.Runtime(spy))
    measure("eager")
    original, converted = forms
    assert not any(isinstance(m, nn.BatchNorm2d) for m in original.modules())
    assert "add" in original.code
    assert "add" not in converted.code


def test_the_number_of_threads_is_used_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def spy(form: runtimes.Form, threads: int) -> runtimes.Run:
        def run() -> object:
            seen.add(torch.get_num_threads())
            return form.gm(*form.inputs)

        return run

    monkeypatch.setitem(runtimes.RUNTIMES, "eager", runtimes.Runtime(spy))
    threads = torch.get_num_threads()
    settings = Settings(**{**FAST, "runtimes": ("eager",), "threads": threads + 1})
    measure_latency([residual()], settings)
    assert seen == {threads + 1}
    assert torch.get_num_threads() == threads


# ---- what does not work -------------------------------------------------------------------------


def test_a_wrong_conversion_is_an_error_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = latency.convert

    def convert_wrongly(*arguments: object, **options: object) -> object:
        conversion = right(*arguments, **options)  # type: ignore[arg-type]
        weights = dict(conversion.after.named_parameters())
        with torch.no_grad():
            next(iter(weights.values())).mul_(1.01)
        return conversion

    monkeypatch.setattr(latency, "convert", convert_wrongly)
    (row,) = measure("eager").rows
    assert "the converted network gives wrong numbers here" in row.failure
    assert row.error is not None
    assert row.error > 1e-4
    assert row.original == row.converted == ()


def test_a_runtime_that_is_wrong_for_both_forms_is_an_error_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference is the original in eager mode, not what the runtime makes of it."""

    def halve(form: runtimes.Form, threads: int) -> runtimes.Run:
        return lambda: form.gm(*form.inputs) / 2

    monkeypatch.setitem(runtimes.RUNTIMES, "inductor", runtimes.Runtime(halve))
    wrong, right = measure("inductor", "eager").rows
    assert "the original network gives wrong numbers here" in wrong.failure
    assert right.failure == ""


def test_a_runtime_that_fails_says_why_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(form: runtimes.Form, threads: int) -> runtimes.Run:
        raise ValueError("\nno kernel for Residual\nand much more")

    monkeypatch.setitem(runtimes.RUNTIMES, "inductor", runtimes.Runtime(fail))
    report = measure("inductor", "eager")
    assert [row.failure for row in report.rows] == ["ValueError: no kernel for Residual", ""]
    assert "failed: ValueError: no kernel for Residual" in str(report)


def test_a_missing_runtime_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = runtimes.Runtime(runtimes.run_in_openvino, ("no_such_package",))
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", absent)
    report = measure("openvino", "eager")
    assert [row.runtime for row in report.rows] == ["eager"]
    (note,) = report.notes
    assert note.startswith("openvino left out: no_such_package not installed")
    assert "pip install" in note
    assert note in str(report)
    left = r"no runtime is left to measure in: no_such_package not installed \(pip install no_such"
    with pytest.raises(LatencyError, match=left):
        measure("openvino")


def test_a_connection_that_stays_is_noted() -> None:
    class Softmaxed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.softmax(x, 1)

    network = Network("softmaxed", Softmaxed().eval(), (torch.zeros(2, 4),))
    (note,) = measure("eager", network=network).notes
    assert note.startswith("softmaxed: 1 of 1 residual connections are still there")


def test_a_batch_that_the_network_does_not_take_is_an_error_row() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 4)

    network = Network("fixed", Fixed().eval(), (torch.zeros(2, 4),))
    settings = Settings(**{**FAST, "runtimes": ("eager",), "batches": (1, 2)})
    first, second = measure_latency([network], settings).rows
    assert first.failure != ""
    assert second.failure == ""


def test_other_types_than_float32_are_refused() -> None:
    network = Network("doubles", Residual().double().eval(), (torch.zeros(1, 3, 8, 8).double(),))
    with pytest.raises(LatencyError, match=r"doubles takes torch\.float64.*float32 only"):
        measure("eager", network=network)


@pytest.mark.parametrize(
    "wrong",
    [{"runtimes": ("abacus",)}, {"runtimes": ()}, {"batches": ()}, {"batches": (0,)}]
    + [{"threads": 0}, {"rounds": 0}, {"rounds": "a"}, {"seconds": -1.0}, {"seconds": "a"}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(LatencyError):
        Settings(**{**FAST, **wrong})


# ---- what is written ----------------------------------------------------------------------------


def test_ratio_is_the_median_of_paired_rounds() -> None:
    first, failed, single, _ = example_report().rows
    assert first.ratios == (1.5, 1.0, 2.0)
    assert first.ratio == (1.5, 1.25, 1.75)
    assert single.ratio == (3.0, 3.0, 3.0)
    assert failed.ratios == ()


def test_json_holds_everything() -> None:
    report = example_report()
    text = json.dumps(report.to_dict())
    assert LatencyReport.from_dict(json.loads(text)) == report
    rows = json.loads(text)["rows"]
    ratio = {"median": 1.5, "low": 1.25, "high": 1.75}
    assert rows[0]["ratio"] == ratio | {"beyond_noise": False}
    assert "ratio" not in rows[1]


def test_the_table_says_how_it_was_made() -> None:
    text = str(example_report())
    assert "1.50 (1.25 to 1.75)" in text
    assert all(part in text for part in ("a note", "threads 2", "abacus", "torch 2.0"))


def test_the_table_says_what_is_not_beyond_the_noise() -> None:
    turns = {"original": (1.0,) * 8, "converted": (1.1, 0.9) * 4}
    slower = {"original": (1.0,) * 8, "converted": (1.1,) * 8}
    rows = (Latency("even", "eager", 1, **turns), Latency("slow", "eager", 1, **slower))
    even, slow = str(LatencyReport(rows, (), {})).splitlines()[2:4]
    assert "1.00 (0.90 to 1.10), not beyond the noise" in even
    assert "1.10 (1.10 to 1.10)" in slow
    assert "noise" not in slow


def test_the_table_says_that_rounds_are_too_few() -> None:
    row = Latency("slow", "eager", 1, original=(1.0,) * 5, converted=(1.8,) * 5)
    text = str(LatencyReport((row,), (), {}))
    assert "1.80 (1.80 to 1.80), too few rounds to tell (it takes 6)" in text
    assert "not beyond the noise" not in text
    assert "by a sign test on the\nrounds, which takes 6 of them" in text


def test_the_table_has_no_median_that_contradicts_the_ratio() -> None:
    before, after = (1.0, 1.0, 3.0, 3.0, 1.0), (0.9, 0.9, 2.0, 2.0, 2.0)
    row = Latency("a", "eager", 1, original=before, converted=after)
    text = str(LatencyReport((row,), (), {}))
    assert "1000 (1000 to 3000)" in text
    assert " 900 (667 to 900)" in text
    assert "0.90 (0.67 to 0.90)" in text
    assert "2000" not in text


def test_machine_names_threads_precision_and_versions() -> None:
    machine = measure("eager").machine
    assert machine["threads"] == "1"
    assert machine["precision"] == "float32"
    assert machine["torch"] == importlib.metadata.version("torch")
    assert "onnxruntime" not in machine


def test_plot_is_an_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.svg"
    latency.plot(example_report(), path)
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    text = " ".join(root.itertext())
    assert all(word in text for word in ("onnxruntime", "a, batch 8", "converted / original"))
    again = tmp_path / "again.svg"
    latency.plot(example_report(), again)
    assert again.read_bytes() == path.read_bytes()


def test_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.png"
    latency.plot(example_report(), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000


def test_a_plot_without_matplotlib_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlotError, match="needs matplotlib: pip install"):
        latency.plot(example_report(), tmp_path / "ratios.svg")


def test_cpu_has_a_name() -> None:
    assert cpu_name().strip()
