"""Causes of wrong numbers, each with an edit that puts it back, and a network that shows it.

Every cause was found by attacking the compiler and mended since. `sample_NAME` does what a user
would do with a network on which it shows: it converts the network by a verb, which verifies its
result, or, where there is nothing to verify yet, runs `rmfx.verify` on what it got. Run as a
program, `python _causes.py NAME` says whether that was noticed.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmfx

Edit = tuple[str, str, str]  # file, text that occurs once, what replaces it
Options = dict[str, Any]


@dataclass(frozen=True)
class Cause:
    """A cause and where it is looked for.

    Attributes:
        name: of its sample, too.
        cause: what was believed, in a few words.
        edits: what puts it back.
        tests: of which at least one should notice.
        fuzz: options of `rmfx.fuzz.fuzz` that draw what shows it.
        silent: whether it gave wrong numbers without an error.
    """

    name: str
    cause: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    fuzz: Options
    silent: bool = True


# ---- networks -----------------------------------------------------------------------------------


class Block(nn.Module):
    """x + b(act(a(x))), with something of one's own before, inside or behind."""

    def __init__(
        self,
        act: Callable[[Tensor], Tensor] = torch.relu,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        weight: Callable[[Tensor], Tensor] = lambda w: w,
        channels: int = 4,
    ) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.act, self.before, self.weight = act, before, weight

    def forward(self, x: Tensor) -> Any:
        x = self.before(x)
        return x + F.conv2d(self.act(self.a(x)), self.weight(self.b.weight), padding=1)


def images(*shape: int) -> Tensor:
    """Random images, by default two of 4 channels and 8 x 8."""
    return torch.randn(shape or (2, 4, 8, 8))


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """A network behind `backend="rmfx"`, without inductor."""
    options = {"backend": "eager", **options}
    compile_with: Any = torch.compile  # whose overloads mypy does not follow here
    made: Callable[..., Any] = compile_with(model, backend="rmfx", options=options)
    return made


