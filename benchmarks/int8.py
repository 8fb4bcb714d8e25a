"""Trained networks in int8 by three quantisers: the original beside each way past an activation.

Three networks: the demo's on its digits, of which every fifth calibrates; EfficientNet-Lite0 and
ResNet-8 on ten views (shifted, mirrored) of 20 photos each, where five other views calibrate. Per
cent of right answers, and noise: root mean square of the error against the network in float32 over
that of its own logits' variation, which tells more than a few answers do.
Limit: no way that `activation="relu"` takes costs more than a point against the original in int8.

Needs `pip install -e '.[bench,int8]'` and `python benchmarks/fetch_weights.py`.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _weights
import torch
from _common import FAILURES, Limit, message, parser, show
from torch import Tensor, fx, nn
from tqdm import tqdm

import rmfx
from rmfx.demo import load_digits, load_model

BATCH = 20
POINTS = 1.0
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto, input_range": {"input_range": True},
    "relu": {"activation": "relu", "input_range": True},
    "odd-pair": {"activation": ("identity", "odd-pair"), "input_range": True},
    "shift": {"activation": ("identity", "shift"), "calibration": True},
}
Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A trained network, images that calibrate, others that it answers, and their classes."""

    model: nn.Module
    calibration: Tensor
    images: Tensor
    labels: Tensor
    input_range: tuple[float, float]


