"""What layers of every kind answer, so that nobody has to ask which kind one is."""

from __future__ import annotations

from typing import ClassVar

from rmfx.errors import Refusal


class Layer:
    """One layer of a chain as an immutable value, with the answers that most kinds give.

    Attributes:
        is_linear: whether it is a linear map.
        keeps_channels: whether as many channels come out as go in, be they what they may.
    """

    is_linear: ClassVar[bool] = False
    keeps_channels: ClassVar[bool] = True

    @property
    def reads_one_position(self) -> bool:
        """Whether a position of the output depends on the same one of the input alone."""
        return True

    @property
    def has_parameters(self) -> bool:
        """Whether it is an activation with parameters of its own, as PReLU is."""
        return False

    def resolved(self, channels: int | None, dims: int) -> Layer | Refusal:
        """The same with everything known, on values of some channels and spatial dimensions."""
        return self

    def unfit(self, channels: int, dims: int, rank: int | None) -> Refusal | None:
        """Why it cannot stand among layers of `dims` dimensions, on `channels`, if it cannot.

        Args:
            rank: dimensions of its output, None where they are not known.
        """
        return None

    def channels_behind(self, channels: int, dims: int) -> int:
        """Channels of its output, where it fits."""
        return channels

    def geometry(self, channels: int) -> Layer | None:
        """A linear layer that moves and resizes values as it does; None if it does neither."""
        return None
