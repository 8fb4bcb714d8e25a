"""What a call writes, shares and draws; what kind of layer a module is; what is one memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_removed, chain, conv, image, ready
from torch import Tensor, fx, nn

import rmfx
from rmfx.frontend.effects import effects_of
from rmfx.frontend.memory import memories
from rmfx.ir.kinds import is_a, is_ordinary

Write = Callable[[Any, Tensor, Tensor], Any]


@torch.library.custom_op("rmfx_tests::into_second", mutates_args=("out",))
def into_second(x: Tensor, out: Tensor) -> None:
    out.add_(x)


@torch.library.custom_op("rmfx_tests::into_list", mutates_args=("outs",))
def into_list(x: Tensor, outs: list[Tensor]) -> Tensor:
    for out in outs:
        out.mul_(2)
    return x + 1


library = torch.library.Library("rmfx_tests", "FRAGMENT")
library.define("into_keyword(Tensor x, *, Tensor(a!) out) -> ()")


@torch.library.impl(library, "into_keyword", "CompositeExplicitAutograd")
def into_keyword(x: Tensor, *, out: Tensor) -> None:
    out.sub_(x)


@torch.library.custom_op("rmfx_tests::reads", mutates_args=())
def reads(x: Tensor) -> Tensor:
    return x + 1


@into_second.register_fake
def _(x: Tensor, out: Tensor) -> None:
    return None


@into_list.register_fake
def _(x: Tensor, outs: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


@reads.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


ops = torch.ops.rmfx_tests
aten = torch.ops.aten


@fx.wrap
def written_by_a_python_function(x: Tensor, y: Tensor) -> None:
    y.mul_(2)


class WritesInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        y.mul_(2)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class WritesToItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3)


class WritesToItsMemory(nn.Module):
    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        self.register_buffer("memory", memory)

    def forward(self, x: Tensor) -> Tensor:
        self.memory.add_(1)  # type: ignore[operator]
        return x * 1


class Leafy(fx.Tracer):
    """A tracer that looks into nothing but the network itself."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return not isinstance(m, (Apply, nn.Sequential))


def leafy(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Leafy().trace(model))


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram | None:
    """None of what torch.export cannot record."""
    try:
        return torch.export.export(model, (x,))
    except (RuntimeError, TypeError, torch._dynamo.exc.Unsupported):
        return None


def forms(model: nn.Module, x: Tensor) -> Iterator[tuple[Any, Any]]:
    """What verbs are given: the model, with inputs and without, and what was exported of it."""
    yield model, x
    yield model, None
    program = exported(model, x)
    if program is not None:
        yield program, None


# ---- writes -------------------------------------------------------------------------------------


