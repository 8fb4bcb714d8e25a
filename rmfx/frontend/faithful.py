"""The check that a trace recorded what the model does.

`torch.fx` runs a model's Python code with proxies instead of tensors. Where the code looks at them
(`isinstance(x, Tensor)`, `str(x.device)`) it may take another way than with tensors, without an
error. So where example inputs are known both the model and its trace run on fake tensors, and every
operator they call, with the values it reads, must be the same. A model that changes itself, or of
which there is no such trace, runs twice, and must do the same again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmfx.ir.kinds import FILLED, aten
from rmfx.ir.threads import FAKES, alone, without_logs, without_warnings

from .draws import no_draws
from .kept_state import KeepsStateError, keeps_state, unchanged
from .masks import gives_as_many_as_values_say, with_places

SYMBOL = re.compile(r"\bz?uf?\d+")  # of a whole number, u0, or of a real one, zuf0
Unknown = (torch.SymInt, torch.SymFloat, torch.SymBool)  # numbers that values decide
Call = tuple[object, ...]
Way = tuple[Any, Any, int]  # an operator, what it is given, and which of its results it is


class _Recording(TorchDispatchMode):
    """Writes down every operator that runs, with its arguments; tensors get running numbers.

    A tensor that the code makes of numbers of its own goes by what it holds: a trace has computed
    it already. What is computed of such tensors alone is not written down, but done. What comes of
    the model's tensors alone, or of the size of others, goes by how it does: it may be kept.

    Args:
        mode: of the fakes.
        inputs: fakes.
        own: ids of the model's tensors.
        before: the call before this one, of which the model may have kept something.
        expected: what another form of the model called in the same mode. What that gave is not
            computed anew for as long as the calls are the same.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        inputs: Any,
        own: Collection[int],
        before: _Recording | None = None,
        expected: _Recording | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._own = own
        self._expected = expected
        self.calls: list[Call] = []
        self._results: list[Any] = []  # of the calls
        self.reshapes = False  # whether an operator changes the shape of what is there already
        self._numbers: dict[int, int] = {}
        self._symbols: dict[str, int] = {}
        self._made: dict[int, int] = {}  # constants that came about in this run
        # What tensors without values hold, which tensor of the model they are, and how they follow
        # from those of the model, by their ids.
        self._held: dict[int, Tensor] = before._held if before else {}
        self._written: dict[int, int] = before._written if before else {}
        self._derived: dict[int, str] = before._derived if before else {}
        self._ways: dict[int, Way] = before._ways if before else {}  # in which they follow
        # An id is a tensor's own for as long as it lives.
        self._alive: list[Tensor] = before._alive if before else []
        self._note(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        flat = pytree.tree_leaves(given)
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        repeats = torch.Tag.nondeterministic_seeded not in func.tags
        if repeats and self._is_of_constants(func, tensors):
            return self._computed(func, given)
        writes = func._schema.is_mutable
        name = self._look if func in FILLED else partial(self._name, writes=writes)
        leaves = [name(leaf) for leaf in flat]
        derives = repeats and not writes and self._is_of_weights(tensors)
        if derives and gives_as_many_as_values_say(func):
            result = self._result_of_weights(func, given)
        else:
            known = None if derives else self._expected_result((func, *leaves))
            result = self._result(func, args, given[1]) if known is None else known
        self.reshapes = self.reshapes or torch.Tag.inplace_view in func.tags
        if func in FILLED or derives:
            self._note_derived((func, *leaves), result, (func, given) if derives else None)
            return result
        if writes or any(isinstance(x, (Tensor, *Unknown)) for x in pytree.tree_leaves(result)):
            self.calls.append((func, *leaves))  # no mere question, such as for the device
            self._results.append(result)
        self._note_written(func, given[0], result)
        self._note(result)
        return result

    def _expected_result(self, call: tuple[Any, ...]) -> Any:
        """What the other form of the model was given where it made the same call, if it did."""
        expected, place = self._expected, len(self.calls)
        if expected is None or expected.calls[place : place + 1] != [call]:
            return None
        # What shares memory with another value is tied to that one by torch, for good.
        is_new = all(one.alias_info is None for one in call[0]._schema.returns)
        return expected._results[place] if is_new else None

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        # A model may write to a tensor of its own: let it write to a fake.
        args, kwargs = as_fakes(self._mode, (with_places(func, args, self._real), kwargs))
        found = _normalised(*args) if func is aten.native_batch_norm.default else None
        return func(*args, **kwargs) if found is None else found

    def _is_of_constants(self, func: Any, tensors: Sequence[Tensor]) -> bool:
        if func._schema.is_mutable:  # a tensor that the model keeps is not ours to write to
            return bool(tensors) and all(id(t) in self._held for t in tensors)
        return all(self._is_constant(t) for t in tensors)

    def _is_of_weights(self, tensors: Sequence[Tensor]) -> bool:
        return bool(tensors) and not any(id(tensor) in self._numbers for tensor in tensors)

    def _result_of_weights(self, func: Any, given: Any) -> Any:
        """A fake of what an operator gives, whose size follows from values of the model."""
        with unset_fake_temporarily():
            args, kwargs = pytree.tree_map_only(Tensor, self._real, given)
            result = func(*args, **kwargs)
        return as_fakes(self._mode, (result,))[0]

    def _real(self, value: Tensor) -> Tensor | None:
        """The values of what depends on the model alone, None of what does not."""
        if id(value) in self._numbers:
            return None
        if id(value) in self._held or not isinstance(value, FakeTensor):
            return self._held.get(id(value), value)
        if id(value) not in self._ways:
            return None
        func, given, place = self._ways[id(value)]
        args, kwargs = pytree.tree_map_only(Tensor, self._real, given)
        found: Tensor = pytree.tree_leaves(func(*args, **kwargs))[place]
        return found

    def _note_derived(self, call: Call, result: Any, way: tuple[Any, Any] | None) -> None:
        """What is computed of the model's tensors alone, which it may keep, goes by how it is."""
        how = hashlib.sha256(repr(call).encode()).hexdigest()
        for i, value in enumerate(pytree.tree_leaves(result)):
            if isinstance(value, Tensor):
                self._derived[id(value)] = f"{how} {i}"
                if way is not None:
                    self._ways[id(value)] = (*way, i)
                self._alive.append(value)

    def _is_constant(self, value: Tensor) -> bool:
        if id(value) in self._held:
            return id(value) not in self._numbers
        return not isinstance(value, FakeTensor) and id(value) not in self._own

    def _computed(self, func: Any, given: Any) -> Any:
        """What an operator makes of constants, for which a fake stands."""
        fakes: dict[int, Tensor] = {}

        def real(leaf: Any) -> Any:
            held = self._held.get(id(leaf), leaf)
            fakes[id(held)] = leaf
            return held

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            made = fakes.get(id(leaf))  # an operator in place gives what it was given
            if not isinstance(made, FakeTensor):
                made = self._mode.from_tensor(leaf, static_shapes=True)
                self._held[id(made)] = leaf
                self._made[id(made)] = len(self._made)
                self._alive.append(made)
            return made

        with unset_fake_temporarily():
            args, kwargs = pytree.tree_map(real, given)
            result = func(*args, **kwargs)
        return pytree.tree_map(fake, result)

    def _note_written(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """`buffer += 1` leaves what the operator gives in the place of the buffer."""
        writes = func._schema.is_mutable and args and isinstance(result, Tensor)
        if writes and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            self._written[id(result)] = id(args[0])

    def _note(self, values: Any) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor) and id(value) not in self._numbers:
                self._numbers[id(value)] = len(self._numbers)
                self._alive.append(value)

    def _look(self, leaf: Any) -> object:
        """What there is to a tensor but its values."""
        if not isinstance(leaf, Tensor):
            return self._name(leaf)
        return (tuple(map(self._name, leaf.shape)), leaf.dtype, leaf.device)

    def _name(self, leaf: Any, *, writes: bool = False) -> object:
        if isinstance(leaf, Unknown):
            # By their order: each run has symbols of its own.
            known = self._symbols
            return SYMBOL.sub(lambda u: f"u{known.setdefault(u[0], len(known))}", str(leaf))
        if not isinstance(leaf, Tensor):
            return repr(leaf) if isinstance(leaf, float) else leaf
        if id(leaf) in self._numbers:
            return ("value", self._numbers[id(leaf)])
        if id(leaf) in self._derived:
            return ("derived", self._derived[id(leaf)])
        if not writes and self._is_constant(leaf):
            digest = _digest(self._held.get(id(leaf), leaf))
            return ("constant", leaf.dtype, tuple(leaf.shape), digest)
        if id(leaf) in self._made:
            return ("made", self._made[id(leaf)])
        # Of the model, the same in both runs.
        return ("weight", self._written.get(id(leaf), id(leaf)))


def _normalised(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """What a batch norm gives that is not training; torch finds it out in ten milliseconds."""
    is_training = others[4]
    return None if is_training else (torch.empty_like(x), x.new_empty(0), x.new_empty(0))


def _digest(value: Tensor) -> str:
    """A short form of what a tensor holds."""
    with unset_fake_temporarily():
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


def records_the_same(model: nn.Module, gm: fx.GraphModule, inputs: tuple[Any, ...]) -> bool:
    """Whether a model and its trace call the same operators on the same values.

    Args:
        model, gm: the model and what was traced of it, sharing its tensors.
        inputs: example inputs; only their shapes and types are used.

    Raises:
        KeepsStateError: the model does something else when it is called again.
        Whatever the model's own code raises.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    mode = _fake_mode()
    expected, calls = _recorded(model, inputs, own, mode)
    # Fakes that have other shapes now can stand for nothing again.
    again = (_fake_mode(), None) if expected.reshapes else (mode, expected)
    try:
        return calls == _recorded(gm, inputs, own, *again)[1]
    except Exception:  # noqa: BLE001  (a trace that missed something may fail in any way)
        return False


def check_state(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise KeepsStateError for a model that does something else when it is called again."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        with no_draws(lambda: _recorded(model, inputs, own, _fake_mode())):
            _recorded(model, inputs, own, _fake_mode(), twice=True)
    except KeepsStateError:
        raise
    except Exception:  # noqa: BLE001  (whoever traces it says better why it does not run)
        return


def _fake_mode() -> FakeTensorMode:
    """A mode in which sizes that depend on the inputs' values are unknown."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)


def _recorded(
    model: nn.Module,
    inputs: tuple[Any, ...],
    own: Collection[int],
    mode: FakeTensorMode,
    expected: _Recording | None = None,
    *,
    twice: bool = False,
) -> tuple[_Recording, list[Call]]:
    """A run of a model, and all that it called, its results the last of it."""
    # A trace that fails is no news to anybody; torch would print it.
    run = model.forward if isinstance(model, fx.GraphModule) else model

    def record(before: _Recording | None = None) -> tuple[_Recording, list[Call]]:
        others = pytree.tree_map_only(Tensor, torch.empty_like, inputs) if before else inputs
        fake = as_fakes(mode, others)  # what it kept of the call before is no input of this one
        recording = _Recording(mode, fake, own, before, None if before else expected)
        with recording:
            result = run(*fake)
        names = tuple(map(recording._name, pytree.tree_leaves(result)))
        return recording, [*recording.calls, names]

    # Warnings are the model's own, which nobody called; and torch's, of tensors that it keeps.
    with (
        alone(),
        unchanged(model) as state,
        mode,
        torch.no_grad(),
        without_warnings(),
        without_logs(FAKES),
    ):
        recording, calls = record()
        changed = state.changed()
        if twice or changed is not None:
            try:
                again = record(recording)[1]
            except Exception as error:  # the model's own code may raise anything
                raise keeps_state(changed, state.hidden) from error
            if again != calls:
                raise keeps_state(changed, state.hidden)
    return recording, calls


def as_fakes(mode: FakeTensorMode, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with tensors that have shape and type, but no values."""

    def fake(x: Any) -> Any:
        is_real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
        return mode.from_tensor(x, static_shapes=True) if is_real else x

    fakes: tuple[Any, ...] = pytree.tree_map(fake, inputs)
    return fakes
