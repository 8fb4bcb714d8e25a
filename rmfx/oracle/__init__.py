"""Whether two networks compute the same: at outputs and joins, at many sizes, up to rounding."""
