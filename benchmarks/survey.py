"""Networks nobody fitted the compiler to: does it convert, refuse with a reason, or stumble?

More than forty CNNs of torchvision and timm that are not in the zoo, in float64 with random batch
norm statistics and small inputs, each as `nn.Module` with example inputs, as `ExportedProgram`, and
by `torch.compile(model, backend="rmfx")` with the eager backend behind. Most have sites that cannot
be removed, squeeze-and-excite for one.

Limits for each: nothing raises; every site is removed or refused with a reason; relative error at
most 1e-10 at the output, and for the first two at every join. Exit code 1 if one is exceeded.
Numbers of the three ways stand side by side where they differ.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from _common import Limit, choose_models, parser, show
from _zoo import random_input, randomise_batch_norms
from frontends import FAILURES, MESSAGE_LENGTH, WAYS, Result, attempt
from torch import Tensor, nn
from tqdm import tqdm

SURVEYED = ("module", "export", "backend")
BATCH = 2
LARGEST = 1e8  # an output beyond this says that the network's numbers explode

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One network of the survey.

    Attributes:
        library: "torchvision" or "timm".
        size: of one input, without the batch.
    """

    library: str
    size: tuple[int, ...]

    def build(self, name: str) -> nn.Module:
        """Makes it with random weights."""
        if self.library == "timm":
            made: nn.Module = timm.create_model(name, pretrained=False)
            return made
        # GoogLeNet and Inception would take a minute for their initial weights.
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        found: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        return found


_TORCHVISION = """
convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mobilenet_v3_small regnet_y_400mf
shufflenet_v2_x1_0 squeezenet1_1 vgg11_bn
"""
_TIMM = """
cs3darknet_s cspdarknet53 cspresnet50 darknet53 dla34 dpn68 edgenext_xx_small efficientnet_lite0
ese_vovnet19b_dw fastvit_t8 fbnetc_100 gernet_s ghostnet_100 hardcorenas_a hrnet_w18_small
inception_resnet_v2 inception_v4 lcnet_050 mixnet_s mnasnet_small mobilenetv3_large_100
mobilenetv4_conv_small mobileone_s0 nf_resnet26 nfnet_l0 repvgg_a0 repvit_m0_9 res2net50_26w_4s
resnest14d resnet26d resnetblur18 resnetv2_50 rexnet_100 selecsls42 seresnet18 skresnet18
spnasnet_100 starnet_s1 tf_efficientnet_b0 tinynet_a vovnet39a xception41
"""
CANDIDATES = {
    **{name: Candidate("torchvision", (3, 96, 96)) for name in _TORCHVISION.split()},
    "mc3_18": Candidate("torchvision", (3, 4, 48, 48)),
    "r2plus1d_18": Candidate("torchvision", (3, 4, 48, 48)),
    **{name: Candidate("timm", (3, 96, 96)) for name in _TIMM.split()},
}


@torch.no_grad()
def evaluate(name: str) -> dict[str, Result | str]:
    """Converts one network in the three ways; of a way that fails, what it says."""
    candidate = CANDIDATES[name]
    torch.manual_seed(0)
    try:
        model = candidate.build(name).double().eval()
        calibration = torch.randn(4, *candidate.size, dtype=torch.float64)
        randomise_batch_norms(model, calibration)
        x = random_input((BATCH, *candidate.size))
        _check_sane(model(x))
    except FAILURES as error:
        return {"original": f"{type(error).__name__}: {error}".strip()[:MESSAGE_LENGTH]}
    return {way: attempt(WAYS[way], model, x) for way in SURVEYED}


def _check_sane(output: Tensor) -> None:
    """With numbers that explode a relative error says nothing about the compiler."""
    largest = float(output.abs().max())
    if not 0 < largest < LARGEST:
        raise ValueError(f"the original's outputs reach {largest:.1e}")


def failures(results: dict[str, Result | str]) -> list[str]:
    """What the results of one network lack, in words; empty if nothing."""
    problems = []
    for way, result in results.items():
        if isinstance(result, str):
            problems.append(f"{way}: {result}")
            continue
        unexplained = [
            r["join"] for r in result.rows if r["status"] != "removed" and not r["reason"]
        ]
        if unexplained:
            problems.append(f"{way}: refused without a reason: {', '.join(unexplained)}")
        if not result.error <= result.limit:
            problems.append(f"{way}: relative error {result.error:.3g}")
    return problems


def _table_row(name: str, results: dict[str, Result | str], seconds: float) -> Row:
    done = [result for result in results.values() if isinstance(result, Result)]

    def numbers(count: Callable[[Result], int]) -> str:
        found = [count(result) for result in done]
        return "/".join(map(str, found if len(set(found)) > 1 else found[:1]))

    return {
        "network": name,
        "sites": numbers(lambda r: len(r.rows)),
        "removed": numbers(_removed),
        "refused": numbers(lambda r: len(r.rows) - _removed(r)),
        "failed": ", ".join(way for way, result in results.items() if isinstance(result, str)),
        "worst error": max((r.error for r in done), default=None),
        "seconds": round(seconds, 1),
    }


def _removed(result: Result) -> int:
    return sum(row["status"] == "removed" for row in result.rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--reasons", action="store_true", help="list reasons of refusals")
    options, names = choose_models(options_parser, CANDIDATES, arguments)
    rows: list[Row] = []
    problems: list[str] = []
    reasons: list[str] = []
    progress = tqdm(names)
    for name in progress:
        progress.set_description(name)
        start = time.perf_counter()
        results = evaluate(name)
        rows.append(_table_row(name, results, time.perf_counter() - start))
        problems += [f"{name}: {what}" for what in failures(results)]
        reasons += [f"{name}, {reason}" for reason in _reasons(results)]
    limits = [Limit("failed demands", len(problems), 0)]
    notes = "\n".join([*problems, *(reasons if options.reasons else ())])
    return show(rows, limits, as_json=options.json, notes=notes)


def _reasons(results: dict[str, Result | str]) -> list[str]:
    """Every reason once, with the first way and the first node it was given for."""
    first: dict[str, str] = {}
    for way, result in results.items():
        for row in result.rows if isinstance(result, Result) else ():
            if row["reason"]:
                text = row["reason"].split(": ")[-1].split(", by ")[0]
                first.setdefault(text, f"{way}: {row['reason']}")
    return list(first.values())


if __name__ == "__main__":
    sys.exit(main())
