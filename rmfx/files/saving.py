"""Writes a converted network to a file, whole or not at all, and checks what was written.

The file is written under its own name in a hidden folder beside its place, loaded again, run
against the original on random inputs, and only then moved to its place in one step. Whatever goes
wrong before that step, an interruption included, leaves the place as it was.

The kinds of files stand in `formats.py`.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from rmfx.errors import RmfxError, ShapeError, VerificationError, install_command
from rmfx.interval import Interval
from rmfx.options import number_of

from .formats import FORMATS, Format, Function
from .free_sizes import described_shapes, free_batch, free_sizes, left_to_torch, takes_any_batch
from .trials import Trials, copies, default_tolerance, doubled, relative_error, state_kept

SUFFIXES = tuple(FORMATS)
Run = tuple[Sequence[Tensor], object]  # inputs, and what a network gives for them


# What the exporter raises for a model it cannot follow (Dynamo's errors are RuntimeErrors), and
# networks for inputs of other sizes than theirs.
_EXPORT_ERRORS = (
    *(RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError),
    ShapeError,
)


class SaveError(RmfxError):
    """The network cannot be written as asked; nothing was left behind."""


@dataclass(frozen=True)
class SavedFile:
    """A file that was written, loaded, run and found equal.

    Attributes:
        path: where it is.
        size: bytes.
        free_batch: whether it takes batches of any size.
        inputs: the shapes that it takes, in words, as `described_shapes` has them.
        runs: how many inputs it was checked on: random ones, and the example where it is not all 0.
        error: the largest relative error, max |file - original| / max |original|.
        tolerance: the error that would have been too large.
    """

    path: Path
    size: int
    free_batch: bool
    inputs: str
    runs: int
    error: float
    tolerance: float


def check_output(path: str | os.PathLike[str]) -> Path:
    """Finds out, before any work is done, whether `save` could write to `path`.

    Raises:
        SaveError: another suffix than those of `FORMATS`, no such folder, no permission, a place
            that holds something else than a file, or packages that the format needs are missing.
    """
    place = check_place(path, SUFFIXES)
    absent = FORMATS[place.suffix].missing
    if absent:
        raise SaveError(f"{place.suffix} files need more packages: {install_command(absent)}")
    return place


def check_place(path: str | os.PathLike[str], suffixes: Sequence[str]) -> Path:
    """Finds out whether a file could be written to `path`.

    Raises:
        SaveError: another suffix than those given, no such folder, no permission, or a place that
            holds something else than a file.
    """
    place = Path(path)
    if place.suffix not in suffixes:
        raise SaveError(f"{place}: the name must end in {' or '.join(suffixes)}")
    with whole_file(place):
        return place


def save(
    gm: fx.GraphModule,
    path: str | os.PathLike[str],
    example_inputs: Sequence[Tensor],
    *,
    reference: nn.Module | ExportedProgram | None = None,
    source: nn.Module | ExportedProgram | None = None,
    tolerance: float | None = None,
    input_range: Interval | None = None,
    samples: Sequence[Sequence[Tensor]] = (),
) -> SavedFile:
    """Writes `gm` to `path` and checks the written file against the reference.

    Args:
        gm: a network in eval mode.
        path: ends in one of `SUFFIXES`. A file that is there already is replaced.
        example_inputs: what the network takes; the first dimension of each is the batch, which the
            file leaves free if the network allows it.
        reference: what the file must compute, by default `gm` itself.
        source: what `gm` was made from, by default the reference. The sizes that are free in an
            exported program are so in the file, as far as the network allows it.
        tolerance: largest relative error that is accepted, by default 1e-4 in float32.
        input_range: (low, high) of all inputs, where the network was made for such.
        samples: batches of inputs on which alone it is checked, where it was made for such.

    Raises:
        OptionError: the tolerance is no number, negative or infinite.
        SaveError: the place cannot be written to, or the network cannot be exported.
        VerificationError: the error is too large or not finite.

    Example:
        >>> from torch import fx, nn
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
        >>> folder = tempfile.TemporaryDirectory()
        >>> saved = save(gm, Path(folder.name) / "net.pt2", (torch.zeros(1, 3, 8, 8),))
        >>> saved.inputs, saved.error
        ('(any, 3, 8, 8)', 0.0)
        >>> folder.cleanup()
    """
    place = check_output(path)
    limit = default_tolerance(example_inputs)
    if tolerance is not None:
        limit = number_of("tolerance", tolerance, least=0, below=math.inf)
    reference = gm if reference is None else reference
    original = as_function(reference)
    inputs = tuple(example_inputs)
    form = FORMATS[place.suffix]
    types, reason = form.lacks
    if any(x.dtype in types for x in inputs):
        raise SaveError(f"{reason}; use float32 or .pt2")
    trials = Trials(inputs, input_range, samples)
    program = _export(gm, original, trials, source or reference)
    with whole_file(place) as temporary:
        _write(form, program, temporary)
        runs, error = _verify(original, form.read(temporary), trials, program, limit)
        size = temporary.stat().st_size
    free, shapes = takes_any_batch(program), described_shapes(program)
    return SavedFile(place, size, free, shapes, runs, error, limit)


def as_function(model: nn.Module | ExportedProgram) -> nn.Module:
    """What can be called with inputs: the model itself, or the module of an exported program."""
    return model.module() if isinstance(model, ExportedProgram) else model


@contextlib.contextmanager
def whole_file(place: Path) -> Iterator[Path]:
    """A temporary path on the same disk, which becomes `place` if the block ends without error.

    It has the final name, since writers look at the suffix. If the block writes no file, `place`
    stays as it is. The folder around it vanishes in any case. A file that is replaced hands on its
    permissions; a link stays one, and its target is replaced.

    Raises:
        SaveError: the place cannot be written to, or holds what must not be replaced.
    """
    target = Path(os.path.realpath(place))
    try:
        mode = _mode_of(place)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            temporary = Path(folder) / target.name
            yield temporary
            if temporary.exists():
                if mode is not None:
                    temporary.chmod(mode)
                _flush(temporary)
                os.replace(temporary, target)
                _flush(target.parent)
    except OSError as error:
        raise SaveError(f"{place} cannot be written: {error.strerror or error}") from error


def _mode_of(place: Path) -> int | None:
    """The permissions of the file at a place, None where there is none.

    Raises:
        SaveError: it is no file, or read-only.
        OSError: nobody can tell.
    """
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise SaveError(f"{place} exists and is not a file")
    # The superuser may write to what its owner has protected, and a folder lets it be replaced.
    if not mode & 0o222 or not os.access(place, os.W_OK):
        raise SaveError(f"{place} exists and is read-only; name another file, or make it writable")
    return stat.S_IMODE(mode)


def _flush(path: Path) -> None:
    """Brings a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":  # only there can a folder be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _export(
    gm: fx.GraphModule,
    original: Function,
    trials: Trials,
    source: nn.Module | ExportedProgram,
) -> ExportedProgram:
    """The program to write, with as many free sizes as the first way that works gives."""
    # The file will hold its example inputs: random numbers, no data of the caller's.
    example = Trials(trials.inputs, trials.input_range)
    if isinstance(source, ExportedProgram) and any(free := free_sizes(source)):
        # A batch of one would be taken for a constant; two stand for any number.
        is_single = all(0 in dims for dims in free) and example.inputs[0].shape[0] == 1
        given = tuple(example.draw(batch=2 if is_single else None))
        with contextlib.suppress(*_EXPORT_ERRORS):
            return torch.export.export(
                gm, given, dynamic_shapes=left_to_torch(given, free), strict=False
            )
    if _takes_any_batch(gm, original, trials):
        batched, batch = tuple(example.draw(batch=2)), Dim("batch")
        with contextlib.suppress(*_EXPORT_ERRORS):
            shapes = tuple({0: batch} for _ in batched)
            return torch.export.export(gm, batched, dynamic_shapes=shapes, strict=False)
    try:
        return torch.export.export(gm, tuple(example.draw()), strict=False)
    except _EXPORT_ERRORS as error:
        raise SaveError(f"torch.export cannot export the network: {error}") from error