WRITES: dict[str, Write] = {
    "second argument": lambda m, x, h: ops.into_second.default(h * 2, x),
    "packet": lambda m, x, h: ops.into_second(h * 2, x),
    "packet by keyword": lambda m, x, h: ops.into_second(out=x, x=h * 2),
    "list": lambda m, x, h: ops.into_list.default(h, [h * 2, x]),
    "list, packet": lambda m, x, h: ops.into_list(h, [x]),
    "keyword": lambda m, x, h: ops.into_keyword.default(h, out=x),
    "keyword, packet": lambda m, x, h: ops.into_keyword(h, out=x),
    "aten packet": lambda m, x, h: aten.mul_(x, 2),
    "aten packet with out": lambda m, x, h: aten.add(h, h, out=x),
    "init.constant_": lambda m, x, h: nn.init.constant_(x, 0.3),
    "init.zeros_": lambda m, x, h: nn.init.zeros_(tensor=x),
    "foreach": lambda m, x, h: torch._foreach_mul_([x], 2.0),
    "foreach, second": lambda m, x, h: torch._foreach_add_([h * 1, x], [h, h]),
    "foreach, view": lambda m, x, h: torch._foreach_mul_([x[:, :2], x[:, 2:]], 2.0),
    "out": lambda m, x, h: torch.sigmoid(h, out=x),
    "outs": lambda m, x, h: torch.frexp(h, out=(x, torch.empty_like(h, dtype=torch.int32))),
    "set_": lambda m, x, h: x.set_(h).mul_(2),
    "copy_": lambda m, x, h: x.copy_(h),
    "unbound method": lambda m, x, h: torch.Tensor.mul_(x, 2),
    "data": lambda m, x, h: x.data.mul_(2),
    "detach": lambda m, x, h: x.detach().mul_(2),
    "view": lambda m, x, h: x.view(-1).mul_(2),
    "lifted view": lambda m, x, h: aten.unsqueeze(x, 0).mul_(2),
    "part": lambda m, x, h: x.unbind(1)[1].mul_(2),
    "index_fill_": lambda m, x, h: x.index_fill_(1, m.places, 0.5),
    "swapped": lambda m, x, h: x.transpose_(0, 0).mul_(2),
    "function in place": lambda m, x, h: F.threshold(x, 0.1, 20.0, True),
    "function with _": lambda m, x, h: F.elu_(x),
    "statistics": lambda m, x, h: F.instance_norm(h, x[0, 0, 0, :4], x[0, 0, 1, :4] * 0 + 1),
}
TRACED_ONLY: dict[str, Write] = {
    "item": lambda m, x, h: x.__setitem__((slice(None), 0), 0.0),
    "python function": lambda m, x, h: written_by_a_python_function(h, x),
    "autograd function": lambda m, x, h: WritesInForward.apply(h, x),
}
FUNCTIONAL = ("aten packet", "unbound method", "function in place", "function with _")
FILLING = ("init.constant_", "init.zeros_")  # the sum with what they leave may be one with a number
RANDOM: dict[str, Write] = {  # what they write cannot be compared
    "init.normal_": lambda m, x, h: nn.init.normal_(x),
    "uniform_": lambda m, x, h: x.uniform_(),
    "init.xavier_uniform_": lambda m, x, h: nn.init.xavier_uniform_(x),
}


def writing(write: Write) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        h = m.b(torch.relu(x))
        write(m, x, h)
        return h + x

    model = Apply(forward, a=conv(), b=conv())
    model.register_buffer("places", torch.tensor([1, 3]))
    return ready(model).requires_grad_(False)


@pytest.mark.parametrize("name", [*WRITES, *TRACED_ONLY])
def test_every_write_is_seen(name: str) -> None:
    model, x = writing((WRITES | TRACED_ONLY)[name]), image()
    checked = 0
    for form, inputs in forms(model, x):
        try:
            gm = rmfx.remove_residuals(form, inputs)
        except rmfx.RmfxError:  # it cannot be traced, or only with inputs
            continue
        checked += 1
        rows = rmfx.report(gm).rows
        if rows or name not in FILLING:
            row = rows[0]
            assert (row.status == "refused" and row.reason) or may_be_functional(name, form), row
        for size in ((3, 4, 10, 6), (1, 4, 9, 7)) if inputs is None and form is model else ():
            other = torch.randn(size, dtype=torch.float64)
            torch.testing.assert_close(gm(other), model(other), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gm(image()), model(image()), rtol=1e-11, atol=1e-11)
    assert checked


def may_be_functional(name: str, form: Any) -> bool:
    """Whether nobody could tell a write from an operation without one."""
    if name == "autograd function":  # torch.export looks into it
        return True
    return name in FUNCTIONAL or (name == "python function" and not isinstance(form, nn.Module))


@pytest.mark.parametrize("name", RANDOM)
def test_random_writes_stay(name: str) -> None:
    model = writing(RANDOM[name])
    x = image()
    for form, inputs in forms(model, image()):
        try:
            gm = rmfx.remove_residuals(form, inputs)
        except rmfx.TraceError:  # without inputs
            continue
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(gm(x), expected)
        assert rmfx.report(gm).rows[0].status == "refused"


def test_an_operator_that_only_reads_is_no_barrier() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return ops.reads(x) * 0 + x + m.b(torch.relu(m.c(x)))

    model = ready(Apply(forward, a=conv(), b=conv(), c=conv()))
    for form in (model, torch.export.export(model, (image(),))):
        gm = rmfx.remove_residuals(form, None if form is not model else image())
        assert not any(n.meta.get("frozen") for n in rmfx.trace(form).graph.nodes)
        torch.testing.assert_close(gm(image()), model(image()))


