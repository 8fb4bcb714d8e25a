"""Random networks keep the values of their outputs and of every join."""

from __future__ import annotations

from hypothesis import given

import rmfx
from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks


@given(residual_networks())
def test_random_networks_keep_their_values(spec: NetworkSpec) -> None:
    model, inputs = spec.build(), spec.inputs()
    plain = rmfx.remove_residuals(model, inputs)
    assert_equivalent(model, plain, inputs)


@given(residual_networks())
def test_random_networks_keep_their_values_without_example_inputs(spec: NetworkSpec) -> None:
    model, inputs = spec.build(), spec.inputs()
    plain = rmfx.remove_residuals(model)
    assert_equivalent(model, plain, inputs)
