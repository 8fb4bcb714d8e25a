"""What `remove_residuals` gives goes wherever a network goes: files, engines, compilers, int8.

Whatever comes out at the other end is compared with the original network, mostly at other batch and
image sizes than those of the conversion.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Residual, adds, basic_branch, chain, conv, conv_bn, ready, shapes, types
from torch import Tensor, fx, nn
from torch.export import Dim

import rmfx
from rmfx.demo import load_digits, load_model
from rmfx.files.trials import relative_error
from rmfx.models import cifar_resnet

DYNAMIC = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
# Ten times what float32 rounds here. A lost carry is a thousand times more:
# `test_a_lost_carry_would_be_noticed`.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- the networks -------------------------------------------------------------------------------
# They end in logits for every pixel: a mean over the maps of a random network hardly depends on the
# input.


def basic() -> nn.Module:
    strided = Residual(basic_branch(8, 12, stride=2), conv_bn(8, 12, 1, stride=2))
    blocks = [Residual(basic_branch(8, 8)), nn.ReLU(), strided, nn.ReLU()]
    return chain(conv_bn(3, 8), nn.ReLU(), *blocks, conv(12, 5, 1))


def bottleneck() -> nn.Module:
    def block(channels: int, shortcut: nn.Module | None = None) -> nn.Module:
        reduce, inner, expand = conv_bn(channels, 4, 1), conv_bn(4, 4), conv_bn(4, 16, 1)
        branch = chain(reduce, nn.ReLU(), inner, nn.ReLU(), expand)
        return chain(Residual(branch, shortcut), nn.ReLU())

    blocks = [block(8, conv_bn(8, 16, 1)), block(16)]
    return chain(conv_bn(3, 8), nn.ReLU(), *blocks, conv(16, 5, 1))


def inverted_residual() -> nn.Module:
    def block() -> nn.Module:
        expand, depthwise = conv_bn(8, 16, 1), conv_bn(16, 16, groups=16)
        return Residual(chain(expand, nn.ReLU6(), depthwise, nn.ReLU6(), conv_bn(16, 8, 1)))

    return chain(conv_bn(3, 8, stride=2), nn.ReLU6(), block(), block(), conv(8, 5, 1))


def silu() -> nn.Module:
    blocks = [Residual(basic_branch(8, 8, act=nn.SiLU())) for _ in range(2)]
    return chain(conv_bn(3, 8), nn.SiLU(), *blocks, nn.SiLU(), conv(8, 5, 1))


# The last two ship with rmfx, are larger and run with the slow tests.
# Name: the network, how its carries pass the activations, channels of its input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str], int]] = {
    "basic": (basic, {"identity"}, 3),
    "bottleneck": (bottleneck, {"identity"}, 3),
    "inverted_residual": (inverted_residual, {"identity", "per-channel"}, 3),
    "silu": (silu, {"masked"}, 3),
    "cifar": (lambda: cifar_resnet(8), {"identity"}, 3),
    "digits": (load_model, {"identity", "per-channel"}, 1),
}
OWN = ["basic", "bottleneck", "inverted_residual", "silu"]
SHIPPED = [pytest.param(name, marks=pytest.mark.slow) for name in ("cifar", "digits")]
every_network = pytest.mark.parametrize("name", [*OWN, *SHIPPED])
every_form = pytest.mark.parametrize("form", ["graph", "sequential"])


def images(name: str, batch: int = 2, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, NETWORKS[name][2], height, width, generator=generator)


@functools.cache
def original(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = NETWORKS[name][0]()
    if name != "digits":  # that one is trained
        model = ready(model, torch.float32)
    return model


@functools.cache
def removed(name: str, with_inputs: bool = True) -> fx.GraphModule:
    """The network without residual connections. It is shared by the tests, which leave it alone."""
    plain = rmfx.remove_residuals(original(name), images(name) if with_inputs else None)
    assert rmfx.report(plain).refused == adds(plain) == 0, str(rmfx.report(plain))
    assert {row.strategy for row in rmfx.report(plain).rows} == NETWORKS[name][1]
    return plain


def converted(name: str, form: str = "graph") -> nn.Module:
    return removed(name) if form == "graph" else rmfx.to_sequential(removed(name))


def assert_computes(name: str, function: Callable[[Tensor], Any]) -> None:
    """The function is the original's up to rounding, at the size of the conversion."""
    x = images(name, seed=1)
    assert relative_error(original(name)(x), function(x)) < TOLERANCE


