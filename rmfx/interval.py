"""Intervals of numbers, by their two bounds."""

from __future__ import annotations

import math

Interval = tuple[float, float]
INF = math.inf
EVERYWHERE: Interval = (-INF, INF)
