"""The summary that `rmfx convert`, `rmfx report` and `rmfx demo` print."""

from __future__ import annotations

import json

import torch
from torch import nn

from rmfx.conversion import convert
from rmfx.demo import load_digits, load_model


def test_both_forms_come_with_their_costs() -> None:
    images, _ = load_digits()
    conversion = convert(load_model(), images[:1])
    assert conversion.cost_before is not None
    assert conversion.cost_after is not None
    assert (conversion.cost_before.adds, conversion.cost_after.adds) == (5, 0)
    # What the table compares is the removal alone: both have their batch norm folded.
    for gm in (conversion.before, conversion.after):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in gm.modules())
    with torch.no_grad():
        difference = conversion.before(images[:8]) - conversion.after(images[:8])
    assert difference.abs().max() < 1e-4


def test_text_has_summary_sites_and_costs() -> None:
    text = str(convert(load_model(), load_digits()[0][:1]))
    for word in (
        "5 of 5 residual connections removed",
        "layer3.0",
        "multiply-adds",
        "after/before",
    ):
        assert word in text


def test_the_text_says_whether_the_result_is_a_chain() -> None:
    conversion = convert(load_model())
    assert "\nthe result is a chain: rmfx.to_sequential gives it" in str(conversion)
    assert conversion.to_dict()["why_not_plain"] is None
    kept = convert(load_model(), policy=lambda row: False)
    (line,) = (line for line in str(kept).splitlines() if line.startswith("the result is no chain"))
    assert "is read by" in line
    assert " together" in line
    assert kept.to_dict()["why_not_plain"] in line


def test_the_text_says_that_batch_norm_is_folded_where_it_is() -> None:
    model, images = load_model(), load_digits()[0][:1]
    assert "batch norm is folded in both forms" in str(convert(model, images)).splitlines()[-1]
    assert "batch norm is" not in str(convert(model, images, fold_batch_norm=False))
    chain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    assert "batch norm is" not in str(convert(chain, images))


def test_without_inputs_there_are_no_costs() -> None:
    conversion = convert(load_model())
    assert conversion.cost_before is None
    assert conversion.to_dict()["cost"] is None
    assert "after/before" not in str(conversion)


def test_dict_is_what_json_can_hold() -> None:
    found = convert(load_model(), load_digits()[0][:1]).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["cost"]["before"]["adds"] == 5


def test_a_network_without_residuals_is_called_one() -> None:
    chain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    assert "no residual connections" in str(convert(chain, (torch.zeros(1, 1, 8, 8),)))


def test_the_conversion_was_verified() -> None:
    found = convert(load_model(), load_digits()[0][:1]).report.verification
    assert found is not None
    assert len(found.joins) == 5
    assert found.error < 1e-5
    assert not found.unseen
