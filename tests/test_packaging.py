"""What is installed is what the folders hold, and the documents say what is true."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import resources
from pathlib import Path

import pytest

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
        if importlib.util.find_spec("captum") is not None or module != "attribution":
            importlib.import_module(f"{name}.{module}")


def test_a_clone_works_from_its_root_without_being_installed(tmp_path: Path) -> None:
    """There the folder rmfx/ is found before any installed package, with passes/ beside it."""
    for folder in ("rmfx", "passes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    code = "import rmfx, rmfx.passes.noop as p; print(rmfx.__file__, p.__file__, rmfx.merge_convs)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    places = done.stdout.split()
    assert places[:2] == [str(tmp_path / name) for name in ("rmfx/__init__.py", "passes/noop.py")]


# What people import; whatever else moves, these paths stay.
PATHS = {
    "rmfx": tuple(rmfx.__all__),
    "rmfx.backend": ("rmfx",),
    "rmfx.cli": ("main",),
    "rmfx.conversion": ("Conversion", "convert"),
    "rmfx.cost": ("Cost", "NodeCost", "Skip", "count", "nodes", "skips", "table"),
    "rmfx.demo": ("load_digits", "load_model"),
    "rmfx.frontend": ("trace", "with_constants"),
    "rmfx.fuzz": tuple(rmfx.fuzz.__all__),
    "rmfx.latency": (
        *("Latency", "LatencyError", "LatencyReport", "Network", "Settings"),
        *("check_plotting", "measure_latency", "plot", "write_figure"),
    ),
    "rmfx.models": tuple(rmfx.models.__all__),
    "rmfx.passes.batch_norm": ("BatchNormRule", "fold", "fold_batch_norm", "insert_batch_norm"),
    "rmfx.passes.branches": ("merge_branches",),
    "rmfx.passes.calibration": ("Measured", "Moments", "identity_norm", "measure"),
    "rmfx.passes.carries": ("close_carries",),
    "rmfx.passes.dead_channels": ("eliminate_dead_channels",),
    "rmfx.passes.layer": ("fuse_resconv", "insert_resconv", "layer_scales", "prune_layers"),
    "rmfx.passes.linear": ("LinearRule", "merge_convs"),
    "rmfx.passes.noop": ("NoopRule", "remove_noops"),
    "rmfx.passes.optimize": ("optimize",),
    "rmfx.passes.pruning": ("PruningReport", "prune_channels"),
    "rmfx.passes.recurrent": ("materialize", "share_parameters"),
    "rmfx.passes.reserve": ("ReserveReport", "reserve"),
    "rmfx.passes.residual": ("ResidualRule", "remove_residuals"),
    "rmfx.passes.sites": ("ChoiceReport", "choose_sites"),
    "rmfx.plain": ("is_plain", "to_sequential"),
    "rmfx.testing": tuple(rmfx.testing.__all__),
    "rmfx.training": ("Distillation", "Slimming", "freeze_carries", "gradual_targets"),
}


@pytest.mark.parametrize("module", PATHS)
def test_public_names_stay_where_they_are(module: str) -> None:
    made = importlib.import_module(module)
    assert [name for name in PATHS[module] if not hasattr(made, name)] == []


def test_starting_the_command_loads_no_torch() -> None:
    for argument in ("--help", "--version"):
        command = [sys.executable, "-X", "importtime", "-m", "rmfx", argument]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not re.search(r"\| +torch\n", done.stderr)
        assert "rmfx" in done.stdout


def test_a_graph_is_converted_without_loading_the_compiler() -> None:
    code = """
        import sys, torch, rmfx.models
        for name in rmfx.__all__:
            getattr(rmfx, name)
        model = rmfx.models.cifar_resnet(8).eval()
        for given in (model, torch.fx.symbolic_trace(model)):
            assert rmfx.report(rmfx.remove_residuals(given)).removed == 3
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


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


def test_readme_is_short() -> None:
    """What it says besides has a page in docs/."""
    assert README.count("\n") <= 150


def test_documents_are_not_installed() -> None:
    assert not any(folder.is_relative_to(ROOT / "docs") for folder in listed_packages().values())