@pytest.mark.parametrize("name", ["second argument", "packet", "list", "foreach", "detach"])
def test_the_backend_sees_every_write(name: str) -> None:
    torch._dynamo.reset()
    model, x = writing(WRITES[name]), image()
    compiled = torch.compile(model, backend="rmfx", options={"backend": "eager"})
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-11, atol=1e-11)


def test_the_backend_takes_views_of_a_written_buffer_for_one_memory() -> None:
    torch._dynamo.reset()
    model = reading_a_view(*flat_and_view(), "itself")
    own = _apart(model)
    compiled = torch.compile(model, backend="rmfx", options={"backend": "eager"})
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(image()), own(image()), rtol=1e-11, atol=1e-11)


CALLS: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...], bool]] = {
    # a function of x, y and z; what it writes to, in what its value may lie, whether it draws
    "add": (lambda g, x, y, z: g(torch.add, (x, y)), (), (), False),
    "view of one": (lambda g, x, y, z: g(aten.expand_as.default, (x, y)), (), "x", False),
    "of one list": (lambda g, x, y, z: g(torch._foreach_add_, ([x, y], [z, z])), "xy", (), False),
    "third": (lambda g, x, y, z: g(torch.addcmul, (x, y, z), {"out": z}), "z", "z", False),
    "set_": (lambda g, x, y, z: g(aten.set_.source_Tensor, (x, y)), "x", "xy", False),
    "random": (lambda g, x, y, z: g(aten.bernoulli, (x,)), (), (), True),
    "random on demand": (lambda g, x, y, z: g(torch.dropout, (x, 0.5, True)), (), "x", True),
    "not random": (lambda g, x, y, z: g(torch.dropout, (x, 0.5, False)), (), "x", False),
    "left as found": (lambda g, x, y, z: g(torch.empty_like, (x,)), (), (), True),
    "statistics": (
        lambda g, x, y, z: g(aten.batch_norm.default, (x, None, None, y, z, True, 0, 0, False)),
        "yz",
        (),
        False,
    ),
    "embedding": (lambda g, x, y, z: g(F.embedding, (x, y), {"max_norm": 2.0}), "y", (), False),
    "embeddings": (lambda g, x, y, z: g(F.embedding, (x, y)), (), (), False),
    "nobody's": (lambda g, x, y, z: g(written_by_a_python_function, (x, y)), "xy", "xy", True),
    "builtin": (lambda g, x, y, z: g(setattr, (x, "data", y)), "xy", "xy", True),
}


@pytest.mark.parametrize("name", CALLS)
def test_effects_of_calls(name: str) -> None:
    call, writes, aliases, draws = CALLS[name]
    graph = fx.Graph()
    call(graph.call_function, *map(graph.placeholder, "xyz"))
    found = effects_of(fx.GraphModule(nn.Module(), graph), next(iter(reversed(graph.nodes))))
    assert {n.name for n in found.writes} == set(writes)
    assert {n.name for n in found.aliases} == set(aliases)
    assert found.draws is draws


FRESH: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "method": lambda y: y.abs(),
    "special": torch.special.expit,
    "cumsum": lambda y: y.cumsum(1),
    "softmax": lambda y: F.softmax(y, 1),
    "pool": lambda y: F.max_pool2d(y, 3, 1, 1),
    "packet": aten.tanh,
    "custom": reads,
    "clone": torch.clone,
    "where": lambda y: torch.where(y > 0, y, 0.5 * y),
    "operator": lambda y: 2 - y,
}


