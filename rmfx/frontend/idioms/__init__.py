"""Ways to write a layer out by hand become the layer."""
