"""Adapters of PEFT on tiny transformers are merged into the layers that they adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import rmfx

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
INSTALL = "pip install peft transformers"
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES["intermediate_size"] = 24


class Hidden(nn.Module):
    """A transformer that gives its last hidden state alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state  # type: ignore[no-any-return]


def bert(transformers: Any) -> nn.Module:
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=32, **SIZES)
    return transformers.BertModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


def vit(transformers: Any) -> nn.Module:
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
    return transformers.ViTModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


def llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, num_key_value_heads=1, max_position_embeddings=32, use_cache=False, **SIZES
    )
    return transformers.LlamaModel(config)  # type: ignore[no-any-return]


def tokens(*shape: int) -> Tensor:
    return torch.randint(40, shape)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64)


def lengths() -> tuple[Tensor, ...]:
    return tokens(2, 7), tokens(1, 3), tokens(3, 20)


def batches() -> tuple[Tensor, ...]:
    return images(2), images(1), images(5)


# What builds a network, inputs of several sizes, and how many of their dimensions are left open.
Rows = tuple[Callable[[Any], nn.Module], Callable[[], tuple[Tensor, ...]], int]
NETWORKS: dict[str, Rows] = {
    "bert": (bert, lengths, 2),
    "vit": (vit, batches, 1),
    "llama": (llama, lengths, 2),
}


def adapted(build: Callable[[Any], nn.Module]) -> tuple[nn.Module, int]:
    """A network with random adapters on all linear layers of its blocks, and their number."""
    peft = pytest.importorskip("peft", reason=INSTALL)
    transformers = pytest.importorskip("transformers", reason=INSTALL)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    model = peft.get_peft_model(build(transformers), config)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    for weight in weights:
        nn.init.normal_(weight, std=0.3)
    return Hidden(model).double().eval(), len(weights) // 2


@pytest.mark.parametrize(("build", "inputs", "open_dims"), NETWORKS.values(), ids=NETWORKS)
def test_adapters_are_merged(
    build: Callable[[Any], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], open_dims: int
) -> None:
    model, count = adapted(build)
    x, *others = inputs()
    shapes = (dict.fromkeys(range(open_dims), Dim.AUTO),)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    merged = rmfx.merge_branches(program, x)
    assert rmfx.report(merged).removed == count > 0, str(rmfx.report(merged))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    for value in (x, *others):
        torch.testing.assert_close(merged(value), model(value), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("build", "inputs", "open_dims"), NETWORKS.values(), ids=NETWORKS)
def test_a_module_is_exported_on_the_way(
    build: Callable[[Any], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], open_dims: int
) -> None:
    model, count = adapted(build)
    x = inputs()[0]
    merged = rmfx.merge_branches(model, x)
    assert rmfx.report(merged).removed == count, str(rmfx.report(merged))
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-10)
    adapted(build)  # what the library keeps classes in is as it was
