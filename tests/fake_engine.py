"""`FakeEngine`: an engine for tests of the scheduler that checks everything and computes nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from descant.contract.plan import (
    NO_ADAPTER,
    EngineLimits,
    HeadCandidates,
    Row,
    RowResult,
    StepPlan,
    StepResult,
    TokenDraft,
    pack_floats,
    pack_ints,
    unpack_ints,
    validate_plan,
)
from fake_arena import FakeArena
from fake_model import Behavior, FakeRow, extend_history, hash_history, logprob_rows

LIMITS = EngineLimits(num_blocks=64, block_size=4, max_context=200, vocab_size=1000, num_adapter_slots=4)


class EngineDied(Exception):
    """The fake executor is gone."""


@dataclass
class FakeEngine:
    """A callable from `StepPlan` to `StepResult` which holds every plan to its contract.

    Instead of K/V a slot of the cache holds the history up to its position. A row only runs if each of its earlier
    positions holds exactly that row's history, so that any mistake with blocks, prefixes or adapters is an
    AssertionError. `kills` says whether a row ends the engine, `row_error` whether it fails alone. What a launched
    step reads and writes it reads and writes when it is collected, so that whatever is taken from it before shows.
    """

    limits: EngineLimits = LIMITS
    behavior: Behavior = hash_history
    kills: Callable[[FakeRow], bool] = lambda row: False
    row_error: Callable[[FakeRow], str | None] = lambda row: None
    heads: Callable[[FakeRow, int], list[list[int]]] = lambda row, history: []  # what each proposes, likeliest first
    seconds: Callable[[StepPlan], float] = lambda plan: 0.0  # that a step says it took
    plans: list[StepPlan] = field(default_factory=list)
    rows: dict[int, FakeRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.restart()
        self.epoch = 0

    def restart(self) -> None:
        """Lose everything."""
        self.rows.clear()
        self._step = 0
        self.launched: deque[StepPlan] = deque()
        self._cache: dict[tuple[int, int], int] = {}
        self.arena = FakeArena()

    def __call__(self, plan: StepPlan) -> StepResult:
        """Carry out a plan. Raises EngineDied, or AssertionError and InvalidRequest if the plan is wrong."""
        self.launch(plan)
        return self.collect()

    def launch(self, plan: StepPlan) -> None:
        """Take a plan. Raises AssertionError and InvalidRequest if it is wrong."""
        self._check_order(plan)
        validate_plan(plan, self.limits, list(self.rows))
        self._check_given_blocks(plan)
        self.plans.append(plan)
        self.launched.append(plan)
        for row in unpack_ints(plan.drop):
            del self.rows[row]
        for admit in plan.admit:
            assert admit.row not in self.rows, "a row is admitted twice"
            blocks = unpack_ints(admit.blocks)
            self.rows[admit.row] = FakeRow(admit, unpack_ints(admit.token_ids), blocks, admit.num_cached_tokens)

    def collect(self) -> StepResult:
        """Carry out the oldest launched plan. Raises EngineDied, or AssertionError if it is wrong."""
        plan = self.launched.popleft()
        for row in plan.rows:
            if self.kills(self.rows[row.row]):
                raise EngineDied(f"row {row.row}")
        histories = [self._read(row) for row in plan.rows]  # what a step writes is not there when it begins
        results = [self._write(row, history) for row, history in zip(plan.rows, histories, strict=True)]
        return StepResult(plan.epoch, plan.step, tuple(results), self.seconds(plan))

    def history(self, row: FakeRow, adapter: str) -> list[int]:
        """Return the history at each position."""
        histories, history = [], 0
        for token_id in row.tokens:
            history = extend_history(history, token_id, adapter)
            histories.append(history)
        return histories

    def _check_order(self, plan: StepPlan) -> None:
        if plan.epoch != self.epoch:
            assert plan.epoch > self.epoch, "epochs grow"
            self.epoch, self._step = plan.epoch, 0
            self.rows.clear()
        assert plan.step == self._step + 1, "steps are numbered one by one"
        assert plan.rows, "a step without rows"
        assert len(self.launched) < self.limits.max_steps_in_flight, "too many steps in flight"
        self._step = plan.step

    def _check_given_blocks(self, plan: StepPlan) -> None:
        """Check that no block which a step in flight may write to is given to somebody else."""
        cached = {admit.row: admit.num_cached_tokens // self.limits.block_size for admit in plan.admit}
        given = [block for admit in plan.admit for block in unpack_ints(admit.blocks)[cached[admit.row] :]]
        given += [block for row in plan.rows for block in unpack_ints(row.blocks)]
        in_flight = {row.row for launched in self.launched for row in launched.rows}
        owned = {block for row in in_flight for block in self.rows[row].blocks}
        assert owned.isdisjoint(given), "a block is given away in flight"
        assert in_flight.isdisjoint(unpack_ints(plan.drop)), "a row is dropped in flight"

    def _slot(self, row: FakeRow, position: int) -> tuple[int, int]:
        return row.blocks[position // self.limits.block_size], position % self.limits.block_size

    def _read(self, row: Row) -> list[int]:
        state = self.rows[row.row]
        state.blocks += unpack_ints(row.blocks)
        histories = self.history(state, self._adapter(row))
        for position in range(state.num_computed):
            assert self._cache[self._slot(state, position)] == histories[position], f"position {position} is wrong"
        return histories

    def _adapter(self, row: Row) -> str:
        slot = row.spans[0].adapter_slot
        return "" if slot == NO_ADAPTER else self.arena.digest_in(slot)

    def _write(self, row: Row, histories: list[int]) -> RowResult:
        state = self.rows[row.row]
        start, end = state.num_computed, state.num_computed + row.num_new_tokens
        assert end <= len(state.tokens), "more positions are asked for than there are tokens"
        for position in range(start, end):
            self._cache[self._slot(state, position)] = histories[position]
        state.num_computed = end
        if (error := self.row_error(state)) is not None:
            state.tokens += [0] * (end == len(state.tokens))  # a later step may have been planned with it
            return RowResult(row.row, start, error=error)
        if row.draft is not None:
            return self._verify(row, row.draft, state, histories)
        return self._result(row, state, start, histories)

    def _verify(self, row: Row, draft: TokenDraft, state: FakeRow, histories: list[int]) -> RowResult:
        ids, parents = unpack_ints(draft.token_ids), unpack_ints(draft.parents)
        assert state.num_computed + len(ids) <= self.limits.max_context, "a draft goes beyond the context"
        assert state.num_computed == len(state.tokens), "a draft follows the last token"
        for node in range(len(ids)):
            self._cache[self._slot(state, state.num_computed + node)] = -1  # until it is accepted and moved
        adapter, said, node = self._adapter(row), histories[-1:], -1
        while True:
            token_id = self.behavior(state, said[-1]) % self.limits.vocab_size
            state.tokens.append(token_id)
            children = [i for i, parent in enumerate(parents) if parent == node and ids[i] == token_id]
            if not children:
                break
            node = children[0]
            said.append(extend_history(said[-1], token_id, adapter))
            self._cache[self._slot(state, state.num_computed)] = said[-1]
            state.num_computed += 1
        logprobs = logprob_rows(said, state.admit.num_logprobs) if state.admit.num_logprobs >= 0 else None
        candidates = self._propose(row, state)
        token_ids = pack_ints(state.tokens[-len(said) :])
        return RowResult(row.row, state.num_computed, token_ids, logprobs, candidates=candidates)

    def _propose(self, row: Row, state: FakeRow) -> HeadCandidates | None:
        if not row.num_candidates:
            return None
        assert self.arena.digest_in(row.heads_slot), "heads are on the device"
        proposed = self.heads(state, self.history(state, self._adapter(row))[-1])
        ids = [token_id for one in proposed for token_id in one[: row.num_candidates]]
        likelihoods = [0.5**rank for one in proposed for rank in range(1, 1 + len(one[: row.num_candidates]))]
        return HeadCandidates(row.num_candidates, pack_ints(ids), pack_floats(likelihoods))

    def _result(self, row: Row, state: FakeRow, start: int, histories: list[int]) -> RowResult:
        end, num_prompt = state.num_computed, state.admit.num_prompt_tokens
        token_ids: list[int] = []
        if end == len(state.tokens):
            token_ids = [self.behavior(state, histories[-1]) % self.limits.vocab_size]
        wants_logprobs = token_ids and state.admit.num_logprobs >= 0
        wants_prompt_logprobs = row.num_prompt_logprobs >= 0
        result = RowResult(
            row.row,
            end,
            pack_ints(token_ids),
            logprobs=logprob_rows(histories[-1:], state.admit.num_logprobs) if wants_logprobs else None,
            prompt_logprobs=logprob_rows(histories[start : min(end, num_prompt - 1)], row.num_prompt_logprobs)
            if wants_prompt_logprobs
            else None,
        )
        state.tokens += token_ids
        return msgspec.structs.replace(result, candidates=self._propose(row, state))
