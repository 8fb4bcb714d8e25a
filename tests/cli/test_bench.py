"""`rmfx bench` says beforehand how long it takes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rmfx.cli import bench, main
from rmfx.cli.bench import Trial, announcement, tried
from rmfx.demo import load_digits, load_model
from rmfx.latency import Network
from rmfx.table import FEWEST_ROUNDS
from rmfx.timing.speed import LatencyError, Settings

EAGER = Settings(runtimes=("eager",), batches=(1,), threads=1, rounds=20, seconds=0.1)


def test_rounds_batches_and_runtimes_take_their_time() -> None:
    trial = Trial(batch=1, conversion=3.0, calls=(0.001, 0.002))
    assert trial.estimate(EAGER) == pytest.approx(3 + 2 * 20 * 0.1)
    assert trial.estimate(replace(EAGER, rounds=40)) == pytest.approx(3 + 2 * 40 * 0.1)
    assert trial.estimate(replace(EAGER, batches=(1, 8))) == pytest.approx(2 * (3 + 4))
    compiled = replace(EAGER, runtimes=("eager", "inductor"))
    assert trial.estimate(compiled) == pytest.approx(3 * 11 + 2 * 4)
    slow = Trial(batch=1, conversion=3.0, calls=(1.0, 2.0))
    assert slow.estimate(replace(EAGER, batches=(8,))) == pytest.approx(3 + 20 * 3 * 8 * 3)


def test_a_line_is_written_before_the_first_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--runtimes=eager", "--batch=1", "--rounds=1", "--threads=1", "--json")
    assert main(["bench", "rmfx.models:DigitsNet", "--input-shape=1,1,28,28", *asked]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"rmfx: this will take about \d+ (s|min); fewer --runtimes.*", line)


def test_the_short_run_measures_the_network() -> None:
    network = Network("digits", load_model(), (load_digits()[0][:1],))
    trial = tried(network, replace(EAGER, batches=(2, 8)), lambda _: None)
    assert trial is not None
    assert trial.batch == 2
    assert trial.conversion > sum(trial.calls) > 0


def test_the_help_says_how_many_rounds_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"fewer than {FEWEST_ROUNDS} cannot tell which is faster" in told


def test_nobody_knows_how_long_a_network_takes_that_fails() -> None:
    assert announcement([None], EAGER) == ""
    assert "about 7 s" in announcement([Trial(1, 3.0, (0.001, 0.001)), None], EAGER)
    assert set(bench._PREPARATIONS) >= set(Settings().runtimes)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf"), "0.1"])
def test_a_tolerance_is_a_number_above_0(tolerance: float) -> None:
    with pytest.raises(LatencyError, match=r"tolerance=.* must be a number, at least 0"):
        Settings(tolerance=tolerance)
