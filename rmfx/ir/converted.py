"""Generated code that looks up modules once.

torch.fx writes `self.stages.0.blocks.1.conv(x)` for a call. Each dot is a search of `nn.Module` in
Python, up to a microsecond, and a deep network of small layers spends a tenth of its time there.
Here modules on the way to several others are looked up once and kept in local variables.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

CodeTransformer = Callable[[list[str]], list[str]]
Path = tuple[str, ...]


# What a line assigns, if it begins with an attribute of the module: self.a, getattr(self.a, "0").b
_LOOKUP = re.compile(
    r"^(?P<to>\w+(?: : [^=]+)? = )(?P<path>(?:getattr\()*self(?:\.\w+|, \"[^\"]*\"\))+)"
)
_STEP = re.compile(r"\.(\w+)|, \"([^\"]*)\"\)")


def share_lookups(body: Sequence[str]) -> list[str]:
    """The body of a generated function, with the modules that it passes several times first.

    Args:
        body: pieces of source code, as torch.fx hands them to a transformer of its code.
    """
    paths = dict.fromkeys(_path(found) for line in body if (found := _LOOKUP.match(line)))
    taken = {word for line in body for word in re.findall(r"(?<![.\w])\w+", line)}
    names: dict[Path, str] = {}
    first = []
    for path in _forks(paths):
        name = re.sub(r"\W|^(?=\d)", "_", "_".join(path))
        while name in taken:
            name += "_"
        first.append(f"{name} = {_written(path, names)}\n")
        names[path] = name
        taken.add(name)
    return [*first, *(_LOOKUP.sub(lambda found: _rewritten(found, names), line) for line in body)]


def _path(found: re.Match[str]) -> Path:
    return tuple(name or other for name, other in _STEP.findall(found["path"]))


def _forks(paths: Iterable[Path]) -> Iterator[Path]:
    """Where paths part, outer ones first."""
    onward: dict[Path, set[str]] = {}
    for path in paths:
        for i in range(1, len(path)):
            onward.setdefault(path[:i], set()).add(path[i])
    yield from (path for path, steps in onward.items() if len(steps) > 1)


def _rewritten(found: re.Match[str], names: dict[Path, str]) -> str:
    return found["to"] + _written(_path(found), names)


def _written(path: Path, names: dict[Path, str]) -> str:
    """How a module is looked up from the nearest one that has a name."""
    known = next((i for i in range(len(path), 0, -1) if path[:i] in names), 0)
    text = names[path[:known]] if known else "self"
    for name in path[known:]:
        text = f"{text}.{name}" if name.isidentifier() else f'getattr({text}, "{name}")'
    return text


class ConvertedModule(fx.GraphModule):
    """What passes make: a GraphModule whose copies keep its metadata.

    torch's own keeps the metadata when it is copied, but not when it is pickled.
    Its code looks up modules less often, which shows in networks of many small layers.
    """

    def recompile(self) -> fx.graph.PythonCode:
        """Writes the code of the graph anew."""
        with self.graph.on_generate_code(_then_share_lookups):
            return super().recompile()

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments = super().__reduce__()
        meta = {key: value for key, value in self.meta.items() if key.startswith("rmfx_")}
        return _restore, (make, arguments, meta)


def _then_share_lookups(transformed: CodeTransformer | None) -> CodeTransformer:
    return lambda body: share_lookups(transformed(body) if transformed else body)


def _restore(
    make: Callable[..., fx.GraphModule],
    arguments: tuple[Any, ...],
    meta: dict[str, Any],
) -> ConvertedModule:
    plain = make(*arguments)
    gm = ConvertedModule(plain, plain.graph, type(plain).__name__)
    gm.training = plain.training
    gm.meta.update(meta)
    return gm


def copy_graph(gm: fx.GraphModule) -> fx.Graph:
    """A graph of its own for the same module; nodes keep their names and metadata."""
    graph = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, places, return_output_node=True)
    if isinstance(output, tuple):
        value, node = output
        graph.output(value, getattr(node, "type", None)).meta = copy.copy(node.meta)
    for node in graph.nodes:
        if isinstance(node.type, str):  # torch 2.13 cannot pickle them
            node.type = None
    graph.set_codegen(gm.graph._codegen)
    return graph


def as_tree(parts: Mapping[str, object]) -> nn.Module:
    """Modules and tensors by their paths as a tree, of which torch.fx takes them in graph order.

    Of a mapping it would take them by the depth of their paths, and again in graph order after
    pickling: the order of parameters, by which optimisers know them, would change.
    """
    tree = nn.Module()
    for target in sorted(parts, key=lambda path: path.count(".")):
        attach(tree, target, parts[target])
    return tree


def attach(root: nn.Module, target: str, value: object) -> None:
    """Put a module or tensor at a path, through modules made on the way."""
    *path, name = target.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root._modules[step]  # type: ignore[assignment]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


def copied_value(value: Any, memo: dict[int, object], *, written: bool) -> Any:
    """A copy of what a graph reads; of tensors one that a recorder of operators can follow.

    Args:
        written: whether the graph may write to it: then copies share memory as their originals do.
    """
    if type(value) is not Tensor or (written and value.is_leaf):
        return copy.deepcopy(value, memo)
    return memo.setdefault(id(value), value.detach().clone().requires_grad_(value.requires_grad))
