"""Random networks as plain data, and the modules that are built of them."""
