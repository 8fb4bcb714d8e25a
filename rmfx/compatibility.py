"""What differs between the releases of torch that rmfx runs on."""

from __future__ import annotations

import re
from typing import Any


def dotted(path: str) -> str:
    """The path of a module as its model names it, of one as Dynamo writes it.

    >>> dotted("L['self'].layer1.0"), dotted("L['self']")
    ('layer1.0', '')

    Torch 2.9 writes where modules are kept, too:

    >>> dotted("L['self']._modules['layer1']._modules['0']")
    'layer1.0'
    """
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    return re.sub(r"^[LG]\['[^']*'\]\.?", "", path)


def asked(told: Any) -> Any:
    """What one of Dynamo's sources tells of itself; newer torch keeps what older torch computes."""
    return told() if callable(told) else told
