"""ONNX files hold the network and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from rmfx.files.saving import save

pytestmark = pytest.mark.oldest

IMAGE = (torch.zeros(1, 3, 8, 8),)


class Layers(nn.Sequential):
    """What a converted network is made of."""

    def __init__(self) -> None:
        conv, linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 5)
        super().__init__(conv, nn.PReLU(4), nn.Flatten(), linear)


class Clamps(nn.Module):
    """The same bounds for each channel, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("low", torch.tensor([-1.0, 0.0, -2.0])[:, None, None])
        self.register_buffer("same", torch.tensor([-1.0, 0.0, -2.0])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.clamp(self.low)).clamp(self.same)  # type: ignore[no-any-return]


class Products(nn.Module):
    """Layers and products whose weights the exporter transposes, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(8, 6), nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.weight.t() @ self.weight + x @ self.weight


@pytest.mark.parametrize("shape", [(2, 8), (2, 5, 8), (2, 3, 5, 8)])
def test_weights_that_the_exporter_transposes_are_written(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = Products().eval(), torch.randn(7, *shape[1:])
    saved = save(fx.symbolic_trace(model), tmp_path / "net.onnx", (torch.zeros(shape),))
    assert saved.free_batch
    session = onnxruntime.InferenceSession(saved.path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


def test_an_onnx_file_holds_the_network_and_nothing_else(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    saved = save(fx.symbolic_trace(Clamps().eval()), tmp_path / "net.onnx", IMAGE)
    written = saved.path.read_bytes()
    for folder in (os.path.dirname(torch.__file__), os.getcwd(), str(tmp_path)):
        assert folder.encode() not in written
    graph = onnx.load(saved.path).graph
    for value in (*graph.input, *graph.output):
        sizes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert sizes == ["batch", 3, 8, 8]
    assert len(graph.initializer) == 3  # weight, bias and bounds


@pytest.mark.parametrize("tool", ["onnxsim", "onnxslim"])
def test_nothing_is_left_to_simplify_in_an_onnx_file(tool: str, tmp_path: Path) -> None:
    package = pytest.importorskip(tool, reason=f"pip install {tool}")
    onnx = pytest.importorskip("onnx")
    for name, net in (
        ("net", fx.symbolic_trace(Layers().eval())),
        ("clamps", fx.symbolic_trace(Clamps().eval())),
    ):
        model = onnx.load(save(net, tmp_path / f"{name}.onnx", IMAGE).path)
        simpler = package.simplify(model)[0] if tool == "onnxsim" else package.slim(model)
        counts = [(len(m.graph.node), len(m.graph.initializer)) for m in (model, simpler)]
        assert counts[0] == counts[1]
