"""`rmfx models`: every network that its name alone makes, with what it takes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from rmfx import models
from rmfx.cli.own_models import OwnModel, listed, own_models
from rmfx.files.loading import load_model

SMALL = [row for row in own_models() if "rmnext" not in row.name]


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
@pytest.mark.parametrize("size", ["64", "96"])
def test_a_network_takes_the_shape_that_is_listed(row: OwnModel, size: str) -> None:
    model = load_model(row.name).model
    assert isinstance(model, nn.Module)
    shape = [int({"N": "1", "H": size, "W": size}.get(n, n)) for n in row.shape.split(",")]
    with torch.no_grad():
        assert model(torch.zeros(shape)).isfinite().all()


@pytest.mark.parametrize("name", models.__all__)
def test_a_network_is_listed_if_it_needs_no_arguments(name: str) -> None:
    is_listed = f"rmfx.models:{name}" in {row.name for row in own_models()}
    with torch.device("meta"), contextlib.nullcontext() if is_listed else pytest.raises(TypeError):
        getattr(models, name)()


def test_the_table_says_what_is_free() -> None:
    text = listed([OwnModel("a:b", 5, "a network")])
    assert "N,5,H,W" in text
    assert text.endswith("N, H and W are free, such as --input-shape 1,5,64,64.")
