"""`AdapterTurns`: the order in which principals get places for their adapters on the device.

Places are given in order of arrival, with one exception: a principal whose adapters have fewer places, by weight,
than those of the principal that is next comes before it. Between equals, the one that has had less service comes
first. If there is no place for an adapter at all, the principal with most places gives one up: all sequences that use
one of its adapters are preempted. That is done at most once for the sake of one sequence.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from descant.contract.version import AdapterVersion
from descant.scheduling.fairness import Account, Fairness, Lane
from descant.scheduling.gate import AdapterGate
from descant.scheduling.placement.residency import AdapterResidency, aligned
from descant.scheduling.preemption import may_take, richest
from descant.scheduling.sequence import Sequence, by_arrival

MAX_TRIES = 8  # principals per step for which others may be preempted
LOOK_EVERY = 8  # steps between comparisons while no sequence is added or removed: service changes


class AdapterTurns:
    """The sequences that wait for a place for their adapter, by principal."""

    def __init__(self, fairness: Fairness) -> None:
        self._fairness = fairness
        self._waiting: dict[Account, list[Sequence]] = {}  # in order of arrival; some may have a place by now
        self._num_idle = -1  # steps since a sequence came or left
        self._served: set[int] = set()  # ids of sequences for which others were preempted

    def enqueue(self, sequence: Sequence) -> None:
        """Add a sequence that waits at the gate."""
        self._num_idle = -1
        insort(self._waiting.setdefault(self._fairness.account(sequence), []), sequence, key=by_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, which may not have waited here."""
        account = self._fairness.account(sequence)
        queue = self._waiting.get(account, [])
        index = bisect_left(queue, sequence.id, key=by_arrival)
        if index < len(queue) and queue[index] is sequence:
            del queue[index]
        self._num_idle = -1
        if sequence.is_finished:
            self._served.discard(sequence.id)

    def clear(self) -> None:
        """Forget all sequences."""
        self._waiting.clear()
        self._served.clear()

    def look_again(self) -> None:
        """Compare the principals again before the next step, though no sequence came or left."""
        self._num_idle = -1

    def place_waiting(self, gate: AdapterGate) -> tuple[list[Sequence], list[Sequence]]:
        """Give free places to waiting sequences in fair order.

        Returns the sequences that may run now, and the first sequence of each principal, in fair order, that others
        may be preempted for: `victims_for`.
        """
        self._num_idle += 1
        if len(self._fairness.accounts) < 2 or not self._waiting or self._num_idle % LOOK_EVERY:
            return gate.place_waiting(), []
        self._num_idle = 0
        firsts = self._firsts()
        if not firsts:
            return gate.place_waiting(), []
        num_places = self._places_by_account(gate)
        order = sorted(
            firsts,
            key=lambda account: (num_places.get(account, 0) / account.weight, account.service, firsts[account].id),
        )
        next_account = min(firsts, key=lambda account: firsts[account].id)
        ready = gate.place_waiting([_digest(firsts[account]) for account in order[: order.index(next_account)]])
        return ready, [firsts[account] for account in order[:MAX_TRIES]]

    def victims_for(self, sequence: Sequence, gate: AdapterGate) -> list[Sequence]:
        """Return the sequences to preempt so that this one gets a place; none if that is unfair or not enough."""
        if sequence.device.spans is not None or sequence.id in self._served:
            return []
        assert sequence.adapter is not None, "only a sequence with an adapter waits for a place"
        account = self._fairness.accounts[sequence.request.principal]
        num_places, lanes = self._places_by_account(gate), list[Lane]()
        num_own = num_places.get(account, 0)
        while not _would_have_room(gate.residency, sequence.adapter, lanes):
            holder = richest(num_places)
            if holder is None or not may_take(holder, num_places[holder] - 1, account, num_own, 1):
                return []
            lane = self._spare_lane(gate, holder, lanes)
            if lane is None:
                return []
            num_places[holder] -= 1
            lanes.append(lane)
        return [user for lane in lanes for user in lane.users]

    def place(self, sequence: Sequence, gate: AdapterGate) -> list[Sequence]:
        """Give the sequence the place that its victims have left; return the sequences that may run now."""
        self._served.add(sequence.id)
        return gate.place_waiting([_digest(sequence)])

    def _firsts(self) -> dict[Account, Sequence]:
        """Return the first waiting sequence of each principal, dropping those that have a place by now."""
        firsts: dict[Account, Sequence] = {}
        for account, queue in list(self._waiting.items()):
            while queue and queue[0].device.spans is not None:
                del queue[0]
            if queue:
                firsts[account] = queue[0]
            else:
                del self._waiting[account]
        return firsts

    def _places_by_account(self, gate: AdapterGate) -> dict[Account, float]:
        """Return the number of adapters with a place that each principal uses."""
        digests = {
            account: {lane.digest for lane in account.lanes.values() if lane.digest and lane.is_busy}
            for account in self._fairness.accounts.values()
        }
        for sequence in gate.loading:
            digests.setdefault(self._fairness.account(sequence), set()).add(_digest(sequence))
        return {account: float(len(own)) for account, own in digests.items() if own}

    def _spare_lane(self, gate: AdapterGate, holder: Account, taken: list[Lane]) -> Lane | None:
        """Return the lane of `holder` to preempt; None if all its adapters are pinned or used by others too.

        A lane without running sequences comes first; among equals, the one with the latest first user.
        """
        others = {
            lane.digest
            for account in self._fairness.accounts.values()
            if account is not holder
            for lane in account.lanes.values()
            if lane.is_busy
        }
        lanes = [
            lane
            for lane in holder.lanes.values()
            if lane.digest and lane.is_busy and lane.digest not in others and lane not in taken
        ]
        lanes = [lane for lane in lanes if not gate.residency.is_pinned(lane.digest)]
        return max(lanes, key=lambda lane: (not lane.running, lane.users[0].id), default=None)


def _would_have_room(residency: AdapterResidency, version: AdapterVersion, without: list[Lane]) -> bool:
    """Return whether the version has a place, or would have one without the adapters of these lanes."""
    freed = [lane.users[0].adapter for lane in without]
    num_bytes = residency.num_available + sum(aligned(other.num_bytes) for other in freed if other is not None)
    has_room = (residency.has_free_slot() or bool(freed)) and aligned(version.num_bytes) <= num_bytes
    return has_room or residency.is_resident(version.digest)


def _digest(sequence: Sequence) -> str:
    return sequence.adapter.digest if sequence.adapter else ""
