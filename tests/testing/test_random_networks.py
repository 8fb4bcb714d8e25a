"""Random networks keep the values of their outputs and of every join."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import rmfx
from rmfx.choices import STRATEGIES
from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks

WAYS = st.one_of(
    st.sampled_from(["auto", "auto", "relu"]), st.sets(st.sampled_from(STRATEGIES), min_size=1)
)
SHIFTED = 1e-8  # a shift costs digits


@given(residual_networks(), WAYS)
def test_random_networks_keep_their_values(spec: NetworkSpec, activation: str | set[str]) -> None:
    model, inputs = spec.build(), spec.inputs()
    bound = max(float(x.abs().max()) for x in inputs)
    plain = rmfx.remove_residuals(
        model,
        inputs,
        activation=activation,
        input_range=(-bound, bound),
        calibration=[inputs] if "shift" in activation else None,
    )
    rounds = any(row.strategy == "shift" for row in rmfx.report(plain).rows)
    assert_equivalent(model, plain, inputs, tolerance=SHIFTED if rounds else None)


@given(residual_networks())
def test_random_networks_keep_their_values_without_example_inputs(spec: NetworkSpec) -> None:
    model, inputs = spec.build(), spec.inputs()
    plain = rmfx.remove_residuals(model)
    assert_equivalent(model, plain, inputs)