def views(photos: _weights.Photos, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five views of each photo that calibrate, ten others that are asked, and their classes."""

    def shifted(by: int) -> list[Tensor]:
        # A roll brings in what left at the other side, which no border of zeros would be nearer to.
        shifts = [(0, 0), (by, 0), (-by, 0), (0, by), (0, -by)]
        return [torch.roll(photos.images, shift, (2, 3)) for shift in shifts]

    asked = shifted(step)
    whole = torch.stack([*asked, *(x.flip(3) for x in asked)], 1).flatten(0, 1)
    return torch.cat(shifted(2 * step)), whole, photos.labels.repeat_interleave(10)


def digits() -> Case:
    """The demo's network: every fifth digit calibrates, the other 400 are answered."""
    images, labels = load_digits()
    seen = torch.arange(len(labels)) % 5 == 0
    return Case(load_model(), images[seen], images[~seen], labels[~seen], (0, 1))


def lite0() -> Case:
    """EfficientNet-Lite0, its ReLU6 and linear bottlenecks."""
    model, photos = _weights.load_efficientnet_lite0(), _weights.imagenet_photos()
    return Case(model, *views(photos, 8), (-1, 1))


def resnet8() -> Case:
    """The MLPerf Tiny ResNet-8: ReLU alone."""
    return Case(_weights.load_resnet8(), *views(_weights.cifar10_photos(), 2), (0, 1))


CASES = {"demo": digits, "efficientnet_lite0": lite0, "resnet8": resnet8}


def in_torchao(network: nn.Module, seen: Tensor) -> Answer:
    """PT2E as for x86 CPUs: export, prepare, calibrate, convert."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    quantizer = x86.X86InductorQuantizer().set_global(config)
    if isinstance(network, fx.GraphModule):
        for node in network.graph.nodes:
            # The quantiser goes by classes, which here are those that layers were traced from.
            node.meta.clear()
            if node.op == "call_module":
                kind = type(network.get_submodule(str(node.target)))
                node.meta["nn_module_stack"] = {node.name: (node.name, kind)}
    prepared = prepare_pt2e(torch.export.export(network, (seen[:BATCH],)).module(), quantizer)
    for batch in seen.split(BATCH):
        prepared(batch)
    made: fx.GraphModule = convert_pt2e(prepared)
    layers = [n for n in made.graph.nodes if str(n.target).startswith("aten.conv")]
    if not all("dequantize" in str(getattr(n.args[0], "target", "")) for n in layers):
        raise RuntimeError("a convolution is not quantised")
    answer: Answer = made
    return answer


def _onnx_file(network: nn.Module, example: Tensor, folder: Path) -> Path:
    path = folder / "network.onnx"
    program = torch.onnx.export(network, (example,), verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    program.save(path, external_data=False)
    return path


def in_openvino(network: nn.Module, seen: Tensor) -> Answer:
    """NNCF's default preset on the model that OpenVINO reads."""
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        model = openvino.Core().read_model(_onnx_file(network, seen[:BATCH], Path(folder)))
    data = nncf.Dataset([x.numpy() for x in seen.split(BATCH)])
    quantised = nncf.quantize(model, data, subset_size=len(seen) // BATCH)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(quantised, "CPU", options)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def in_onnxruntime(network: nn.Module, seen: Tensor) -> Answer:
    """ONNX Runtime's static quantiser: QDQ, a scale for each output channel, extremes of values."""
    import onnxruntime
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(seen.split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        path = _onnx_file(network, seen[:BATCH], Path(folder))
        name = onnxruntime.InferenceSession(path).get_inputs()[0].name
        out = Path(folder) / "int8.onnx"
        quantization.quantize_static(path, out, Reader(), per_channel=True)
        session = onnxruntime.InferenceSession(out)
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


QUANTISERS: dict[str, Callable[[nn.Module, Tensor], Answer]] = {
    "torchao PT2E": in_torchao,
    "NNCF, OpenVINO": in_openvino,
    "ONNX Runtime": in_onnxruntime,
}


def answers(run: Answer, images: Tensor) -> Tensor:
    """Logits of all images, in the batches that a model was exported for."""
    return torch.cat([run(batch) for batch in images.split(BATCH)])


def noise(expected: Tensor, found: Tensor) -> float:
    """Root mean square of the error over that of the logits' variation."""
    return float((found - expected).norm() / (expected - expected.mean(0)).norm())


def forms(case: Case, names: Iterable[str]) -> dict[str, tuple[str, nn.Module | None]]:
    """How carries pass activations and the network, None if refused, for each different one."""
    example = case.calibration[:BATCH]
    made = {"original": ("", rmfx.fold_batch_norm(case.model, example))}
    alike: dict[str, list[str]] = {}
    data = {"input_range": case.input_range, "calibration": [case.calibration]}
    for name in names:
        given = {key: data.get(key, value) for key, value in WAYS[name].items()}
        converted = rmfx.remove_residuals(case.model, example, **given)
        rows = rmfx.report(converted).rows
        ways = ", ".join(sorted({str(row.strategy or "refused") for row in rows}))
        alike.setdefault(ways, []).append(name)
        made[ways] = ways, converted if rmfx.is_plain(converted) else None
    return {"; ".join(alike.get(key, [key])): found for key, found in made.items()}


@torch.no_grad()
def rows_of(name: str, ways_asked: Iterable[str]) -> Iterator[dict[str, Any]]:
    """One network: a row for the original, and each way, by each quantiser."""
    case = CASES[name]()
    expected = answers(case.model, case.images)
    for form, (ways, network) in forms(case, ways_asked).items():
        row: dict[str, Any] = {"network": name, "activation": form, "carries pass by": ways}
        if network is None:
            yield row
            continue
        row["float32 %"] = right(answers(network, case.images), case.labels)
        for quantiser, made in tqdm(QUANTISERS.items(), desc=f"{name}, {form}", leave=False):
            try:
                found = answers(made(copy.deepcopy(network), case.calibration), case.images)
            except FAILURES as error:
                yield {**row, "quantiser": quantiser, "note": message(error)}
                continue
            figures = {"int8 %": right(found, case.labels), "noise": noise(expected, found)}
            yield {**row, "quantiser": quantiser, **figures}


def right(logits: Tensor, labels: Tensor) -> float:
    """Per cent of the images whose class is right."""
    return 100 * float((logits.argmax(1) == labels).double().mean())


def lost(rows: Iterable[dict[str, Any]]) -> float:
    """The most points below float32 that "relu" costs, beyond those that int8 costs the original.

    Answers that are right by int8's own chance are no merit of a form, so none is above float32.
    """
    found: dict[tuple[str, str, str], float] = {
        (row["network"], row["quantiser"], form): max(0.0, row["float32 %"] - row["int8 %"])
        for row in rows
        if "int8 %" in row
        for form in row["activation"].split("; ")
    }
    beyond = (at - found[(n, q, "original")] for (n, q, f), at in found.items() if f == "relu")
    return max(beyond, default=0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if the limit is exceeded, 2 without the weights."""
    made = parser(str(__doc__))
    made.add_argument("--networks", default=",".join(CASES), help="default: %(default)s")
    made.add_argument("--ways", default=";".join(WAYS), help="default: %(default)s")
    options = made.parse_args(arguments)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        names, ways = options.networks.split(","), options.ways.split(";")
        rows = [row for name in names for row in rows_of(name, ways)]
    except _weights.MissingWeightsError as error:
        print(error, file=sys.stderr)
        return 2
    limits = [Limit('points lost by activation="relu"', lost(rows), POINTS)]
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
