"""Stand-ins for tests of the scheduler: an engine that checks everything and computes nothing, sinks, a step loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from descant.scheduling.adapter_work import AdapterLoad
from descant.scheduling.plan import (
    NO_ADAPTER,
    EngineLimits,
    Row,
    RowResult,
    StepPlan,
    StepResult,
    TokenDraft,
    pack_ints,
    unpack_ints,
    validate_plan,
)
from descant.scheduling.policy import Policy
from descant.scheduling.rows import PlannedStep
from descant.scheduling.sequence import Sequence, SequenceTable, Stopper
from descant.scheduling.version import AdapterVersion
from descant_client.errors import DescantError
from descant_client.protocol import SamplingParams
from fake_arena import FakeArena
from fake_model import Behavior, FakeRow, extend_history, hash_history, logprob_rows
from fake_model import counter as counter
from fake_model import echo as echo

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
        self._copy_blocks(unpack_ints(plan.copy_blocks))
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
        return StepResult(plan.epoch, plan.step, tuple(results))

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

    def _copy_blocks(self, pairs: list[int]) -> None:
        for source, target in zip(pairs[::2], pairs[1::2], strict=True):
            for offset in range(self.limits.block_size):
                self._cache[target, offset] = self._cache[source, offset]

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
        if isinstance(row.draft, TokenDraft):
            return self._verify(row, row.draft, state, histories)
        return self._result(row, state, start, histories)

    def _verify(self, row: Row, draft: TokenDraft, state: FakeRow, histories: list[int]) -> RowResult:
        ids, parents = unpack_ints(draft.token_ids), unpack_ints(draft.parents)
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
        return RowResult(row.row, state.num_computed, pack_ints(state.tokens[-len(said) :]), logprobs)

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
        return result


@dataclass
class FakeSink:
    """Keeps what it is told. It has room until `budget` tokens are unread."""

    budget: int = 10**9
    unread: int = 0
    token_ids: list[int] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)

    def put(self, sequence: Sequence, num_new: int) -> bool:
        assert not self.ended, "tokens after the end"
        self.token_ids += sequence.output_ids[len(sequence.output_ids) - num_new :]
        self.unread += num_new
        return self.unread <= self.budget

    def end(self, sequence: Sequence) -> None:
        assert not self.ended, "ended twice"
        self.ended.append(sequence)


def version(digest: str, num_bytes: int = 64) -> AdapterVersion:
    """Return an adapter version that exists only on paper."""
    return AdapterVersion(digest=digest, path=f"{digest}.safetensors", num_bytes=num_bytes, max_rank=8, num_modules=1)


class Loop:
    """What the scheduler actor does, without waiting: a policy and an engine with as many steps as it takes."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 64,
        adapter_bytes: int = 1024,
        max_queued: int | None = None,
    ) -> None:
        self.engine = engine or FakeEngine()
        self.adapter_bytes = adapter_bytes
        self.table = SequenceTable()
        self.clock = 0.0
        self.budgets: dict[str, Any] = {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_queued": max_queued,
        }
        self.lives: list[bool] = []  # of executors that died: were they of use?
        self.loads: list[AdapterLoad] = []  # started, not done
        self.in_flight: deque[PlannedStep] = deque()
        self.load_error: Callable[[AdapterLoad], DescantError | None] = lambda load: None
        self.restart_policy()

    def restart_policy(self) -> None:
        """Start a new policy on the table, with a new executor."""
        self.policy = Policy(self.table, **self.budgets, now=lambda: self.clock)
        self._start_executor()

    def submit(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int | None = 8,
        n: int = 1,
        request_id: str | None = None,
        seed: int = 0,
        sinks: list[FakeSink] | None = None,
        stop: frozenset[int] = frozenset(),
        stopper: Stopper | None = None,
        adapter: AdapterVersion | None = None,
        scope: str = "",
        num_logprobs: int = -1,
        num_prompt_logprobs: int = -1,
        **fields: Any,
    ) -> list[Sequence]:
        """Submit a request and return its choices; `fields` are more of `Sequence`'s."""
        sequences = [
            Sequence(
                id=(sequence_id := self.table.next_id()),
                request_id=request_id or str(sequence_id - choice),
                prompt_ids=prompt_ids,
                sampling=SamplingParams(),
                seed=seed,
                sink=sinks[choice] if sinks else FakeSink(),
                choice=choice,
                max_tokens=max_tokens,
                stop_token_ids=stop,
                stopper=stopper,
                num_logprobs=num_logprobs,
                num_prompt_logprobs=num_prompt_logprobs,
                adapter=adapter,
                cache_scope=scope,
                **fields,
            )
            for choice in range(n)
        ]
        self.policy.submit(sequences)
        return sequences

    def start_loads(self) -> None:
        """Move what is to be moved and take the loads that are due."""
        work = self.policy.adapter_work()
        for move in work.moves:
            self.engine.arena.move(move)
        self.loads += work.loads
        for version in work.prefetches:
            self.policy.prefetched(version.digest)

    def finish_load(self, index: int = 0) -> None:
        """Carry out a started load."""
        load = self.loads.pop(index)
        if (error := self.load_error(load)) is not None:
            self.policy.load_failed(load, error)
        else:
            self.engine.arena.load(load)
            self.policy.loaded(load)
        self.start_loads()

    def crash(self, reason: str = "killed") -> None:
        """Lose the executor, whatever it is doing, and start another."""
        self.lives.append(self.policy.executor_lost(reason))
        self._start_executor()

    def launch(self) -> bool:
        """Plan and launch a step. False: nothing to run now."""
        planned = self.policy.plan()
        self.start_loads()
        if planned is None:
            return False
        self.engine.launch(planned.plan)
        self.in_flight.append(planned)
        return True

    def collect(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Run and apply the oldest step; `meanwhile` happens in between."""
        planned = self.in_flight.popleft()
        try:
            result = self.engine.collect()
        except EngineDied as exc:
            self.crash(str(exc))
        else:
            meanwhile()
            self.policy.apply(planned, result)

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Launch all the steps there can be and apply the first of them. False: nothing to run."""
        self.clock += 1.0
        while self.launch():
            pass
        if not self.in_flight:
            return False
        self.collect(meanwhile)
        return True

    def run(self, max_steps: int = 1000) -> None:
        """Step, with every load done at once, until nothing can run. Fails if that takes more than `max_steps`."""
        for _ in range(max_steps):
            while self.loads:
                self.finish_load()
            if not self.step() and not self.loads:
                return
        raise AssertionError(f"still running after {max_steps} steps")

    def _start_executor(self) -> None:
        self.engine.restart()
        self.loads.clear()
        self.in_flight.clear()
        self.policy.executor_up(self.engine.limits, self.adapter_bytes)
