"""Whether a `.pt2` file can be opened without running anything that it brings along.

`torch.export.load` trusts a file. What it does with the parts of one, and what is let through here:

| part | torch | let through |
|---|---|---|
| sample inputs, pickled weights | unpickles them | what its weights-only unpickler reads |
| custom and opaque objects | unpickles them | none |
| compiled models (`data/aotinductor`) | loads their libraries | none |
| sizes, conditions on inputs | evaluates them | arithmetic, comparisons, known functions |
| operators | looks them up in Python modules | those of the dispatcher, functions of sizes |
| structures of inputs and outputs | imports modules that they name | those that name none |
| names | writes them into Python source | what cannot be read as code |

Everything is read as torch reads it, through the same readers: a zip can show two readers two
contents. What `torch.export` itself writes is let through, and the rest is refused, not searched
for harm.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from .expressions import UnsafeFileError, check_condition, check_size, quoted


def check_program(file: IO[bytes]) -> None:
    """Read a `.pt2` file without running anything, and leave it at its beginning.

    Raises:
        UnsafeFileError: an entry could run code, or cannot be told not to.
        RuntimeError, ValueError, zipfile.BadZipFile: it is no such file, or damaged.
    """
    # A file may be of the present format for one reader and of the former for another one.
    with zipfile.ZipFile(file) as former:
        for name in former.namelist():
            if name == "serialized_exported_program.json":
                _check_text(name, former.read(name))
            elif name.startswith("serialized_"):
                _check_pickle(name, former.read(name))
        is_former = "version" in former.namelist()
    file.seek(0)
    if not is_former:
        _check_archive(torch._C.PyTorchFileReader(file))
        file.seek(0)


# ---- entries ------------------------------------------------------------------------------------
def _check_archive(archive: Any) -> None:
    names = archive.get_all_records()
    twice = [name for name, n in Counter(map(str.lower, names)).items() if n > 1]
    if twice:
        raise UnsafeFileError(f"the entry {twice[0]} is there twice")
    for name in names:
        place = name.lower()  # torch finds entries whatever their case
        if place.startswith("data/aotinductor/"):
            raise UnsafeFileError(f"the entry {name} belongs to compiled code, which is not loaded")
        if place.startswith("models/"):
            _check_text(name, archive.get_record(name))
        elif place.startswith("data/") and place.endswith(".pt"):
            _check_pickle(name, archive.get_record(name))
        elif place.startswith("data/") and place.endswith("_config.json"):
            _check_payloads(archive, name)


def _check_payloads(archive: Any, name: str) -> None:
    """Check the pickles among the weights or constants that a list names."""
    listed = _parsed(name, archive.get_record(name))
    payloads = listed.get("config") if isinstance(listed, dict) else None
    if not isinstance(payloads, dict):
        raise UnsafeFileError(f"the entry {name} is no list of tensors")
    for label, payload in payloads.items():
        _check_label(name, label)
        path = payload.get("path_name") if isinstance(payload, dict) else None
        if not isinstance(path, str):
            raise UnsafeFileError(f"the entry {name} does not say where {label} is")
        if path.lower().startswith(("custom_obj", "opaque_obj")):
            raise UnsafeFileError(f"{label} is an object of a class of its own ({path}), no tensor")
        if payload.get("use_pickle"):
            entry = os.path.join(os.path.dirname(name), path)
            _check_pickle(entry, archive.get_record(entry))


def _check_pickle(name: str, data: bytes) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    # Whatever stops this unpickler, torch.export.load would go on with the one that runs code.
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        more = f" (it names {named.group(1)})" if named else ""
        raise UnsafeFileError(
            f"the entry {name} holds something else than tensors{more}, which could run code"
        ) from error


def _parsed(name: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsafeFileError(f"the entry {name} is not the text that it should be") from error


# ---- the text of a program ----------------------------------------------------------------------

# Python and sympy end a line of code at these, wherever they stand.
_BREAKS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029]")
_QUOTES = re.compile(r"[\"'\\\n\t]")
_IDENTIFIERS = ("name", "as_name", "forward_arg_names", "user_input_name")


# Texts that nobody reads as code, and strings that operators take.
_PROSE = (
    *("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"),
    *("as_string", "as_strings"),
)


def _check_text(name: str, data: bytes) -> None:
    for key, text in set(_strings(_parsed(name, data))):
        if _BREAKS.search(text):
            raise UnsafeFileError(
                f"the entry {name} has a control character in its {key or 'keys'}"
            )
        if key == "expr_str":
            check_size(text)
        elif key == "guards_code":
            check_condition(text)
        elif key in ("target", "as_operator"):
            _check_operator(text)
        elif key in ("in_spec", "out_spec"):
            _check_structure(text, takes_names=key == "in_spec")
        elif key in _IDENTIFIERS:
            if text and not text.isidentifier():
                raise UnsafeFileError(f"the entry {name} has {quoted(text)} for a name")
        elif key not in _PROSE:
            _check_label(name, text)


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """All strings of a text, each with the key under which it stands, and all keys, with none."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:  # every part of a text waits once
        key, value = waiting.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, list):
            waiting += [(key, part) for part in value]
        elif isinstance(value, dict):
            for inner, part in value.items():
                yield "", inner
                waiting.append((inner, part))


