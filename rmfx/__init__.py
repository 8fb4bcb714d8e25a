"""rmfx removes residual connections from trained networks, exactly."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent
if not (_HERE / "passes").is_dir():  # not installed: in a clone they are the folder beside this one
    _spec = importlib.util.spec_from_file_location(
        f"{__name__}.passes", _HERE.parent / "passes" / "__init__.py"
    )
    if _spec is None or _spec.loader is None:
        raise ImportError(f"there is no folder {_HERE.parent / 'passes'}")
    passes = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(passes)

from .errors import (
    InternalError,
    ModeError,
    NotPlainError,
    OptionError,
    RefusedError,
    RmfxError,
    ShapeError,
    TraceError,
    VerificationError,
    WeightError,
)
from .report import Report, SiteReport, report
from .verified import Verification

if TYPE_CHECKING:
    from rmfx.oracle.verification import verify

    from .files.compact import load_compact, save_compact
    from .frontend import trace
    from .passes.batch_norm import fold_batch_norm, insert_batch_norm
    from .passes.branches import merge_branches
    from .passes.carries import close_carries
    from .passes.dead_channels import eliminate_dead_channels
    from .passes.layer import (
        LayerReport,
        fuse_resconv,
        insert_resconv,
        layer_scales,
        prune_layers,
    )
    from .passes.linear import merge_convs
    from .passes.noop import remove_noops
    from .passes.optimize import optimize
    from .passes.pruning import PruningReport, prune_channels
    from .passes.recurrent import materialize, share_parameters
    from .passes.reserve import ReserveReport, reserve
    from .passes.residual import remove_residuals
    from .passes.sites import ChoiceReport, choose_sites
    from .plain import is_plain, to_sequential
    from .pruning.latency_table import LatencyTable
    from .removal.measured import MeasuredPolicy

__version__ = "0.1.0"

__all__ = [
    "ChoiceReport",
    "InternalError",
    "LatencyTable",
    "LayerReport",
    "MeasuredPolicy",
    "ModeError",
    "NotPlainError",
    "OptionError",
    "PruningReport",
    "RefusedError",
    "Report",
    "ReserveReport",
    "RmfxError",
    "ShapeError",
    "SiteReport",
    "TraceError",
    "Verification",
    "VerificationError",
    "WeightError",
    "choose_sites",
    "close_carries",
    "cost",
    "eliminate_dead_channels",
    "fold_batch_norm",
    "fuse_resconv",
    "insert_batch_norm",
    "insert_resconv",
    "is_plain",
    "layer_scales",
    "load_compact",
    "materialize",
    "merge_branches",
    "merge_convs",
    "optimize",
    "prune_channels",
    "prune_layers",
    "remove_noops",
    "remove_residuals",
    "report",
    "reserve",
    "save_compact",
    "share_parameters",
    "to_sequential",
    "trace",
    "verify",
]


# Where the public names stand: each file is imported when it is first asked for one.
_PLACES = {
    "files.compact": (
        "load_compact",
        "save_compact",
    ),
    "frontend": ("trace",),
    "passes.batch_norm": (
        "fold_batch_norm",
        "insert_batch_norm",
    ),
    "passes.branches": ("merge_branches",),
    "passes.carries": ("close_carries",),
    "passes.dead_channels": ("eliminate_dead_channels",),
    "passes.layer": (
        "LayerReport",
        "fuse_resconv",
        "insert_resconv",
        "layer_scales",
        "prune_layers",
    ),
    "passes.linear": ("merge_convs",),
    "passes.noop": ("remove_noops",),
    "passes.optimize": ("optimize",),
    "passes.pruning": (
        "PruningReport",
        "prune_channels",
    ),
    "passes.recurrent": (
        "materialize",
        "share_parameters",
    ),
    "passes.reserve": (
        "ReserveReport",
        "reserve",
    ),
    "passes.residual": ("remove_residuals",),
    "passes.sites": (
        "ChoiceReport",
        "choose_sites",
    ),
    "plain": (
        "is_plain",
        "to_sequential",
    ),
    "pruning.latency_table": ("LatencyTable",),
    "removal.measured": ("MeasuredPolicy",),
    "oracle.verification": ("verify",),
}
_FOLDERS = ("cost", "frontend", "fuzz", "models", "passes", "testing", "training")


def __getattr__(name: str) -> Any:
    """Import what is asked for: `rmfx --help` need not wait for torch."""
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{name}")
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{place}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
