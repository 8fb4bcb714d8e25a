"""Whether a rewrite that is possible should happen: the caller's policy."""

from __future__ import annotations

from collections.abc import Callable

from rmfx.errors import OptionError, Refusal
from rmfx.ir.net import Net
from rmfx.options import shown
from rmfx.report import SiteReport
from rmfx.rules.linear import Choice
from rmfx.table import short

from .measured import BothForms, MeasuredPolicy
from .site import Site

Policy = Choice | MeasuredPolicy

# How many multiply-adds a core does while it moves one float32 value to or from memory.
MACS_PER_VALUE = 20


def check_policy(policy: object) -> None:
    """Raise OptionError unless it is one."""
    known = isinstance(policy, str) and policy in ("all", "profitable")
    if not known and not isinstance(policy, MeasuredPolicy) and not callable(policy):
        raise OptionError(
            f"policy={shown(policy)}: choose 'all', 'profitable', a function of a site "
            "or a MeasuredPolicy"
        )


def reason_to_keep(
    policy: Policy, net: Net, site: Site, row: SiteReport, both_forms: BothForms
) -> Refusal | None:
    """Why a site stays as it is by choice, None if it goes.

    Args:
        both_forms: what a network is without and with the rewrite, for a policy that measures.
    """
    if policy == "all":
        return None
    if isinstance(policy, MeasuredPolicy):
        return policy.reason_to_keep(net, site, both_forms)
    if callable(policy):
        return None if _asked(policy, row) else Refusal("kept by the policy", by_choice=True)
    before = time_of(row.macs_before, row.moved_before)
    after = time_of(row.macs_after, row.moved_after)
    if before is None or after is None:
        return Refusal("what it costs is unknown; pass example_inputs", by_choice=True)
    if after < before:
        return None
    return Refusal(
        f"it would not pay: {_shown(row.macs_before, row.moved_before)} now, "
        f"{_shown(row.macs_after, row.moved_after)} then",
        by_choice=True,
    )


def _asked(policy: Callable[[SiteReport], bool], row: SiteReport) -> bool:
    try:
        return policy(row)
    # The function is the caller's.
    except Exception as error:
        raise OptionError(f"policy raised {type(error).__name__} on {row.join}: {error}") from error


def time_of(macs: int | None, moved: int | None) -> float | None:
    """What some work takes, in multiply-adds; None where it is not known.

    Arithmetic and traffic add up: layers of a network alternate between the two.
    """
    return None if macs is None or moved is None else macs + MACS_PER_VALUE * moved


def _shown(macs: int | None, moved: int | None) -> str:
    return f"{short(macs or 0)} multiply-adds and {short(moved or 0)} values moved"