def assert_computes_at_any_size(name: str, function: Callable[[Tensor], Any]) -> None:
    for seed, size in enumerate([(2, 16, 16), (1, 16, 24), (5, 21, 18)]):
        x = images(name, *size, seed=seed)
        assert relative_error(original(name)(x), function(x)) < TOLERANCE, size


@every_network
def test_example_inputs_make_no_difference(name: str) -> None:
    """What the other tests find holds for a conversion without inputs too."""
    one, other = removed(name), removed(name, with_inputs=False)
    assert one.code == other.code
    assert str(one) == str(other)
    weights = other.state_dict()
    assert weights.keys() == one.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in one.state_dict().items())


@every_network
def test_a_lost_carry_would_be_noticed(name: str) -> None:
    """The comparisons below can fail: without one carry the output is another."""
    broken = copy.deepcopy(removed(name))
    row = next(row for row in rmfx.report(broken).rows if row.node and row.carry)
    (node,) = [node for node in broken.graph.nodes if node.name == row.node]
    merge: Any = broken.get_submodule(str(node.target))
    merge.weight[:, -row.carry :] = 0
    x = images(name, seed=1)
    assert relative_error(original(name)(x), broken(x)) > 1000 * TOLERANCE


# ---- files and engines --------------------------------------------------------------------------


def loaded(program: torch.export.ExportedProgram, path: Path) -> Any:
    """The program as a module, by way of a file."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


@every_network
def test_is_exported_and_saved_for_one_size(name: str, tmp_path: Path) -> None:
    program = torch.export.export(removed(name), (images(name),))
    assert not [n for n in program.graph.nodes if "add" in str(n.target)]
    assert_computes(name, loaded(program, tmp_path / "net.pt2"))


@every_form
@every_network
def test_is_exported_and_saved_for_any_size(name: str, form: str, tmp_path: Path) -> None:
    plain = converted(name, form)
    program = torch.export.export(plain, (images(name),), dynamic_shapes=DYNAMIC)
    assert_computes_at_any_size(name, loaded(program, tmp_path / "net.pt2"))


def test_exported_program_is_converted_no_further() -> None:
    plain = removed("basic")
    program = torch.export.export(plain, (images("basic"),))
    again = rmfx.remove_residuals(program, images("basic"))
    assert rmfx.report(again).rows == ()
    assert shapes(again) == shapes(plain)
    assert_computes("basic", again)


@functools.cache
def onnx_bytes(name: str, form: str = "graph", dynamic: bool = True) -> bytes:
    """What the dynamo exporter writes, for any size or for one."""
    pytest.importorskip("onnxscript")
    shapes = DYNAMIC if dynamic else None
    program = torch.onnx.export(
        converted(name, form), (images(name),), dynamo=True, verbose=False, dynamic_shapes=shapes
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def assert_runs_in_onnxruntime(name: str, written: bytes) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0])

    assert_computes_at_any_size(name, run)


@every_network
def test_onnx_runs_in_onnxruntime(name: str) -> None:
    assert_runs_in_onnxruntime(name, onnx_bytes(name))


@pytest.mark.bench
@every_network
def test_onnx_runs_in_openvino(name: str) -> None:
    core = pytest.importorskip("openvino").Core()
    # On processors that have it OpenVINO would compute in bfloat16.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    network = core.compile_model(core.read_model(onnx_bytes(name)), "CPU", options)
    assert_computes_at_any_size(name, lambda x: torch.from_numpy(network(x.numpy())[0]))


def test_onnx_of_the_sequential_runs_in_onnxruntime() -> None:
    name = "inverted_residual"
    assert_runs_in_onnxruntime(name, onnx_bytes(name, "sequential"))


@pytest.mark.parametrize("name", ["basic", "inverted_residual"])
def test_onnx_for_one_size_is_a_chain(name: str) -> None:
    onnx = pytest.importorskip("onnx")
    nodes = onnx.load_from_string(onnx_bytes(name, dynamic=False)).graph.node
    read = [value for node in nodes for value in node.input]
    readers = [read.count(value) for node in nodes for value in node.output]
    assert readers == [*[1] * (len(nodes) - 1), 0]
    assert "Add" not in {node.op_type for node in nodes}


# ---- torch.compile ------------------------------------------------------------------------------


@every_network
def test_compiles_without_a_graph_break(name: str) -> None:
    """With "aot_eager", which does all that Inductor does before it writes code."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(removed(name), backend="aot_eager", fullgraph=True)
    assert_computes_at_any_size(name, compiled)


