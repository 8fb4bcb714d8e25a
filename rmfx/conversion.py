"""A network before and after `remove_residuals`, with what the change costs: for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from rmfx.cost.counting import Cost, count
from rmfx.options import as_inputs
from rmfx.plain import why_not_plain

from .passes.batch_norm import fold_batch_norm as fold
from .passes.noop import remove_noops
from .passes.residual import remove_residuals
from .report import Report, modified, report
from .table import Column, table


@dataclass(frozen=True)
class Conversion:
    """Both forms of a network. `str()` gives tables, `to_dict` what JSON can hold.

    Attributes:
        before: the network as it was, without no-ops and with its batch norm folded like that of
            `after`, so that the costs differ by the removal alone.
        after: the network without its residual connections.
        report: what was done at every site.
        cost_before, cost_after: None where the inputs are not known.
        folded: whether there was a batch norm to fold, in both forms.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    report: Report
    cost_before: Cost | None
    cost_after: Cost | None
    folded: bool

    def to_dict(self) -> dict[str, Any]:
        """The report, what keeps the result from being a chain, and the costs."""
        made: dict[str, Any] = {"report": self.report.to_dict(), "cost": None}
        made["why_not_plain"] = self.why_not_plain
        if self.cost_before and self.cost_after:
            made["cost"] = {"before": asdict(self.cost_before), "after": asdict(self.cost_after)}
        return made

    def __str__(self) -> str:
        done = f"{self.report}\n{self.told_chain}"
        if not self.costs:
            return done
        costs = "\n".join(filter(None, [table(self.costs, _COLUMNS), self.told_folding]))
        return f"{done}\n\n{costs}"

    @cached_property
    def why_not_plain(self) -> str | None:
        """What keeps the result from being a chain, in words; None if nothing does."""
        return why_not_plain(self.after)

    @property
    def told_chain(self) -> str:
        """Whether the result is a chain, in a line, and if not, why."""
        if self.why_not_plain is None:
            return "the result is a chain: rmfx.to_sequential gives it as an nn.Sequential"
        return f"the result is no chain (rmfx.is_plain): {self.why_not_plain}"

    @property
    def told_folding(self) -> str:
        """That parameters are counted without batch norm, "" where the model has none."""
        told = "batch norm is folded in both forms, so the model's own count of parameters differs"
        return told if self.folded else ""

    @property
    def costs(self) -> list[tuple[str, int, int]]:
        """What is counted, before and after; nothing where the inputs are not known."""
        if not (self.cost_before and self.cost_after):
            return []
        before, after = asdict(self.cost_before), asdict(self.cost_after)
        return [(title, before[name], after[name]) for name, title in _TITLES.items()]


_COLUMNS = (
    Column("", itemgetter(0)),
    Column("before", itemgetter(1), ",", right=True),
    Column("after", itemgetter(2), ",", right=True),
    Column("after/before", lambda row: row[2] / row[1] if row[1] else None, ".2f", right=True),
)
_TITLES = {
    "layers": "conv and linear layers",
    "adds": "adds",
    "parameters": "parameters",
    "macs": "multiply-adds",
    "moved": "bytes moved",
    "peak": "bytes alive at most",
}


def convert(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    fold_batch_norm: bool = True,
    **options: Any,
) -> Conversion:
    """Runs `rmfx.remove_residuals`, verifies the result and counts what it costs.

    Args:
        model: in eval mode; it is not changed.
        example_inputs: what the model takes, a tensor or several. Without them there are no costs.
        fold_batch_norm: as in `rmfx.remove_residuals`, and for the form before as well.
        options: the other options of `rmfx.remove_residuals`.

    Raises:
        VerificationError: the result does not compute what the model computes.
        RmfxError: as `rmfx.remove_residuals`.

    Example:
        >>> from rmfx.demo import load_digits, load_model
        >>> conversion = convert(load_model(), load_digits()[0][:1])
        >>> conversion.cost_before.adds, conversion.cost_after.adds
        (5, 0)
    """
    inputs = as_inputs(example_inputs)
    after = remove_residuals(model, inputs, fold_batch_norm=fold_batch_norm, **options)
    before = remove_noops(model, inputs, verify=False)
    folded = False
    if fold_batch_norm:
        before = fold(before, inputs, verify=False)
        folded = bool(modified(before))
    return Conversion(
        before=before,
        after=after,
        report=report(after),
        cost_before=None if inputs is None else count(before, inputs),
        cost_after=None if inputs is None else count(after, inputs),
        folded=folded,
    )
