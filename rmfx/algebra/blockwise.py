"""Activations that differ from channel to channel.

An activation is f ⊕ id on [main; carry] when the carry's channels pass unchanged. Here are the
modules for that: the activation as it is where it leaves the carry alone, PReLU with slopes (a on
main, 1 on carry) for max(x, 0) + a·min(x, 0), a clamp with per-channel bounds, infinite on the
carry, and `where(carry, x, act(x))` for every other one. `removal/strategy.py` chooses among them,
and knows two ways to write a carry so that the activation leaves it alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rmfx.errors import Refusal
from rmfx.interval import EVERYWHERE, INF, Interval
from rmfx.modules.activations import ChannelClamp, ChannelPReLU, MaskedActivation

from .activation import Activation, Block, is_activation, plain_copy
from .layer import Layer


@dataclass(frozen=True, eq=False)
class Blockwise(Layer):
    """An activation that differs from block to block of channels, as a value.

    Attributes:
        blocks: channel blocks in order; at least one has an activation.
        dims: spatial dimensions after the channel dimension.
        means: of its module, one of `all_means`; None for the simplest.
    """

    blocks: tuple[Block, ...]
    dims: int
    means: str | None = None
    is_per_channel: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Of all blocks, in channels."""
        return sum(b.width for b in self.blocks)

    @property
    def own_means(self) -> str:
        """By what its module applies the activations: one of `all_means`."""
        return self.means or all_means(self.blocks)[0]

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for two values that are the same function."""
        return tuple((b.width, b.activation and b.activation.signature) for b in self.blocks)

    @property
    def has_parameters(self) -> bool:
        return any(b.activation is not None and b.activation.has_parameters for b in self.blocks)

    def over(self, width: int) -> tuple[Block, ...]:
        """As blocks of its channels."""
        return self.blocks

    def unfit(self, channels: int, dims: int, rank: int | None) -> Refusal | None:
        if (self.width, self.dims) == (channels, dims):
            return None
        places = f"{self.width} channels and {self.dims} spatial dimensions"
        return Refusal(f"activations for {places} on {channels} and {dims}")

    @staticmethod
    def of(module: nn.Module) -> Blockwise | None:
        """What a module was made of that `to_module` has made, None of any other."""
        if isinstance(module, ChannelClamp):
            bounds = (module.get_buffer(name).flatten().tolist() for name in ("low", "high"))
            ends = zip(*bounds, strict=True)
            blocks = [Block(len(run), _clamp_of(*run[0])) for run in _runs(ends)]
        elif isinstance(module, ChannelPReLU):
            blocks = [_part_of(module, slice(0, module.weight.numel()))]
        elif isinstance(module, MaskedActivation):
            masks = torch.stack([mask.flatten() for mask in module.buffers(recurse=False)]).cpu()
            # Where several apply it is the last one; where none does, -1.
            last = [max((i for i, on in enumerate(m) if on), default=-1) for m in masks.T.tolist()]
            blocks, start = [], 0
            for run in _runs(last):
                own = module.activations[run[0]] if run[0] >= 0 else None
                blocks.append(_part_of(own, slice(start, start + len(run))))
                start += len(run)
        else:
            return None
        dims = next(itertools.chain(module.parameters(False), module.buffers(False))).dim() - 1
        known = all(b.activation is None or is_activation(b.activation.module) for b in blocks)
        return Blockwise(tuple(blocks), dims) if known else None

    def to_module(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """One module that applies each block's activation to its channels."""
        means = self.own_means
        active = [b.activation for b in self.blocks if b.activation and b.width]
        if means == "same":
            return plain_copy(active[0].module)
        if means == "masks":
            return _masked(self, dtype, device)
        if means == "slopes":
            slopes = torch.cat([_slope_of(b) for b in self.blocks]).to(device, dtype)
            return _prelu(slopes, self)
        low, high = (
            torch.cat([torch.full((w,), end, dtype=dtype, device=device) for w, end in ends])
            for ends in zip(
                *([(b.width, end) for end in _bounds_of(b)] for b in self.blocks), strict=True
            )
        )
        return ChannelClamp(low, high, self.dims).eval()


