"""The words of reports, and what they mean."""

from __future__ import annotations

# What `SiteReport.layout` may say.
IN_TURNS, TAKEN_APART = "in turns with the branch", "layers taken apart"
PADDED = "carry padded to whole groups"
MERGED = "linear layers merged"
LAYOUTS = (IN_TURNS, TAKEN_APART, PADDED, MERGED)
# What `SiteReport.strategy` may say, and what it means.
WAYS = {
    "identity": "unchanged",
    "scale": "times a power of two",
    "per-channel": "slopes or bounds of its own",
    "odd-pair": "as x and -x",
    "shift": "moved to where it stays",
    "double-relu": "a clamp becomes two ReLU",
    "masked": "a mask lets it by",
    "linear": "there is none to pass",
}
# What `SiteReport.kind` may say; several of it, and what becomes of those that are "removed".
SKIP, PARALLEL = "residual connection", "parallel branches"
KINDS = {
    SKIP: ("residual connections", "removed"),
    PARALLEL: ("sums of parallel branches", "merged"),
}
# What `Timing.form` may say, and what was done.
FORMS = {
    "folded": "batch norm folded",
    "merged": "parallel branches merged",
    "converted": "residual connections removed",
}
