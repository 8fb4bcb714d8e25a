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
from .passes.pruning import PruningReport, prune_channels
from .passes.recurrent import materialize, share_parameters
from .passes.reserve import ReserveReport, reserve
from .passes.residual import remove_residuals
from .passes.sites import ChoiceReport, choose_sites
from .plain import is_plain, to_sequential
from .pruning.latency_table import LatencyTable
from .removal.measured import MeasuredPolicy
from .report import Report, SiteReport, Verification, report
from .testing.verification import verify

if TYPE_CHECKING:
    from .files.compact import load_compact, save_compact
    from .passes.optimize import optimize

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


_LATER = {
    "load_compact": "files.compact",
    "optimize": "passes.optimize",
    "save_compact": "files.compact",
}


def __getattr__(name: str) -> Any:
    """Import what few need, and takes a while to load, when it is first asked for."""
    if name in ("fuzz", "models", "testing", "training"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
