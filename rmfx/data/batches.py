"""What callers give to measure a network on: batches of (inputs, targets), and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from rmfx.errors import OptionError, ShapeError, first_line
from rmfx.options import as_tuple, shapes_shown, shown, with_article

Loss = Callable[[Any, Any], Tensor]
Batches = Iterable[tuple[Any, Any]]


def check_batches(name: str, given: object, *, pairs: bool = True, twice: bool = False) -> None:
    """Raise OptionError unless an option can hold batches.

    Args:
        name: of the option.
        given: its value.
        pairs: whether batches are of (inputs, targets), or of inputs alone.
        twice: whether they are gone through more than once.
    """
    wanted = "(inputs, targets), such as [(x, y)]" if pairs else "inputs, such as [x]"
    if isinstance(given, Tensor):  # its first dimension would be taken for the batches
        raise OptionError(f"{name} is a tensor; pass a list of batches of {wanted}")
    if not isinstance(given, Iterable):
        raise OptionError(f"{name}={shown(given)}: pass a list of batches of {wanted}")
    if twice and iter(given) is given:
        raise OptionError(f"{name} is an iterator, which can be gone through once; pass a list")


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch that is a pair.

    Raises:
        OptionError: it is none, or empty.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise OptionError(
            f"data holds {with_article(batch)}, where batches are pairs of (inputs, targets)"
        )
    if any(isinstance(x, Tensor) and not x.numel() for x in tree_leaves(batch[0])):
        raise OptionError("data holds an empty batch")
    return batch[0]


def arguments_of(batch: Any, fits: Callable[[int], bool]) -> tuple[Tensor, ...]:
    """The inputs of a batch that may be a pair of inputs and something else, or inputs alone.

    Args:
        batch: of either kind.
        fits: whether the network takes so many inputs; a pair is read as one wherever that fits.

    Returns:
        Nothing where neither fits.
    """
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    for arguments in (as_tuple(batch[0]), as_tuple(batch)) if is_pair else (as_tuple(batch),):
        if all(isinstance(x, Tensor) for x in arguments) and fits(len(arguments)):
            return arguments
    return ()


def output_on(network: Callable[..., Any], inputs: Any, what: str = "batch of data") -> Any:
    """What a network gives for the inputs of a batch, be they one tensor or several.

    Args:
        what: the batch is, for the message.

    Raises:
        ShapeError: it raises something.
    """
    given = as_tuple(inputs)
    try:
        return network(*given)
    except ShapeError:
        raise
    # The network runs the model's own operations, which may raise anything.
    except Exception as error:
        raise ShapeError(
            f"the model does not run on a {what} {shapes_shown(given)}: {first_line(error)}"
        ) from error


def loss_on(loss: Loss, output: Any, target: Any) -> Tensor:
    """The loss of a batch.

    Raises:
        OptionError: it raises something, or is not one number.
    """
    try:
        value = loss(output, target)
    # The loss and what it is of are the caller's.
    except Exception as error:
        what = f"an output of {_shape(output)} and a target of {_shape(target)}"
        raise OptionError(f"the loss cannot be taken of {what}: {error}") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise OptionError(
            f"the loss gives {_shape(value)}, not a tensor of one number; let it take the mean "
            "over the batch"
        )
    return value


def _shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
