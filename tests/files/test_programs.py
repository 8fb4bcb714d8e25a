"""Programs in files: each way in which `torch.export.load` runs what a file says, and no other."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from rmfx.cli import main
from rmfx.files.loading import LoadError, load_model
from rmfx.files.programs import check_program

MARK = Path("executed")  # what the code in a file would make, in the test's own folder
CALL = f"__import__('pathlib').Path('{MARK}').touch()"
Edit = Callable[[dict[str, bytes]], None]


class Marks:
    """An object whose pickle makes a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(MARK),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 5, 3, stride=2, padding=1)
        self.register_buffer("scale", torch.rand(5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return torch.nn.functional.interpolate(self.second(h), scale_factor=2.0) * self.scale


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program with sizes that may vary, in the current folder."""
    monkeypatch.chdir(tmp_path)
    sizes = ({0: Dim("batch"), 2: Dim.AUTO, 3: Dim.AUTO},)
    program = torch.export.export(Net().eval(), (torch.zeros(2, 3, 9, 7),), dynamic_shapes=sizes)
    torch.export.save(program, "good.pt2")
    return tmp_path / "good.pt2"


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(parts: dict[str, bytes], folder: str = "good/") -> str:
    with zipfile.ZipFile("bad.pt2", "w") as archive:
        for name, data in parts.items():
            archive.writestr(folder + name, data)
    return "bad.pt2"


def edited(good: Path, edit: Edit) -> str:
    parts = entries(good)
    edit(parts)
    return write(parts)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def in_program(change: Callable[[dict[str, Any]], None]) -> Edit:
    """An edit of the text of the program."""

    def edit(parts: dict[str, bytes]) -> None:
        program = json.loads(parts["models/model.json"])
        change(program)
        parts["models/model.json"] = json.dumps(program).encode()

    return edit


def in_config(kind: str, payload: dict[str, Any], data: bytes) -> Edit:
    """An edit that adds an entry to the list of weights or constants."""

    def edit(parts: dict[str, bytes]) -> None:
        name = f"data/{kind}/model_{kind}_config.json"
        listed = json.loads(parts[name])
        listed["config"]["added"] = {"is_param": False, "use_pickle": True, **payload}
        parts[name] = json.dumps(listed).encode()
        parts[f"data/{kind}/{payload['path_name']}"] = data

    return edit


def nodes(program: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = program["graph_module"]["graph"]["nodes"]
    return found


def with_sizes(program: dict[str, Any]) -> None:
    values = program["graph_module"]["graph"]["tensor_values"].values()
    sizes = [size for value in values for size in value["sizes"]]
    next(size for size in sizes if "as_expr" in size)["as_expr"]["expr_str"] = CALL


def with_structure(program: dict[str, Any], context: object, kind: str = "builtins.dict") -> None:
    whole = program["graph_module"]["module_call_graph"][0]["signature"]
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {"type": kind, "context": context, "children_spec": [leaf]}
    whole["out_spec"] = json.dumps([1, spec])


def renamed(program: dict[str, Any], name: str) -> None:
    """The input under another name, wherever the program says it."""
    text = json.dumps(program).replace('"x"', json.dumps(name))
    program.clear()
    program.update(json.loads(text))


def sample(parts: dict[str, bytes]) -> None:
    parts["data/sample_inputs/model.pt"] = saved((((torch.zeros(2, 3, 9, 7),), {}), Marks()))


def legacy_weights(parts: dict[str, bytes]) -> None:
    parts["data/weights/model.pt"] = saved({"first.weight": Marks()})


def legacy_constants(parts: dict[str, bytes]) -> None:
    parts["data/constants/model.pt"] = saved({"constant": Marks()})


def guards(program: dict[str, Any]) -> None:
    program["guards_code"].append(f"{CALL} is None")


def factory(program: dict[str, Any]) -> None:
    context = {"default_factory_module": "marking", "default_factory_name": "f", "dict_context": []}
    with_structure(program, context, "collections.defaultdict")


# The routes by which a file runs code in torch.export.load, or in the module of what it gives.
RUN_TODAY: dict[str, tuple[Edit, str]] = {
    "sample inputs": (sample, r"data/sample_inputs/model\.pt .*posix\.mkdir"),
    "weights of the former layout": (legacy_weights, r"data/weights/model\.pt .*posix\.mkdir"),
    "constants of the former layout": (legacy_constants, r"data/constants/model\.pt"),
    "pickled weight": (
        in_config("weights", {"path_name": "weight_9", "tensor_meta": None}, saved(Marks())),
        "data/weights/weight_9",
    ),
    "pickled constant": (
        in_config("constants", {"path_name": "tensor_9", "tensor_meta": None}, saved(Marks())),
        "data/constants/tensor_9",
    ),
    "opaque object": (
        in_config(
            "constants", {"path_name": "opaque_obj_0", "tensor_meta": None}, pickle.dumps(Marks())
        ),
        "opaque_obj_0",
    ),
    "size": (in_program(with_sizes), "does more than compute with sizes"),
    "guards": (in_program(guards), "does more than compute with sizes"),
    "name of an input": (in_program(lambda p: renamed(p, f"x=[{CALL}]")), "for a name"),
    "enum in a structure": (
        in_program(
            lambda p: with_structure(p, '[{"__enum__": true, "fqn": "marking:E", "name": "A"}]')
        ),
        "names code to import",
    ),
    "default of a dictionary": (in_program(factory), "names code to import"),
}


def run_with_torch(path: str) -> None:
    """What torch does with a file, up to the call of the module."""
    program = torch.export.load(path)
    program.module()(torch.zeros(2, 3, 9, 7))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("route", RUN_TODAY)
def test_what_torch_runs_is_refused(
    route: str, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(good.parent)
    monkeypatch.delitem(sys.modules, "marking", raising=False)
    Path("marking.py").write_text(f"{CALL}\nf = dict\n")
    edit, message = RUN_TODAY[route]
    path = edited(good, edit)
    with pytest.raises(LoadError, match=rf"bad\.pt2 is not opened: .*{message}"):
        load_model(path)
    assert not MARK.exists()
    # What torch makes of the file after that is its own affair.
    with contextlib.suppress(Exception):
        run_with_torch(path)
    assert MARK.exists(), "torch does not run this any more: the check may be too strict"


@pytest.mark.filterwarnings("ignore")
def test_the_command_says_so_in_one_line(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", edited(good, sample)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "data/sample_inputs/model.pt" in message
    assert not MARK.exists()


def calls(target: str) -> Edit:
    def change(program: dict[str, Any]) -> None:
        nodes(program)[-1]["target"] = target

    return in_program(change)


def former(parts: dict[str, bytes]) -> None:
    text = parts["models/model.json"]
    parts.clear()
    parts["version"] = b"8.8"
    parts["serialized_exported_program.json"] = text
    for name in ("state_dict", "constants", "example_inputs"):
        parts[f"serialized_{name}.pt"] = saved({"value": Marks()})


def compiled(parts: dict[str, bytes]) -> None:
    parts["data/aotinductor/model/wrapper.so"] = b"\x7fELF"


def script_object(parts: dict[str, bytes]) -> None:
    payload = {"path_name": "custom_obj_0", "tensor_meta": None}
    in_config("constants", payload, b"")(parts)


def in_other_case(parts: dict[str, bytes]) -> None:
    parts["data/sample_inputs/Model.PT"] = saved(Marks())


def other_case_alone(parts: dict[str, bytes]) -> None:
    del parts["data/sample_inputs/model.pt"]
    in_other_case(parts)


def buffer_name(program: dict[str, Any]) -> None:
    text = json.dumps(program).replace('"scale"', json.dumps(f'a", {CALL}) #'))
    program.clear()
    program.update(json.loads(text))


def trace(program: dict[str, Any]) -> None:
    for node in nodes(program):
        node["metadata"]["stack_trace"] = f'File "a.py", line 1, in f\n x\r    {CALL}'


def argument_name(program: dict[str, Any]) -> None:
    whole = program["graph_module"]["module_call_graph"][0]["signature"]
    whole["forward_arg_names"] = [f"x=[{CALL}]"]


def key_of_inputs(program: dict[str, Any]) -> None:
    whole = program["graph_module"]["module_call_graph"][0]["signature"]
    leaf = {"type": None, "context": None, "children_spec": []}
    named = {"type": "builtins.dict", "context": json.dumps(["y=f(1)"]), "children_spec": [leaf]}
    both = {"type": "builtins.tuple", "context": "null", "children_spec": [leaf, named]}
    whole["in_spec"] = json.dumps([1, both])


MORE: dict[str, tuple[Edit, str]] = {
    "library of AOTInductor": (compiled, r"data/aotinductor/model/wrapper\.so"),
    "script object": (script_object, "custom_obj_0"),
    "another case": (in_other_case, "there twice"),
    "another case alone": (other_case_alone, "something else than tensors"),
    "function of Python": (calls("torch.os.system"), "is no operator"),
    "function of operator": (calls("_operator.call"), "is no operator"),
    "library of operators": (calls("torch.ops.load_library"), "is no operator"),
    "inner function": (calls("torch.ops.aten.add.__call__"), "is no operator"),
    "operator that writes": (calls("torch.ops.aten.save.default"), "is no operator"),
    "operator that maps a file": (calls("torch.ops.aten.from_file.default"), "is no operator"),
    "packet": (calls("torch.ops.aten.save"), "is no operator"),
    "compiled code of others": (
        calls("torch.ops.higher_order.inductor_compiled_code"),
        "is no operator",
    ),
    "unknown operator": (calls("torch.ops.no_such.thing.default"), "import the package"),
    "name of a buffer": (in_program(buffer_name), "for a name"),
    "line break in a comment": (in_program(trace), "control character"),
    "name of an argument": (in_program(argument_name), "for a name"),
    "key of the inputs": (in_program(key_of_inputs), "for a name"),
    "no text": (lambda parts: parts.update({"models/model.json": b"{"}), "not the text"),
    "no list": (
        lambda parts: parts.update({"data/weights/model_weights_config.json": b"[]"}),
        "no list of tensors",
    ),
    "no place": (
        lambda parts: parts.update(
            {"data/weights/model_weights_config.json": b'{"config":{"a":1}}'}
        ),
        "does not say where",
    ),
}


@pytest.mark.parametrize("kind", MORE)
def test_what_could_run_is_refused(kind: str, good: Path) -> None:
    edit, message = MORE[kind]
    with pytest.raises(LoadError, match=message):
        load_model(edited(good, edit))
    assert not MARK.exists()


@pytest.mark.parametrize("folder", ["", "good/"])
def test_the_former_format_is_checked_too(folder: str, good: Path) -> None:
    parts = entries(good)
    former(parts)
    with pytest.raises(LoadError, match=r"damaged|serialized_state_dict"):
        load_model(write(parts, folder))
    assert not MARK.exists()


def test_a_file_of_both_formats_is_checked_as_both(good: Path) -> None:
    """torch goes on to the former format when the present one fails."""
    parts = {f"good/{name}": data for name, data in entries(good).items()}
    old = entries(good)
    former(old)
    with pytest.raises(LoadError, match="serialized_state_dict"):
        load_model(write({**parts, **old}, ""))
    assert not MARK.exists()


def test_an_entry_that_is_there_twice_is_refused(good: Path) -> None:
    path = edited(good, lambda parts: None)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("good/data/sample_inputs/model.pt", saved(Marks()))
    with pytest.raises(LoadError, match="there twice"):
        load_model(path)


class Varied(nn.Module):
    """Much of what torch.export can write: sizes, conditions, modes, vmap, structures."""

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            y = more["left_over"] * 2
        half = torch.nn.functional.interpolate(x, scale_factor=0.4)
        total = torch.einsum("bc,dc->bd", x.mean((2, 3)), x.amax((2, 3)))
        rows = torch.vmap(lambda row: row.sum())(y)
        pairs = collections.OrderedDict(a=x.flatten(2), b=x[:, :, ::2])
        return {"half (x)": half, "total": total, "rows": rows, "pairs": pairs}


@pytest.mark.parametrize("decomposed", [False, True])
def test_what_torch_writes_is_let_through(decomposed: bool, tmp_path: Path) -> None:
    inputs = (torch.zeros(2, 3, 12, 11), {"left_over": torch.zeros(4, 2)})
    free = {0: Dim("b", max=9), 2: Dim.AUTO, 3: Dim.AUTO}
    sizes = {"x": free, "more": {"left_over": {0: Dim.AUTO}}}
    program = torch.export.export(Varied(), inputs, dynamic_shapes=sizes)
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "net.pt2")
    with (tmp_path / "net.pt2").open("rb") as file:
        check_program(file)
        assert file.tell() == 0
