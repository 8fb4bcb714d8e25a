"""What a type has digits for: how far a carry may be scaled, and what rounding costs it.

A type rounds by up to u = eps / 2 of a value, down to `tiny`, its smallest normal number; below
that by up to u·tiny. From this follow the laws that `removal/strategy.py` goes by:

    scaling    x·2⁻ᵏ and back is x bit for bit where |x| ≥ 2ᵏ·tiny; below, it errs by up to
               2ᵏ·tiny·u. Such values may be there wherever a range holds 0, in every type. What is
               lost must lie below the last digit of the interval's end: 2ᵏ·tiny ≤ eps·end.
    summing    what is the sum of terms c times as large errs by up to a few c·u: log₂ c bits are
               lost, of which a type affords a quarter of those it has. An odd pair sums
               act(x) − act(−x), with c = (1 + |a|) / |1 + a| for a slope a below zero; a shift
               takes its offset away again, with c = the largest coded value over the largest value.
    weights    a row whose largest weight is a normal number errs by no more than u of that.

A *gain* is the largest factor, up or down, by which something on the way is multiplied. Floating
point does not mind powers of two; int8 and fixed point, with one scale for main channels and carry,
lose log₂ gain of their few bits.
"""

from __future__ import annotations

import math

import torch

from .affine import AffineConv

# Of a carry that arrives, the best first.
EXACTNESS = ("bit-exact", "normal numbers", "rounding", "calibrated range")


# Of 8 bits a gain of 16 leaves 4 to a carry that shares its scale with the main channels.
SMALL_GAIN = 16.0
SMALLEST_SCALE = 2.0**-40  # in any type
AFFORDED = 0.25  # of a type's bits


def exactness_of_taps(dtype: torch.dtype) -> str:
    """Of a value that passes a Dirac tap: processors' products of bfloat16 take tiny ones for 0."""
    return "normal numbers" if dtype == torch.bfloat16 else "bit-exact"


def smallest_scale(dtype: torch.dtype, end: float) -> float:
    """The smallest factor that takes a carry into an interval of that end without loss."""
    info = torch.finfo(dtype)
    return max(info.tiny, info.tiny / (info.eps * end))


def bits_of(dtype: torch.dtype) -> float:
    """How many bits a value has, the leading one included."""
    return 1 - math.log2(torch.finfo(dtype).eps)


def is_half(dtype: torch.dtype) -> bool:
    """Whether a type has so few bits that one rounding shows."""
    return bits_of(dtype) < 12


def affords(dtype: torch.dtype, bits: float) -> bool:
    """Whether a carry may lose so many bits."""
    return bits <= AFFORDED * bits_of(dtype)


def factor_up_or_down(*factors: float) -> float:
    """The largest of some factors or of their reciprocals."""
    return max(max(abs(f), 1 / abs(f)) if f else math.inf for f in factors)


def lost_rows(layer: AffineConv, dtype: torch.dtype) -> float:
    """The share of outputs whose largest weight is neither 0 nor a normal number of a type."""
    info = torch.finfo(dtype)
    rows = torch.cat([layer.weight.flatten(1), layer.bias.unsqueeze(1).to(layer.weight)], 1)
    largest = rows.abs().amax(1).to(torch.float64)
    lost = (largest > info.max) | ((largest < info.tiny) & (largest > 0))
    return float(lost.double().mean())
