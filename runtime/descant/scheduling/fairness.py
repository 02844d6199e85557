"""`Fairness`: counts the service of each principal, and orders the runnable sequences by it.

This is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024). Every
principal has a counter of the service it received: prompt tokens computed and output tokens, weighted, divided by the
principal's own weight. The principal with the lowest counter is served next. A principal that begins to wait is lifted
to the lowest counter of those already waiting, so idle time earns no credit. If no principal waits, it is lifted to
the highest counter of all, because then no principal is behind. Between the adapters of one principal the same
counters decide, then arrival.

A token is charged once, however often it is computed. Tokens found in the prefix cache are not charged.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from descant.scheduling.sequence import Sequence, by_arrival

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
MAX_IDLE_LANES = 64  # per principal; beyond that, lanes that would be lifted anyway are forgotten


@dataclass(slots=True, eq=False)
class Lane:
    """The sequences of one principal with one adapter version, or with none."""

    digest: str  # empty: the base model
    account: Account
    service: float
    queue: list[Sequence] = field(default_factory=list[Sequence])  # runnable ones, in order of arrival
    running: dict[int, Sequence] = field(default_factory=dict[int, Sequence])

    @property
    def is_busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.queue or self.running)

    @property
    def users(self) -> list[Sequence]:
        """Waiting and running sequences, in order of arrival."""
        return sorted([*self.queue, *self.running.values()], key=by_arrival)

    def charge(self, amount: float) -> None:
        """Add service, in weighted tokens, to the lane and its account."""
        amount /= self.account.weight
        self.service += amount
        self.account.service += amount


@dataclass(slots=True, eq=False)
class Account:
    """The service and the sequences of one principal."""

    name: str
    weight: float = 1.0
    service: float = 0.0
    turn: int = 0  # number of the present wait, which decides between equals: the earliest first
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
        """Yield the runnable sequences, in fair order."""
        lanes = [lane for lane in self.lanes.values() if lane.queue]
        if len(lanes) > 1:
            lanes.sort(key=lambda lane: (lane.service, lane.queue[0].id))
        for lane in lanes:
            yield from lane.queue

    def lift(self, lane: Lane) -> None:
        """Raise the counter of a lane that begins to wait: to the lowest of those waiting, else to the highest."""
        waiting = [other.service for other in self.lanes.values() if other.queue]
        least = min(waiting) if waiting else max(other.service for other in self.lanes.values())
        lane.service = max(lane.service, least)

    def forget_idle_lanes(self) -> None:
        """If there are many lanes, remove the idle ones that would be lifted at their next sequence anyway."""
        if len(self.lanes) <= self._max_lanes:
            return
        services = [lane.service for lane in self.lanes.values()]
        self._floor = min((lane.service for lane in self.lanes.values() if lane.queue), default=max(services))
        self.lanes = {digest: lane for digest, lane in self.lanes.items() if lane.is_busy or lane.service > self._floor}
        self._max_lanes = max(MAX_IDLE_LANES, 2 * len(self.lanes))


class Fairness:
    """The runnable and the running sequences of all principals."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.num_waiting = 0
        self._lanes: dict[int, Lane] = {}  # by sequence id
        # Accounts with runnable sequences, least service first. The service of an entry may be out of date: too low.
        self._heap: list[tuple[float, int, Account]] = []
        self._aside: list[tuple[int, Account]] = []  # turn, account: passed over in this step
        self._num_turns = 0

    def account(self, sequence: Sequence) -> Account:
        """Return the account of the sequence's principal, with its present weight."""
        account = self.accounts.get(sequence.request.principal)
        if account is None:
            account = self.accounts[sequence.request.principal] = Account(sequence.request.principal)
        account.weight = sequence.request.weight
        return account

    def enqueue(self, sequence: Sequence) -> None:
        """Add a runnable sequence to the queue of its principal and adapter."""
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
        """Move a sequence from its queue to the running ones."""
        lane = self._lanes[sequence.id]
        self._unqueue(lane, sequence)
        lane.running[sequence.id] = sequence
        lane.account.num_running += 1

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence, if it is one."""
        lane = self._lanes.pop(sequence.id, None)
        if lane is None:
            return
        if not self._unqueue(lane, sequence):
            del lane.running[sequence.id]
            lane.account.num_running -= 1
        lane.account.forget_idle_lanes()

    def clear(self) -> None:
        """Remove all sequences, but keep the counters."""
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
        """Charge the prompt tokens among the next `num_new_tokens` of a sequence, each only once."""
        end = min(sequence.device.num_planned + num_new_tokens, sequence.num_prompt_tokens)
        num_new = end - max(sequence.device.num_planned, sequence.num_charged)
        if num_new > 0:
            sequence.num_charged = end
            self._lanes[sequence.id].charge(num_new * INPUT_WEIGHT)

    def charge_output(self, sequence: Sequence, num_tokens: int) -> None:
        """Charge new output tokens of a running sequence."""
        self._lanes[sequence.id].charge(num_tokens * OUTPUT_WEIGHT)

    def charge_draft(self, sequence: Sequence, num_nodes: int) -> None:
        """Charge the draft of a running sequence that is verified whether or not that pays."""
        self._lanes[sequence.id].charge(num_nodes * INPUT_WEIGHT)

    # ---- order ----------------------------------------------------------------------------------------------------

    def first(self) -> Account | None:
        """Return the account with least service among those with runnable sequences; None if there is none.

        Accounts that were passed over in this step are skipped.
        """
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
        """Skip the account, which is the `first`, until the end of the step: none of its sequences can be admitted."""
        self._aside.append((account.turn, account))
        if self._heap[0][2] is account:
            heappop(self._heap)
        else:  # a preempted sequence has made another the first
            self._heap = [entry for entry in self._heap if entry[2] is not account]
            heapify(self._heap)

    def end_step(self) -> None:
        """Let accounts that were passed over be first again."""
        for turn, account in self._aside:
            if turn == account.turn:
                heappush(self._heap, (account.service, turn, account))
        self._aside.clear()

    def _lift(self, account: Account) -> None:
        """Raise the counter of an account that begins to wait, as the module describes, and add it to the heap."""
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
