"""The arms: ways to make a trained network cheaper before it is trained on.

Every arm gets the trained network, images to look at, and the share of the multiply-adds that may
stay. It gives a network that can be trained; `deployed` is what of it runs in the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch_pruning
from _blocks import is_projected, joins_of, multiply_adds, replaced, shortened
from _fashion import Split
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

import rmfx

MULTIPLE = 4  # of which numbers of filters are, in every arm that does not say otherwise
BLOCK = 16  # what runtimes compute at once on this kind of machine
FLOOR = 0.1  # the share of a layer's filters that stays
INNER_FLOOR = 0.02  # where only what is inside of blocks goes
CARRIES = frozenset({"identity", "scale", "shift"})  # keep activations that runtimes are quick at
STEPS = 200  # in which Torch-Pruning goes from all filters to none


@dataclass(frozen=True)
class Task:
    """What an arm gets.

    Attributes:
        net: trained, in eval mode, with residual connections.
        looked_at: training images, to judge filters by.
        share: of the multiply-adds of `net`, batch norm folded, that may stay.
    """

    net: nn.Module
    looked_at: Split
    share: float

    @property
    def example(self) -> Tensor:
        """One image."""
        return self.looked_at.images[:1]

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """What filters are judged by."""
        return self.looked_at.batches(256)

    @property
    def budget(self) -> float:
        """Multiply-adds that may stay."""
        return self.share * multiply_adds(self.net, self.example)


Arm = Callable[[Task], nn.Module]


def deployed(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """What runs: batch norm folded, and linear layers in a row merged where that is cheaper."""
    folded = rmfx.fold_batch_norm(rmfx.remove_noops(net, x), x)
    merged: fx.GraphModule = rmfx.merge_convs(folded, x)
    return merged


def _pruned(net: nn.Module, task: Task, budget: float | None = None, **options: Any) -> nn.Module:
    small: nn.Module
    small, _ = rmfx.prune_channels(
        net,
        task.example,
        budget=task.budget if budget is None else budget,
        data=task.batches,
        **{"multiple": MULTIPLE, "floor": FLOOR} | options,
    )
    return small


# ---- residual connections kept ------------------------------------------------------------------


def residual(task: Task) -> nn.Module:
    """The same share of every family of filters, judged by the Taylor score."""
    return _pruned(task.net, task)


def in_blocks(task: Task) -> nn.Module:
    """The same in whole blocks, as runtimes compute them, and of few filters in halves.

    At shares that halves are too coarse for in quarters.
    """
    parts = 2 if task.share > 0.2 else 4
    return _pruned(task.net, task, multiple=lambda n: max(1, min(BLOCK, n // parts)))


def searched(task: Task) -> nn.Module:
    """Widths by a search: where the least score is lost for what is saved; a quarter stays."""
    return _pruned(task.net, task, allocation="search", floor=0.25)


def expansions(task: Task) -> nn.Module:
    """Of inverted residuals only the inner filters, which no skip ties."""
    return _pruned(task.net, task, protect=_not_inner(task.net, task.example), floor=INNER_FLOOR)


def _not_inner(net: nn.Module, x: Tensor) -> list[str]:
    """Paths of the layers whose outputs are not those of a depthwise convolution as well."""
    traced = rmfx.trace(net, x)
    layers = {
        node: traced.get_submodule(str(node.target))
        for node in traced.graph.nodes
        if node.op == "call_module"
    }
    inner: set[str] = set()
    for node, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            inner.add(str(node.target))
            before = node.all_input_nodes[0]
            while not isinstance(layers.get(before), nn.Conv2d):
                before = before.all_input_nodes[0]
            inner.add(str(before.target))
    weighted = (nn.Conv2d, nn.Linear)
    paths = [str(node.target) for node, layer in layers.items() if isinstance(layer, weighted)]
    return [path for path in paths if path not in inner]


def depth(task: Task) -> nn.Module:
    """Whole blocks with an identity skip go, always the one that the loss misses least.

    Where all are gone, the same share of every family goes.
    """
    net = shortened(task.net, task.looked_at, task.budget)
    return _pruned(net, task) if multiply_adds(net, task.example) > task.budget else net


# ---- residual connections opened or cut ---------------------------------------------------------


def plain(task: Task) -> nn.Module:
    """All residual connections removed, then the same share of every family."""
    return _pruned(_normed(_opened(task), task), task)


def first_opened(task: Task) -> nn.Module:
    """Only the blocks with a projection opened, then the same share of every family."""
    net = rmfx.remove_noops(task.net, task.example)
    projected = {join.name for join in joins_of(net) if is_projected(net, join)}
    opened = _opened(task, policy=lambda site: site.join in projected)
    return _pruned(_normed(opened, task), task)


def _opened(task: Task, **options: Any) -> fx.GraphModule:
    opened: fx.GraphModule = rmfx.remove_residuals(
        task.net,
        task.example,
        strict=True,
        calibration=[x for x, _ in task.batches],
        **{"fold_batch_norm": False} | options,
    )
    return opened


def _normed(net: nn.Module, task: Task) -> nn.Module:
    """With a batch norm behind every convolution: where a carry is added there was room for none.

    Without, values grow until nothing can be learned at the rates of this study.
    """
    normed: nn.Module = rmfx.insert_batch_norm(net, [x for x, _ in task.batches])
    return normed


def cut(task: Task) -> nn.Module:
    """Every skip cut, without a carry, then the same share of every family."""
    return _pruned(_without_skips(task), task)


def _without_skips(task: Task) -> fx.GraphModule:
    net: fx.GraphModule = rmfx.remove_noops(task.net, task.example)
    for name in [join.name for join in joins_of(net)]:
        net = replaced(net, name, by=_branch)
    update_bn((x for x, _ in task.batches), net)
    return net.eval()


def _branch(first: fx.Node, second: fx.Node) -> fx.Node:
    """The operand of an addition with more layers behind it, down to what both come from."""

    def ancestors(node: fx.Node) -> set[fx.Node]:
        seen = [node]
        for one in seen:
            seen += [n for n in one.all_input_nodes if n not in seen]
        return set(seen)

    return first if len(ancestors(first)) > len(ancestors(second)) else second


# ---- inverted residuals with merged necks -------------------------------------------------------


def merged(task: Task) -> nn.Module:
    """All removed and necks merged, then the same share of every family."""
    return _pruned(
        _merged_necks(_opened(task, activation=CARRIES, fold_batch_norm=True), task), task
    )


def cut_merged(task: Task) -> nn.Module:
    """Every skip cut and necks merged, then the same share of every family."""
    return _pruned(_merged_necks(_without_skips(task), task), task)


def depth_merged(task: Task) -> nn.Module:
    """Blocks with an identity skip gone, necks merged, then the same share of every family."""
    return _pruned(_merged_necks(shortened(task.net, task.looked_at), task), task)


def _merged_necks(net: nn.Module, task: Task) -> nn.Module:
    """What projects out of a block and what expands into the next as one layer, where they touch.

    It has a batch norm again, so that it is trained in the form in which it runs.
    """
    folded = rmfx.fold_batch_norm(net, task.example)
    return _normed(rmfx.merge_convs(folded, task.example, policy="all"), task)


# ---- Torch-Pruning ------------------------------------------------------------------------------


def _torch_pruning(
    task: Task, importance: Any, *, gradients: bool = False, multiple: int = MULTIPLE
) -> nn.Module:
    net = copy.deepcopy(task.net).requires_grad_(True)
    pruner = torch_pruning.pruner.BasePruner(
        net,
        task.example,
        importance=importance,
        pruning_ratio=1 - FLOOR,
        max_pruning_ratio=1 - FLOOR,
        iterative_steps=STEPS,
        global_pruning=True,
        round_to=multiple,
        ignored_layers=[module for module in net.modules() if isinstance(module, nn.Linear)],
    )
    batches = task.looked_at.batches(128)
    while multiply_adds(net, task.example) > task.budget and pruner.current_step < STEPS:
        if gradients:
            x, y = batches[pruner.current_step % len(batches)]
            net.zero_grad()
            functional.cross_entropy(net(x), y).backward()
        pruner.step()
    net.zero_grad()
    return net


def torch_pruning_l2(task: Task) -> nn.Module:
    """Torch-Pruning: L2 of a group's filters."""
    return _torch_pruning(task, torch_pruning.importance.GroupMagnitudeImportance(p=2))


