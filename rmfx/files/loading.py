"""Finds a model by a short text and fills it with weights from a file.

| text | model |
|---|---|
| `torchvision:NAME` | an architecture of torchvision, random weights |
| `timm:NAME` | an architecture of timm, random weights |
| `package.module:factory` | what `factory()` returns, or a module object of that name |
| `FILE.pt2` | a program saved by `torch.export.save` |

Weights come from a safetensors file or from one that `torch.load` reads with `weights_only=True`.
No code that stands in a file, of weights or of a program, is ever run (see `programs.py`). A
factory, like any import, is code that runs.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rmfx.errors import first_line
from rmfx.modules.copies import copied_model
from rmfx.options import with_article

from .expressions import UnsafeFileError
from .programs import check_program
from .source_lines import described
from .tensors import LoadError, check_kept, read_tensors

_IMAGE = (1, 3, 224, 224)
_VIDEO = (1, 3, 16, 112, 112)
_STATES = (".pt", ".pth", ".tar", ".ckpt", ".bin", ".safetensors", ".npz", ".pkl")
_SOURCES = {"torchvision": "torchvision.models", "timm": "timm"}  # where their lists are
_WAYS = "write torchvision:NAME, timm:NAME, package.module:factory or a file that ends in .pt2"
_DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference.

    Attributes:
        model: a module in eval mode that belongs to the caller alone, or an exported program.
        inputs: example inputs where the source of the model tells what they look like.
        random: whether the weights are random, so that only the architecture means something.
    """

    model: nn.Module | ExportedProgram
    inputs: tuple[Tensor, ...] | None
    random: bool

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point weight, float32 if there is none."""
        weights = self.model.state_dict
        values = weights.values() if isinstance(weights, dict) else weights().values()
        return next((x.dtype for x in values if x.is_floating_point()), torch.float32)


def load_model(
    text: str, *, weights: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None
) -> LoadedModel:
    """Loads the model that `text` names (see the module's table) and puts it in eval mode.

    Args:
        text: `torchvision:NAME`, `timm:NAME`, `package.module:factory` or `FILE.pt2`. Modules are
            looked for in the current folder first.
        weights: a safetensors file or a PyTorch checkpoint with the model's own keys. A checkpoint
            may hold them under "state_dict" or "model", and each may begin with "module.".
        dtype: what to convert the model to.

    Raises:
        LoadError: there is no such model, its package is not installed, the file is damaged, does
            not fit, or holds what would run code when it is opened; `weights` or `dtype` is given
            for a `.pt2` file, whose weights are fixed.

    Example:
        >>> load_model("rmfx.models:DigitsNet").model.training
        False
    """
    if text.endswith(".pt2"):
        if weights is not None or dtype is not None:
            raise LoadError(f"{text}: a .pt2 file holds its weights and their type already")
        return _load_program(Path(text))
    kind, colon, name = text.partition(":")
    if not (kind and colon and name):
        raise LoadError(_no_model(text))
    if kind.endswith(".py") or "/" in kind:
        raise LoadError(f"{text} names a file: write {_module_of(kind)}:{name}")
    load = {"torchvision": _load_torchvision, "timm": _load_timm}.get(kind)
    model, shape = load(name) if load else _call_factory(kind, name)
    if weights is not None:
        load_weights(model, weights)
    model.eval().requires_grad_(False)
    if dtype is not None:
        model.to(dtype)
    loaded = LoadedModel(model, None, random=load is not None and weights is None)
    if shape is None:
        return loaded
    return replace(loaded, inputs=(torch.zeros(shape, dtype=loaded.dtype),))


def _no_model(text: str) -> str:
    """Why a text without a colon names no model, and what to write instead."""
    suffix = Path(text).suffix.lower()
    if suffix in _STATES:
        return (
            f"{text} may hold weights, but no model: write package.module:factory, a function that"
            " returns the model, and give the file to --weights"
        )
    if suffix == ".onnx":
        return f"{text}: .onnx files are written, not read; name the model it was made of"
    if text and Path(text).is_dir():
        return f"{text} is a folder: {_WAYS}"
    if suffix == ".py":
        return f"{text} holds code: write {_module_of(text)}:factory"
    return f"{text!r} names no model: {_suggest_source(text) or _WAYS}"


def _module_of(path: str) -> str:
    """The name of the module that a file of code is, from the current folder."""
    return ".".join(Path(path).with_suffix("").parts)


def _suggest_source(name: str) -> str:
    """What to write for an architecture that a package knows, or for a function; "" for others."""
    found = [f"{source}:{name}" for source in _SOURCES if name and _knows(source, name)]
    module, _, function = name.rpartition(".")
    if not found and module and name.replace(".", "").isidentifier():
        found = [f"{module}:{function}"]
    return f"did you mean {' or '.join(found)}?" if found else ""


def _knows(source: str, name: str) -> bool:
    """Whether a package that is installed has an architecture of a name."""
    try:
        found = importlib.import_module(_SOURCES[source])
    except ImportError:
        return False
    return name in found.list_models()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fills a model, in place, from a file that must hold exactly its parameters and buffers.

    Raises:
        LoadError: the file cannot be read or is damaged, or a key is missing, left over or has
            another shape; the model is then as it was.
    """
    path = Path(path)
    found = _strip_prefix(_read_state(path))
    wanted = model.state_dict()
    # Counters of batch norm are bookkeeping of training, and older files do not have them.
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in found if k not in wanted]
    differing = [
        f"{k} is {tuple(found[k].shape)} in the file and {tuple(wanted[k].shape)} in the model"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    faults = [
        _count(missing, "missing key"),
        _count(unexpected, "unexpected key"),
        _count(differing, "wrong shape"),
    ]
    if any(faults):
        raise LoadError(f"{path} does not fit the model: {'; '.join(filter(None, faults))}")
    model.load_state_dict(wanted | dict(found))


def _count(names: list[str], what: str, shown: int = 3) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > shown else ""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} {what}{plural} ({', '.join(names[:shown])}{more})"