class Calls(nn.Module):
    """What is called in the place of a network."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def verify_at_example(model: nn.Module, function: Callable[..., Any], x: Tensor) -> None:
    """Verify something that is called like a network, at the sizes of the example alone."""

    def at_example(called: Callable[..., Any], y: Tensor) -> Any:
        if y.shape != x.shape:
            raise ValueError("another size")
        return called(y)

    # Functions are not copied, as networks are.
    before, after = partial(at_example, lambda y: model(y)), partial(at_example, function)
    rmfx.verify(Calls(before), Calls(lambda y: after(y)), x)


# ---- samples ------------------------------------------------------------------------------------


def sample_roll() -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return x + self.b(torch.roll(x, 3, 2))

    rmfx.remove_residuals(Rolled().eval(), images(2, 4, 9, 9))


def sample_border() -> None:
    class Bordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.fill = nn.Buffer(torch.randn(4) * 0.3)

        def forward(self, x: Tensor) -> Any:
            y = F.pad(self.norm(self.conv(x)), [1, 1, 1, 1])
            border = self.fill.view(1, -1, 1, 1)
            y[:, :, 0:1, :] = border
            y[:, :, -1:, :] = border
            y[:, :, :, 0:1] = border
            y[:, :, :, -1:] = border
            return self.last(y)

    rmfx.merge_convs(Bordered().eval().bfloat16(), images().bfloat16())


def sample_fused_optimiser() -> None:
    model, x = Block().eval(), images()
    function = compiled(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        function(x)
    model(x).sum().backward()
    optimiser.step()
    verify_at_example(model, function, x)


def sample_another_process() -> None:
    model, x = Block().eval().requires_grad_(False), images()
    for parameter in model.parameters():
        parameter.share_memory_()
    function = compiled(model)
    with torch.no_grad():  # as in the verification: with gradients it is another graph
        function(x)
    weights = [p.data for p in model.parameters()]
    process = multiprocessing.get_context("spawn").Process(target=double, args=(weights,))
    process.start()
    process.join()
    verify_at_example(model, function, x)


def double(weights: list[Tensor]) -> None:
    """What another process does to shared weights."""
    for weight in weights:
        weight.mul_(2)


def sample_data_twice() -> None:
    for channels in (4, 64, 256, 384):  # memory is used again sooner or later
        model, x = Block(channels=channels).eval(), images(1, channels, 4, 4)
        function = compiled(model)
        with torch.no_grad():
            function(x)
            for _ in range(8):
                for _ in range(2):
                    for parameter in model.parameters():
                        parameter.data = parameter.data * 1.05
                verify_at_example(model, function, x)


def sample_failed_renewal() -> None:
    fails = [False]

    def inner(gm: Any, inputs: Any) -> Any:
        if fails.pop():
            raise RuntimeError("no space left on device")
        return gm.forward

    fails.append(False)
    model, x = Block().eval(), images()
    function = compiled(model, backend=inner)
    with torch.no_grad():
        function(x)
        model.a.weight.mul_(3)
        fails += [False, True]
        try:
            function(x)
        except RuntimeError:
            fails[:] = [False] * 9
        verify_at_example(model, function, x)


def sample_slope() -> None:
    act = nn.PReLU()
    model = Block(act)
    model.act = act
    rmfx.remove_residuals(model.eval(), images(), activation="relu", differentiable=True)


def sample_detach() -> None:
    model = Block(weight=lambda w: w + (torch.round(w * 8) / 8 - w).detach())
    rmfx.remove_residuals(model.eval(), images(), differentiable=True)


def sample_write() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            y = self.b(x)
            torch._foreach_mul_([x], 2.0)
            return y + x

    model, x = Writes().eval(), images()
    rmfx.remove_residuals(torch.export.export(model, (x,)), x)
    rmfx.remove_residuals(model, x)


def sample_view() -> None:
    class Counts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Buffer(torch.ones(4))
            self.gain = nn.Buffer(self.flat.view(4, 1, 1))

        def forward(self, x: Tensor) -> Any:
            self.flat.add_(1.0)
            return x * self.gain + self.b(torch.relu(self.a(x)))

    rmfx.remove_residuals(Counts().eval(), images())


def sample_odd_pair() -> None:
    model = Block(lambda x: F.leaky_relu(x, -0.999)).eval().bfloat16()
    rmfx.remove_residuals(model, images().bfloat16(), activation=("relu", "odd-pair"))


def sample_float16() -> None:
    model = Block(F.relu6).eval().half()
    with torch.no_grad():
        model.b.weight.zero_()
    rmfx.remove_residuals(model, images().half(), input_range=(0.0, 1000.0))


class Twice(nn.Identity):
    """A subclass that does something else."""

    def forward(self, x: Tensor) -> Any:
        return x * 2


def sample_subclass() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Twice) or super().is_leaf_module(m, module_qualified_name)

    model = Block()
    model.act = Twice()
    graph = torch.fx.GraphModule(model.eval(), Tracer().trace(model))
    rmfx.remove_residuals(graph, images())


class Down(nn.Module):
    """A block that halves the image."""

    def __init__(self, *, ceil_mode: bool) -> None:
        super().__init__()
        first, last = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 1)
        self.branch = nn.Sequential(first, nn.ReLU(), last)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=ceil_mode), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return self.branch(x) + self.shortcut(x)


def sample_lost_condition() -> None:
    model, x = Down(ceil_mode=True).eval(), images()
    plain = rmfx.remove_residuals(model, x)
    rmfx.verify(model, pickle.loads(pickle.dumps(plain)), x)  # noqa: S301  (one's own)


def sample_broadcast() -> None:
    rmfx.remove_residuals(Down(ceil_mode=False).eval(), images())


def sample_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x).flatten(2).transpose(1, 2)
            return y + y.flip(1)

    rmfx.remove_residuals(Tokens().eval(), images())


def sample_state() -> None:
    class Held:
        count = 1.0

    class Counts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.held: Any = Held()

        def forward(self, x: Tensor) -> Any:
            self.held.count += 1
            return x * self.held.count + self.b(torch.relu(self.a(x)))

    rmfx.remove_residuals(Counts().eval(), images())


def sample_without_inputs() -> None:
    class Hooked(Block):
        def forward(self, x: Tensor) -> Any:
            hook = self.b.register_forward_hook(lambda module, inputs, output: 2 * output)
            y = self.b(torch.relu(self.a(x)))
            hook.remove()
            return x + y

    model = Hooked().eval()
    rmfx.verify(model, rmfx.remove_residuals(model), images())


# ---- the list -----------------------------------------------------------------------------------

READS = "            and self._bits == self._reader.read(weights)\n"
EXPIRED = "            and not any(map(torch.UntypedStorage._expired, self._storages))\n"
COMPILES = "            state = self._compile(args, lifted, again=True)\n"
DEEMED = "            seen = snapshot(lifted, self._held, self._options.weights)\n"
PLACED = "            self._state = replace(self._state, weights=seen)\n"
COPIED = "        self._places[node] = self._graph.node_copy(node, lambda n: self._places[n])\n"
IS_LAYER = '        if node.op == "call_module":\n'
DETACHED = '        if "detach" in str(node.target):\n            self._places[node] = '
KINK = 'if "odd-pair" in allowed and ranges.weights_vary and has_kink:'
COMPILED: Options = {"frontend": "compiled"}

CAUSES: tuple[Cause, ...] = (
    Cause(
        "roll",
        "a roll along space is the identity",
        (("rmfx/ir/selections.py", "if moved is None or moved - {axis}:", "if moved is None:"),),
        ("tests/ir/test_selections.py",),
        {},
    ),
    Cause(
        "border",
        "borders in half types agree",
        (
            (
                "rmfx/frontend/idioms/border_fill.py",
                "last = ROUNDING * size * torch.finfo(torch.float64).eps",
                "last = 1000 * size * torch.finfo(written.dtype).eps",
            ),
            (
                "rmfx/frontend/idioms/border_fill.py",
                "of_type = ROUNDING * size",
                "of_type = 1000 * size",
            ),
        ),
        ("tests/frontend/idioms/test_border_fill.py",),
        {},
    ),
    Cause(
        "fused_optimiser",
        "weights that no version counter moved are the same (fused optimisers)",
        (("rmfx/frontend/freshness.py", READS, ""),),
        ("tests/frontend/test_freshness.py", "tests/test_backend.py"),
        COMPILED,
    ),
    Cause(
        "another_process",
        "weights that no version counter moved are the same (collectives, processes)",
        (("rmfx/frontend/freshness.py", READS, ""),),
        ("tests/frontend/test_freshness.py", "tests/test_backend.py"),
        COMPILED,
    ),
    Cause(
        "data_twice",
        "memory at the same address is the same memory",
        (("rmfx/frontend/freshness.py", READS, ""), ("rmfx/frontend/freshness.py", EXPIRED, "")),
        ("tests/frontend/test_freshness.py", "tests/test_backend.py"),
        COMPILED,
    ),
    Cause(
        "failed_renewal",
        "weights are noted before the graph is made of them",
        (("rmfx/backend.py", COMPILES, DEEMED + PLACED + COMPILES),),
        ("tests/test_backend.py",),
        COMPILED,
    ),
    Cause(
        "slope",
        "numbers leave weights that may change",
        (
            ("rmfx/removal/recording.py", "if kind > self._may_leave:", "if kind > 9:"),
            ("rmfx/removal/strategy.py", KINK, "if False:"),
        ),
        ("tests/removal/test_differentiable.py", "tests/removal/test_recording.py"),
        {},
    ),
    Cause(
        "detach",
        "a weight that is detached is the weight",
        (
            (
                "rmfx/removal/linker.py",
                COPIED + IS_LAYER,
                f"{COPIED}{DETACHED}self._places[node.all_input_nodes[0]]\n{IS_LAYER}",
            ),
        ),
        ("tests/removal/test_differentiable.py",),
        {},
    ),
    Cause(
        "write",
        "an operator writes to its first argument only",
        (
            (
                "rmfx/frontend/schemas.py",
                "    writes = [n for a in written for n in _written(node, a, given)]",
                "    writes = [n for n in node.args[:1] if written and isinstance(n, fx.Node)]",
            ),
        ),
        ("tests/frontend/test_effects.py",),
        {},
    ),
    Cause(
        "view",
        "memory goes by the names of buffers",
        (
            (
                "rmfx/frontend/functionalise.py",
                "memories(t for behind in self._behind.values() for t in behind)",
                "{id(t): id(t) for behind in self._behind.values() for t in behind}",
            ),
        ),
        ("tests/frontend/test_effects.py",),
        {},
    ),
    Cause(
        "odd_pair",
        "1 + slope may be as small as it likes",
        (
            (
                "rmfx/algebra/digits.py",
                "    return bits <= AFFORDED * bits_of(dtype)",
                "    return True",
            ),
        ),
        ("tests/algebra/test_digits.py",),
        {"activation": ("relu", "odd-pair")},
    ),
    Cause(
        "float16",
        "a scale is exact in every type",
        (
            (
                "rmfx/removal/codes.py",
                "    if least < smallest_scale(dtype, nearest):",
                "    if least < SMALLEST_SCALE:",
            ),
        ),
        ("tests/algebra/test_digits.py",),
        {},
    ),
    Cause(
        "subclass",
        "a subclass is its base class",
        (
            (
                "rmfx/ir/kinds.py",
                "        if set(vars(base)) - HARMLESS:",
                "        if base is None:",
            ),
        ),
        ("tests/frontend/test_effects.py", "tests/passes/test_noop.py"),
        {},
    ),
    Cause(
        "lost_condition",
        "the result takes sizes that it was not made for",
        (
            (
                "rmfx/ir/net.py",
                "        put_conditions(conditions, self.graph)\n",
                "",
            ),
        ),
        ("tests/ir/test_conditions.py",),
        {},
    ),
    Cause(
        "broadcast",
        "operands of equal sizes have equal sizes always",
        (
            (
                "rmfx/ir/size_conditions.py",
                "        return agreements(sizes, node)\n",
                "        return ()\n",
            ),
        ),
        ("tests/ir/test_sizes.py",),
        {},
    ),
    Cause(
        "state",
        "a model keeps things in attributes, dicts, lists and sets only",
        (
            (
                "rmfx/frontend/kept_state.py",
                "    return _attributes(path, value) if _has_attributes(value) else None",
                "    return ()",
            ),
        ),
        ("tests/frontend/test_symbolic.py",),
        {},
    ),
    Cause(
        "without_inputs",
        "without example inputs a trace holds all that the model does",
        (
            (
                "rmfx/frontend/symbolic.py",
                "(changed := self._state.changed_in(m)) is not None",
                "(changed := None) is not None",
            ),
        ),
        ("tests/frontend/test_symbolic.py",),
        {},
    ),
    Cause(
        "tokens",
        "H·W of the example is a number of channels",
        (
            (
                "rmfx/ir/facts.py",
                "return None if found is None or self._is_open(node, axis) else found",
                "return found",
            ),
        ),
        ("tests/ir/test_open_sizes.py",),
        {},
        silent=False,
    ),
)


def main() -> int:
    """Run one sample; the exit code is 3 where a verification failed, 4 for any other refusal."""
    torch.manual_seed(0)
    sample = globals()[f"sample_{sys.argv[1]}"]
    try:
        sample()
    except rmfx.VerificationError as error:
        print(error)
        return 3
    except rmfx.RmfxError as error:
        print(f"{type(error).__name__}: {error}")
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
