"""An original and a result that are run on the same inputs, each from where it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx.ir.undisturbed import autocast_of_caller

from .equivalence import Recorder, cloned, moved_by_one_rounding
from .runs import (
    Forms,
    Run,
    Shape,
    call,
    in_float64,
    is_of_dynamo,
    may_write,
    positions_of,
    seeded,
    shapes_of,
)
from .trial_inputs import Inputs

SMALL = 1 << 21  # parameters up to which a network is run at further sizes, and is called
CALLED = 1 << 11  # positions up to which a small network with a graph is called as well


class Sides:
    """Both networks, as far as they are run.

    Args:
        fresh: makes a copy of the original, which may be run.
        source: its graph, if joins are to be compared.
        after: the result.
        names: of the nodes whose values are noted, in the original and in the result.

    Attributes:
        writes: whether the original may write to its own tensors.
        is_small: whether both are called besides that their graphs are run.
        kept: what holds the original's tensors.
        fixed: positions of inputs that are weights.
    """

    def __init__(
        self,
        fresh: Callable[[], nn.Module],
        source: fx.GraphModule | None,
        after: nn.Module,
        names: tuple[set[str], set[str]],
    ) -> None:
        self._fresh, self._names = fresh, names
        self.writes = may_write(source)
        self.is_small = sum(p.numel() for p in after.parameters()) <= SMALL
        graph = after if isinstance(after, fx.GraphModule) else None
        both = (None, None) if source is None or graph is None else (source, graph)
        calls = self.is_small or both[0] is None
        self._forms = (
            Forms(fresh() if calls else None, both[0]),
            Forms(after if calls else None, both[1], graph is None),
        )
        self._start = self._forms
        self.kept: Any = self._forms[0].module if source is None else source
        self.fixed: frozenset[int] = frozenset()

    def begin(self) -> None:
        """Keep both as they are now, for `undo` and `again`."""
        self._start = self._forms
        if self.writes:
            self._forms = (self._start[0].apart(), self._start[1].apart())

    def undo(self) -> None:
        """Put both back to where `begin` found them."""
        self._forms = self._start

    def run(self, side: int, inputs: Inputs) -> Run:
        """Run one side, 0 for the original and 1 for the result."""
        return self._run(self._forms[side], side, inputs)

    def again(
        self,
        inputs: Inputs,
        *,
        precise: bool = False,
        weights: int | None = None,
        times: int = 1,
        seed: int = 0,
    ) -> Run:
        """Run the original once more from where `begin` found it.

        Args:
            inputs: which may be others than before.
            precise: whether in float64.
            weights: a seed, with which its weights are moved by one rounding.
            times: or by so many.
            seed: of the numbers that it draws at random.
        """
        as_it_was = not (self.writes or precise or weights is not None)
        forms = self._start[0] if as_it_was else self._start[0].apart(precise=precise)
        if weights is not None:
            forms.move(weights, times)
        inputs = in_float64(inputs) if precise else inputs
        return self._run(forms, 0, inputs, precise=precise, seed=seed)

    def anew(self, inputs: Inputs) -> Run | None:
        """Run an original that has seen no inputs yet; None where nothing but its graph is run."""
        forms = self._forms[0]
        if forms.module is None:
            return None
        return self._run(replace(forms, module=self._fresh()), 0, inputs)

    def _run(
        self, forms: Forms, side: int, inputs: Inputs, *, precise: bool = False, seed: int = 0
    ) -> Run:
        """Run a network as it is called, unless that takes long, and for the values its graph."""
        output, values, has_empty = None, dict[str, Any](), False
        module, graph = forms.module, forms.graph
        if graph is not None and positions_of(inputs) > CALLED:
            module = None
        casts = contextlib.nullcontext() if precise else self.autocast()
        try:
            with torch.no_grad(), casts:
                if module is not None:
                    with seeded(seed):
                        output = call(module, self._copies(inputs))
                if graph is not None:
                    recorder = Recorder(graph, self._names[side])
                    with seeded(seed):
                        found = recorder.run(*self._copies(inputs))
                    output, values = found if output is None else output, recorder.values
                    has_empty = recorder.has_empty
        # Both run the model's own operations, which may raise anything.
        except Exception as failure:  # noqa: BLE001
            return Run(failure=failure)
        outputs = (x for x in pytree.tree_leaves(output) if isinstance(x, Tensor))
        return Run(output, values, has_empty=has_empty or any(not x.numel() for x in outputs))

    def _copies(self, inputs: Inputs) -> Inputs:
        """Copies of inputs, which a network may write to, and weights as they are."""
        return tuple(x if i in self.fixed else cloned(x) for i, x in enumerate(inputs))

    def moved(self, inputs: Inputs, seed: int, *, times: int = 1) -> Inputs:
        """Inputs, without weights, moved by one rounding, or by so many."""
        moved = moved_by_one_rounding(inputs, seed, times=times)
        return tuple(inputs[i] if i in self.fixed else x for i, x in enumerate(moved))

    def autocast(self) -> contextlib.AbstractContextManager[dict[str, torch.dtype]]:
        """Autocast as the caller has it, where the original is a graph that was made under it."""
        return autocast_of_caller() if is_of_dynamo(self.kept) else contextlib.nullcontext({})

    def shapes_of(self, inputs: Inputs) -> tuple[Shape, ...]:
        """The shapes of what the caller gives, without weights."""
        return shapes_of(tuple(x for i, x in enumerate(inputs) if i not in self.fixed))