@pytest.mark.parametrize(
    "name",
    [
        "inverted_residual",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("basic", "bottleneck", "silu")),
        *SHIPPED,
    ],
)
def test_compiles_with_inductor(name: str) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(removed(name), fullgraph=True)
    assert_computes(name, compiled)


# ---- copies -------------------------------------------------------------------------------------


def saved_and_loaded(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
    "torch.save twice": lambda module: saved_and_loaded(saved_and_loaded(module)),
    "deepcopy twice": lambda module: copy.deepcopy(copy.deepcopy(module)),
}
every_way = pytest.mark.parametrize("way", COPIES)


@every_way
@every_form
@every_network
def test_copies_compute_the_same(name: str, form: str, way: str) -> None:
    plain = converted(name, form)
    again = COPIES[way](plain)
    x = images(name, seed=1)
    assert torch.equal(again(x), plain(x))
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert types(again) == types(plain)


def assert_keeps_its_report(again: fx.GraphModule, plain: fx.GraphModule) -> None:
    assert rmfx.report(again) == rmfx.report(plain)
    joins = {row.node for row in rmfx.report(again).rows}
    assert joins - {None} <= {node.name for node in again.graph.nodes}
    assert rmfx.is_plain(again)


@every_way
@every_network
def test_copies_keep_the_report(name: str, way: str) -> None:
    assert_keeps_its_report(COPIES[way](removed(name)), removed(name))


@pytest.mark.parametrize(("first", "second"), [("deepcopy", "pickle"), ("pickle", "deepcopy")])
def test_copies_of_copies_keep_the_report(first: str, second: str) -> None:
    plain = removed("basic")
    assert_keeps_its_report(COPIES[second](COPIES[first](plain)), plain)


@every_form
@every_network
def test_weights_are_saved_as_tensors_alone(name: str, form: str, tmp_path: Path) -> None:
    plain = converted(name, form)
    torch.save(plain.state_dict(), tmp_path / "net.pt")
    other = copy.deepcopy(plain)
    for value in (*other.parameters(), *other.buffers()):
        value.zero_()
    x = images(name, seed=1)
    assert not torch.equal(other(x), plain(x))
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize("name", OWN)
def test_weights_fit_the_conversion_of_another_network_of_the_kind(name: str) -> None:
    """Weights saved alone are read back into the conversion of an untrained network."""
    fresh = rmfx.remove_residuals(ready(NETWORKS[name][0](), torch.float32))
    x = images(name, seed=1)
    assert not torch.equal(fresh(x), removed(name)(x))
    fresh.load_state_dict(removed(name).state_dict())
    assert torch.equal(fresh(x), removed(name)(x))


# ---- once is enough -----------------------------------------------------------------------------


def assert_converted_no_further(name: str, plain: nn.Module) -> None:
    again = rmfx.remove_residuals(plain, images(name))
    x = images(name, seed=1)
    assert torch.equal(again(x), plain(x))
    assert rmfx.report(again).rows == ()
    assert rmfx.is_plain(again)
    assert types(again) == types(removed(name))


