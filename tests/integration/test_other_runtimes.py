"""Runtimes and converters of other projects take the plain network; each runs if it is installed.

They are no dependencies of rmfx. `pip install` with the name in the skip's reason brings one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import Residual, basic_branch, chain, conv, ready
from torch import Tensor, nn

import rmfx

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network(photo: Tensor) -> nn.Sequential:
    """A plain network with padding, a carry, a stride, a pool, a mean and a classifier."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = conv(3, 4), nn.ReLU()
            self.block = chain(Residual(basic_branch()), nn.ReLU(), nn.MaxPool2d(2))
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(self.act(self.stem(nn.functional.pad(x, (1, 0, 1, 0)))))
            return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]

    model = ready(Net(), torch.float32)
    plain = rmfx.to_sequential(rmfx.remove_residuals(model, photo))
    torch.testing.assert_close(plain(photo), model(photo))
    return plain


def test_executorch_runs_it(network: nn.Sequential, photo: Tensor, tmp_path: Path) -> None:
    exir = pytest.importorskip("executorch.exir", reason="pip install executorch")
    runtime = pytest.importorskip("executorch.runtime", reason="pip install executorch")
    program = exir.to_edge(torch.export.export(network, (photo,))).to_executorch()
    (tmp_path / "net.pte").write_bytes(program.buffer)
    method = runtime.Runtime.get().load_program(tmp_path / "net.pte").load_method("forward")
    torch.testing.assert_close(method.execute([photo])[0], network(photo))


def test_ncnn_runs_what_pnnx_makes_of_it(
    network: nn.Sequential, photo: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pnnx = pytest.importorskip("pnnx", reason="pip install pnnx ncnn")
    ncnn = pytest.importorskip("ncnn", reason="pip install pnnx ncnn")
    np = pytest.importorskip("numpy")
    monkeypatch.chdir(tmp_path)
    pnnx.export(network, "net.pt", (photo,), fp16=False)
    compile((tmp_path / "net_pnnx.py").read_text(), "net_pnnx.py", "exec")  # names are names
    with ncnn.Net() as net:
        net.load_param(str(tmp_path / "net.ncnn.param"))
        net.load_model(str(tmp_path / "net.ncnn.bin"))
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(photo[0].numpy()).clone())
        _, output = extractor.extract("out0")
        found = torch.from_numpy(np.array(output).copy())[None]
        del output, extractor  # before the memory that they lie in
    torch.testing.assert_close(found, network(photo), rtol=1e-2, atol=1e-3)


def test_tvm_runs_it(network: nn.Sequential, photo: Tensor) -> None:
    tvm = pytest.importorskip("tvm", reason="pip install apache-tvm")
    frontend = pytest.importorskip("tvm.relax.frontend.torch", reason="pip install apache-tvm")
    made = frontend.from_exported_program(torch.export.export(network, (photo,)))
    machine = tvm.relax.VirtualMachine(tvm.relax.build(made, target="llvm"), tvm.cpu())
    (found,) = machine["main"](tvm.runtime.tensor(photo.numpy()))
    torch.testing.assert_close(torch.from_numpy(found.numpy()), network(photo))


def test_core_ml_takes_it(network: nn.Sequential, photo: Tensor) -> None:
    """It runs on Apple's machines alone."""
    coremltools = pytest.importorskip("coremltools", reason="pip install coremltools")
    program = torch.export.export(network, (photo,)).run_decompositions({})
    spec = coremltools.convert(program).get_spec()
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    assert "conv" in {operation.type for operation in block.operations}


def test_litert_runs_it(network: nn.Sequential, photo: Tensor) -> None:
    litert = pytest.importorskip("litert_torch", reason="pip install litert-torch")
    made = litert.convert(network, (photo,))
    torch.testing.assert_close(torch.from_numpy(made(photo)), network(photo), rtol=1e-3, atol=1e-4)
