"""Independent calls in processes of this machine and on a cluster give what they give here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from builders import doubled_unless_negative

import rmfx
from rmfx import fuzz
from rmfx.testing.jobs import Jobs

HERE = Jobs()
TWO = Jobs(2)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with two workers on this machine."""
    distributed = pytest.importorskip("distributed", reason="pip install 'dask[distributed]'")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address


def of_fuzzing(how: Jobs, **options: object) -> dict[str, object]:
    given = {"jobs": how.count, "backend": how.backend, "address": how.address}
    return fuzz.fuzz(examples=12, seed=3, frontend="traced", **given, **options).to_dict()


def test_processes_give_results_in_order() -> None:
    given = [(i,) for i in range(20)]
    found = list(TWO.results(doubled_unless_negative, given))
    assert [one for one, _ in found] == [2 * i for (i,) in given]
    assert os.getpid() not in {process for _, process in found}
    other = TWO.results(doubled_unless_negative, given, in_order=False)
    assert sorted(one for one, _ in other) == [2 * i for (i,) in given]


def test_without_more_jobs_it_is_this_process() -> None:
    assert list(HERE.results(doubled_unless_negative, [(1,)])) == [(2, os.getpid())]


@pytest.mark.parametrize("how", [HERE, TWO])
def test_what_a_call_raises_is_raised(how: Jobs) -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        list(how.results(doubled_unless_negative, [(1,), (-1,)]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"jobs": 0}, "from 1"),
        ({"backend": "threads"}, "choose from loky, dask, ray"),
        ({"address": "tcp://1.2.3.4:5"}, "name its backend"),
        ({"backend": "dask", "address": "nowhere"}, "backend='dask'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(rmfx.OptionError, match=text):
        fuzz.fuzz("remove_noops", examples=1, **options)


@pytest.mark.slow
def test_fuzzing_does_not_depend_on_where_it_runs(address: str) -> None:
    expected = of_fuzzing(HERE)
    assert expected["examples"] == 12
    assert of_fuzzing(TWO) == expected
    assert of_fuzzing(Jobs(-1, "dask", address)) == expected


@pytest.mark.slow
def test_the_first_failure_is_found_wherever_it_runs() -> None:
    here, there = (
        fuzz.fuzz("builders:refuses_slopes", examples=60, seed=2, frontend="traced", jobs=jobs)
        for jobs in (1, 2)
    )
    assert here.failure is not None
    assert here.examples > 1
    assert here.to_dict() == there.to_dict()


@pytest.mark.slow
def test_a_time_limit_ends_processes_too() -> None:
    assert 0 < fuzz.fuzz("remove_noops", examples=None, seconds=2, jobs=2).examples < 10_000


@pytest.mark.slow
def test_no_more_is_begun_once_nobody_reads() -> None:
    read: list[int] = []

    def given() -> Iterator[tuple[int]]:
        for i in range(1000):
            read.append(i)
            yield (i,)

    found = TWO.results(doubled_unless_negative, given())
    next(found)
    found.close()
    time.sleep(0.2)
    assert len(read) < 100
