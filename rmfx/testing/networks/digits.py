"""What costs digits: half types, slopes near -1, 0 and 1, tiny and huge bounds, other scales."""

from __future__ import annotations

from collections.abc import Iterator

from .layers import Act
from .node import Node
from .operations import Arithmetic

TYPES = ("float32", "bfloat16", "float16", "bfloat16")
STEEP = (-0.99, -0.999, -0.98)
SLOPES = (*STEEP, 1e-3, 0.99, -1.0, 1.0, 0.0)
BOUNDS = ((-1e-3, 1e-3), (-3e4, 3e4), (-1e-3, 3e4), (1e-3, 2e-3))
SCALES = (2.0**-8, 2.0**8)  # exact in every type


def digit_features(node: Node) -> Iterator[str]:
    """What costs digits in a node."""
    if isinstance(node, Arithmetic) and abs(node.value) in SCALES:
        yield "values of very different scale"
    if not isinstance(node, Act) or not node.args:
        return
    if node.kind == "hardtanh" and node.args in BOUNDS:
        reach = max(map(abs, node.args))
        yield "huge bounds" if reach > 1e4 else "tiny bounds"
    slopes = node.args if node.kind == "leaky_relu" else node.args[1:]
    if node.kind in ("leaky_relu", "prelu") and slopes and slopes[0] in SLOPES:
        yield f"slope near {round(slopes[0])}"


DIGIT_FEATURES = (
    *(f"{name} network" for name in dict.fromkeys(TYPES)),
    *("slope near -1", "slope near 0", "slope near 1", "tiny bounds", "huge bounds"),
    "values of very different scale",
)