def _takes_any_batch(gm: fx.GraphModule, original: Function, trials: Trials) -> bool:
    """Whether both functions accept, and agree on, another batch than that of the inputs."""
    inputs = trials.inputs
    if any(x.ndim < 2 for x in inputs) or len({x.shape[0] for x in inputs}) != 1:
        return False
    try:
        with torch.no_grad(), state_kept(original, gm):
            trial, expected = trials.run(original, inputs[0].shape[0] + 1)
            return relative_error(expected, gm(*trial)) <= default_tolerance(inputs)
    except (*_EXPORT_ERRORS, VerificationError):
        return False


def _write(form: Format, program: ExportedProgram, path: Path) -> None:
    size = sum(value.nbytes for value in program.state_dict.values())
    if form.limit is not None and size >= form.limit:
        raise SaveError(
            f"{size / 1e9:.1f} GB of weights do not fit in one {path.suffix} file; use .pt2"
        )
    try:
        form.write(program, path)
    except _EXPORT_ERRORS as error:
        raise SaveError(f"the network cannot be written as {path.suffix}: {error}") from error


def _verify(
    original: Function,
    written: Function,
    trials: Trials,
    program: ExportedProgram,
    tolerance: float,
) -> tuple[int, float]:
    """On how many inputs both were run, and the largest error.

    Raises:
        VerificationError: it is above the tolerance, or the original gives no numbers.
    """
    with torch.no_grad(), state_kept(original):
        runs = _runs(original, trials, program)
        worst = max(relative_error(expected, written(*given)) for given, expected in runs)
    if not worst <= tolerance:
        raise VerificationError(
            f"the written file differs from the original by {worst:.2g} (relative); at most"
            f" {tolerance:.2g} is accepted; nothing was kept"
        )
    return len(runs), worst


def _runs(original: Function, trials: Trials, program: ExportedProgram) -> list[Run]:
    """Inputs of all the sizes at which a file is tried, with what the original gives.

    Three are of other numbers than zeros: as given, and where batches are free one and five. One
    more is of larger sizes where others are free, if both the original and the program take them.
    """
    batch = free_batch(program)
    runs: list[Run] = [trials.run(original)]
    for seed, size in enumerate((1, 5) if batch else (None, None), 1):
        if size is None or takes_any_batch(program):
            runs.append(trials.run(original, size, seed))
        else:
            runs += _if_taken(original, program, trials, size, seed)
    free = [[d for d in dims if not (batch and d == 0)] for dims in free_sizes(program)]
    if any(free) and not trials.samples:
        larger = [doubled(x, dims) for x, dims in zip(trials.inputs, free, strict=True)]
        runs += _if_taken(original, program, Trials(larger, trials.input_range))
    return runs + [(own, original(*copies(own))) for own in trials.own()]


def _if_taken(
    original: Function,
    program: ExportedProgram,
    trials: Trials,
    batch: int | None = None,
    seed: int = 0,
) -> Iterator[Run]:
    """Inputs of sizes that may be too large or too small; nothing where they are."""
    with contextlib.suppress(*_EXPORT_ERRORS, VerificationError):
        given, expected = trials.run(original, batch, seed)
        program.module()(*given)
        yield given, expected
