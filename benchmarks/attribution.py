"""Relevance on residual networks and on the plain ones made of them, by third-party tools.

Layer-wise relevance propagation shares the score of a class out among the pixels, so that their sum
is the score. Figures are |sum - score| / |score| in float32, on one picture, by the epsilon rule: 0
is right. Biases take a share of their own, so they are 0 here in all forms; "kept" is the sum over
the score of the plain network with its biases. For zennit, batch norm is folded in both forms, so
that skips alone differ. DeepLift's figure is its own convergence delta. Limit for plain networks:
1e-3.

`--picture FILE` draws maps of trained networks on photos (needs fetch_weights.py and matplotlib).
Needs `pip install -e '.[attribution]'`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _weights
import timm
import torch
import torchvision.models as zoo
from _common import FAILURES, Limit, parser, show
from _randomise import randomise
from captum.attr import LRP, DeepLift
from torch import Tensor, nn
from tqdm import tqdm
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, LayerMapComposite, layer_map_base
from zennit.rules import Epsilon
from zennit.torchvision import ResNetCanonizer
from zennit.types import Linear

import rmfx
from rmfx import attribution

CONSERVED = 1e-3
PHOTOS = 3


class Block(nn.Module):
    """A residual block of one's own, as no library has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(2)
        self.wide, self.deep = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 3, padding=1)
        self.skip, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(self.skip(x) + self.deep(torch.relu(self.wide(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": zoo.resnet18,
    "torchvision resnet50": zoo.resnet50,
    "torchvision mobilenet_v2": zoo.mobilenet_v2,
    "torchvision regnet_x_400mf": zoo.regnet_x_400mf,
    "timm resnet18": lambda: timm.create_model("resnet18"),
    "a block of one's own": Block,
}


@dataclass(frozen=True)
class Forms:
    """One network as it was, with batch norm folded, and plain; all of them copies."""

    original: nn.Module
    folded: nn.Module
    plain: nn.Sequential


def forms_of(model: nn.Module, x: Tensor) -> Forms:
    """The forms of a network, which no tool gets to change for another one."""
    plain = rmfx.remove_residuals(model, x, activation="relu")
    return Forms(copy.deepcopy(model), rmfx.fold_batch_norm(model, x), rmfx.to_sequential(plain))


def score(network: nn.Module, x: Tensor, target: int) -> float:
    """The output that is explained."""
    with torch.no_grad():
        return float(network(x)[0, target])


@torch.no_grad()
def without_biases(network: nn.Module) -> nn.Module:
    """A copy in which nothing is added but what comes of the input."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        for name in ("bias", "running_mean"):
            if isinstance(getattr(layer, name, None), Tensor):
                getattr(layer, name).zero_()
    return network


def off(relevance: Tensor, network: nn.Module, x: Tensor, target: int) -> float:
    """How far the pixels' sum is from the score, relative to it."""
    whole = score(network, x, target)
    return abs(float(relevance.sum()) - whole) / abs(whole)


def by_zennit(network: nn.Module, x: Tensor, target: int, composite: Any) -> Tensor:
    """Relevance of the pixels."""
    network = copy.deepcopy(network).requires_grad_(True)
    with Gradient(model=network, composite=composite) as attributor:
        chosen = nn.functional.one_hot(torch.tensor([target]), network(x).shape[1])
        _, relevance = attributor(x, lambda y: y * chosen)
    return relevance  # type: ignore[no-any-return]


def epsilon(canonizers: Sequence[Any] = ()) -> Any:
    """The epsilon rule everywhere."""
    rules = [(Linear, Epsilon(1e-9)), *layer_map_base(stabilizer=1e-9)]
    return LayerMapComposite(layer_map=rules, canonizers=list(canonizers))


def attempted(measure: Callable[[], float]) -> float | str:
    """What is measured, or the kind of the error."""
    try:
        return measure()
    except FAILURES as error:
        return type(error).__name__


def alike(one: Tensor, other: Tensor) -> float:
    """The correlation of two maps of pixels."""
    maps = torch.stack([one.sum(1).flatten(), other.sum(1).flatten()])
    return float(torch.corrcoef(maps)[0, 1])


def row_of(name: str, size: int) -> dict[str, Any]:
    """All figures of one network."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, size, size)
    model = NETWORKS[name]().eval()
    randomise(model, x)
    target = int(model(x).argmax())
    forms = forms_of(model, x)
    original, folded, plain = map(without_biases, (forms.original, forms.folded, forms.plain))

    def captum(lrp: Callable[[nn.Module], Any], network: nn.Module) -> float:
        copied = copy.deepcopy(network)
        return off(lrp(copied).attribute(x, target=target), network, x, target)

    def zennit(network: nn.Module) -> float:
        return off(by_zennit(network, x, target, epsilon()), network, x, target)

    def deep_lift(network: nn.Module) -> float:
        tool = DeepLift(copy.deepcopy(network))
        _, delta = tool.attribute(x, 0 * x, target=target, return_convergence_delta=True)
        return float(delta.abs().max())

    kept = attribution.LRP(forms.plain).attribute(x, target=target).sum() / score(
        forms.plain, x, target
    )
    return {
        "network": name,
        "captum, residual": attempted(lambda: captum(LRP, original)),
        "captum, plain": captum(attribution.LRP, plain),
        "kept": float(kept),
        "zennit, residual": attempted(lambda: zennit(folded)),
        "zennit, plain": zennit(plain),
        "DeepLift, residual": attempted(lambda: deep_lift(forms.original)),
        "DeepLift, plain": deep_lift(forms.plain),
        **canonized(model, forms, x, target),
    }


def canonized(model: nn.Module, forms: Forms, x: Tensor, target: int) -> dict[str, Any]:
    """How alike maps of the plain network are to those with zennit's canonizer, by two rules."""

    def likeness(rules: Callable[..., Any]) -> float:
        expected = by_zennit(forms.original, x, target, rules(canonizers=[ResNetCanonizer()]))
        return alike(expected, by_zennit(forms.plain, x, target, rules()))

    has_one = isinstance(model, zoo.ResNet)
    return {
        "canonizer, epsilon": likeness(epsilon) if has_one else "none",
        "canonizer, ZPlus": likeness(EpsilonPlus) if has_one else "none",
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people to read."""
    digits = {"kept": ".2f", "canonizer, epsilon": ".4f", "canonizer, ZPlus": ".4f"}
    return {k: v if isinstance(v, str) else f"{v:{digits.get(k, '.0e')}}" for k, v in row.items()}


def draw(path: Path) -> None:
    """Maps of a trained network on photos: zennit on both forms, captum on the plain one."""
    import matplotlib.pyplot as plt

    photos = _weights.imagenet_photos().images[:PHOTOS]
    model = _weights.load_efficientnet_lite0()
    forms = forms_of(model, photos[:1])
    figure, axes = plt.subplots(PHOTOS, 4, figsize=(8, 2.3 * PHOTOS), layout="constrained")
    for row, photo in zip(axes, photos, strict=True):
        x = photo[None]
        target = int(model(x).argmax())
        maps = {
            "zennit, residual": by_zennit(forms.folded, x, target, EpsilonPlus()),
            "zennit, plain": by_zennit(forms.plain, x, target, EpsilonPlus()),
            "captum, plain": attribution.LRP(forms.plain).attribute(x, target=target),
        }
        row[0].imshow((0.5 * photo + 0.5).clamp(0, 1).permute(1, 2, 0))
        for axis, (name, relevance) in zip(row[1:], maps.items(), strict=True):
            values = relevance[0].sum(0).detach()
            end = float(values.abs().flatten().quantile(0.99))
            axis.imshow(values, cmap="seismic", vmin=-end, vmax=end)
            part = float(values.sum()) / score(model, x, target)
            axis.set_title(f"{name}\nsum / score: {part:.3g}", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=80)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    made = parser(str(__doc__))
    made.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    made.add_argument("--size", type=int, default=96, help="of the picture; default: %(default)s")
    made.add_argument("--picture", type=Path, metavar="FILE", help="draw maps of photos instead")
    options = made.parse_args(arguments)
    if options.picture is not None:
        draw(options.picture)
        return 0
    rows = [row_of(name, options.size) for name in tqdm(options.networks, unit="network")]
    worst = {tool: max(row[f"{tool}, plain"] for row in rows) for tool in ("captum", "zennit")}
    limits = [Limit(f"{tool}, plain", value, CONSERVED) for tool, value in worst.items()]
    table = rows if options.json else [shown(row) for row in rows]
    return show(table, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
