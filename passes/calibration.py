"""What data tell of a network's values: the public names of `rmfx.data.calibration`."""

from rmfx.data.calibration import Measured, measure
from rmfx.data.moments import Moments
from rmfx.rules.batch_norm import identity_norm

__all__ = ["Measured", "Moments", "identity_norm", "measure"]
