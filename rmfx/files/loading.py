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

from rmfx.errors import check_memory, first_line
from rmfx.modules.copies import copied_model
from rmfx.options import with_article

from .expressions import UnsafeFileError
from .programs import check_program
from .source_lines import described, working_folder
from .states import load_weights
from .tensors import LoadError, check_kept

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
    _check_kind(text, model)
    model.eval().requires_grad_(False)
    if dtype is not None:
        model.to(dtype)
    loaded = LoadedModel(model, None, random=load is not None and weights is None)
    if shape is None:
        return loaded
    return replace(loaded, inputs=(torch.zeros(shape, dtype=loaded.dtype),))


def _check_kind(text: str, model: nn.Module) -> None:
    """Raise LoadError for a model that cannot be put into another mode or type."""
    if isinstance(model, torch.jit.ScriptModule):
        raise LoadError(f"{text} is TorchScript; name the torch.nn.Module that it was made from")
    lazy = [name for name, weight in model.named_parameters() if nn.parameter.is_lazy(weight)]
    if lazy:
        raise LoadError(
            f"{text}: {lazy[0]} has no shape before the first call; let the factory run the model"
            " once on example inputs"
        )


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
    if os.path.isdir(text):
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


def _load_program(path: Path) -> LoadedModel:
    if os.path.isdir(path):
        raise LoadError(f"{path} is a folder, not a file of torch.export.save")
    if not os.path.isfile(path):
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
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        told = first_line(error).partition(". Please check the warnings above")[0]
        raise LoadError(
            f"{path} is damaged, no exported program, or of another version of torch: {told}"
        ) from error
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}") from error


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
    if not module_name or not attribute or module_name.startswith("."):
        raise LoadError(f"{text!r} names nothing: write package.module:name")
    if (here := working_folder()) and here not in sys.path:
        sys.path.insert(0, here)
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
        return _own_copy(found, text), _own_size(found)
    if not callable(found):
        raise LoadError(f"{text} is {with_article(found)}, neither a module nor a function")
    model = _call(found, text)
    return model, _own_size(model)


def _call(factory: Callable[[], object], text: str) -> nn.Module:
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        check_memory(error)
        raise LoadError(f"{text}() raised {described(error)}") from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"{text}() gave {with_article(model)}, not a torch.nn.Module")
    # The factory may hand out one object again and again; the caller's eval() must not reach it.
    return _own_copy(model, text)


def _own_copy(model: nn.Module, text: str) -> nn.Module:
    try:
        return copied_model(model)
    # What a model holds besides tensors may raise anything where it is copied.
    except Exception as error:
        check_memory(error)
        raise LoadError(
            f"{text} cannot be copied ({described(error)}); let it hold nothing but modules,"
            " tensors and plain values"
        ) from error
