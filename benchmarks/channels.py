"""Channels that go: exactness on the zoo, and how many filters are free before and after removal.

Each network (float64, random batch norms, small images), residual and, where it can be, plain:
    dead    a tenth of its labels are made zero and a tenth is read by nobody; all of them are cut
    masks   a third of its labels is cut at random and what they were on average put into biases,
            against the network with these numbers in their place
    closed  `close_carries(remove_residuals(net))` against the network
Limits: a relative error of 1e-10 each.

With --groups: for how many filters nothing else must go with them, in the network, in the one
without residual connections, and as Torch-Pruning groups them (pip install torch-pruning); and what
both make of a channel that batch norm keeps at a number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import Limit, choose_models, each, parser, show
from _masked import Masked
from _zoo import prepared, random_input, zoo
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import rmfx
from rmfx.analysis.channel_labels import Channels
from rmfx.frontend import trace
from rmfx.ir.net import Net
from rmfx.pruning.allocation import spare
from rmfx.pruning.cutting import without
from rmfx.pruning.families import Widths
from rmfx.pruning.importance import Responses

NETWORKS = """
resnet18 resnet34 resnet50 resnext50_32x4d wide_resnet50_2 mobilenet_v2 mnasnet1_0
regnet_x_400mf r3d_18 cifar20A cifar20B cifar110B edsr c2f_net inception_resnet efficientnet_b0
mobilenet_v3_large mobilenet_v3_small regnet_y_400mf googlenet squeezenet1_1 darknet53
cspresnet50 dla34 ghostnet_100 hrnet_w18_small resnet26d resnetv2_18 rexnet_100 seresnet18
vgg11_bn densenet121
"""
GROUPED = ("resnet18", "resnet50", "mobilenet_v2", "regnet_x_400mf", "efficientnet_b0")
LIMIT = 1e-10


def relative(expected: Any, found: Any) -> float:
    """Largest difference of two outputs over the largest value of the first."""
    pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


def widths_of(model: nn.Module | fx.GraphModule, x: Tensor) -> tuple[Net, Widths]:
    """A net and what of it may go."""
    net = Net(trace(model, x))
    net.sweep()
    return net, Widths(net, Channels(net))


@torch.no_grad()
def masks(model: nn.Module, x: Tensor) -> tuple[float, int]:
    """The error of cutting a third of the labels, and their number."""
    net, widths = widths_of(model, x)
    if not len(widths.roots):
        return 0.0, 0
    drawn = torch.rand(2, len(widths.roots), generator=torch.Generator().manual_seed(0))
    keep = spare(widths, drawn[1], drawn[0] > 1 / 3)
    means = Responses(net, widths, [(x, None)], lambda text: None).means
    expected = Masked(net, widths, keep, means).run(x)
    return relative(expected, without(net, widths, keep, means)(x)), int((~keep).sum())


@torch.no_grad()
def dead(model: nn.Module, x: Tensor) -> tuple[float, int]:
    """The error of cutting labels that are zero or unused, and their number."""
    net, widths = widths_of(rmfx.trace(model, x), x)
    if not len(widths.roots):
        return 0.0, 0
    end = len(widths.roots)
    drawn = torch.rand(end + 1, generator=torch.Generator().manual_seed(1))
    drawn[end] = 1.0
    zero, unused = drawn < 0.1, (drawn >= 0.1) & (drawn < 0.2)
    for layer in widths.channels.layers:
        own: Any = layer.module
        rows, columns = zero[widths.places(layer.outs)], unused[widths.places(layer.ins)]
        own.weight[rows] = 0
        if own.bias is not None:
            own.bias[rows] = 0
        if layer.carries.numel() == 1:
            own.weight[:, columns] = 0
    for table in widths.channels.tables:
        rows = zero[widths.places(table.ids)]
        if table.node.op == "call_module":
            norm: Any = net.module(table.node)
            for value in norm.parameters():
                value[rows] = 0
    found = Responses(net, widths, [(x, None)], lambda text: None)
    is_zero = torch.ones(end + 1, dtype=torch.bool)
    for layer in widths.channels.layers:
        if layer.node in found.means:
            size = found.means[layer.node].abs() + found.deviation(layer.node)
            is_zero[widths.places(layer.ins)[(size > 0) & layer.mixes]] = False
    keep = ~((zero & is_zero)[:end] | (unused[:end] & ~widths.used()))
    keep = spare(widths, drawn[:end], keep)
    expected = net.source(x)
    return relative(expected, without(net, widths, keep, {})(x)), int((~keep).sum())


@torch.no_grad()
def evaluate(name: str) -> list[dict[str, Any]]:
    """A row for a network and one for what it is without residual connections."""
    net = zoo()[name]
    model = prepared(net)
    x = random_input(net.shapes.small_odd)
    try:
        model(x)
    except RuntimeError:  # some take even sizes only
        x = random_input(net.shapes.small_even)
    forms: dict[str, Callable[[], nn.Module]] = {"as it is": lambda: prepared(net)}
    plain = rmfx.remove_residuals(model, x)
    closed: Any = ""
    if rmfx.report(plain).removed:
        forms["removed"] = lambda: rmfx.remove_residuals(model, x)
        closed = relative(model(x), rmfx.close_carries(plain, x)(x))
    rows = []
    for form, make in forms.items():
        dead_error, dead_count = dead(make(), x)
        mask_error, mask_count = masks(make(), x)
        rows.append(
            {
                "network": name,
                "form": form,
                "dead cut": dead_count,
                "error, dead": dead_error,
                "cut at random": mask_count,
                "error, masks": mask_error,
                "error, closed": closed if form == "removed" else "",
            }
        )
    return rows


# ---- against Torch-Pruning ----------------------------------------------------------------------


def free_filters(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Filters that go without a filter of another layer, and all that may go.

    The filters of a depthwise convolution are not counted: they belong to the channels they read.
    """
    _, widths = widths_of(model, x)
    filters, makers = torch.zeros(2, len(widths.roots) + 1, dtype=torch.int64)
    for layer in widths.channels.layers:
        own = ~layer.carries.repeat_interleave(layer.outs.numel() // layer.carries.numel())
        is_depthwise = layer.carries.numel() == layer.ins.numel() > 1
        places = widths.places(layer.outs)[own & ~torch.tensor(is_depthwise)]
        filters.index_add_(0, places, torch.ones_like(places))
        makers[places.unique()] += 1
    return int(filters[:-1][makers[:-1] == 1].sum()), int(filters[:-1].sum())


def torch_pruning_filters(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """The same as Torch-Pruning groups them."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    free = total = 0
    head = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for group in graph.get_all_groups(ignored_layers=head):
        makers = [
            (dep.target.module, len(idxs))
            for dep, idxs in group
            if isinstance(dep.target.module, (nn.Conv2d, nn.Linear))
            and graph.is_out_channel_pruning_fn(dep.handler)
            and getattr(dep.target.module, "groups", 1) != dep.target.module.weight.shape[0]
        ]
        total += sum(n for _, n in makers)
        free += makers[0][1] if len({id(m) for m, _ in makers}) == 1 else 0
    return free, total


def groups(name: str) -> dict[str, Any]:
    """Free filters of one network in three forms."""
    net = zoo()[name]
    x = random_input(net.shapes.small_even)
    plain = rmfx.remove_residuals(prepared(net), x)
    counts = {
        "Torch-Pruning": torch_pruning_filters(prepared(net), x),
        "rmfx": free_filters(prepared(net), x),
        "rmfx, removed": free_filters(plain, x),
    }
    return {"network": name} | {form: f"{a} of {b}" for form, (a, b) in counts.items()}


def shift_lost() -> dict[str, float]:
    """Errors after cutting channels that batch norm keeps at a number, on resnet18."""
    import torch_pruning as tp

    net = zoo()["resnet18"]
    x = random_input(net.shapes.small_even)

    def make() -> Any:
        model: Any = prepared(net)
        block = model.layer1[0]
        with torch.no_grad():
            block.conv1.weight[:8] = 0
            block.bn1.running_mean[:8], block.bn1.bias[:8] = 0, 0.5
        return model

    expected = make()(x)
    cut = make()
    graph = tp.DependencyGraph().build_dependency(cut, example_inputs=x)
    group = graph.get_pruning_group(
        cut.layer1[0].conv1, tp.prune_conv_out_channels, idxs=list(range(8))
    )
    group.prune()
    clean = rmfx.eliminate_dead_channels(make(), x)
    traced, widths = widths_of(make(), x)
    keep = torch.ones(len(widths.roots), dtype=torch.bool)
    family = next(f for f in widths.families if f.layers == ("layer1.0.conv1",))
    keep[family.members[:8]] = False
    means = Responses(traced, widths, [(x, None)], lambda text: None).means
    exact = without(traced, widths, keep, means, borders=True)
    return {
        "Torch-Pruning": relative(expected, cut(x)),
        "rmfx.prune_channels, responses='borders'": relative(expected, exact(x)),
        "rmfx.eliminate_dead_channels": relative(expected, clean(x)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a limit is exceeded."""
    made = parser(__doc__ or "")
    made.add_argument("--groups", action="store_true", help="free filters, beside Torch-Pruning")
    options, names = choose_models(made, NETWORKS.split(), arguments)
    if options.groups:
        rows = [groups(name) for name in each([n for n in names if n in GROUPED])]
        errors = shift_lost()
        notes = "Eight channels at a number cut from resnet18, relative error:\n" + "\n".join(
            f"  {name}: {error:.1e}" for name, error in errors.items()
        )
        limit = Limit("constant channels", errors["rmfx.eliminate_dead_channels"], LIMIT)
        return show(rows, [limit], as_json=options.json, notes=notes)
    rows = [row for name in each(names) for row in evaluate(name)]
    worst = {
        key: max((row[key] for row in rows if row[key] != ""), default=0.0)
        for key in ("error, dead", "error, masks", "error, closed")
    }
    limits = [Limit(key, value, LIMIT) for key, value in worst.items()]
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
