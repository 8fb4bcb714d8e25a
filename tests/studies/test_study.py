"""What the pruning study reads off its curves, on numbers that can be checked by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "pruning"))

from _study import FROM_SCRATCH
from outcomes import UNPRUNED, Job, Outcome, Record, Timing
from summary import accuracy_at, best, claims_of, cost_at, curves_of, write_summary

# accuracy in % of two seeds at half and a quarter of the multiply-adds
ACCURACY = {
    "residual": {0.5: (88.0, 88.4), 0.25: (86.0, 86.4)},
    "merged": {0.5: (87.0, 87.4), 0.25: (86.2, 86.6)},
    "Torch-Pruning L2": {0.5: (85.0, 85.4), 0.25: (80.0, 86.2)},
    "residual" + FROM_SCRATCH: {0.5: (87.0, 87.2), 0.25: (86.9, 87.3)},
}
TIMES = {"residual": 1.0, "merged": 0.5, "Torch-Pruning L2": 1.2}  # times the share


def record(path: Path) -> Record:
    found = Record(path)
    for seed, accuracy in enumerate((90.0, 90.2)):
        whole = Job("mobilenet", UNPRUNED, 1.0, seed)
        found.add(Outcome(whole, 1, "", 1000, 100, 4, 90.0, accuracy, accuracy))
        for arm, shares in ACCURACY.items():
            for share, values in shares.items():
                job = Job("mobilenet", arm, share, seed)
                macs = round(1000 * share)
                found.add(Outcome(job, 1, "", macs, 50, 4, 10.0, values[seed], values[seed]))
                if arm in TIMES and not seed:
                    for runtime in ("inductor", "onnxruntime"):
                        time = TIMES[arm] * share
                        found.add(Timing(job, runtime, (time, time, time)))
    return found


def test_the_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    saved = record(tmp_path / "study.json")
    saved.save()
    again = Record.read(saved.path)
    assert again.outcomes == saved.outcomes
    assert list(again.timings) == list(saved.timings)


def test_curves_are_read_by_lines_between_points(tmp_path: Path) -> None:
    curve = curves_of(record(tmp_path / "x"), "mobilenet")["residual"]
    assert [p.macs for p in curve] == [0.25, 0.5, 1.0]
    assert accuracy_at(curve, "multiply-adds", 0.375) == pytest.approx((87.0, 87.4))
    assert accuracy_at(curve, "inductor", 0.2) is None  # no network is that fast
    assert cost_at(curve, "inductor", 87.0, 0) == pytest.approx(0.375)
    assert cost_at(curve, "inductor", 85.0, 0) == pytest.approx(0.25)
    assert cost_at(curve, "inductor", 95.0, 0) is None


def test_only_whole_seeds_count(tmp_path: Path) -> None:
    known = record(tmp_path / "x")
    del known.outcomes[Job("mobilenet", "merged", 0.5, 1)]
    curves = curves_of(known, "mobilenet")
    assert all(len(p.test) == 1 for curve in curves.values() for p in curve)


def test_the_best_arm_is_chosen_on_the_validation_images(tmp_path: Path) -> None:
    curves = curves_of(record(tmp_path / "x"), "mobilenet")
    assert best(curves, ["residual", "merged"]) == "residual"
    assert best(curves, ["residual", "merged"], 0.25) == "merged"


def test_one_seed_that_is_behind_is_told(tmp_path: Path) -> None:
    known = record(tmp_path / "x")
    peer = Job("mobilenet", "Torch-Pruning L2", 0.25, 1)
    known.add(replace(known.outcomes[peer], test=88.0))
    claims = claims_of(curves_of(known, "mobilenet"), "mobilenet")
    (claim,) = (c for c in claims if "inductor, time 0.30" in c.text)
    assert "(-0.41 to 7.20)" in claim.text
    assert not claim.holds


def test_claims_hold_only_beyond_the_spread_of_the_seeds(tmp_path: Path) -> None:
    claims = claims_of(curves_of(record(tmp_path / "x"), "mobilenet"), "mobilenet")
    holds = {claim.text: claim.holds for claim in claims}
    # At 0.6 of the time the peer has 85.0 and 85.4, residual by interpolation 88.4 and 88.76.
    (half,) = (t for t in holds if "inductor, time 0.60" in t)
    assert "88.58 (88.40 to 88.76)" in half
    assert holds[half]
    # At 0.3 it has 80.0 and 86.2. Residual has 86.4 and 86.8, but merged is better on the
    # validation images there: each seed is above.
    (quarter,) = (t for t in holds if "inductor, time 0.30" in t)
    assert "merged 87.39 (87.20 to 87.59)" in quarter
    assert "seed by seed 4.29 (1.39 to 7.20)" in quarter
    assert holds[quarter]
    (better,) = (t for t in holds if t.startswith("residual at 0.50"))
    (worse,) = (t for t in holds if t.startswith("residual at 0.25"))
    assert holds[better]
    assert not holds[worse]
    # merged takes 0.125 for 86.2 and 86.6, residual 0.275, from scratch 0.25.
    (merged,) = (t for t in holds if t.startswith("inductor, merged at 0.25"))
    assert "2.00 (2.00 to 2.00)" in merged
    assert holds[merged]


def test_the_page_has_tables_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    known = record(tmp_path / "study.json")
    rows, limits = write_summary(known, ["mobilenet", "resnet20"])
    assert {row["arm"] for row in rows} == {UNPRUNED, *ACCURACY}
    assert all(limit.holds for limit in limits)
    assert "| residual " in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study_mobilenet.svg").read_text().startswith("<?xml")
