"""The working copy of a graph: guards, virtual layers, and a source that stays as it was."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_same, chain, conv, image, ready, snapshot, types
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import rmfx
from rmfx.algebra.activation import Activation, Block
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.algebra.products import compose
from rmfx.errors import Refusal, WeightError
from rmfx.ir.elements import Virtual
from rmfx.ir.net import Net
from rmfx.ir.notes import positions
from rmfx.ir.reading import read_affine
from rmfx.ir.weights import check_weight

CPU = torch.device("cpu")
F64 = torch.float64


def net_of(model: nn.Module, x: Tensor | None = None) -> Net:
    return Net(rmfx.trace(model.double().eval(), x))


def node_of(net: Net, name: str) -> fx.Node:
    return next(n for n in net.graph.nodes if n.name == name)


def put_there(net: Net, name: str, layer: Virtual) -> None:
    net.set(node_of(net, name), layer)


def virtual(layer: AffineConv | Blockwise) -> Virtual:
    return Virtual(layer, F64, CPU)


# ---- guards -------------------------------------------------------------------------------------


def hooked() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda module, args, output: -output)
    return layer


def pre_hooked() -> nn.Module:
    layer = conv()
    layer.register_forward_pre_hook(lambda module, args: (-args[0],))
    return layer


def drawn() -> nn.Module:
    class Drawn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * torch.rand_like(x)

    layer = conv()
    parametrize.register_parametrization(layer, "weight", Drawn())
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked, "hooks"),
        (pre_hooked, "hooks"),
        (drawn, "parametriz"),
    ],
)
def test_touched_modules_are_guarded_and_keep_their_values(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model = Apply(lambda m, x: x + m.b(F.relu(m.a(x))), a=make(), b=conv()).double().eval()
    refusal = Net(rmfx.trace(model)).guard(node_of(Net(rmfx.trace(model)), "a"))
    assert refusal is not None
    assert reason in refusal.reason
    for convert in (rmfx.remove_residuals, rmfx.merge_convs, rmfx.fold_batch_norm):
        torch.testing.assert_close(convert(model, image())(image()), model(image()))
    (row,) = rmfx.report(rmfx.remove_residuals(model)).rows
    assert row.status == "refused"
    assert reason in row.reason


def shared_module() -> nn.Module:
    return Apply(lambda m, x: x + m.a(F.relu(m.a(x))), a=conv())


def shared_under_two_names() -> nn.Module:
    layer = conv()
    return Apply(lambda m, x: x + m.b(F.relu(m.a(x))), a=layer, b=layer)


def tied_weights() -> nn.Module:
    a, b = conv(), conv()
    b.weight = a.weight
    return Apply(lambda m, x: x + m.b(F.relu(m.a(x))), a=a, b=b)


def weight_read_elsewhere() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        return x + m.b(F.relu(m.a(x))), F.conv2d(x, m.a.weight, padding=1)

    return Apply(forward, a=conv(), b=conv())


def functional_with_one_weight() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        return x + F.conv2d(F.relu(F.conv2d(x, m.w, padding=1)), m.w, padding=1)

    return Apply(forward, w=nn.Parameter(torch.randn(4, 4, 3, 3)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (shared_module, "called 2 times"),
        (shared_under_two_names, "called 2 times"),
        (tied_weights, "used elsewhere"),
        (weight_read_elsewhere, "used elsewhere"),
        (functional_with_one_weight, "used elsewhere"),
    ],
)
def test_shared_weights_are_guarded(make: Callable[[], nn.Module], reason: str) -> None:
    model = make().double().eval()
    gm = rmfx.remove_residuals(model, image(), copy_shared=False)
    assert any(reason in row.reason for row in rmfx.report(gm).rows)
    torch.testing.assert_close(gm(image()), model(image()))


def test_batch_norm_shared_by_two_convs_is_not_folded() -> None:
    model = ready(Apply(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=conv(), b=conv(),
                        bn=nn.BatchNorm2d(4)))  # fmt: skip
    gm = rmfx.fold_batch_norm(model)
    assert types(gm).count("BatchNorm2d") == 2
    torch.testing.assert_close(gm(image()), model(image()))


def test_a_plain_module_is_not_guarded() -> None:
    net = net_of(chain(conv(), nn.ReLU()))
    assert [net.guard(n) for n in net.graph.nodes] == [None] * 4


# ---- writing ------------------------------------------------------------------------------------


def test_the_source_stays_as_it_was() -> None:
    model = ready(chain(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()))
    gm = rmfx.trace(model, image())
    before = snapshot(gm)
    net = Net(gm)
    first, second = node_of(net, "_0"), node_of(net, "_1")
    net.merge(first, second, virtual(AffineConv.identity(4, 2)), ())
    net.finish()
    assert_same(before, snapshot(gm))


def test_nothing_is_shared_with_the_source() -> None:
    model = chain(conv(), nn.ReLU()).double().eval()
    result = net_of(model).finish()
    mine = {p.data_ptr() for p in result.parameters()}
    assert not mine & {p.data_ptr() for p in model.parameters()}


def test_tied_weights_stay_tied_in_the_result() -> None:
    a, b = conv(), conv()
    b.weight = a.weight
    result = net_of(Apply(lambda m, x: m.b(m.a(x)), a=a, b=b)).finish()
    assert result.a.weight is result.b.weight


def test_put_makes_names_unique() -> None:
    net = net_of(chain(conv()))
    node = node_of(net, "_0")
    with net.graph.inserting_after(node):
        made = net.put(virtual(AffineConv.identity(4, 2)), node, "0", node)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    assert (made.target, types(net.finish())) == ("0_1", ["Conv2d", "Conv2d"])


def test_released_names_are_used_again() -> None:
    net = net_of(chain(conv()))
    node = node_of(net, "_0")
    net.release([node])
    with net.graph.inserting_after(node):
        made = net.put(virtual(AffineConv.identity(4, 2)), node.all_input_nodes[0], "0", node)
    node.replace_all_uses_with(made)
    net.graph.erase_node(node)
    result = net.finish()
    assert made.target == "0"
    assert torch.equal(result(image()), image())


@pytest.mark.parametrize("order", [("conv", "bn"), ("bn", "conv")])
def test_merge_keeps_the_name_of_the_conv(order: tuple[str, str]) -> None:
    parts = {"conv": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4)}
    net = net_of(Apply(lambda m, x: getattr(m, order[1])(getattr(m, order[0])(x)), **parts))
    first, second = (node_of(net, name) for name in order)
    net.merge(first, second, virtual(AffineConv.identity(4, 2)), ())
    result = net.finish()
    assert [n.name for n in result.graph.nodes] == ["x", "conv", "output"]
    assert [name for name, _ in result.named_children()] == ["conv"]


def test_asymmetric_padding_gets_a_module_of_its_own() -> None:
    net = net_of(chain(conv()))
    put_there(net, "_0", virtual(AffineConv.identity(4, 2, padding=((1, 0), (0, 0)))))
    result = net.finish()
    assert types(result) == ["ZeroPad2d", "Conv2d"]
    assert torch.equal(result(image()), F.pad(image(), (0, 0, 1, 0)))


def test_blockwise_layers_are_made_at_the_end() -> None:
    blocks = (Block(1, Activation(nn.ReLU())), Block(3, None))
    net = net_of(chain(conv()))
    put_there(net, "_0", virtual(Blockwise(blocks, 2)))
    assert isinstance(net.replacement(node_of(net, "_0")), Virtual)
    assert net.module(node_of(net, "_0")) is None
    assert types(net.finish()) == ["PReLU"]


def test_overflow_names_the_node() -> None:
    net = net_of(chain(conv()))
    layer = AffineConv.scale(torch.full((4,), 1e5, dtype=F64), dims=2)
    put_there(net, "_0", Virtual(layer, torch.float16, CPU))
    with pytest.raises(WeightError, match=r"^_0: .*float16"):
        net.finish()


def test_dead_code_goes_and_writes_stay() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        m.unused(x)
        m.n.add_(1)
        return F.relu(x)

    model = Apply(forward, unused=conv(), n=nn.Buffer(torch.zeros(1)))
    result = net_of(model).finish()
    assert types(result) == ["ReLU"]
    result(image())
    assert float(result.n) == 1


def test_meta_is_handed_on() -> None:
    gm = rmfx.trace(chain(conv()).double().eval(), image())
    gm.meta["own"] = 1
    result = Net(gm).finish({"more": 2})
    assert (result.meta["own"], result.meta["more"]) == (1, 2)
    assert not result.training


# ---- small things -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dims", "expected"),
    [
        ((2, 4, 5, 6), 2, 60),
        ((2, 4), 0, 2),
        ((2, 7, 4), 0, 14),
        ((2, 4, None), 1, None),
        (None, 1, None),
    ],
)
def test_positions_are_pixels_or_tokens(shape: Any, dims: int, expected: int | None) -> None:
    assert positions(shape, dims) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.empty(1, device="meta"), "meta device"),
        (torch.ones(1, dtype=torch.complex64), "complex"),
        (torch.tensor([float("nan")]), "NaN"),
        (torch.tensor([float("inf"), -float("inf")]), "Inf"),
        (nn.UninitializedParameter(), "not initialised"),
    ],
)
def test_weights_that_cannot_be_computed_with_are_errors(value: Tensor, reason: str) -> None:
    with pytest.raises(WeightError, match=reason):
        check_weight("layer.weight", value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.bool])
def test_other_weights_are_accepted(dtype: torch.dtype) -> None:
    check_weight("layer.weight", torch.ones(3, dtype=dtype))


def test_a_refusal_blames_the_nodes_it_names_first() -> None:
    assert str(Refusal("why").at("a", "b")) == "a, b: why"
    assert str(Refusal("why", ("c",)).at("a")) == "c: why"
    assert str(Refusal("why")) == "why"


def test_a_merged_layer_has_the_channels_of_its_last() -> None:
    """Known without shapes, they decide what a slice of its value is."""
    model = chain(conv(4, 3, 1), conv(3, 5, 1))
    net = net_of(model)
    first, second = (node for node in net.graph.nodes if node.op == "call_module")
    assert (net.channels(first, 2), net.channels(second, 2)) == (3, 5)
    layers = read_affine(net, first), read_affine(net, second)
    assert isinstance(layers[0], AffineConv)
    assert isinstance(layers[1], AffineConv)
    merged = compose(layers[1], layers[0])
    assert isinstance(merged, AffineConv)
    net.merge(first, second, virtual(merged), ())
    assert net.channels(first, 2) == 5


def test_parameters_keep_their_order_when_pickled() -> None:
    inner = chain(conv(), nn.ReLU(), conv())
    model = ready(chain(chain(inner, nn.ReLU()), conv(), Apply(lambda m, x: m.c(x), c=conv())))
    gm = Net(rmfx.trace(model, image())).finish()
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in gm.named_parameters()] == names
    again = pickle.loads(pickle.dumps(gm))
    assert [name for name, _ in again.named_parameters()] == names
