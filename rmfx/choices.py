"""The words from which callers choose; they are known without torch."""

from __future__ import annotations

ALLOCATIONS = ("uniform", "global", "search")


# The simplest first; of those allowed, the first that works is used.
STRATEGIES = ("identity", "scale", "per-channel", "odd-pair", "shift", "double-relu", "masked")
BY_DATA = ("taylor", "activation")
BY_WEIGHT = ("bn_scale", "l1", "l2", "geometric_median")
IMPORTANCES = (*BY_DATA, *BY_WEIGHT, "random")
PASSES = (
    *("remove_residuals", "fold_batch_norm", "merge_branches", "merge_convs", "remove_noops"),
    "eliminate_dead_channels",
)
BACKENDS = ("loky", "dask", "ray")  # processes of this machine; clusters
FRONTENDS = ("module", "traced", "exported", "compiled")
COSTS = ("macs", "parameters", "latency")  # of a network, which pruning makes smaller
RUNTIMES = ("eager", "inductor", "onnxruntime", "openvino")
TARGETS = ("time", "macs", *RUNTIMES)  # what a rewrite is made cheap for
