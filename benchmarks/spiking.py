"""The demo's network as a spiking one: accuracy and spikes against time steps, in two simulators.

A chip of spiking neurons that takes chains only cannot add two streams. The plain network with
`activation="relu"` is convolutions and ReLU alone, which sinabs and spikingjelly turn into neurons
that integrate and fire. The residual network is simulated beside it: sinabs leaves its ReLU6 and
its additions in numbers, so that it is no spiking network; spikingjelly refuses it. Nothing here
ran on a chip. Limit: at the most steps sinabs is at most 1 point below the network itself.

Needs `pip install -e '.[spiking]'`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import FAILURES, Limit, parser, show
from torch import Tensor, nn
from tqdm import tqdm

import rmfx
from rmfx.demo import load_digits, load_model

STEPS = {"sinabs": (4, 8, 16, 32), "spikingjelly": (64, 256)}
POINTS = 1.0


def in_sinabs(network: nn.Module, images: Tensor, steps: int) -> tuple[Tensor, float]:
    """Outputs, and spikes for each image, where an image is shown for so many steps."""
    from sinabs.from_torch import from_model
    from sinabs.layers import IAFSqueeze

    made = from_model(copy.deepcopy(network), batch_size=len(images), min_v_mem=None)
    spiking, spikes = made.spiking_model, 0.0

    def count(module: nn.Module, given: Any, output: Tensor) -> None:
        nonlocal spikes
        spikes += float(output.sum())

    for layer in spiking.modules():
        if isinstance(layer, IAFSqueeze):
            layer.register_forward_hook(count)
    shown = spiking(images.repeat_interleave(steps, 0))
    return shown.reshape(len(images), steps, -1).mean(1), spikes / len(images)


def in_spikingjelly(network: nn.Module, images: Tensor, steps: int) -> tuple[Tensor, float]:
    """The same, with thresholds of the largest values on the images."""
    from spikingjelly.activation_based import ann2snn, neuron

    data = [(images, torch.zeros(len(images)))]
    recipe = ann2snn.RateCodingRecipe(dataloader=data, mode="max")
    spiking = ann2snn.Converter(recipe).convert(copy.deepcopy(network)).eval()
    spikes = 0.0

    def count(module: nn.Module, given: Any, output: Tensor) -> None:
        nonlocal spikes
        spikes += float((output != 0).sum())

    for layer in spiking.modules():
        if isinstance(layer, neuron.IFNode):
            layer.register_forward_hook(count)
    total = sum(spiking(images) for _ in range(steps))
    return total / steps, spikes / len(images)


SIMULATORS: dict[str, Callable[[nn.Module, Tensor, int], tuple[Tensor, float]]] = {
    "sinabs": in_sinabs,
    "spikingjelly": in_spikingjelly,
}


def share(outputs: Tensor, labels: Tensor) -> float:
    """Per cent of the images whose class is right."""
    return 100 * float((outputs.argmax(1) == labels).double().mean())


@torch.no_grad()
def rows_of(simulator: str, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Both forms at all numbers of steps."""
    model = load_model()
    plain = rmfx.to_sequential(rmfx.remove_residuals(model, images[:1], activation="relu"))
    forms = {"plain": plain, "residual": rmfx.fold_batch_norm(model, images[:1])}
    rows = []
    for form, network in forms.items():
        for steps in tqdm(STEPS[simulator], desc=f"{simulator}, {form}", leave=False):
            row: dict[str, Any] = {"simulator": simulator, "network": form, "steps": steps}
            try:
                outputs, spikes = SIMULATORS[simulator](network, images, steps)
            except FAILURES as error:
                rows.append({**row, "accuracy": type(error).__name__, "spikes per image": None})
                break
            accuracy = share(outputs, labels)
            rows.append({**row, "accuracy": accuracy, "spikes per image": round(spikes)})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if the limit is exceeded."""
    made = parser(str(__doc__))
    made.add_argument("--images", type=int, default=100, help="default: %(default)s")
    options = made.parse_args(arguments)
    images, labels = (x[: options.images] for x in load_digits())
    rows = [row for name in SIMULATORS for row in rows_of(name, images, labels)]
    with torch.no_grad():
        own = share(load_model()(images), labels)
    best = [r for r in rows if (r["simulator"], r["network"]) == ("sinabs", "plain")][-1]
    limits = [Limit("points that sinabs loses", own - best["accuracy"], POINTS)]
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
