"""The modules that rmfx leaves in networks."""