def _check_label(name: str, text: str) -> None:
    if _QUOTES.search(text) or _BREAKS.search(text):
        raise UnsafeFileError(f"the entry {name} has {quoted(text)} for a name")


# ---- operators ----------------------------------------------------------------------------------
_ON_SIZES = {
    *(f"_operator.{name}" for name in ("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul")),
    *(f"_operator.{name}" for name in ("add", "sub", "floordiv", "mod", "pow", "truediv")),
    *(f"_operator.{name}" for name in ("and_", "or_", "lshift", "rshift")),
    *(f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt")),
    *("math.trunc", "torch._sym_sqrt"),
}


# Those that torch.export writes for control flow and modes; their graphs are in the file, too.
_CONTROL = {
    *("cond", "map_impl", "scan", "while_loop", "switch", "associative_scan", "invoke_subgraph"),
    *("wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint"),
    *("auto_functionalized", "auto_functionalized_v2", "out_dtype", "flex_attention"),
    *("strict_mode", "hints_wrapper", "with_effects", "wrap"),
}


# What torch.vmap and the forward-mode derivatives leave in a program: levels, no computation.
_LEVELS = {
    *("_add_batch_dim", "_remove_batch_dim", "_vmap_increment_nesting", "_vmap_decrement_nesting"),
    *("lazy_load_decompositions", "_make_dual", "_unpack_dual", "_jvp_increment_nesting"),
    *("_jvp_decrement_nesting", "_unwrap_for_grad", "_enter_dual_level", "_exit_dual_level"),
}


def _check_operator(text: str) -> None:
    """Refuse what is no operator of torch's dispatcher, or reaches outside the process."""
    if text in _ON_SIZES:
        return
    parts = text.split(".")
    if parts[:2] == ["torch", "ops"] and 4 <= len(parts) <= 5 and text.replace(".", "").isascii():
        found = _looked_up(parts[2:])
        if found is None:
            raise UnsafeFileError(
                f"the operator {quoted(text)} is not known here; import the package that has it"
            )
        if isinstance(found, HigherOrderOperator) and found.name() in _CONTROL:
            return
        if isinstance(found, OpOverload) and _stays_inside(found):
            return
    elif parts[:3] == ["torch", "_functorch", "predispatch"] and parts[3:] in (
        [n] for n in _LEVELS
    ):
        return
    raise UnsafeFileError(f"the program calls {quoted(text)}, which is no operator of a network")


def _looked_up(names: list[str]) -> object | None:
    found: object = torch.ops
    for name in names:
        found = getattr(found, name, None)
    return found


def _stays_inside(operator: OpOverload) -> bool:
    """Whether an operator is the dispatcher's own and neither reads nor writes files."""
    if operator.namespace == "debugprims" or not torch._C._dispatch_has_kernel(operator.name()):
        return False
    return all(argument.name != "filename" for argument in operator._schema.arguments)


# ---- structures ---------------------------------------------------------------------------------
_FACTORIES = {("builtins", name) for name in ("dict", "float", "int", "list", "set", "tuple")}


def _check_structure(text: str, *, takes_names: bool) -> None:
    """Refuse a structure that makes torch import a module.

    Args:
        takes_names: whether its keys become names of arguments in Python source.
    """
    waiting: list[Any] = [text]
    while waiting:  # every part of the text waits once, and once more parsed
        part = waiting.pop()
        if isinstance(part, dict):
            factory = tuple(part.get(f"default_factory_{kind}") for kind in ("module", "name"))
            if "__enum__" in part or (
                "default_factory_module" in part and factory not in _FACTORIES
            ):
                raise UnsafeFileError(f"a structure names code to import: {quoted(text)}")
            waiting += [*part, *part.values()]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and part[:1] in tuple('[{"'):
            waiting.append(_parsed("of a structure", part.encode()))
        elif isinstance(part, str):
            _check_label("of a structure", part)
            if takes_names and not re.fullmatch(r"[\w.-]*", part):
                raise UnsafeFileError(f"an input has {quoted(part)} for a name")
