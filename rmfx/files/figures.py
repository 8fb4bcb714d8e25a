"""Figures as files, equal ones byte by byte."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rmfx.errors import RmfxError, install_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PLOT_SUFFIXES = (".svg", ".png")


class PlotError(RmfxError):
    """Nothing can be drawn."""


def check_plotting() -> None:
    """Finds out, before minutes of measuring, whether `plot` can draw.

    Raises:
        PlotError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError(f"a plot needs matplotlib: {install_command(['matplotlib'])}")


def write_figure(figure: Figure, target: Path | IO[str], kind: str) -> None:
    """Writes a figure so that equal ones make equal files, without date and random names.

    Args:
        figure: made without pyplot, which would look for a display and keep it alive.
        target: a file.
        kind: "svg", in which text stays text, or "png".
    """
    from matplotlib import rc_context

    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "rmfx", "svg.fonttype": "none"}):
        figure.savefig(target, format=kind, dpi=150, metadata=metadata)
