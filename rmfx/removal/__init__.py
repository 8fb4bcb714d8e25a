"""From a join to a plain chain."""