T = TypeVar("T")


def _runs(values: Iterable[T]) -> list[list[T]]:
    """Equal values in a row, together."""
    return [list(run) for _, run in itertools.groupby(values)]


def _clamp_of(low: float, high: float) -> Activation | None:
    if (low, high) == EVERYWHERE:
        return None
    if (low, high) in ((0.0, INF), (0.0, 6.0)):
        return Activation(nn.ReLU() if high == INF else nn.ReLU6())
    clamp = nn.Hardtanh()  # which is not made with equal bounds, but computes with them
    clamp.min_val, clamp.max_val = min(low, high), high
    return Activation(clamp)


def _part_of(module: nn.Module | None, channels: slice) -> Block:
    """An activation on some channels, which may have slopes of their own."""
    shared = isinstance(module, nn.PReLU) and module.weight.numel() == 1
    if isinstance(module, (nn.PReLU, ChannelPReLU)) and not shared:
        slopes = module.weight.detach().flatten()[channels]
        module = nn.PReLU(slopes.numel())
        module.weight = nn.Parameter(slopes)
    return Block(channels.stop - channels.start, Activation(module) if module else None)


def all_means(blocks: Sequence[Block]) -> tuple[str, ...]:
    """By what one module can apply each block's activation, the simplest first.

    "same" where it is one for all channels; else some of "slopes", "bounds" and "masks" for each.
    """
    active = [b.activation for b in blocks if b.activation and b.width]
    full = len(active) == sum(b.width > 0 for b in blocks)
    if full and len({a.signature for a in active}) == 1 and not active[0].is_per_channel:
        return ("same",)
    slopes, bounds = all(a.row.slope for a in active), all(a.row.bounds for a in active)
    return (*("slopes",) * slopes, *("bounds",) * bounds, "masks")


# The strategy that each of them serves as.
WAYS = {"same": "identity", "slopes": "per-channel", "bounds": "per-channel", "masks": "masked"}


def way_of(blocks: Sequence[Block]) -> str:
    """The strategy that one module serves as, by the simplest means."""
    return WAYS[all_means(blocks)[0]]


def _masked(whole: Blockwise, dtype: torch.dtype, device: torch.device) -> MaskedActivation:
    total = sum(b.width for b in whole.blocks)
    activations: list[nn.Module] = []
    masks: list[Tensor] = []
    start = 0
    for b in whole.blocks:
        mask = torch.zeros(total, dtype=torch.bool, device=device)
        mask[start : start + b.width] = True
        if b.activation is not None:
            module = b.activation.module
            if b.activation.is_per_channel:
                slopes = torch.ones(total, dtype=dtype, device=device)
                slopes[mask] = _slope_of(b).to(device, dtype)
                module = _prelu(slopes, whole)
            activations.append(plain_copy(module))
            masks.append(mask)
        start += b.width
    return MaskedActivation(activations, masks, whole.dims).eval()


def _prelu(slopes: Tensor, whole: Blockwise) -> nn.Module:
    # nn.PReLU takes dimension 1 as the channels, whatever comes after it.
    if not whole.dims:
        return ChannelPReLU(slopes, whole.dims).eval()
    module = nn.PReLU(slopes.numel(), device=slopes.device, dtype=slopes.dtype)
    module.weight = nn.Parameter(slopes)
    return module.eval()


def _slope_of(block: Block) -> Tensor:
    slope: Tensor | float = 1.0
    if block.activation is not None and block.activation.row.slope:
        slope = block.activation.row.slope(block.activation.module)
    return torch.as_tensor(slope, dtype=torch.float64).cpu().reshape(-1).expand(block.width)


def _bounds_of(block: Block) -> Interval:
    return (block.activation and block.activation.bounds) or EVERYWHERE
