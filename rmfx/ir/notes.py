"""What is noted of a node's value, and how long that holds.

The keys of `node.meta` have their names here, and no other file spells one out.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

SHAPE = "shape"  # of the value, None for sizes that the inputs change
TYPE = "dtype"  # of the value, and its device
FROZEN = "frozen"  # why a node stays as it is
NUMBER = "number"  # the value is a number, a size or the like
CONTAINER = "container"  # the value is a tuple or list of tensors
FUNCTIONAL = "functional"  # a call in place of which one that does not write may stand
FIRST = "first"  # the node stands for the first result of its operator
KIND = "kind"  # something was decided because the value holds floating numbers, or none
GIVEN = "given"  # an input of the example that is no tensor
SOURCE = "source"  # the line of code
OWN_GRADIENT = "own_gradient"  # where a gradient is not that of what is computed
WRITTEN = "written"  # tensors of the model behind the node may be written to
OF_BRANCHES = "of_branches"  # an addition that was a sum over an axis of branches
FOLLOWED = "followed"  # in a graph's metadata: no number is read from its tensors, which may change
NAMED = "named"  # likewise, until its layers are found: names of nodes that are to be kept
GUARDED = "guarded"  # the sizes noted are those of every call: others are refused
VAL, EXAMPLE_VALUE, GRAPHARG = "val", "example_value", "grapharg"  # by exporting; two by Dynamo
OF_VALUE = (SHAPE, TYPE)
ORIGIN = ("nn_module_stack", SOURCE, "stack_trace")  # where a node comes from
NOTED = (VAL, EXAMPLE_VALUE, "tensor_meta")  # by exporting, by Dynamo and by torch.fx
Shape = tuple[int | None, ...]


def kind_read(node: fx.Node) -> Any:
    """The type of a value as `type_of` tells it, where something is decided by it.

    It is that of the example: who needs to know can see on the node that it was read.
    """
    for one in (node, *node.all_input_nodes):  # what is made like a value goes with it
        one.meta[KIND] = True
    return type_of(node)


def noted(node: fx.Node) -> Any:
    """What exporting or Dynamo noted of a value, None if nothing."""
    return node.meta.get(VAL, node.meta.get(EXAMPLE_VALUE))


def shape_of(node: fx.Node, otherwise: Any = None) -> Any:
    """The shape of a value, something else where nobody noted it."""
    return node.meta.get(SHAPE, otherwise)


def set_shape(node: fx.Node, shape: Shape | None) -> None:
    """Note the shape of a value, None where it is not known any more."""
    _set(node, SHAPE, shape)


def type_of(node: fx.Node) -> Any:
    """Type and device of a value, None where nobody noted them."""
    return node.meta.get(TYPE)


def set_type(node: fx.Node, kind: tuple[Any, Any] | None) -> None:
    """Note type and device of a value, None where they are not known any more."""
    _set(node, TYPE, kind)


def _set(node: fx.Node, key: str, value: Any) -> None:
    if value is None:
        node.meta.pop(key, None)
    else:
        node.meta[key] = value


def why_frozen(node: fx.Node) -> Any:
    """Why a node has to stay as it is, None if it need not."""
    return node.meta.get(FROZEN)


def gives_number(node: fx.Node) -> bool:
    """Whether a node's value is a number, a size or the like instead of a tensor."""
    return NUMBER in node.meta


def gives_container(node: fx.Node) -> bool:
    """Whether a node's value is a tuple or list of tensors."""
    return CONTAINER in node.meta


def notes_of(node: fx.Node, *keys: str) -> dict[str, Any]:
    """What is noted of a node under some keys."""
    return {key: node.meta[key] for key in keys if key in node.meta}


def sizes_of_every_call(node: fx.Node) -> tuple[Any, ...] | None:
    """Sizes of a value, a number or a SymInt each, None where inputs of other sizes may come."""
    value = noted(node) if GUARDED in node.meta else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def without_notes(node: fx.Node, *others: str) -> dict[str, Any]:
    """The metadata of a node for one that holds another value."""
    return {key: value for key, value in node.meta.items() if key not in (*NOTED, *others)}


def forget(node: fx.Node) -> None:
    """Drop what was noted of a value that is another one now."""
    for key in NOTED:
        node.meta.pop(key, None)


def with_channels(shape: Shape, channels: int, dims: int) -> Shape:
    """A shape with other channels, for layers of `dims` spatial dimensions."""
    return (shape[0], channels, *shape[2:]) if dims else (*shape[:-1], channels)


def positions(shape: Shape | None, dims: int) -> int | None:
    """Pixels or tokens in a batch, for layers of `dims` spatial dimensions."""
    if shape is None or any(n is None for n in shape):
        return None
    sizes = [int(n) for n in shape if n is not None]
    return math.prod(sizes[:1] + sizes[2:] if dims else sizes[:-1])
