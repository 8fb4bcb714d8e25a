"""How every network of the study is trained: the same for all arms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from _fashion import Split
from torch import Tensor, nn
from torch.nn import functional

WARM_UP = 0.2  # the share of the cycle in which the learning rate rises


@dataclass(frozen=True)
class Recipe:
    """SGD with one cycle of the learning rate, from 0 up to the highest and down to 0 again.

    Attributes:
        images: that a network sees in all, before and after pruning.
        pruned_at: the share of the cycle after which arms prune.
        rate: the highest learning rate.
        batch: images of a step.
        decay: weight decay.
        bfloat16: whether layers compute in bfloat16, where that is faster.
    """

    images: int
    pruned_at: float = 0.3
    rate: float = 0.2
    batch: int = 128
    decay: float = 5e-4
    bfloat16: bool = False

    @property
    def steps(self) -> int:
        """Of the whole cycle."""
        return max(4, round(self.images / self.batch))

    @property
    def pruning_step(self) -> int:
        """Before which arms prune."""
        return round(self.pruned_at * self.steps)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: half a cosine up, half a cosine down."""
        done = (step + 0.5) / self.steps
        phase = done / WARM_UP if done < WARM_UP else 1 + (done - WARM_UP) / (1 - WARM_UP)
        return self.rate * (1 - math.cos(math.pi * phase)) / 2


def train(
    net: nn.Module,
    split: Split,
    recipe: Recipe,
    steps: range,
    seed: int,
    regularise: Callable[[nn.Module], Callable[[float], object]] | None = None,
) -> nn.Module:
    """Trains a copy in some steps of the cycle.

    Args:
        regularise: given the copy, makes what is called with the learning rate after each step.

    Returns:
        The trained network in eval mode.
    """
    net = copy.deepcopy(net).train()
    if not any(p.requires_grad for p in net.parameters()):
        net.requires_grad_(True)
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=recipe.rate, momentum=0.9, nesterov=True, weight_decay=recipe.decay
    )
    then = regularise(net) if regularise else None
    generator = torch.Generator().manual_seed(1000 * seed + steps.start)
    batches = islice(split.forever(recipe.batch, generator), len(steps))
    for step, (x, y) in zip(steps, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            output: Tensor = net(x.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        functional.cross_entropy(output.float(), y).backward()
        optimizer.step()
        if then:
            then(recipe.rate_at(step))
    return net.eval().to(memory_format=torch.contiguous_format)


def renew(net: nn.Module) -> None:
    """New weights for all layers."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            layer.reset_parameters()


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """The share of images that a network in eval mode names rightly, in %."""
    hits = [(net(x).argmax(1) == y).double() for x, y in split.batches()]
    return 100 * float(torch.cat(hits).mean())


@torch.no_grad()
def loss(net: nn.Module, split: Split) -> float:
    """Mean cross-entropy of a network in eval mode."""
    losses = [functional.cross_entropy(net(x), y, reduction="none") for x, y in split.batches()]
    return float(torch.cat(losses).mean())
