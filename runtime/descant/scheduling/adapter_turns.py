"""`SlotTurns`: whose adapters get the places on the device when several principals want them.

The gate opens in order of arrival, except that a principal whose adapters have fewer places, by weight, than those of
who would be next comes before it; of equals, who has had less service. If there is no place for it at all, who has
most places gives one up: everybody that uses one of its adapters is preempted, which is done once at most for the sake
of one sequence.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

from descant.contract.version import AdapterVersion
from descant.scheduling.fairness import Account, Fairness, Lane
from descant.scheduling.gate import AdapterGate
from descant.scheduling.placement.residency import AdapterResidency, aligned
from descant.scheduling.preemption import may_take, richest
from descant.scheduling.sequence import Sequence, by_arrival

MAX_TRIES = 8  # principals per step for which somebody may be asked to give way
LOOK_EVERY = 8  # steps, while nobody comes or leaves: who has had less service may change all the same

# Takes everything from some sequences, and returns what lets them take their way to a seat again; None: not now.
ClearOut = Callable[[list[Sequence]], Callable[[], None] | None]


class SlotTurns:
    """Knows who waits for a place."""

    def __init__(self, fairness: Fairness) -> None:
        self._fairness = fairness
        self._waiting: dict[Account, list[Sequence]] = {}  # in order of arrival; some may have a place by now
        self._num_idle = -1  # steps since somebody came or left
        self._served: set[int] = set()  # ids of sequences for which somebody gave way

    def wait(self, sequence: Sequence) -> None:
        """The sequence waits at the gate."""
        self._num_idle = -1
        insort(self._waiting.setdefault(self._fairness.account(sequence), []), sequence, key=by_arrival)

    def leave(self, sequence: Sequence) -> None:
        """The sequence, which may not have waited here, is gone."""
        account = self._fairness.account(sequence)
        queue = self._waiting.get(account, [])
        index = bisect_left(queue, sequence.id, key=by_arrival)
        if index < len(queue) and queue[index] is sequence:
            del queue[index]
        self._num_idle = -1
        if sequence.is_finished:
            self._served.discard(sequence.id)

    def clear(self) -> None:
        """Nobody waits, and nobody has a place."""
        self._waiting.clear()
        self._served.clear()

    def open(self, gate: AdapterGate, clear_out: ClearOut) -> list[Sequence]:
        """Open the gate, and return who can run now."""
        self._num_idle += 1
        if len(self._fairness.accounts) < 2 or not self._waiting or self._num_idle % LOOK_EVERY:
            return gate.open()
        self._num_idle = 0
        firsts = self._firsts()
        if not firsts:
            return gate.open()
        held = self._slots_held(gate)
        order = sorted(
            firsts, key=lambda account: (held.get(account, 0) / account.weight, account.service, firsts[account].id)
        )
        next_account = min(firsts, key=lambda account: firsts[account].id)
        ready = gate.open([_digest(firsts[account]) for account in order[: order.index(next_account)]])
        for account in order[:MAX_TRIES]:
            sequence = firsts[account]
            if sequence.device.spans is None and sequence.id not in self._served:
                ready += self._take_place(gate, account, sequence, clear_out)
        return ready

    def _take_place(
        self,
        gate: AdapterGate,
        account: Account,
        sequence: Sequence,
        clear_out: ClearOut,
    ) -> list[Sequence]:
        """Have somebody give up a place for the sequence, if that is fair and enough."""
        assert sequence.adapter is not None, "who waits for a place has an adapter"
        held, lanes = self._slots_held(gate), list[Lane]()
        num_held = held.get(account, 0)
        while not _would_have_room(gate.residency, sequence.adapter, lanes):
            holder = richest(held)
            if holder is None or not may_take(holder, held[holder] - 1, account, num_held, 1):
                return []
            lane = self._spare_lane(gate, holder, lanes)
            if lane is None:
                return []
            held[holder] -= 1
            lanes.append(lane)
        if not lanes:
            return []
        enter_again = clear_out([one for lane in lanes for one in lane.users])
        if enter_again is None:
            self._num_idle = -1  # look again next time
            return []
        self._served.add(sequence.id)
        ready = gate.open([sequence.adapter.digest])
        enter_again()
        return ready

    def _firsts(self) -> dict[Account, Sequence]:
        """Return the first of each principal that waits for a place."""
        firsts: dict[Account, Sequence] = {}
        for account, queue in list(self._waiting.items()):
            while queue and queue[0].device.spans is not None:
                del queue[0]
            if queue:
                firsts[account] = queue[0]
            else:
                del self._waiting[account]
        return firsts

    def _slots_held(self, gate: AdapterGate) -> dict[Account, float]:
        digests = {
            account: {lane.digest for lane in account.lanes.values() if lane.digest and lane.is_busy}
            for account in self._fairness.accounts.values()
        }
        for sequence in gate.loading:
            digests.setdefault(self._fairness.account(sequence), set()).add(_digest(sequence))
        return {account: float(len(own)) for account, own in digests.items() if own}

    def _spare_lane(self, gate: AdapterGate, holder: Account, taken: list[Lane]) -> Lane | None:
        """Return the users of the adapter that its principal misses least: of who came last, running ones later."""
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
    """Whether the version has a place, or slots and bytes for one are free, evictable or used by these lanes only."""
    freed = [lane.users[0].adapter for lane in without]
    num_bytes = residency.num_available + sum(aligned(other.num_bytes) for other in freed if other is not None)
    has_room = (residency.has_free_slot() or bool(freed)) and aligned(version.num_bytes) <= num_bytes
    return has_room or residency.is_resident(version.digest)


def _digest(sequence: Sequence) -> str:
    return sequence.adapter.digest if sequence.adapter else ""
