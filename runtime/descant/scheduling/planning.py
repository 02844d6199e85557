"""`Planner`: chooses the rows of a step, and preempts sequences to make room for them.

First come the decoding sequences, in order of arrival. The rest of the step's tokens goes to prompts, of running
sequences and of newly admitted ones, in fair order: the principal with least service is served next. A new sequence
needs a seat and blocks; if there are none, sequences of principals that have too many are preempted.

No sequence is preempted while a step is in flight, which may still write to its blocks. A sequence that needs them
gets no row in this step, and the next step is planned when nothing is in flight.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from heapq import heapify, heappop, heapreplace

from descant.scheduling.fairness import Account
from descant.scheduling.life import ExecutorLife
from descant.scheduling.preemption import (
    block_victims,
    blocks_by_account,
    growth_victim,
    is_ahead,
    latest_of,
    may_take,
    richest,
    seats_by_account,
)
from descant.scheduling.rows import StepBuilder
from descant.scheduling.sequence import Sequence, by_arrival
from descant.scheduling.sequence_states import SequenceStates
from descant.scheduling.speculation.draft_choice import StepChoice
from descant.scheduling.speculation.drafting import Drafter
from descant.scheduling.speculation.guess import Guess
from descant.scheduling.speculation.ngram import DraftTree

MAX_READ = 1024  # tokens that drafters read before a step, so that a long prompt does not delay it
_NO_DRAFTS: Mapping[int, DraftTree] = {}


class Planner:
    """Plans one step, and preempts, seats or finishes sequences for it."""

    def __init__(self, states: SequenceStates, life: ExecutorLife, num_seats: int, builder: StepBuilder) -> None:
        self._states = states
        self._life = life
        self._fairness = states.lineup.fairness
        self._running = states.lineup.running
        self._num_seats = num_seats
        self._builder = builder
        self._now = states.now()
        self._draft_choice: StepChoice | None = None  # None: the engine verifies no drafts
        if life.max_draft_nodes:
            is_forced = any(sequence.always_verifies for sequence in self._running)
            self._draft_choice = life.draft_choice.for_step(len(self._running), is_forced=is_forced)
        self._prefills: list[Sequence] = []
        self._is_full = False  # no sequence is admitted any more
        self._least_blocked = math.inf  # least number of blocks, by weight, of principals that lack blocks
        self._seat_holder: Account | None = None  # with most seats by weight; None: not known since seats changed
        self._blocks_by_account: dict[Account, float] | None = None  # None: not known since blocks changed

    def plan(self) -> None:
        """Put the rows into the builder."""
        self._plan_decodes()
        prefills = self._group_prefills()
        while self._builder.num_tokens_left > 0:
            account = None if self._is_full else self._fairness.first()
            if prefills and (next_prefill := self._next_prefill(prefills, account)) is not None:
                self._prefill(next_prefill)
            elif account is None:
                break
            elif not self._serve(account):
                self._fairness.pass_over(account)
        self._fairness.end_step()

    # ---- decodes --------------------------------------------------------------------------------------------------

    def _plan_decodes(self) -> None:
        life, running = self._life, self._running
        block_size, index = life.blocks.block_size, 0
        trees = self._drafts()
        while index < len(running):
            sequence = running[index]
            device = sequence.device
            num_tokens = sequence.num_prompt_tokens + len(sequence.output.token_ids) + device.num_pending
            index += 1
            if device.num_planned + 1 < num_tokens:
                self._prefills.append(sequence)
            elif num_tokens >= device.token_limit and device.num_pending:
                continue  # its last token is in flight
            elif num_tokens <= len(device.block_table) * block_size:
                self._decode(sequence, [], trees)
            elif (new_blocks := life.grow(sequence)) is not None:
                self._decode(sequence, new_blocks, trees)
            elif self._states.may_preempt():
                self._preempt(growth_victim(self._fairness, running, sequence))
                index = bisect_left(running, sequence.id, key=by_arrival)  # again with this one, if it still runs

    def _drafts(self) -> Mapping[int, DraftTree]:
        """Let drafters guess, and return the trees to verify in this step, by sequence id."""
        life, running, choice = self._life, self._running, self._draft_choice
        if choice is None:
            return _NO_DRAFTS
        num_spare = (self._builder.num_tokens_left - len(running)) // (2 * max(1, len(running)))  # nodes of each draft
        max_nodes = min(life.max_draft_nodes, num_spare)
        if max_nodes <= 0:
            return _NO_DRAFTS
        guesses: dict[int, tuple[Drafter, Guess]] = {}
        least_likelihood = choice.least_likelihood
        num_readable = MAX_READ
        for sequence in running:
            drafter, device, num_tokens = sequence.drafter, sequence.device, sequence.num_tokens
            num_left = device.token_limit - num_tokens - 1
            if drafter is None or num_left <= 0 or device.num_computed + 1 != num_tokens:
                continue
            least = 0.0 if sequence.always_verifies else least_likelihood
            if least > 1:
                continue
            num_readable -= drafter.read(sequence, num_readable)
            guess = drafter.guess(sequence, min(max_nodes, num_left), least)
            if guess is not None:
                guesses[sequence.id] = drafter, guess
        return choice.choose(guesses) if guesses else _NO_DRAFTS

    def _decode(self, sequence: Sequence, new_blocks: list[int], trees: Mapping[int, DraftTree]) -> None:
        """Plan a row for the sequence's next token, with its draft if there is one and room for it."""
        life, tree, num_candidates = self._life, trees.get(sequence.id), 0
        drafter, version = sequence.drafter, sequence.adapter
        if self._draft_choice is not None and drafter is not None and version is not None and version.num_heads:
            num_candidates = self._draft_choice.num_candidates(drafter, version.digest)
        if tree is not None:
            new_blocks = new_blocks + life.room_behind(sequence, len(tree.token_ids), len(self._running))
            num_slots = len(sequence.device.block_table) * life.blocks.block_size - sequence.num_tokens
            if num_slots < len(tree.token_ids):
                tree = tree.beginning(num_slots)
                if drafter is not None:
                    drafter.expect(0.0)  # the expectation was that of the whole draft
            if tree is not None and sequence.always_verifies:
                self._fairness.charge_draft(sequence, len(tree.token_ids))
        self._builder.decode(sequence, new_blocks or None, tree, num_candidates)

    # ---- prompts of running sequences -----------------------------------------------------------------------------

    def _group_prefills(self) -> list[tuple[float, int, Account, list[Sequence]]]:
        """Return a heap of accounts by service, each with its prefills, the first last."""
        groups: dict[Account, list[Sequence]] = {}
        for sequence in reversed(self._prefills):
            groups.setdefault(self._fairness.account(sequence), []).append(sequence)
        heap = [(account.service, group[-1].id, account, group) for account, group in groups.items()]
        heapify(heap)
        return heap

    def _next_prefill(
        self, heap: list[tuple[float, int, Account, list[Sequence]]], waiting: Account | None
    ) -> Sequence | None:
        """Return the next running sequence to prefill; None if it is the turn of `waiting`, or there is none."""
        while heap:
            service, number, account, group = heap[0]
            if not group:
                heappop(heap)
            elif service != account.service:
                heapreplace(heap, (account.service, number, account, group))
            elif waiting is not None and waiting.service < service:
                return None
            else:
                sequence = group.pop()
                if sequence.status == "running" and not self._builder.has_prompt_of(sequence):  # not preempted since
                    return sequence
        return None

    def _prefill(self, sequence: Sequence) -> None:
        self._fairness.charge_prompt(sequence, self._builder.prefill(sequence))

    # ---- waiting sequences -------------------------------------------------------------------------------------------

    def _serve(self, account: Account) -> bool:
        """Admit or finish one waiting sequence of the account. Return False if none can be admitted now."""
        life = self._life
        for sequence in account.waiting():
            first = self._states.table.first_of_request(sequence.request_id) if sequence.request.choice else sequence
            if first is not sequence and life.will_share(sequence, first):
                continue
            if sequence.num_tokens >= life.max_tokens:
                self._states.finish(sequence, "length")  # it began on an executor with more room
                return True
            if not self._find_seat(account) or not self._find_blocks(account, sequence):
                return False
            sequence.device.token_limit = life.token_limit(sequence)
            self._states.lineup.seat(sequence, self._now)
            for choice in self._states.table.of_request(sequence.request_id):
                choice.has_started = True
            self._seat_holder = self._blocks_by_account = None
            self._fairness.charge_prompt(sequence, self._builder.admit(sequence))
            return True
        return False

    def _find_seat(self, account: Account) -> bool:
        if self._states.lineup.num_seated < self._num_seats:
            return True
        if self._seat_holder is None:
            self._seat_holder = richest(seats_by_account(self._fairness))
        holder = self._seat_holder
        if holder is None or holder.num_running == 1 or is_ahead(account, holder):
            self._is_full = True  # accounts with a later turn have no claim either
            return False
        victim = latest_of(self._running, holder)
        if victim is None or not may_take(holder, holder.num_running - 1, account, account.num_running, 1):
            return False
        if not self._states.may_preempt():
            return False
        self._preempt(victim)
        return True

    def _find_blocks(self, account: Account, sequence: Sequence) -> bool:
        """Give the sequence its blocks and return whether it got them.

        While a principal lacks blocks, no sequence is admitted whose principal would then hold more than that one.
        """
        life, running = self._life, self._running
        num_needed = life.blocks.num_blocks_for(sequence.num_tokens)
        bar = self._least_blocked * account.weight
        if bar < math.inf and self._num_blocks_of(account) + num_needed > bar:
            return False
        if life.allocate(sequence, len(running)):
            return True
        num_missing = num_needed + life.watermark(len(running)) - life.blocks.num_available
        victims = block_victims(self._fairness, running, account, num_needed, num_missing)
        if victims and self._states.may_preempt():
            for victim in victims:
                if not victim.is_finished:  # with another choice of its request, whose adapter never fits any more
                    self._preempt(victim)
            if life.allocate(sequence, len(running)):
                return True
        self._least_blocked = min(self._least_blocked, self._num_blocks_of(account) / account.weight)
        self._is_full = self._least_blocked == 0
        return False

    def _num_blocks_of(self, account: Account) -> float:
        if self._blocks_by_account is None:
            self._blocks_by_account = blocks_by_account(self._fairness, self._running)
        return self._blocks_by_account.get(account, 0)

    def _preempt(self, sequence: Sequence) -> None:
        self._states.preempt(sequence)
        self._builder.remove_stopped()
        self._seat_holder = self._blocks_by_account = None
        self._is_full = False
