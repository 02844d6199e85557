"""Whom to preempt: for a principal that is behind and cannot get in, and when blocks run out.

Only who holds more than another takes from, by weight, gives way to it, and only as much that it still holds no less
than the other does then. So two principals cannot take from each other in turns, the first to arrive of a principal
never gives way to another's, and nobody gives way to its own for the sake of fairness.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from descant.scheduling.fairness import Account, Fairness
from descant.scheduling.sequence import Sequence

SLACK = 1.125  # who holds something already takes more only where the difference is worth a preemption


def may_take(holder: Account, num_left: float, taker: Account, num_held: float, num_taken: float) -> bool:
    """Return whether `holder` may be left with `num_left` of a thing so that `taker`, who has `num_held`, gets more."""
    if holder is taker or is_ahead(taker, holder):
        return False
    slack = SLACK if num_held else 1.0
    return num_left * taker.weight >= (num_held + num_taken) * holder.weight * slack


def is_ahead(taker: Account, holder: Account) -> bool:
    """Return whether `holder` waits as well and has had less service: then nothing of it is the other's."""
    return holder.num_waiting > 0 and holder.service < taker.service


def richest(held: Mapping[Account, float]) -> Account | None:
    """Return who, with one less, still holds most by weight, as `may_take` counts; the first of equals."""
    return max(held, key=lambda account: (held[account] - 1) / account.weight, default=None)


def richest_in_blocks(held: Mapping[Account, float], running: Iterable[Sequence]) -> Account | None:
    """Return who, without its latest sequence, still has most blocks by weight; the first of equals."""
    latest: dict[str, int] = {}
    for sequence in running:  # the last of each principal stays
        latest[sequence.request.principal] = len(sequence.device.block_table)
    return max(
        (account for account in held if account.name in latest),
        key=lambda account: (held[account] - latest[account.name]) / account.weight,
        default=None,
    )


def seats_held(fairness: Fairness) -> dict[Account, float]:
    """Return how many seats everybody has."""
    return {account: account.num_running for account in fairness.accounts.values() if account.num_running}


def blocks_held(fairness: Fairness, running: Iterable[Sequence]) -> dict[Account, float]:
    """Return how many blocks everybody uses; blocks that several sequences share count for each."""
    held: dict[Account, float] = {}
    for sequence in running:
        account = fairness.accounts[sequence.request.principal]
        held[account] = held.get(account, 0) + len(sequence.device.block_table)
    return held


def block_victims(
    fairness: Fairness, running: list[Sequence], taker: Account, num_needed: int, num_missing: int
) -> list[Sequence]:
    """Return who may give way so that `taker` gets `num_needed` blocks, of which `num_missing` are not free."""
    held = blocks_held(fairness, running)
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
    """Return who gives way so that a running sequence may grow, perhaps itself: the latest of who holds most.

    If that would leave its principal with less than the other's, it is the latest of all. Either way the first to
    arrive of all goes on.
    """
    held = blocks_held(fairness, running)
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
    """Return a principal's sequence that arrived last."""
    return next((one for one in reversed(list(running)) if one.request.principal == account.name), None)
