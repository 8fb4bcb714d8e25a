"""Which channels go, and the cut."""