def torch_pruning_l2_in_blocks(task: Task) -> nn.Module:
    """The same in blocks: half of them, since with whole ones layers of 16 filters all stay."""
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    return _torch_pruning(task, importance, multiple=BLOCK // 2)


def torch_pruning_bn(task: Task) -> nn.Module:
    """Torch-Pruning: scales of batch norm."""
    return _torch_pruning(task, torch_pruning.importance.BNScaleImportance())


def torch_pruning_taylor(task: Task) -> nn.Module:
    """Torch-Pruning: Taylor."""
    importance = torch_pruning.importance.GroupTaylorImportance()
    return _torch_pruning(task, importance, gradients=True)


def torch_pruning_taylor_in_blocks(task: Task) -> nn.Module:
    """Torch-Pruning: Taylor, in blocks."""
    importance = torch_pruning.importance.GroupTaylorImportance()
    return _torch_pruning(task, importance, gradients=True, multiple=BLOCK // 2)


ARMS: dict[str, Arm] = {
    "residual": residual,
    "residual, in blocks": in_blocks,
    "residual, searched": searched,
    "residual, expansions": expansions,
    "depth": depth,
    "cut": cut,
    "plain": plain,
    "first opened": first_opened,
    "merged": merged,
    "cut, merged": cut_merged,
    "depth, merged": depth_merged,
    "Torch-Pruning L2": torch_pruning_l2,
    "Torch-Pruning L2, in blocks": torch_pruning_l2_in_blocks,
    "Torch-Pruning BN": torch_pruning_bn,
    "Torch-Pruning Taylor": torch_pruning_taylor,
    "Torch-Pruning Taylor, in blocks": torch_pruning_taylor_in_blocks,
}
