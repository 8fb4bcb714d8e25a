"""What training needs around pruning; each works in any training loop.

    slimming = Slimming(model, strength=1e-4)
    for inputs, targets in loader:
        loss(model(inputs), targets).backward()
        optimizer.step()
        slimming.step(learning_rate)

For the statistics of batch norm after pruning there is `torch.optim.swa_utils.update_bn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rmfx.algebra.affine import CONVS
from rmfx.errors import OptionError, WeightError
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.modules.activations import ChannelPReLU
from rmfx.modules.parametrized import make_ordinary
from rmfx.options import count_of, number_of


class Slimming:
    """L1 on the scales of batch norms, by the proximal step, which reaches 0 (a gradient does not).

    Network slimming (Liu et al., 2017): what is 0 afterwards can go for nothing.

    Args:
        model: to be trained.
        strength: of the penalty strength·Σ|γ|.
        scales: other parameters than those of batch norms, such as `rmfx.layer_scales(model)`.
    """

    def __init__(
        self, model: nn.Module, strength: float, *, scales: Iterable[Tensor] | None = None
    ) -> None:
        self.strength = number_of("strength", strength, least=0, below=math.inf)
        if isinstance(scales, Tensor):
            raise OptionError("scales is a tensor; pass a list of parameters")
        norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
        found = [m.weight for m in norms if m.weight is not None] if scales is None else scales
        self.scales: list[Tensor] = list(found)
        if not self.scales and scales is not None:
            raise OptionError("scales= is empty; rmfx.insert_resconv makes scales of layers")
        if not self.scales:
            raise OptionError(
                f"{type(model).__name__} has no batch norm with a scale; "
                "rmfx.insert_batch_norm puts one behind every convolution"
            )

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """γ ← sign(γ)·max(|γ| − learning_rate·strength, 0); to be called after the optimiser."""
        learning_rate = number_of("learning_rate", learning_rate, least=0, below=math.inf)
        for scale in self.scales:
            scale.copy_(F.softshrink(scale, learning_rate * self.strength))

    def zeros(self) -> int:
        """Scales that are 0."""
        return sum(int((scale == 0).sum()) for scale in self.scales)


def gradual_targets(final: float, steps: int, start: float = 1.0) -> Iterator[float]:
    """Shares of the cost to prune to, one after the other, fast at first (Zhu and Gupta, 2017).

    Each is a share of the whole network's cost: divide by the one before it to prune what is left.

    >>> [round(share, 3) for share in gradual_targets(0.5, 3)]
    [0.648, 0.519, 0.5]
    """
    steps = count_of("steps", steps)
    start = number_of("start", start, above=0, most=1)
    final = number_of("final", final, above=0, most=start)
    done = (step / steps for step in range(1, steps + 1))
    return (final + (start - final) * (1 - share) ** 3 for share in done)


class Distillation:
    """A loss that also follows a teacher, such as the network before pruning (Hinton et al., 2015).

    (1 − weight)·loss(output, target) + weight·T²·KL(teacher/T, output/T)

    Args:
        teacher: gives logits; is put in eval mode and not trained.
        weight: of the teacher, between 0 and 1.
        temperature: T.
        loss: against the targets.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        weight: float = 0.5,
        temperature: float = 4.0,
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    ) -> None:
        number_of("weight", weight, least=0, most=1)
        number_of("temperature", temperature, above=0, below=math.inf)
        self.teacher = teacher.eval()
        self.weight, self.temperature, self.loss = weight, temperature, loss

    def __call__(self, inputs: Tensor, output: Tensor, target: Any) -> Tensor:
        """The loss of a batch."""
        with torch.no_grad():
            taught = self.teacher(inputs) / self.temperature
        following = F.kl_div(
            F.log_softmax(output / self.temperature, 1),
            F.log_softmax(taught, 1),
            reduction="batchmean",
            log_target=True,
        )
        own = self.loss(output, target)
        return (1 - self.weight) * own + self.weight * self.temperature**2 * following


class _Kept(nn.Module):
    """Gives a parameter with some of its values as they were."""

    kept: Tensor
    values: Tensor

    def __init__(self, kept: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)
        self.register_buffer("values", values)

    def forward(self, parameter: Tensor) -> Tensor:
        return torch.where(self.kept, self.values, parameter)


def freeze_carries(model: nn.Module) -> int:
    """Hold the filters that only hand a channel on, whatever the optimiser does, weight decay too.

    Slopes of 1 are held as well, with which a PReLU hands a channel on.

    So a carry stays one while the network is trained, and `close_carries` can close it afterwards;
    call `thaw_carries` first: passes read what is held as it is, and their results hold nothing.

    Args:
        model: with weights as `remove_residuals` leaves them, batch norm folded where a carry
            passes; is changed.

    Returns:
        How many filters are held.
    """
    count = 0
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            continue
        if isinstance(module, (nn.PReLU, ChannelPReLU)):
            slope: Tensor = module.weight.detach()
            _hold(module, "weight", slope == 1, slope.clone())
        if type(module) not in CONVS:
            continue
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        bias: Any = module.bias
        rows = (weight != 0).flatten(1).sum(1) == 1
        if bias is not None:
            rows = rows & (bias.detach() == 0)
        if not bool(rows.any()):
            continue
        count += int(rows.sum())
        everywhere = rows.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
        _hold(module, "weight", everywhere.clone(), weight.clone())
        if bias is not None:
            _hold(module, "bias", rows.clone(), bias.detach().clone())
    return count


def _hold(module: nn.Module, name: str, kept: Tensor, values: Tensor) -> None:
    parametrize.register_parametrization(module, name, _Kept(kept, values))


def thaw_carries(model: nn.Module) -> None:
    """Undo `freeze_carries`: the values that were held become ordinary parameters.

    Raises:
        WeightError: a layer has other parametrizations beside those of `freeze_carries`.
    """
    found = {path: _held(path, module) for path, module in model.named_modules()}
    for path, held in found.items():
        if held:
            module = model.get_submodule(path)
            for name, parameter in held.items():
                with torch.no_grad():
                    parameter.copy_(getattr(module, name))
            make_ordinary(module, held)


def _held(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimiser knows of the parameters of a layer that are held."""
    own: Any = getattr(module, "parametrizations", {})
    parts = {name: list(one) for name, one in own.items()}
    if not any(isinstance(part, _Kept) for several in parts.values() for part in several):
        return {}
    for name, several in parts.items():
        if not all(isinstance(part, _Kept) for part in several):
            raise WeightError(f"{path}: its {name} is parametrized otherwise, too; remove that")
    return {name: own[name].original for name in own}
