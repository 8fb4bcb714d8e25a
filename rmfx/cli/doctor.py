"""What `rmfx doctor` says: what is installed here, and whether a conversion works."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rmfx.demo import load_digits, load_model
from rmfx.errors import RmfxError, install_command
from rmfx.passes.residual import remove_residuals
from rmfx.plain import is_plain
from rmfx.table import Column, table
from rmfx.timing.machine import cpu_name

_FOR_DEVELOPERS = {"dev", "docs"}
_REQUIREMENT = re.compile(r"(?P<name>rmfx\[[\w,-]+\]|[\w.-]+).*extra == .(?P<extra>\w+)")
_INCLUDED = re.compile(r"rmfx\[([\w,-]+)\]")
_DIGITS = 4


@dataclass(frozen=True)
class Extra:
    """Packages that something optional needs.

    Attributes:
        name: of the extra, as in `pip install '.[name]'`.
        versions: of the packages that are installed.
        missing: the others.
    """

    name: str
    versions: dict[str, str]
    missing: tuple[str, ...]

    @property
    def advice(self) -> str:
        """What would bring the missing ones."""
        return install_command(self.missing) if self.missing else ""


@dataclass(frozen=True)
class Diagnosis:
    """All that `rmfx doctor` finds; `str()` gives it as text, `to_dict` for JSON.

    Attributes:
        versions: of rmfx, torch and Python.
        system: the operating system, and for which kind of processor.
        devices: processor and accelerators.
        threads: that torch uses.
        extras: optional packages.
        seconds: that the conversion of a small network took, with its verification.
        failure: what went wrong in it, "" if nothing did.
    """

    versions: dict[str, str]
    system: str
    devices: tuple[str, ...]
    threads: int
    extras: tuple[Extra, ...]
    seconds: float
    failure: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        columns = (
            Column("extra", "name"),
            Column("installed", _installed, width=60),
            Column("missing", "advice"),
        )
        found = self.failure or "a small network converts and answers as before"
        return (
            f"{versions}, {self.system}\n{', '.join(self.devices)}; {self.threads} threads\n\n"
            f"{table(self.extras, columns)}\n\nSelf-test, {self.seconds:.1f} s: {found}."
        )


def _installed(row: Extra) -> str:
    return ", ".join(f"{name} {version}" for name, version in row.versions.items())


def diagnose(step: Callable[[str], object] = lambda _: None) -> Diagnosis:
    """Looks at the machine and converts the network of the demo.

    Args:
        step: called with a few words before each part of the work.
    """
    step("look around")
    versions = {name: importlib.metadata.version(name) for name in ("rmfx", "torch")}
    versions["Python"] = platform.python_version()
    system = f"{platform.system()} {platform.machine()}"
    cuda = range(torch.cuda.device_count())
    devices = (cpu_name(), *(torch.cuda.get_device_name(i) for i in cuda))
    extras = _extras()
    step("convert a small network")
    began = time.perf_counter()
    failure = _failure()
    seconds = time.perf_counter() - began
    threads = torch.get_num_threads()
    return Diagnosis(versions, system, devices, threads, extras, seconds, failure)


def _failure() -> str:
    """What goes wrong when a small network is converted, verified and run; "" if nothing does."""
    model, (images, _) = load_model(), load_digits()
    images = images[:_DIGITS]
    try:
        plain = remove_residuals(model, images)
    except RmfxError as error:
        return str(error)
    if not is_plain(plain):
        return "it still has residual connections"
    with torch.no_grad():
        same = torch.equal(plain(images).argmax(1), model(images).argmax(1))
    return "" if same else "it gives other answers than before"


def _extras() -> tuple[Extra, ...]:
    """The optional packages, as the metadata of rmfx name them."""
    needed: dict[str, list[str]] = defaultdict(list)
    for text in importlib.metadata.requires("rmfx") or ():
        if match := _REQUIREMENT.match(text):
            needed[match["extra"]].append(match["name"])
    made = []
    for name in (name for name in needed if name not in _FOR_DEVELOPERS):
        versions = {package: _version(package) for package in _packages(name, needed)}
        there = {package: version for package, version in versions.items() if version}
        made.append(Extra(name, there, tuple(p for p in versions if p not in there)))
    return tuple(made)


def _packages(extra: str, needed: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The packages of an extra, and of the extras that it includes, as `rmfx[onnx]`."""
    for name in needed.get(extra, ()):
        included = _INCLUDED.fullmatch(name)
        if included is None:
            yield name
        for other in included[1].split(",") if included else ():
            yield from _packages(other, needed)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
