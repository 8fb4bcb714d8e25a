"""What all tests share: hypothesis profiles, seeds, one thread for each worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from rmfx.ir.spec import enforced

# The first example of a property compiles or traces things and is slow; no deadline then. Most draw
# whole networks, which .ci/run and `rmfx fuzz` do by the hundreds.
settings.register_profile(
    "default",
    max_examples=12,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
# `pytest tests/testing/test_random_networks.py --hypothesis-profile=ci`: bounded, and the same in
# every run; two tests of 120 networks each.
settings.register_profile(
    "ci", settings.get_profile("default"), max_examples=120, derandomize=True, print_blob=True
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random weights are the same whether a test runs alone or with others."""
    torch.default_generator.manual_seed(0)  # torch's own way takes a millisecond for each device


@pytest.fixture(autouse=True)
def _dialect() -> Iterator[None]:
    """Every rule leaves a graph in the dialect."""
    with enforced():
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Leaves out what is slow where nobody names tests or marks; shares the cores among workers."""
    if config.args_source is config.ArgsSource.TESTPATHS and not config.option.markexpr:
        config.option.markexpr = "not slow"
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