@pytest.mark.parametrize("name", FRESH)
def test_a_value_in_memory_of_its_own_may_be_read_after_a_write(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        kept = FRESH[name](y)
        y.relu_()
        return kept + m.b(y)

    model = ready(Apply(forward, a=conv(), b=conv()))
    for inputs in (None, image()):
        gm = rmfx.trace(model, inputs)
        assert not any(n.meta.get("frozen") for n in gm.graph.nodes)
        torch.testing.assert_close(gm(image()), model(image()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pick", [torch.conj_physical, aten.conj_physical])
def test_operators_that_may_give_their_input_back(pick: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        kept = pick(y)
        y.relu_()
        return kept - m.b(y)

    model = ready(Apply(forward, a=conv(), b=conv()))
    gm = rmfx.remove_residuals(model, image())
    torch.testing.assert_close(gm(image()), model(image()))


def test_a_layer_that_writes_to_its_input_is_a_barrier() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        h = m.b(torch.relu(x))
        m.k(x)
        return h + x

    model = ready(Apply(forward, a=conv(), b=conv(), k=WritesToItsInput())).requires_grad_(False)
    gm = rmfx.remove_residuals(leafy(model), image())
    assert "WritesToItsInput" in rmfx.report(gm).rows[0].reason
    torch.testing.assert_close(gm(image()), model(image()))


def test_hooks_of_a_layer_are_a_barrier() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        h = m.b(torch.relu(x))
        return h + x + m.k(x)

    model = ready(Apply(forward, a=conv(), b=conv(), k=nn.Identity())).requires_grad_(False)
    model.k.register_forward_pre_hook(lambda m, args: args[0].mul_(2) and None)
    gm = leafy(model)
    found = {n.name: effects_of(gm, n) for n in gm.graph.nodes}
    assert "hooks" in str(found["k"].unknown)
    assert found["k"].writes == found["relu"].aliases or len(found["k"].writes) == 1


def test_an_embedding_that_normalises_its_weight_is_never_baked() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scale = (m.e.weight * 1).sum()
        return x + m.a(x) * m.e(m.places).sum() + scale

    model = Apply(forward, a=conv(), e=nn.Embedding(4, 3, max_norm=0.5))
    model.register_buffer("places", torch.tensor([1, 2]))
    model = ready(model).requires_grad_(False)
    for inputs in (None, image()):
        gm, own = rmfx.remove_residuals(model, inputs), copy.deepcopy(model)
        for _ in range(2):
            torch.testing.assert_close(gm(image()), own(image()))


# ---- memory -------------------------------------------------------------------------------------


def flat_and_view() -> tuple[Tensor, Tensor]:
    flat = torch.rand(12, dtype=torch.float64)
    return flat, flat[4:8].view(4, 1, 1)


@pytest.mark.parametrize("read", ["itself", "computed", "by a layer"])
def test_a_view_of_a_written_buffer_is_never_baked(read: str) -> None:
    model = reading_a_view(*flat_and_view(), read)
    for form, inputs in forms(model, image()):
        before = copy.deepcopy(model.state_dict())
        gm = rmfx.remove_residuals(form, inputs)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        own = _apart(model)
        for _ in range(3):
            expected = own(image())
            torch.testing.assert_close(gm(image()), expected, rtol=1e-11, atol=1e-11)


def test_memory_that_a_copy_would_part_is_refused() -> None:
    array = torch.rand(8, dtype=torch.float64).numpy()
    parts = torch.from_numpy(array[:6]), torch.from_numpy(array[2:6].reshape(4, 1, 1))
    with pytest.raises(rmfx.WeightError, match="numpy"):
        rmfx.remove_residuals(reading_a_view(*parts, "itself"), image())


def reading_a_view(flat: Tensor, view: Tensor, read: str) -> nn.Module:
    """A model that writes to one tensor and reads another that shares memory with it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.flat.add_(1.0)
        by = {"itself": lambda: m.gain, "computed": lambda: torch.sqrt(m.gain * 2)}
        y = x * by[read]() if read in by else m.norm(x)
        return y + m.b(torch.relu(m.a(x)))

    model = Apply(forward, a=conv(), b=conv(), norm=nn.BatchNorm2d(4, affine=False))
    model = ready(model)
    model.register_buffer("flat", flat)
    model.register_buffer("gain", view)
    if read == "by a layer":
        model.norm.running_mean = view.reshape(4)
        assert model.norm.running_mean.data_ptr() == view.data_ptr()
    return model


def _apart(model: nn.Module) -> nn.Module:
    """A copy whose buffers share memory as the model's do."""
    own = copy.deepcopy(model)
    flat = torch.cat([model.flat.clone(), torch.zeros(4, dtype=torch.float64)])  # type: ignore[operator,list-item]
    start = (model.gain.data_ptr() - model.flat.data_ptr()) // 8  # type: ignore[operator,union-attr]
    own.flat = flat[: model.flat.numel()]  # type: ignore[operator,union-attr]
    own.gain = flat[start : start + 4].view(4, 1, 1)
    if model.norm.running_mean.data_ptr() == model.gain.data_ptr():  # type: ignore[operator,union-attr]
        own.norm.running_mean = own.gain.reshape(4)  # type: ignore[union-attr]
    return own


def test_a_weight_that_shares_memory_with_a_written_buffer_is_never_baked() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.bias.mul_(2)
        return x + m.b(torch.relu(m.a(x)))

    model = ready(Apply(forward, a=conv(), b=conv())).requires_grad_(False)
    model.register_buffer("bias", model.a.bias.detach()[:2])
    for inputs in (None, image()):  # a copy would part them, as one by copy.deepcopy does
        with pytest.raises(rmfx.WeightError, match=r"a: .* make them views of one buffer"):
            rmfx.remove_residuals(model, inputs)
    assert model.bias.data_ptr() == model.a.bias.data_ptr()


def test_a_leaf_that_writes_to_memory_that_others_read_freezes_it() -> None:
    memory = torch.rand(4, dtype=torch.float64)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.k(x) * m.gain + m.b(torch.relu(m.a(x)))

    model = ready(Apply(forward, a=conv(), b=conv(), k=WritesToItsMemory(memory)))
    model.register_buffer("gain", model.k.memory.view(4, 1, 1))
    gm, own = rmfx.remove_residuals(leafy(model), image()), copy.deepcopy(model)
    for _ in range(3):
        torch.testing.assert_close(gm(image()), own(image()))


def test_memory_of_its_own_is_not_frozen() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.n.add_(1)
        return (x + m.b(torch.relu(m.a(x)))) * m.n

    model = ready(Apply(forward, a=conv(), b=conv()))
    model.register_buffer("n", torch.zeros(1, dtype=torch.float64))
    gm = rmfx.remove_residuals(model, image())
    assert rmfx.report(gm).removed == 1
    for _ in range(2):
        torch.testing.assert_close(gm(image()), model(image()))


def test_storages_that_overlap_are_one_memory() -> None:
    whole = torch.rand(10)
    first, last, other = whole[:4], whole[6:], torch.rand(10)
    array = torch.rand(8).numpy()
    low, high = torch.from_numpy(array[:6]), torch.from_numpy(array[4:])
    sparse, meta = torch.eye(2).to_sparse(), torch.empty(2, device="meta")
    found = memories([first, last, other, low, high, sparse, meta, torch.empty(0)])
    assert found[id(first)] == found[id(last)]
    assert found[id(low)] == found[id(high)]
    assert len({found[id(t)] for t in (first, other, low, sparse, meta)}) == 5


# ---- random draws -------------------------------------------------------------------------------


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": torch.rand_like,
    "packet": aten.rand_like,
    "bernoulli": lambda w: torch.bernoulli(w.sigmoid()),
    "dropout": lambda w: F.dropout(w, 0.5, True),
    "alpha dropout": lambda w: F.alpha_dropout(w, 0.5, training=True),
    "rrelu": lambda w: F.rrelu(w, training=True),
    "gumbel": lambda w: F.gumbel_softmax(w),
    "attention": lambda w: F.scaled_dot_product_attention(w, w, w, dropout_p=0.5),
    "method": lambda w: w.sigmoid().bernoulli(),
    "new": lambda w: torch.normal(w, 0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_at_random_is_no_constant(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + F.conv2d(x, DRAWS[name](m.w), padding=1)

    model = Apply(forward, w=nn.Parameter(torch.rand(4, 4, 3, 3, dtype=torch.float64))).eval()
    model.requires_grad_(False)
    for form in (model, torch.export.export(model, (image(),))):
        state = torch.get_rng_state()
        gm = rmfx.remove_residuals(form, image() if form is model else None)
        assert torch.equal(state, torch.get_rng_state())
        assert rmfx.report(gm).removed == 0
        x = image()
        torch.manual_seed(5)
        expected = model(x)
        torch.manual_seed(5)
        torch.testing.assert_close(gm(x), expected)


CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda w: F.dropout(w, 0.5, False),
    "attention": lambda w: F.scaled_dot_product_attention(w, w, w),
    "rrelu": lambda w: F.rrelu(w, training=False),
    "standardised": lambda w: F.instance_norm(w),
    "new": lambda w: w.new_zeros(4, 4, 3, 3) + w,
}


@pytest.mark.parametrize("name", CONSTANT)
def test_what_could_draw_but_does_not_is_a_constant(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + F.conv2d(x, CONSTANT[name](m.w), padding=1)

    model = Apply(forward, w=nn.Parameter(torch.rand(4, 4, 3, 3, dtype=torch.float64))).eval()
    assert_removed(model, image())


# ---- kinds of layers ----------------------------------------------------------------------------


def doubled(base: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
    """A layer of a subclass whose forward is another one."""

    class Doubled(base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    return Doubled(*args, **options)


LAYERS: dict[str, tuple[Any, ...]] = {
    "identity": (nn.Identity,),
    "dropout": (nn.Dropout, 0.5),
    "dropout of channels": (nn.Dropout2d, 0.5),
    "relu": (nn.ReLU,),
    "prelu": (nn.PReLU,),
    "sigmoid": (nn.Sigmoid,),
    "norm": (nn.BatchNorm2d, 4),
    "conv": (nn.Conv2d, 4, 4, 1),
    "max pool": (nn.MaxPool2d, 3, 1, 1),
    "average pool": (nn.AvgPool2d, 3, 1, 1),
    "padding": (nn.ZeroPad2d, 0),
    "shuffle": (nn.ChannelShuffle, 2),
    "upsample": (nn.Upsample, None, 1.0),
}
VERBS: tuple[Callable[..., fx.GraphModule], ...] = (
    *(rmfx.remove_residuals, rmfx.remove_noops, rmfx.fold_batch_norm),
    *(rmfx.merge_convs, rmfx.eliminate_dead_channels, rmfx.merge_branches),
)


@pytest.mark.parametrize("name", LAYERS)
def test_a_subclass_is_not_its_base_class(name: str) -> None:
    layer = doubled(*LAYERS[name])

    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.b(m.k(torch.relu(m.norm(m.a(x)))))

    model = ready(Apply(forward, a=conv(), b=conv(), k=layer, norm=nn.BatchNorm2d(4)))
    gm = leafy(model)
    assert not is_a(layer, LAYERS[name][0])
    for verb in VERBS:
        for again in (gm, rmfx.trace(gm, image())):
            result = verb(again, image())
            torch.testing.assert_close(result(image()), model(image()), rtol=1e-11, atol=1e-11)
            assert "k" in dict(result.named_modules())


def test_a_subclass_that_computes_the_same_is_its_base_class() -> None:
    class Named(nn.Identity):
        """It has a documentation and a way to be shown of its own."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def extra_repr(self) -> str:
            return self.name

    assert is_a(Named("k"), nn.Identity)
    model = ready(Apply(lambda m, x: x + m.b(m.k(m.a(x))), a=conv(), b=conv(), k=Named("k")))
    gm = rmfx.remove_noops(leafy(model), image())
    assert "k" not in dict(gm.named_modules())
    torch.testing.assert_close(gm(image()), model(image()))


def test_what_a_layer_runs_may_be_its_own() -> None:
    own = nn.Conv2d(4, 4, 1)
    assert is_a(own, nn.Conv2d)
    own._conv_forward = lambda x, *rest: x  # type: ignore[method-assign, assignment]
    assert not is_a(own, nn.Conv2d)
    assert is_a(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.Conv2d)
    assert not is_a(None, nn.Module)


# ---- kinds of tensors ---------------------------------------------------------------------------


class Doubling(nn.Parameter):
    """A weight that counts twice wherever torch computes with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(t: Any) -> Any:
            return t.as_subclass(Tensor) * 2 if type(t) is Doubling else t

        with torch._C.DisableTorchFunctionSubclass():
            if func not in (F.conv2d, torch.conv2d):
                return func(*args, **(kwargs or {}))
            return func(*map(plain, args), **(kwargs or {}))


class Noted(nn.Parameter):
    """A weight with a note, as loaders of checkpoints use them."""

    def load(self, value: Tensor) -> None:
        self.data.copy_(value)


def test_a_weight_that_computes_its_own_way_is_not_baked() -> None:
    model = ready(chain(conv(), nn.ReLU(), conv()))
    model[0].weight = Doubling(model[0].weight.detach().clone())
    both = Apply(lambda m, x: x + m.f(x), f=model)
    assert not is_ordinary(model[0].weight)
    gm = rmfx.remove_residuals(both, image())
    row = rmfx.report(gm).rows[0]
    assert row.status == "refused"
    assert "Doubling" in row.reason
    torch.testing.assert_close(gm(image()), both(image()))


def test_a_weight_with_a_note_is_a_weight() -> None:
    model = ready(chain(conv(), nn.ReLU(), conv()))
    model[0].weight = Noted(model[0].weight.detach().clone())
    assert_removed(Apply(lambda m, x: x + m.f(x), f=model).eval(), image())


# ---- graphs in graphs ---------------------------------------------------------------------------


def test_a_graph_without_gradients_that_only_reads_is_no_barrier() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        with torch.no_grad():
            gate = torch.sigmoid(x).mean()
        return (x + m.b(torch.relu(x))) * gate

    model = ready(Apply(forward, a=conv(), b=conv()))
    gm = rmfx.trace(torch.export.export(model, (image(),)))
    assert not any("known" in str(n.meta.get("frozen")) for n in gm.graph.nodes)
    torch.testing.assert_close(gm(image()), model(image()))


@pytest.mark.parametrize("write", ["add_", "relu_", "mul_"])
@pytest.mark.parametrize("example", [True, False])
def test_plus_x_is_x(write: str, example: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.c(x)
        same = +h
        getattr(same, write)(*() if write == "relu_" else (2.0,))
        return m.d(torch.relu(h)) + h  # type: ignore[no-any-return]

    model = ready(Apply(forward, c=conv(), d=conv()))
    x = image()
    for verb in (rmfx.remove_residuals, rmfx.remove_noops, rmfx.fold_batch_norm):
        gm = verb(model, x if example else None, verify=False)
        torch.testing.assert_close(gm(x), model(x))


@pytest.fixture(scope="module")
def namesakes() -> Iterator[torch.library.Library]:
    """Operators of a library of one's own, under names that torch has for something else."""
    made = torch.library.Library("rmfx_names", "DEF")
    made.define("split(Tensor x, int n, int dim) -> Tensor[]")
    made.define("chunk(Tensor x, int n, int dim) -> Tensor[]")
    made.define("sym_act(Tensor x) -> Tensor")
    made.define("size(Tensor x) -> Tensor")
    turns = lambda x, n, dim: [x[:, ::2].clone(), x[:, 1::2].clone()]  # noqa: E731
    for name in ("split", "chunk"):
        made.impl(name, turns, "CompositeExplicitAutograd")
    made.impl("sym_act", lambda x: x * torch.sigmoid(x), "CompositeExplicitAutograd")
    made.impl("size", lambda x: x.flip(1), "CompositeExplicitAutograd")
    yield made
    made._destroy()


def _turns(name: str) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        split = getattr(torch.ops.rmfx_names, name)
        a, b = split(m.c(x), 2, 1)[0], split(m.c(x), 2, 1)[1]
        return torch.cat((m.d(torch.cat((a, a), 1)), b), 1)

    return forward


def _written(m: Any, x: Tensor) -> Tensor:
    gate = torch.ops.rmfx_names.sym_act.default(m.c(x))
    gate.add_(1)
    return m.d(torch.relu(gate)) + gate  # type: ignore[no-any-return]


OWN: dict[str, Any] = {
    "split": _turns("split"),
    "chunk": _turns("chunk"),
    "sym_act": _written,
    "size": lambda m, x: m.d(torch.relu(torch.ops.rmfx_names.size.default(m.c(x)))) + x,
}


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_operators_of_other_libraries_are_not_torchs(
    name: str, example: bool, namesakes: torch.library.Library
) -> None:
    model, x = ready(Apply(OWN[name], c=conv(), d=conv())), image()
    for verb in (rmfx.remove_residuals, rmfx.fold_batch_norm, rmfx.merge_branches):
        gm = verb(model, x if example else None, verify=False)
        torch.testing.assert_close(gm(x), model(x))
