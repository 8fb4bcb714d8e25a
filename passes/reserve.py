"""Reserving channels: a sum of parallel linear branches lets its first channels pass.

`rmfx.rules.reserving` says which sums can and how; here it is chosen which do, and reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from rmfx.errors import OptionError, Refusal
from rmfx.frontend.tracing import trace
from rmfx.ir.names import module_path
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.options import count_of, is_named, number_of, patterns_of
from rmfx.report import META_KEY
from rmfx.rules.reserving import Branches, find_blocks, let_pass
from rmfx.table import Column, Record, table


@dataclass(frozen=True)
class ReserveRow:
    """One sum of parallel linear branches.

    Attributes:
        place: path of the module whose code adds, "" for the root.
        channels: of its output, None where unknown.
        reserved: how many of them pass.
        reason: why none does.
    """

    place: str
    channels: int | None
    reserved: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ReserveReport(Record):
    """What `reserve` did. `str()` gives a table, `to_dict` what JSON can hold.

    Attributes:
        blocks: in the order of the network.
    """

    blocks: tuple[ReserveRow, ...]

    @property
    def reserving(self) -> int:
        """How many blocks let channels pass."""
        return sum(row.reserved > 0 for row in self.blocks)

    def __str__(self) -> str:
        total = f"{self.reserving} of {len(self.blocks)} blocks reserve channels"
        return f"{table(self.blocks, _COLUMNS)}\n{total}".lstrip()


_COLUMNS = (
    Column("block", "place"),
    Column("channels", lambda row: "?" if row.channels is None else row.channels, right=True),
    Column("reserved", "reserved", right=True),
    Column("", "reason"),
)


@undisturbed
def reserve(
    model: nn.Module | Any,
    ratio: float = 0.25,
    example_inputs: Any = None,
    *,
    every: int = 2,
    blocks: str | Sequence[str] = ("*",),
) -> tuple[fx.GraphModule, ReserveReport]:
    """Let the first channels of RepVGG's blocks, and of the like, pass as they are.

    The result is to be trained: what was learned for the channels that pass is lost. The other
    channels of a block compute of its input what they did.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        ratio: share of the channels that pass, from 0 to below 1.
        example_inputs: a tensor or a tuple of arguments; needed where tracing needs it.
        every: which blocks reserve: the last of so many in a row that give the same channels at
            the same size. 1 means all.
        blocks: patterns such as "stages.2.*" of the paths of modules whose code adds.

    Returns:
        A network to be trained, and a report of all sums of parallel convolutions.
        `rmfx.remove_residuals`, and for most networks `rmfx.merge_branches`, deploys it.

    Raises:
        OptionError: `ratio` or `every` makes no sense, or no block can reserve a channel.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx
        >>> from rmfx.models import rmrep
        >>> repvgg = rmrep(9, ratio=0).eval()
        >>> net, report = rmfx.reserve(repvgg, 0.25)
        >>> [row.reserved for row in report.blocks]
        [0, 0, 0, 32, 0, 64, 0, 64, 0]
    """
    ratio = number_of("ratio", ratio, least=0, below=1)
    every = count_of("every", every)
    net = Net(trace(model, example_inputs))
    net.sweep()
    found = find_blocks(net)
    if found:
        blocks = patterns_of("blocks", blocks, [module_path(join) for join, _ in found])
    rows = _rows(net, found, ratio, every, blocks)
    report = ReserveReport(tuple(rows))
    if ratio and not report.reserving:
        where = f" at ratio={ratio:g}, every={every}\n{report}"
        nowhere = ": nowhere are parallel linear branches added"
        raise OptionError(f"no block reserves channels{where if rows else nowhere}")
    pairs = zip(found, rows, strict=True)
    let_pass(
        net, ((b, r.reserved) for (_, b), r in pairs if isinstance(b, Branches) and r.reserved)
    )
    gm = net.finish()
    gm.meta.pop(META_KEY, None)  # it names additions of before
    return gm, report


def _rows(
    net: Net,
    found: Iterable[tuple[fx.Node, Branches | Refusal]],
    ratio: float,
    every: int,
    blocks: Sequence[str],
) -> list[ReserveRow]:
    """How many channels of which block pass."""
    rows: list[ReserveRow] = []
    before, in_a_row = None, 0
    for join, block in found:
        place = module_path(join)
        if isinstance(block, Refusal):
            before, in_a_row = net.channels(join, (net.rank(join) or 4) - 2), 1
            rows.append(ReserveRow(place, before, reason=block.reason))
            continue
        in_a_row = in_a_row + 1 if block.channels == before else 1
        before = block.channels
        # One channel at least is computed: a layer without any cannot run.
        reserved = min(round(ratio * block.channels), block.channels - 1)
        reason = "" if reserved or not ratio else f"{ratio:g} of its channels is none"
        if not is_named(place, blocks):
            reserved, reason = 0, "not named"
        elif in_a_row % every:
            reserved, reason = 0, ""
        rows.append(ReserveRow(place, block.channels, reserved, reason))
    return rows
