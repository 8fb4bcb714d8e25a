"""Channel clean-up: what goes, what stays, and that the numbers are the same at every border."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    Residual,
    assert_same,
    chain,
    conv,
    conv_bn,
    image,
    ready,
    shapes,
    snapshot,
    types,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import rmfx
import rmfx.cost
from rmfx.modules.activations import ChannelClamp, ChannelPReLU, MaskedActivation
from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks

EXACT = 1e-12


def clean(model: nn.Module, *inputs: Any, **options: Any) -> fx.GraphModule:
    """The result, after checking its numbers, a second run and that the model is untouched."""
    before = snapshot(model)
    result: fx.GraphModule = rmfx.eliminate_dead_channels(model, inputs or None, **options)
    assert_same(before, snapshot(model))
    assert_equivalent(model, result, inputs or (image(),), tolerance=EXACT)
    again = rmfx.eliminate_dead_channels(result, inputs or None, **options)
    assert (types(again), shapes(again)) == (types(result), shapes(result))
    assert_equivalent(result, again, inputs or (image(),), tolerance=EXACT)
    return result


def widths(gm: fx.GraphModule) -> list[int]:
    """Output channels of the linear layers, in order."""
    return [shape[0] for shape in shapes(gm)]


def zeroed(layer: nn.Module, rows: Sequence[int], *, bias: bool = True) -> nn.Module:
    """The layer with some rows of zeros, and without their bias if told so."""
    own: Any = layer
    with torch.no_grad():
        own.weight[list(rows)] = 0
        if bias and own.bias is not None:
            own.bias[list(rows)] = 0
    return layer


def constant(layer: nn.Module, rows: Sequence[int]) -> nn.Module:
    return zeroed(layer, rows, bias=False)


def blind(layer: nn.Module, columns: Sequence[int]) -> nn.Module:
    """The layer with some columns of zeros."""
    own: Any = layer
    with torch.no_grad():
        own.weight[:, list(columns)] = 0
    return layer


def twins(layer: nn.Module, pairs: dict[int, int]) -> nn.Module:
    """The layer with some rows equal to others."""
    own: Any = layer
    with torch.no_grad():
        for copy, original in pairs.items():
            for table in (own.weight, own.bias, *own.buffers()):
                if table is not None and table.dim():
                    table[copy] = table[original]
    return layer


def wide(n_in: int = 4, n_out: int = 8, **options: Any) -> nn.Module:
    return conv(n_in, n_out, **options)


def narrow(n_in: int = 8, n_out: int = 4, **options: Any) -> nn.Module:
    return conv(n_in, n_out, **options)


def norm(n: int = 8) -> nn.Module:
    layer = nn.BatchNorm2d(n)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def prelu(n: int = 8) -> nn.Module:
    layer = nn.PReLU(n)
    with torch.no_grad():
        layer.weight.uniform_(-0.5, 0.5)
    return layer


Make = Callable[[], nn.Module]
GOES: dict[str, tuple[Make, list[int]]] = {
    "zero rows": (lambda: chain(zeroed(wide(), [1, 5]), narrow()), [6, 4]),
    "zero rows, ReLU": (lambda: chain(zeroed(wide(), [1]), nn.ReLU(), narrow()), [7, 4]),
    "zero rows, GELU": (lambda: chain(zeroed(wide(), [1]), nn.GELU(), narrow()), [7, 4]),
    "ReLU that never fires": (
        lambda: chain(nn.ReLU(), _never_fires(wide(), 3), nn.ReLU(), narrow()),
        [7, 4],
    ),
    "constants, no padding": (
        lambda: chain(constant(wide(), [0, 1, 2]), nn.SiLU(), narrow(padding=0)),
        [5, 4],
    ),
    "constants meet padding": (
        lambda: chain(constant(wide(), [0, 1, 2]), nn.SiLU(), narrow()),
        [6, 4],
    ),
    "one constant meets padding": (
        lambda: chain(constant(wide(), [3]), nn.Tanh(), narrow()),
        [8, 4],
    ),
    "constants by batch norm": (
        lambda: chain(constant(wide(bias=False), [1, 2, 7]), norm(), nn.GELU(), narrow()),
        [6, 4],
    ),
    "batch norm without a scale": (
        lambda: chain(wide(), zeroed(norm(), [2, 3], bias=False), narrow(padding=0)),
        [6, 4],
    ),
    "unused": (lambda: chain(wide(), prelu(), blind(narrow(), [0, 7])), [6, 4]),
    "unused, through the layer before": (
        lambda: chain(
            wide(), nn.ReLU(), _only(narrow(8, 8), {6: 6}), nn.ReLU(), blind(narrow(), [6])
        ),
        [7, 7, 4],
    ),
    "duplicates": (
        lambda: chain(twins(wide(), {4: 1, 6: 1}), nn.ReLU(), narrow()),
        [6, 4],
    ),
    "duplicates through parameters": (
        lambda: chain(
            twins(wide(), {4: 1, 6: 2}), twins(norm(), {4: 1}), _one_slope(prelu()), narrow()
        ),
        [7, 4],
    ),
    "duplicates that cancel": (
        lambda: chain(wide(), twins(narrow(8, 8), {4: 1}), nn.ReLU(), _cancelling(narrow(), 1, 4)),
        [8, 6, 4],
    ),
    "depthwise between": (
        lambda: chain(zeroed(wide(), [2]), nn.ReLU(), conv(8, 8, groups=8, bias=False), narrow()),
        [7, 7, 4],
    ),
    "depthwise with a multiplier": (
        lambda: chain(wide(), conv(8, 16, groups=8), nn.ReLU(), blind(narrow(16), [2, 3, 7])),
        [7, 14, 4],
    ),
    "pools and dropout": (
        lambda: chain(
            constant(wide(), [2, 3]),
            nn.MaxPool2d(3, 2, 1),
            nn.Dropout(),
            nn.AvgPool2d(2),
            nn.ReLU6(),
            narrow(kernel=1),
        ),
        [6, 4],
    ),
    "pool that rounds up": (
        lambda: chain(constant(wide(), [2, 3]), nn.AvgPool2d(2, ceil_mode=True), narrow(kernel=1)),
        [6, 4],
    ),
    "transposed convolution": (
        lambda: chain(constant(wide(), [2, 3]), nn.ConvTranspose2d(8, 4, 3, padding=2), narrow(4)),
        [6, 4, 4],
    ),
    "pool to one": (
        lambda: chain(
            constant(wide(), [2, 3]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ),
        [6, 4],
    ),
    "mean over space": (
        lambda: chain(
            constant(wide(), [2, 3]), Apply(lambda m, x: x.mean((2, 3))), nn.Linear(8, 4)
        ),
        [6, 4],
    ),
    "flattened pixels": (
        lambda: chain(
            constant(wide(), [2, 3]), nn.ReLU(), nn.Flatten(), nn.ReLU(), nn.Linear(504, 4)
        ),
        [6, 4],
    ),
    "flattened, one pixel of a channel is read": (
        lambda: chain(wide(), nn.Flatten(), blind(nn.Linear(504, 4), range(1, 126))),
        [7, 4],
    ),
    "numbers, crops and zero padding": (
        lambda: chain(
            zeroed(wide(), [1]), Apply(lambda m, x: F.pad(x[:, :, 1:] * 2, (1, 1))), narrow()
        ),
        [7, 4],
    ),
    "grouped reader, equal numbers": (
        lambda: chain(zeroed(wide(), [0, 1, 4]), nn.ReLU(), narrow(groups=2)),
        [6, 4],
    ),
    "grouped reader, a whole group": (
        lambda: chain(
            zeroed(wide(), [0, 1]),
            nn.ReLU(),
            constant(conv(8, 8, groups=4), [0, 1]),
            nn.ReLU(),
            narrow(padding=0),
        ),
        [6, 6, 4],
    ),
    "grouped maker": (lambda: chain(zeroed(wide(groups=2), [0, 6]), narrow()), [6, 4]),
    "all of them": (lambda: chain(zeroed(wide(), range(8)), nn.ReLU(), narrow()), [1, 4]),
    "a shape is read": (
        lambda: chain(
            zeroed(wide(), [1]),
            nn.AdaptiveAvgPool2d(1),
            Apply(lambda m, x: x.view(x.size(0), -1)),
            nn.Linear(8, 4),
        ),
        [7, 4],
    ),
}


def _never_fires(layer: nn.Module, row: int) -> nn.Module:
    """A row of negative weights, for inputs that are not negative."""
    own: Any = layer
    with torch.no_grad():
        own.weight[row] = -own.weight[row].abs()
        own.bias[row] = -1.0
    return layer


def _one_slope(layer: nn.Module) -> nn.Module:
    own: Any = layer
    with torch.no_grad():
        own.weight[4] = own.weight[1]
    return layer


def _only(layer: nn.Module, pairs: dict[int, int]) -> nn.Module:
    """An input channel that one output channel alone reads."""
    own: Any = layer
    with torch.no_grad():
        for column, row in pairs.items():
            kept = own.weight[row, column].clone()
            own.weight[:, column] = 0
            own.weight[row, column] = kept
    return layer


def _cancelling(layer: nn.Module, one: int, other: int) -> nn.Module:
    own: Any = layer
    with torch.no_grad():
        own.weight[:, other] = -own.weight[:, one]
    return layer


@pytest.mark.parametrize("name", GOES)
def test_dead_channels_go(name: str) -> None:
    make, expected = GOES[name]
    model = make().double().eval()
    assert widths(clean(model, image())) == expected
    result = rmfx.eliminate_dead_channels(model, image())
    if "flatten" not in name:
        assert_equivalent(model, result, image(1, 4, 7, 12), tolerance=EXACT)
    if "crops" not in name:  # whose channels are not known without example inputs
        assert widths(clean(model)) == expected


STAYS: dict[str, Make] = {
    "nothing dead": lambda: chain(wide(), norm(), nn.ReLU(), narrow()),
    "constant before a padded depthwise layer": lambda: chain(
        constant(wide(), [1, 2]), nn.GELU(), conv(8, 8, groups=8), narrow(padding=0)
    ),
    "constant before zero padding": lambda: chain(
        constant(wide(), [1]), nn.ZeroPad2d(1), narrow(padding=0)
    ),
    "constant before an average of the padding": lambda: chain(
        constant(wide(), [1]), nn.AvgPool2d(3, 1, 1), narrow(padding=0)
    ),
    "constant before a pool that divides by a fixed number": lambda: chain(
        constant(wide(), [1]),
        nn.AvgPool2d(2, ceil_mode=True, divisor_override=4),
        narrow(padding=0),
    ),
    "an output": lambda: zeroed(wide(), [1]),
    "also an output": lambda: Apply(
        lambda m, x: (y := m.a(x), m.b(y)), a=zeroed(wide(), [1]), b=narrow()
    ),
    "an add": lambda: Apply(
        lambda m, x: m.b(m.a(x) + m.c(x)), a=zeroed(wide(), [1]), b=narrow(), c=wide()
    ),
    "a product": lambda: Apply(
        lambda m, x: m.b(m.a(x) * torch.sigmoid(m.c(x))),
        a=zeroed(wide(), [1]),
        b=narrow(),
        c=zeroed(wide(), [1]),
    ),
    "a concatenation": lambda: Apply(
        lambda m, x: m.b(torch.cat([m.a(x), x], 1)), a=zeroed(wide(), [1]), b=narrow(12)
    ),
    "softmax": lambda: chain(zeroed(wide(), [1]), nn.Softmax(1), narrow()),
    "group norm": lambda: chain(zeroed(wide(), [1]), nn.GroupNorm(2, 8), narrow()),
    "a layer called twice": lambda: Apply(
        lambda m, x: m.b(m.a(m.b(m.a(x)))), a=zeroed(wide(), [1]), b=narrow()
    ),
    "uneven groups": lambda: chain(zeroed(wide(), [0, 1]), nn.ReLU(), narrow(groups=2)),
    "twins in two groups": lambda: chain(twins(wide(), {4: 0, 5: 1}), nn.ReLU(), narrow(groups=2)),
    "twins of two biases": lambda: chain(_other_bias(twins(wide(), {4: 0}), 4), narrow()),
    "twins of two slopes": lambda: chain(twins(wide(), {4: 0}), prelu(), narrow()),
    "twins of two batch norms": lambda: chain(twins(wide(), {4: 0}), norm(), narrow()),
    "twins of two groups": lambda: chain(zeroed(twins(wide(groups=2), {4: 0}), [1]), narrow()),
    "a block in two groups": lambda: chain(
        zeroed(wide(), [1]), conv(8, 24, groups=8), conv(24, 12, groups=12), narrow(12)
    ),
    "used by one of two readers": lambda: Apply(
        lambda m, x: m.b(y := m.a(x)) + m.c(y),
        a=wide(),
        b=blind(narrow(), [1]),
        c=blind(narrow(), [2]),
    ),
    "a scale for each channel": lambda: chain(
        zeroed(wide(), [1]),
        Apply(lambda m, x: x * m.g, g=nn.Parameter(torch.rand(8, 1, 1))),
        narrow(),
    ),
    "channels moved about": lambda: chain(
        zeroed(wide(), [1]), Apply(lambda m, x: x.flip(1)), narrow()
    ),
    "features of a 4-D value": lambda: chain(zeroed(wide(), [1]), nn.Linear(7, 7), narrow()),
}


def _other_bias(layer: nn.Module, row: int) -> nn.Module:
    own: Any = layer
    with torch.no_grad():
        own.bias[row] += 1
    return layer


@pytest.mark.parametrize("name", STAYS)
def test_what_is_needed_stays(name: str) -> None:
    model = STAYS[name]().double().eval()
    assert shapes(clean(model, image())) == shapes(rmfx.trace(model, image()))
    assert shapes(clean(model)) == shapes(rmfx.trace(model))


def test_readers_with_hooks_or_tied_weights_are_left_alone() -> None:
    for i in (0, 2):
        model = chain(zeroed(wide(), [1]), nn.ReLU(), narrow()).double().eval()
        model[i].register_forward_hook(lambda *args: None)
        assert widths(rmfx.eliminate_dead_channels(model, image())) == [8, 4]
    first, last = zeroed(wide(), [1]), narrow()
    model = chain(first, nn.ReLU(), last, wide(), narrow()).double().eval()
    model[3].weight = model[0].weight
    assert widths(rmfx.eliminate_dead_channels(model, image())) == [8, 4, 8, 4]


def test_values_that_are_written_in_place_elsewhere_stay() -> None:
    def shared(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        view = y[:, 1:]
        view.add_(1)
        return m.b(y)  # type: ignore[no-any-return]

    model = Apply(shared, a=zeroed(wide(), [0, 1]), b=narrow()).double().eval()
    assert widths(clean(model, image())) == [8, 4]


def test_several_readers_drop_what_all_can_drop() -> None:
    """0: zero. 1, 2: unused at one, constant at the other. 3: unused at one only."""
    a, b, c = zeroed(wide(), [0]), blind(narrow(padding=0), [1, 3]), blind(narrow(), [2])
    a = constant(a, [1, 2])
    model = Apply(lambda m, x: (m.b(F.silu(y := m.a(x))), m.c(y)), a=a, b=b, c=c).double().eval()
    assert widths(clean(model, image())) == [5 + 1, 4, 4]  # c pads, so a constant stays for 1


def test_constants_stand_in_for_each_other_at_each_reader() -> None:
    """Behind ReLU some constants are zero; one that is not, at both readers, is enough."""
    a = constant(wide(), [0, 1, 2, 3])
    with torch.no_grad():
        a.bias[:4] = torch.tensor([-1.0, -2.0, 0.5, 3.0])  # type: ignore[index, union-attr]
    model = Apply(lambda m, x: (m.b(F.relu(y := m.a(x))), m.c(y)), a=a, b=narrow(), c=narrow())
    assert widths(clean(model.double().eval(), image())) == [4 + 1, 4, 4]


def test_twins_that_are_constant_at_one_reader_count_once() -> None:
    still = twins(zeroed(norm(), [0], bias=False), {4: 0})
    model = Apply(
        lambda m, x: (m.b(m.n(y := m.a(x))), m.c(y)),
        a=twins(wide(), {4: 0}), n=still, b=narrow(padding=0), c=narrow(),
    )  # fmt: skip
    assert widths(clean(model.double().eval(), image())) == [7, 4, 4]


def test_a_tiny_constant_does_not_stand_in_for_a_large_one() -> None:
    """Behind GELU channel 0 is next to nothing: in float32 it is rounded to zero."""
    a = constant(wide(), [0, 1])
    with torch.no_grad():
        a.bias[:2] = torch.tensor([-9.0, 3.0])  # type: ignore[index, union-attr]
    model = Apply(
        lambda m, x: (m.b(F.gelu(y := m.a(x))), m.c(-y)), a=a, b=narrow(), c=blind(narrow(), [1])
    )
    for dtype in (torch.float64, torch.float32):
        result = rmfx.eliminate_dead_channels(model.to(dtype).eval(), image(dtype=dtype))
        assert_equivalent(model, result, image(dtype=dtype))
        assert all(p.detach().abs().max() < 100 for p in result.parameters())


def test_a_constant_stays_for_each_group_that_pads() -> None:
    model = chain(constant(wide(), [0, 1, 4, 5]), nn.SiLU(), narrow(groups=2)).double().eval()
    assert widths(clean(model, image())) == [6, 4]


def test_borders_are_exact() -> None:
    """The border of the output is where folding a constant into the bias would go wrong."""
    model = chain(constant(wide(bias=False), range(6)), norm(), narrow()).double().eval()
    x = image()
    result = clean(model, x)
    assert widths(result) == [3, 4]
    with torch.no_grad():
        difference = (result(x) - model(x)).abs()
        folded = (
            model[2].weight.sum((2, 3)) @ model[1](torch.zeros(1, 8, 1, 1).double())[0, :, 0, 0]
        )
    assert float(difference[..., 0, :].max()) < EXACT
    assert float(folded.abs().max()) > 0.1  # what is at stake


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_constant_stays_itself_behind_a_border_of_values(mode: str) -> None:
    """No zeros come in, so that the next bias takes all constants."""
    reader = nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode)
    model = chain(constant(wide(), [0, 1, 4, 5]), nn.SiLU(), reader).double().eval()
    assert widths(clean(model, image())) == [4, 4]


def test_a_border_of_a_number_is_no_constant() -> None:
    reader = narrow(padding=0)
    zero = zeroed(wide(), [0, 1, 4, 5])
    model = chain(zero, nn.ConstantPad2d(1, 2.0), reader).double().eval()
    assert widths(clean(model, image())) == [5, 4]


@pytest.mark.parametrize(
    "activation",
    [
        ChannelClamp(torch.zeros(8), torch.arange(8.0), 2),
        ChannelPReLU(torch.linspace(-1, 1, 8), 2),
        MaskedActivation([nn.GELU(), nn.ReLU()], [torch.arange(8) < 3, torch.arange(8) > 5], 2),
    ],
)
def test_activations_that_passes_make_lose_their_channels(activation: nn.Module) -> None:
    model = chain(constant(wide(), [0, 5, 7]), activation, blind(narrow(padding=0), [2]))
    result = clean(model.double().eval(), image())
    assert widths(result) == [4, 4]


def test_linear_layers() -> None:
    layers = (
        constant(nn.Linear(6, 8), [1]),
        nn.GELU(),
        blind(nn.Linear(8, 8), [2]),
        nn.Linear(8, 3),
    )
    model = chain(*layers).double().eval()
    for x in (image(3, 6), image(2, 5, 6)):
        assert widths(clean(model, x)) == [6, 8, 3]
    normed = chain(constant(nn.Linear(6, 8), [1]), nn.BatchNorm1d(8), nn.PReLU(8), nn.Linear(8, 3))
    assert widths(clean(ready(normed), image(3, 6))) == [7, 3]


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    layers = (constant(wide(dims=dims), [1, 2, 3]), nn.SiLU(), narrow(dims=dims, stride=2))
    x = image(2, 4, *(7, 6, 5)[:dims])
    assert widths(clean(chain(*layers).double().eval(), x)) == [6, 4]


def test_input_range_proves_that_an_activation_never_fires() -> None:
    first = wide(bias=True)
    with torch.no_grad():
        first.bias[:3] = -100.0  # type: ignore[index, union-attr]
    model = chain(first, nn.ReLU(), narrow()).double().eval()
    x = image().clamp(-1, 1)
    assert widths(clean(model, x)) == [8, 4]
    assert widths(clean(model, x, input_range=(-1, 1))) == [5, 4]
    with pytest.raises(rmfx.RmfxError, match="low <= high"):
        rmfx.eliminate_dead_channels(model, x, input_range=(1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["constants meet padding", "duplicates", "depthwise between"])
def test_floating_type_stays(dtype: torch.dtype, name: str) -> None:
    make, expected = GOES[name]
    model = make().to(dtype).eval()
    result = rmfx.eliminate_dead_channels(model, image(dtype=dtype))
    assert widths(result) == expected
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert_equivalent(model, result, image(dtype=dtype))


def test_weights_that_are_only_moved_are_the_same_bits() -> None:
    model = chain(zeroed(wide(), [1]), nn.ReLU(), narrow()).eval()
    result = rmfx.eliminate_dead_channels(model)
    kept = [c for c in range(8) if c != 1]
    first, last = (m for m in result.children() if isinstance(m, nn.Conv2d))
    assert torch.equal(first.weight, model[0].weight[kept])
    assert torch.equal(last.weight, model[2].weight[:, kept])


# ---- together with remove_residuals -------------------------------------------------------------


def odd_pairs_of_what_is_not_negative() -> nn.Module:
    """Half of the carry is known not to be negative, so −x behind ReLU is zero."""
    stem = chain(conv(4, 4), nn.ReLU6())
    return ready(
        chain(
            stem,
            Residual(chain(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4)), nn.ZeroPad2d(0)),
            conv(4, 3),
        )
    )


class PaddedShortcut(nn.Module):
    """A shortcut of option A: half of the carried channels are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.branch = chain(conv_bn(4, 8, stride=2), nn.ReLU(), conv_bn(8, 8))
        self.second = chain(conv_bn(8, 8), nn.ReLU(), conv_bn(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.branch(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        x = F.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def pruned() -> nn.Module:
    """A network whose filters were set to zero by pruning; the adds hold them in place."""
    model = ready(PaddedShortcut())
    for layer, rows in ((model.branch[0][0], [1, 4]), (model.second[0][0], [0, 2, 3])):
        zeroed(layer, rows)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", ["auto", "relu", "odd-pair"])
def test_conversion_then_clean_up_is_the_original_and_cheaper(activation: str) -> None:
    model, x = pruned(), image(2, 3, 9, 11)
    plain = rmfx.remove_residuals(model, x, activation=activation)
    assert rmfx.report(plain).adds_left == 0
    result = rmfx.eliminate_dead_channels(plain, x)
    assert_equivalent(model, result, x, tolerance=EXACT)
    assert_equivalent(model, result, image(1, 3, 8, 6), tolerance=EXACT)
    before, after = rmfx.cost.count(plain, x), rmfx.cost.count(result, x)
    assert after.macs < 0.9 * before.macs
    assert rmfx.is_plain(result)


def test_report_survives_and_names_only_nodes_that_hold_a_join() -> None:
    model, x = pruned(), image(2, 3, 9, 11)
    plain = rmfx.remove_residuals(model, x)
    with torch.no_grad():
        head = next(m for m in plain.modules() if isinstance(m, nn.Linear))
        head.weight[:, 0] = 0  # the last join's value has a channel that nobody reads
        model.head.weight[:, 0] = 0
    result = rmfx.eliminate_dead_channels(plain, x)
    rows = rmfx.report(result).rows
    assert [row.status for row in rows] == ["removed", "removed"]
    assert rows[1].node is None
    assert [replaced.join for replaced in rows] == [r.join for r in rmfx.report(plain).rows]
    assert_equivalent(model, result, x, tolerance=EXACT)


def test_report_names_no_node_whose_dimensions_stand_in_another_order() -> None:
    """Without its addition the span between the two transpositions is a convolution of images."""

    def forward(m: Any, x: Tensor) -> Any:
        y = x.flatten(2).transpose(1, 2)
        y = y + y.roll(1, 2)
        return m.a(y.transpose(1, 2).reshape(x.shape)), m.b(x)

    model = ready(Apply(forward, a=conv(), b=conv()))
    plain = rmfx.remove_residuals(model, image())
    result = rmfx.eliminate_dead_channels(plain, image())
    assert types(result) == ["Conv2d"] * 3
    assert rmfx.report(plain).rows[0].node is not None
    assert rmfx.report(result).rows[0].node is None
    assert_equivalent(model, result, image())


def test_report_follows_nodes_that_tracing_renames() -> None:
    model = ready(chain(Residual(chain(conv(), nn.ReLU(), conv())), nn.Sigmoid()))
    plain = rmfx.remove_residuals(model, image())
    (row,) = rmfx.report(plain).rows
    node = next(n for n in plain.graph.nodes if n.name == row.node)
    node.name = "a_name_of_its_own"
    plain.meta["rmfx_report"] = rmfx.Report(
        tuple(type(row)(**{**vars(row), "node": node.name}) for row in rmfx.report(plain).rows)
    )
    result = rmfx.eliminate_dead_channels(plain, image())
    (row,) = rmfx.report(result).rows
    assert row.node in {n.name for n in result.graph.nodes}
    assert_equivalent(model, result, image())


def test_every_way_to_hold_a_model() -> None:
    model = GOES["constants meet padding"][0]().double().eval()
    program = torch.export.export(model, (image(),))
    for held in (fx.symbolic_trace(model), program, program.module()):
        result = rmfx.eliminate_dead_channels(held, image())
        assert widths(result) == [6, 4]
        assert_equivalent(model, result, image(), tolerance=EXACT)


# ---- random networks ----------------------------------------------------------------------------

ACTS: tuple[Callable[[int], nn.Module], ...] = (
    lambda n: nn.ReLU(),
    lambda n: nn.LeakyReLU(0.1),
    lambda n: nn.GELU(),
    lambda n: nn.SiLU(),
    lambda n: nn.Hardswish(),
    prelu,
)
BETWEEN: tuple[Callable[[int], list[nn.Module]], ...] = (
    lambda n: [],
    lambda n: [nn.MaxPool2d(3, 1, 1)],
    lambda n: [nn.AvgPool2d(2, 1)],
    lambda n: [nn.Dropout(0.5)],
)


class Planted:
    """A chain of convolutions with dead channels planted between them, and how many must stay."""

    def __init__(self, draw: st.DrawFn) -> None:
        generator = torch.manual_seed(draw(st.integers(0, 2**16)))
        self._copies: list[int] = []  # of the live channel 0
        self.layers: list[nn.Module] = []
        self.expected: list[int] = []
        self._generator = generator
        live_in = [0, 1, 2]
        total_in = 3
        for _ in range(draw(st.integers(1, 3))):
            plan = {k: draw(st.integers(0, 2)) for k in ("zero", "number", "unused", "twin")}
            order = torch.randperm(3 + sum(plan.values()), generator=generator).tolist()
            total = len(order)
            first = self._conv(draw, total_in, total, live_in)
            self._plant(first, order, plan)
            self.layers += [first, *self._behind(draw, total, order, plan)]
            live_in, total_in = order[:3], total
            self._marks = (order, plan)
            self.expected.append(-1)
        self._finish(draw, total_in, live_in)

    def _conv(self, draw: st.DrawFn, n_in: int, n_out: int, live: list[int]) -> nn.Conv2d:
        kernel = draw(st.sampled_from([1, 3]))
        layer = nn.Conv2d(
            n_in,
            n_out,
            kernel,
            padding=draw(st.integers(0, kernel // 2)),
            stride=draw(st.sampled_from([1, 1, 2])) if kernel == 3 else 1,
            bias=True,
        )
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=self._generator) / 2)
            # Both signs in every row: then no range proves that an activation never fires.
            layer.weight[:, live[0]] = layer.weight[:, live[0]].abs()
            layer.weight[:, live[1]] = -layer.weight[:, live[1]].abs()
            layer.weight[:, self._copies] = layer.weight[:, self._copies].abs()
            self._settle(layer, live)
        return layer

    def _settle(self, layer: nn.Conv2d, live: list[int]) -> None:
        """Note what must stay of the layer before, now that the padding of this one is known."""
        if not self.layers:
            return
        order, plan = self._marks
        unused = order[3 + plan["zero"] + plan["number"] :][: plan["unused"]]
        layer.weight[:, unused] = 0
        numbers = order[3 + plan["zero"] :][: plan["number"]]
        pads = bool(layer.padding[0])
        self.expected[-1] = 3 + bool(pads and any(self._value(n) for n in numbers))

    def _value(self, channel: int) -> float:
        """What a constant channel is behind its layers."""
        x = torch.zeros(1, self._total, 5, 5, dtype=torch.float64)
        x[:, channel] = self._bias[channel].double()
        with torch.no_grad():
            for layer in self._tail:
                x = layer.double().eval()(x)
        return float(x[0, channel, 0, 0])

    def _plant(self, layer: nn.Conv2d, order: list[int], plan: dict[str, int]) -> None:
        assert layer.bias is not None
        zero = order[3 : 3 + plan["zero"]]
        numbers = order[3 + plan["zero"] :][: plan["number"]]
        copies = order[len(order) - plan["twin"] :] if plan["twin"] else []
        with torch.no_grad():
            layer.weight[[*zero, *numbers]] = 0
            layer.bias[zero] = 0
            for copy in copies:
                layer.weight[copy] = layer.weight[order[0]]
                layer.bias[copy] = layer.bias[order[0]]
        self._bias, self._copies, self._zero = layer.bias.detach().clone(), copies, zero

    def _behind(
        self, draw: st.DrawFn, total: int, order: list[int], plan: dict[str, int]
    ) -> list[nn.Module]:
        act = draw(st.sampled_from(ACTS))(total)
        tail: list[nn.Module] = [norm(total)] if draw(st.booleans()) else []
        tail += [act, *draw(st.sampled_from(BETWEEN))(total)]
        with torch.no_grad():
            for layer in tail:
                own: Any = layer
                for table in (*layer.parameters(), *layer.buffers()):
                    if table.dim() and table.numel() == total:
                        table[self._copies] = table[order[0]].clone()
                if isinstance(layer, nn.BatchNorm2d):
                    own.bias[self._zero] = 0
                    own.running_mean[self._zero] = 0
        self._tail, self._total = tail, total
        return tail

    def _finish(self, draw: st.DrawFn, total: int, live: list[int]) -> None:
        last = self._conv(draw, total, 4, live)
        self.layers.append(last)
        self.expected.append(4)
        self.model = chain(*self.layers).double().eval()


@st.composite
def planted(draw: st.DrawFn) -> Planted:
    return Planted(draw)


@settings(max_examples=40)
@given(planted(), st.integers(0, 1))
def test_planted_channels_go_and_no_others(network: Planted, odd: int) -> None:
    x = image(2, 3, 47 + odd, 49)  # the last layer has something to read in any case
    assert widths(clean(network.model, x)) == network.expected


@pytest.mark.slow
@settings(max_examples=8)
@given(residual_networks())
def test_random_networks_keep_their_function(spec: NetworkSpec) -> None:
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)
    for before in (model, rmfx.remove_residuals(model, inputs)):
        result = rmfx.eliminate_dead_channels(before, inputs)
        assert_equivalent(model, result, inputs)
        size = sum(p.numel() for p in result.parameters())
        # Of the trace, in which buffers that serve as weights are parameters.
        assert size <= sum(p.numel() for p in rmfx.trace(before, inputs).parameters())


def test_deep_networks() -> None:
    """A recursion would fail here."""
    model = chain(*(m for _ in range(600) for m in (conv(2, 2, 1), nn.ReLU()))).double().eval()
    result = rmfx.eliminate_dead_channels(fx.symbolic_trace(model))
    assert len(types(result)) == 1200
