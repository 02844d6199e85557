"""`Fairness`: how much service everybody has had, and in which order those who can run take their turns.

This is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024). Every
principal has a counter of the service it received: prompt tokens computed and output tokens, weighted, divided by the
principal's own weight. The next to be served is who has had least. Who begins to wait is lifted to the least of those
that wait already, so nobody saves up idle time. While nobody waits nobody is owed anything: then it is lifted to the
most of all. Between the adapters of one principal the same counters decide, then arrival.

A token is charged once, however often it is computed; what the prefix cache spared is not charged.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from descant.scheduling.sequence import Sequence, by_arrival

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
MAX_IDLE_LANES = 64  # per principal, before those are forgotten that would be lifted anyway


@dataclass(slots=True, eq=False)
class Lane:
    """The sequences of one principal with one adapter version, or with none."""

    digest: str  # empty: the base model
    account: Account
    service: float
    queue: list[Sequence] = field(default_factory=list[Sequence])  # they can run; in order of arrival
    running: dict[int, Sequence] = field(default_factory=dict[int, Sequence])

    @property
    def is_busy(self) -> bool:
        return bool(self.queue or self.running)

    @property
    def users(self) -> list[Sequence]:
        """Who waits and who runs, in order of arrival."""
        return sorted([*self.queue, *self.running.values()], key=by_arrival)

    def charge(self, amount: float) -> None:
        """Count service, in weighted tokens."""
        amount /= self.account.weight
        self.service += amount
        self.account.service += amount


@dataclass(slots=True, eq=False)
class Account:
    """A principal."""

    name: str
    weight: float = 1.0
    service: float = 0.0
    turn: int = 0  # grows with the beginning of the present wait, which decides between equals
    num_waiting: int = 0
    num_running: int = 0
    lanes: dict[str, Lane] = field(default_factory=dict[str, Lane])
    _floor: float = 0.0  # the service of new lanes
    _max_lanes: int = MAX_IDLE_LANES

    def lane(self, digest: str) -> Lane:
        """Return the lane of an adapter version."""
        lane = self.lanes.get(digest)
        if lane is None:
            lane = self.lanes[digest] = Lane(digest, self, self._floor)
        return lane

    def waiting(self) -> Iterator[Sequence]:
        """Return who can run, in fair order."""
        lanes = [lane for lane in self.lanes.values() if lane.queue]
        if len(lanes) > 1:
            lanes.sort(key=lambda lane: (lane.service, lane.queue[0].id))
        for lane in lanes:
            yield from lane.queue

    def lift(self, lane: Lane) -> None:
        """The lane begins to wait."""
        waiting = [other.service for other in self.lanes.values() if other.queue]
        least = min(waiting) if waiting else max(other.service for other in self.lanes.values())
        lane.service = max(lane.service, least)

    def forget_idle_lanes(self) -> None:
        """Once there are many, forget the lanes that will be lifted anyway when they come back."""
        if len(self.lanes) <= self._max_lanes:
            return
        services = [lane.service for lane in self.lanes.values()]
        self._floor = min((lane.service for lane in self.lanes.values() if lane.queue), default=max(services))
        self.lanes = {digest: lane for digest, lane in self.lanes.items() if lane.is_busy or lane.service > self._floor}
        self._max_lanes = max(MAX_IDLE_LANES, 2 * len(self.lanes))


class Fairness:
    """Knows the sequences that could run at once, and those that do."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.num_waiting = 0
        self._lanes: dict[int, Lane] = {}  # by sequence id
        # Those with somebody waiting, least service first. An entry may say less than is true, never more.
        self._heap: list[tuple[float, int, Account]] = []
        self._aside: list[tuple[int, Account]] = []  # turn, account: not to be asked again in this step
        self._num_turns = 0

    def account(self, sequence: Sequence) -> Account:
        """Return whose the sequence is."""
        account = self.accounts.get(sequence.request.principal)
        if account is None:
            account = self.accounts[sequence.request.principal] = Account(sequence.request.principal)
        account.weight = sequence.request.weight
        return account

    def enqueue(self, sequence: Sequence) -> None:
        """The sequence could run."""
        account = self.account(sequence)
        lane = self._lanes[sequence.id] = account.lane(sequence.adapter.digest if sequence.adapter else "")
        if not lane.queue:
            account.lift(lane)
        if not account.num_waiting:
            self._lift(account)
        insort(lane.queue, sequence, key=by_arrival)
        account.num_waiting += 1
        self.num_waiting += 1

    def start(self, sequence: Sequence) -> None:
        """A sequence that waited has a seat."""
        lane = self._lanes[sequence.id]
        self._unqueue(lane, sequence)
        lane.running[sequence.id] = sequence
        lane.account.num_running += 1

    def remove(self, sequence: Sequence) -> None:
        """The sequence neither runs nor could; others than those of `enqueue` are left alone."""
        lane = self._lanes.pop(sequence.id, None)
        if lane is None:
            return
        if not self._unqueue(lane, sequence):
            del lane.running[sequence.id]
            lane.account.num_running -= 1
        lane.account.forget_idle_lanes()

    def clear(self) -> None:
        """Nobody runs and nobody could; what they have had is kept."""
        for account in self.accounts.values():
            account.num_waiting = account.num_running = 0
            for lane in account.lanes.values():
                lane.running.clear()
                lane.queue.clear()
        self._lanes.clear()
        self._heap.clear()
        self._aside.clear()
        self.num_waiting = 0

    # ---- service --------------------------------------------------------------------------------------------------

    def charge_prompt(self, sequence: Sequence, num_new_tokens: int) -> None:
        """The next tokens of the sequence are about to be computed."""
        end = min(sequence.device.num_planned + num_new_tokens, sequence.num_prompt_tokens)
        num_new = end - max(sequence.device.num_planned, sequence.num_charged)
        if num_new > 0:
            sequence.num_charged = end
            self._lanes[sequence.id].charge(num_new * INPUT_WEIGHT)

    def charge_output(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence, which runs, has got new tokens."""
        self._lanes[sequence.id].charge(num_tokens * OUTPUT_WEIGHT)

    def charge_draft(self, sequence: Sequence, num_nodes: int) -> None:
        """A draft of the sequence, which runs, is about to be verified whether or not that pays."""
        self._lanes[sequence.id].charge(num_nodes * INPUT_WEIGHT)

    # ---- order ----------------------------------------------------------------------------------------------------

    def first(self) -> Account | None:
        """Return who has had least of those with somebody waiting that were not passed over in this step."""
        heap = self._heap
        while heap:
            service, turn, account = heap[0]
            if turn != account.turn or not account.num_waiting:
                heappop(heap)
            elif service != account.service:
                heapreplace(heap, (account.service, turn, account))
            else:
                return account
        return None

    def pass_over(self, account: Account) -> None:
        """Nobody of the `first` can run in this step."""
        self._aside.append((account.turn, account))
        if self._heap[0][2] is account:
            heappop(self._heap)
        else:  # a preempted sequence has made another the first
            self._heap = [entry for entry in self._heap if entry[2] is not account]
            heapify(self._heap)

    def end_step(self) -> None:
        """Everybody may be first again."""
        for turn, account in self._aside:
            if turn == account.turn:
                heappush(self._heap, (account.service, turn, account))
        self._aside.clear()

    def _lift(self, account: Account) -> None:
        """The principal begins to wait."""
        waiting = [other.service for _, other in self._aside if other.num_waiting]
        if (first := self.first()) is not None:
            waiting.append(first.service)
        least = min(waiting) if waiting else max(other.service for other in self.accounts.values())
        account.service = max(account.service, least)
        self._num_turns += 1
        account.turn = self._num_turns
        heappush(self._heap, (account.service, account.turn, account))

    def _unqueue(self, lane: Lane, sequence: Sequence) -> bool:
        index = bisect_left(lane.queue, sequence.id, key=by_arrival)
        if index == len(lane.queue) or lane.queue[index] is not sequence:
            return False
        del lane.queue[index]
        lane.account.num_waiting -= 1
        self.num_waiting -= 1
        return True
