"""Networks run apart from what the caller holds: copies, seeds and what came of a run."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rmfx.errors import VerificationError
from rmfx.ir.notes import GRAPHARG, WRITTEN
from rmfx.modules.copies import computed_tensors

from .equivalence import moved_by_one_rounding
from .trial_inputs import Inputs

Shape = tuple[int, ...]
M = TypeVar("M", bound=nn.Module)


def is_of_dynamo(model: Any) -> bool:
    """Whether a model is a graph as Dynamo gives it to a backend."""
    if not isinstance(model, fx.GraphModule):
        return False
    return any(GRAPHARG in node.meta for node in model.graph.find_nodes(op="placeholder"))


def copy_of_original(model: Any, source: fx.GraphModule | None) -> nn.Module:
    """A copy of what the caller holds, to be run; its graph where it cannot be copied.

    Raises:
        VerificationError: there is no graph either.
    """
    model = model.module() if isinstance(model, ExportedProgram) else model
    try:
        copied: nn.Module = apart(model, writes=may_write(source))
    # Copying runs code of the model's own objects, which may raise anything.
    except Exception as error:
        if source is None:
            raise VerificationError(
                f"the original cannot be copied, and running it could change it: {error}"
            ) from error
        return apart(source, writes=may_write(source))
    return copied


def may_write(source: fx.GraphModule | None) -> bool:
    """Whether a model may write to its own tensors, as far as its graph tells."""
    return source is None or any(WRITTEN in node.meta for node in source.graph.nodes)


def apart(model: M, *, writes: bool) -> M:
    """A copy that may run without the caller's model noticing.

    It shares the parameters, unless it may write to them, and of a graph its nodes, which are many
    more objects than its tensors.
    """
    kept: dict[int, Any] = {} if writes else {id(p): p for p in model.parameters()}
    memo = kept | computed_tensors(model)
    if not isinstance(model, fx.GraphModule):
        return copy.deepcopy(model, memo)
    made = object.__new__(type(model))  # whose class has the code
    memo |= {id(model): made, id(model.graph): model.graph, id(model.meta): model.meta}
    vars(made).update(copy.deepcopy(vars(model), memo))
    return made


def in_float64(values: Any) -> Any:
    """Floating numbers in float64."""

    def cast(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    return pytree.tree_map_only(Tensor, cast, values)


@dataclass(frozen=True, eq=False)
class Forms:
    """What is run of one side: the network as it is called, and its graph, of which one is enough.

    Attributes:
        module, graph: None for what is not to be run.
        as_it_is: whether the module is not to be copied, as a compiled one.
    """

    module: nn.Module | None
    graph: fx.GraphModule | None
    as_it_is: bool = False

    def apart(self, *, precise: bool = False) -> Forms:
        """Copies, whose writes these do not see; in float64 if they are to be precise."""
        module, graph = self.module, self.graph and apart(self.graph, writes=True)
        if module is not None and not self.as_it_is:
            module = apart(module, writes=True)
        if precise:
            module, graph = module and module.double(), graph and graph.double()
        return Forms(module, graph, self.as_it_is)

    def move(self, seed: int, times: int = 1) -> None:
        """Move all weights by one rounding, or by so many."""
        for form in filter(None, (self.module, self.graph)):
            held = {id(x): x for x in (*form.parameters(), *form.buffers())}
            tensors = [x for x in held.values() if x.is_floating_point()]
            with torch.no_grad():
                moved = moved_by_one_rounding((*tensors,), seed, times=times)
                for x, new in zip(tensors, moved, strict=True):
                    x.data.copy_(new)


@dataclass(frozen=True, eq=False)
class Run:
    """What a network gave: its output and its values at some nodes, or how it failed.

    `has_empty` says that some value, of whichever node, holds no numbers.
    """

    output: Any = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    failure: Exception | None = None
    has_empty: bool = False


def call(module: nn.Module, inputs: Inputs) -> Any:
    """What a network gives; without what torch.fx prints where one of its graphs fails."""
    call: Any = nn.Module.__call__ if isinstance(module, fx.GraphModule) else type(module).__call__
    return call(module, *inputs)


def shapes_of(inputs: Inputs) -> tuple[Shape, ...]:
    """The shapes of all tensors among some inputs."""
    return tuple(tuple(x.shape) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))


def positions_of(inputs: Inputs) -> int:
    """The most positions, batch and space, of an input."""
    return max((math.prod((*shape[:1], *shape[2:])) for shape in shapes_of(inputs)), default=0)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Let what is drawn at random be the same each time, and afterwards as if nothing was."""
    python, numbers = random.getstate(), np.random.get_state()
    with _torch_seeded(seed):
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


@contextlib.contextmanager
def _torch_seeded(seed: int) -> Iterator[None]:
    if torch.accelerator.is_available():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
        return
    # The same without what torch notes of each kind of device for later, its caller's stack among
    # it, which takes longer than most small networks run.
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
