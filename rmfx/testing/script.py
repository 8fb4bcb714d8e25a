"""Writes a program that gives one network to one pass and compares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rmfx.choices import PASSES
from rmfx.testing.case import Case
from rmfx.testing.networks.node import Node, arguments
from rmfx.testing.networks.spec import NetworkSpec

_WIDTH = 100
_HOLD = {
    "module": ("given, before = model, model", ""),
    "traced": ("given = before = torch.fx.symbolic_trace(model)", "import torch"),
    "exported": (
        "given = torch.export.export(model, inputs)\nbefore = given.module()",
        "import torch",
    ),
}


def script(case: Case, why: str) -> str:
    """A program that fails on the case as the fuzzer saw it fail."""
    if case.frontend == "compiled":
        return _compiled_script(case, why)
    hold, needs = _HOLD[case.frontend]
    own_module, _, function = case.transform.rpartition(":")
    called = function if own_module else f"rmfx.{function}"
    lines = [f"# {line}" for line in f"{case.transform}: {why}".splitlines()]
    lines += [needs] if needs else []
    lines += ["import rmfx", "from rmfx.fuzz import compare", *_imports(case)]
    lines += [f"from {own_module} import {function.partition('.')[0]}"] if own_module else []
    lines += ["", "spec = " + layout(case.spec), ""]
    lines += ["model, inputs = spec.build(seed=0), spec.inputs(seed=0)", hold]
    lines += _options(case)
    ending = ", **options" if case.transform in PASSES else ""
    given_range = ", input_range=options['input_range']" if case.input_range else ""
    for given in ["given, inputs"] + ["given"] * case.without_inputs:
        lines += [f"after = {called}({given}{ending})"]
        lines += [f"print(compare(before, after, inputs{given_range}))"]
    return "\n".join(lines) + "\n"


def _compiled_script(case: Case, why: str) -> str:
    """A program that calls a compiled network again and again."""
    lines = [f"# {line}" for line in f'backend="rmfx": {why}'.splitlines()]
    lines += ["from rmfx.fuzz import compare_compiled", *_imports(case)]
    lines += ["", "spec = " + layout(case.spec), ""]
    lines += ["model, inputs = spec.build(seed=0), spec.inputs(seed=0)", *_options(case)]
    lines += [f"changes = {case.changes!r}"]
    lines += ["print(compare_compiled(model, inputs, changes, options)[1])"]
    return "\n".join(lines) + "\n"


def _imports(case: Case) -> list[str]:
    return [f"from rmfx.testing import {', '.join(sorted(_classes(case.spec)))}"]


def _options(case: Case) -> list[str]:
    """The lines that make the keyword arguments of the pass."""
    if case.transform not in PASSES:
        return []
    own: dict[str, Any] = {} if case.frontend == "compiled" else {"verify": False}
    if case.transform == "remove_residuals":
        own |= {"activation": case.activation, "minimise": case.minimise}
    lines = [f"options = {own!r}"]
    if case.input_range:
        lines.append("bound = max(float(x.abs().max()) for x in inputs)")
        lines.append("options['input_range'] = (-bound, bound)")
    if case.calibrated:
        lines.append("options['calibration'] = [inputs]")
    return lines


def _classes(value: Any) -> set[str]:
    """The names of the classes that a spec is made of."""
    if isinstance(value, tuple):
        return set().union(*map(_classes, value))
    if isinstance(value, (Node, NetworkSpec)):
        inside = (_classes(argument) for _, argument in arguments(value))
        return {type(value).__name__}.union(*inside)
    return set()


def layout(value: Any, indent: int = 0, room: int = 12) -> str:
    """The expression for a spec, over several lines where one would be too long.

    Args:
        value: a spec or a part of one.
        indent: of the line that the expression begins in.
        room: characters of that line that are taken.
    """
    short = repr(value)
    if len(short) + indent + room <= _WIDTH or not _parts(value):
        return short
    inside = " " * (indent + 4)
    lines = [
        f"{inside}{name}{layout(part, indent + 4, len(name) + 1)}," for name, part in _parts(value)
    ]
    opening = "(" if isinstance(value, tuple) else f"{type(value).__name__}("
    return "\n".join([opening, *lines, " " * indent + ")"])


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What stands between the brackets: "name=" or "", and the value."""
    return list(_each_part(value))


def _each_part(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        yield from (("", item) for item in value)
    elif isinstance(value, (Node, NetworkSpec)):
        for name, argument in arguments(value):
            yield (f"{name}=" if name else "", argument)