def _read_state(path: Path) -> Mapping[str, Tensor]:
    state = read_tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise LoadError(f"{path} holds no state dict (a mapping from names to tensors)")
    return state


def _strip_prefix(state: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Undoes what `nn.DataParallel` adds to each key."""
    whole = all(key.startswith(prefix) for key in state)
    return {key[len(prefix) :] if whole else key: value for key, value in state.items()}


def _load_program(path: Path) -> LoadedModel:
    if not path.is_file():
        raise LoadError(f"there is no file {path}")
    program = _read_program(path)
    inputs = None
    if program.example_inputs is not None:
        positional, by_name = program.example_inputs
        if by_name or not all(isinstance(value, Tensor) for value in positional):
            raise LoadError(f"{path} takes other inputs than positional tensors; export it so")
        inputs = tuple(positional)
    return LoadedModel(program, inputs, random=False)


def _read_program(path: Path) -> ExportedProgram:
    try:
        check_kept(path)
        # One open file: what is read is what was checked, whatever comes to lie at the path.
        with path.open("rb") as file:
            check_program(file)
            return torch.export.load(file)
    except UnsafeFileError as error:
        raise LoadError(
            f"{path} is not opened: {error}; a file may hold tensors and a graph, no code"
        ) from error
    # A text that is no program fails in torch wherever it is read first.
    except (*_DAMAGED, zipfile.BadZipFile, OSError) as error:
        raise LoadError(f"{path} is damaged or no exported program: {first_line(error)}") from error


def _load_torchvision(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    models = _import_optional("torchvision.models", "pip install torchvision")
    names = models.list_models()
    if name not in names:
        raise LoadError(f"torchvision has no model {name!r}{_suggest(name, names)}")
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    # Without this a segmentation or detection model downloads weights for its backbone.
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    video = builder.__module__.startswith("torchvision.models.video")
    return models.get_model(name, **options), _VIDEO if video else _IMAGE


def _load_timm(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    timm = _import_optional("timm", "pip install timm")
    if not timm.is_model(name):
        raise LoadError(f"timm has no model {name!r}{_suggest(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False)
    return model, _own_size(model) or _IMAGE


def _own_size(model: nn.Module) -> tuple[int, ...] | None:
    """The size of input that a model names itself, as those of timm do."""
    told = getattr(model, "pretrained_cfg", None)
    size = told.get("input_size") if isinstance(told, Mapping) else None
    return (1, *size) if size else None


def _suggest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _import_optional(name: str, command: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise LoadError(f"this model needs {package}: {command}") from error


def named_object(text: str) -> object:
    """What `package.module:name` names; modules are looked for in the current folder first.

    Raises:
        LoadError: there is no such thing.
    """
    module_name, _, attribute = text.partition(":")
    if not module_name or not attribute:
        raise LoadError(f"{text!r} names nothing: write package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise LoadError(
                f"there is no module {error.name!r} here or on Python's path"
                f"{_suggest(error.name, _SOURCES)}"
            ) from error
        raise LoadError(f"{module_name} needs another module: {error}") from error
    except (Exception, SystemExit) as error:
        raise LoadError(f"importing {module_name} raised {described(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise LoadError(f"{text}: there is no {part!r}{_suggest(part, dir(found))}")
        found = getattr(found, part)
    return found


def _call_factory(module_name: str, attribute: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    text = f"{module_name}:{attribute}"
    found = named_object(text)
    if isinstance(found, nn.Module):
        return copied_model(found), _own_size(found)
    if not callable(found):
        raise LoadError(f"{text} is {with_article(found)}, neither a module nor a function")
    model = _call(found, text)
    return model, _own_size(model)


def _call(factory: Callable[[], object], text: str) -> nn.Module:
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise LoadError(f"{text}() raised {described(error)}") from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"{text}() gave {with_article(model)}, not a torch.nn.Module")
    # The factory may hand out one object again and again; the caller's eval() must not reach it.
    return copied_model(model)
