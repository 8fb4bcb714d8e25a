"""What is installed is what the folders hold, and the documents say what is true."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from builders import python_blocks

import rmfx.passes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def listed_packages() -> dict[str, Path]:
    """The packages of setup.cfg and the folders it maps them to."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = dict(
        [part.strip() for part in line.split("=")]
        for line in config["options"]["package_dir"].strip().splitlines()
    )
    found = {}
    for name in config["options"]["packages"].split():
        inner = name.removeprefix("rmfx").lstrip(".").replace(".", "/")
        found[name] = ROOT / folders[name] if name in folders else ROOT / folders["rmfx"] / inner
    return found


def test_every_folder_with_code_is_a_listed_package() -> None:
    folders = {path.parent for top in ("rmfx", "passes") for path in (ROOT / top).rglob("*.py")}
    assert set(listed_packages().values()) == folders


def test_every_package_has_an_init_file() -> None:
    assert all((folder / "__init__.py").is_file() for folder in listed_packages().values())


@pytest.mark.parametrize("name", sorted(listed_packages()))
def test_every_module_imports_under_its_installed_name(name: str) -> None:
    package = importlib.import_module(name)
    found = {module.name for module in pkgutil.iter_modules(package.__path__)}
    files = {path.stem for path in listed_packages()[name].glob("*.py")} - {"__init__"}
    assert files <= found
    for module in files - {"__main__"}:
        importlib.import_module(f"{name}.{module}")


def test_no_global_package_is_called_passes(tmp_path: Path) -> None:
    code = "import importlib.util as u, rmfx.passes; print(u.find_spec('passes'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_package_data_is_installed_and_small() -> None:
    assert resources.files("rmfx").joinpath("py.typed").is_file()
    for name in ("digits.safetensors", "test_digits.safetensors"):
        data = resources.files("rmfx.demo").joinpath(name).read_bytes()
        assert 300_000 < len(data) < 500_000


def test_public_names_exist_and_are_documented() -> None:
    for name in rmfx.__all__:
        assert getattr(rmfx, name).__doc__, name


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == importlib.metadata.version("rmfx")


def test_readme_has_the_two_commands_that_ci_runs() -> None:
    assert len(re.findall(r"^python3 -m venv .*", README, re.M)) == 2


def test_readme_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / "README.md")
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:  # one goes on where the one before ends
        exec(compile(block, "README.md", "exec"), names)
