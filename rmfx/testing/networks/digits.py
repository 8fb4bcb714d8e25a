"""Numbers that cost digits: half types, slopes near -1, 0 and 1, tiny and huge bounds, scales."""

TYPES = ("float32", "bfloat16", "float16", "bfloat16")
STEEP = (-0.99, -0.999, -0.98)
SLOPES = (*STEEP, 1e-3, 0.99, -1.0, 1.0, 0.0)
BOUNDS = ((-1e-3, 1e-3), (-3e4, 3e4), (-1e-3, 3e4), (1e-3, 2e-3))
SCALES = (2.0**-8, 2.0**8)  # exact in every type
