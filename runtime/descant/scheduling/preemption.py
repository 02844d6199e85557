"""Choice of sequences to preempt: for a principal that is behind and lacks seats or blocks, and when blocks run out.

A principal loses seats or blocks to another only while it still has no less of them than the other then has, by
weight. So two principals cannot take from each other in turns, the first sequence of a principal is never preempted for
another principal's, and no sequence is preempted for one of its own principal for the sake of fairness.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from descant.scheduling.fairness import Account, Fairness
from descant.scheduling.sequence import Sequence

SLACK = 1.125  # a principal that has something takes more only if the difference is worth a preemption


def may_take(holder: Account, num_left: float, taker: Account, num_held: float, num_taken: float) -> bool:
    """Return whether `holder` may be left with `num_left` of a thing so that `taker`, with `num_held`, gets more."""
    if holder is taker or is_ahead(taker, holder):
        return False
    slack = SLACK if num_held else 1.0
    return num_left * taker.weight >= (num_held + num_taken) * holder.weight * slack


def is_ahead(taker: Account, holder: Account) -> bool:
    """Return whether `holder` waits too and has had less service. Then `taker` has no claim against it."""
    return holder.num_waiting > 0 and holder.service < taker.service


def richest(held: Mapping[Account, float]) -> Account | None:
    """Return the account that, with one less, has most by weight, as `may_take` counts; the first of equals."""
    return max(held, key=lambda account: (held[account] - 1) / account.weight, default=None)


def richest_in_blocks(held: Mapping[Account, float], running: Iterable[Sequence]) -> Account | None:
    """Return the account that, without its latest sequence, has most blocks by weight; the first of equals."""
    latest: dict[str, int] = {}
    for sequence in running:  # the last of each principal stays
        latest[sequence.request.principal] = len(sequence.device.block_table)
    return max(
        (account for account in held if account.name in latest),
        key=lambda account: (held[account] - latest[account.name]) / account.weight,
        default=None,
    )


def seats_by_account(fairness: Fairness) -> dict[Account, float]:
    """Return the number of seats of each account that has any."""
    return {account: account.num_running for account in fairness.accounts.values() if account.num_running}


def blocks_by_account(fairness: Fairness, running: Iterable[Sequence]) -> dict[Account, float]:
    """Return the number of blocks that each account uses. A block that several sequences share counts for each."""
    held: dict[Account, float] = {}
    for sequence in running:
        account = fairness.accounts[sequence.request.principal]
        held[account] = held.get(account, 0) + len(sequence.device.block_table)
    return held


def block_victims(
    fairness: Fairness, running: list[Sequence], taker: Account, num_needed: int, num_missing: int
) -> list[Sequence]:
    """Return the sequences to preempt so that `taker` gets `num_needed` blocks, of which `num_missing` are not free.

    Returns none if it would take sequences that may not be preempted for `taker`.
    """
    held = blocks_by_account(fairness, running)
    num_held = held.get(taker, 0)
    left, victims = list(running), list[Sequence]()
    while num_missing > 0:
        holder = richest_in_blocks(held, left)
        victim = latest_of(left, holder) if holder else None
        if holder is None or victim is None:
            return []
        num_given = len(victim.device.block_table)
        if not may_take(holder, held[holder] - num_given, taker, num_held, num_needed):
            return []
        held[holder] -= num_given
        num_missing -= num_given
        left.remove(victim)
        victims.append(victim)
    return victims


def growth_victim(fairness: Fairness, running: list[Sequence], sequence: Sequence) -> Sequence:
    """Return the sequence to preempt so that a running one may grow, perhaps itself: the latest of the richest account.

    If that would leave its principal with less than the growing sequence's, it is the latest of all. Either way the
    sequence that arrived first of all keeps running.
    """
    held = blocks_by_account(fairness, running)
    holder, taker = richest_in_blocks(held, running), fairness.account(sequence)
    if holder is None or len(held) == 1:
        return running[-1]
    victim = latest_of(running, holder)
    if victim is not None:
        num_left = held[holder] - len(victim.device.block_table)
        if num_left > 0 and (holder is taker or num_left * taker.weight >= (held[taker] + 1) * holder.weight):
            return victim
    return running[-1]


def latest_of(running: Iterable[Sequence], account: Account) -> Sequence | None:
    """Return the latest running sequence of an account; None if it has none."""
    return next((one for one in reversed(list(running)) if one.request.principal == account.name), None)