@every_way
@every_network
def test_a_second_conversion_changes_nothing(name: str, way: str) -> None:
    assert_converted_no_further(name, COPIES[way](removed(name)))


def test_a_chain_is_converted_no_further() -> None:
    assert_converted_no_further("bottleneck", converted("bottleneck", "sequential"))


@pytest.mark.parametrize("name", ["inverted_residual", "silu"])
def test_a_chain_with_activations_of_our_own_is_converted_no_further(name: str) -> None:
    assert_converted_no_further(name, converted(name, "sequential"))


# ---- int8 ---------------------------------------------------------------------------------------


def quantised(model: nn.Module, batches: list[Tensor]) -> fx.GraphModule:
    """Static int8 by PT2E: export, prepare, calibrate, convert."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    exported = torch.export.export(model, (batches[0],)).module()
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    for batch in batches:
        prepared(batch)
    made: fx.GraphModule = convert_pt2e(prepared)
    assert_is_quantised(made)
    return made


def assert_is_quantised(model: fx.GraphModule) -> None:
    """Every convolution and Linear layer reads an int8 input and an int8 weight."""
    layers = [n for n in model.graph.nodes if str(n.target).startswith(("aten.conv", "aten.lin"))]
    read = [str(getattr(a, "target", a)) for n in layers for a in n.args[:2]]
    assert len(layers) > 4
    assert all(name.startswith("quantized_decomposed.dequantize_per") for name in read), read


def noise(expected: Tensor, found: Tensor) -> float:
    """Root mean square of the error over that of the output's variation."""
    varies = expected - expected.mean((0, *range(2, expected.dim())), keepdim=True)
    return float((found - expected).norm() / varies.norm())


@pytest.mark.parametrize("name", OWN)
def test_int8_is_about_as_good_as_that_of_the_original(name: str) -> None:
    x = images(name, batch=8, seed=9)
    batches = [images(name, batch=8, seed=seed) for seed in range(4)]
    before, after = (
        noise(model(x), quantised(model, batches)(x)) for model in (original(name), removed(name))
    )
    # One scale serves main channels and carry, and the carry is rounded once more for each layer.
    assert 0 < after < 3 * before


def test_int8_of_a_trained_network_answers_the_same() -> None:
    digits, labels = load_digits()
    batches, x, labels = [digits[:100]], digits[100:200], labels[100:200]
    models = original("digits"), removed("digits")
    found = [quantised(model, batches)(x) for model in models]
    right = [int((logits.argmax(1) == labels).sum()) for logits in found]
    assert right[1] >= right[0] - 2


@pytest.mark.slow
def test_without_other_activations_a_trained_network_answers_the_same_in_few_bits() -> None:
    digits, labels = load_digits()
    model = load_model()
    gm = rmfx.remove_residuals(model, digits[:1], activation="relu", input_range=(0, 1))
    report = rmfx.report(gm)
    assert (report.removed, report.adds_left) == (5, 0)
    assert all(row.gain is not None and row.gain <= 16 for row in report.rows), str(report)
    assert {*types(gm)} <= {"Conv2d", "ReLU", "ReLU6", "AdaptiveAvgPool2d", "Flatten", "Linear"}
    plain, folded = rmfx.to_sequential(gm), rmfx.fold_batch_norm(model, digits[:1])

    def right(module: nn.Module, dtype: torch.dtype = torch.float32) -> int:
        return int((module(digits[200:400].to(dtype)).argmax(1) == labels[200:400]).sum())

    for dtype in (torch.float16, torch.bfloat16):
        before, after = (right(copy.deepcopy(m).to(dtype), dtype) for m in (folded, plain))
        assert after >= before - 2
    batches = [digits[start : start + 200] for start in (0, 200)]
    assert right(quantised(plain, batches)) >= right(quantised(folded, batches)) - 2
