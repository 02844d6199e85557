"""An engine without a model: same plans and results, text at a configured pace. Imports no torch.

It checks plans by the same rules as the model's engine, so it can replace it in tests of the other components.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from descant.contract.engine import EngineInfo, StagedAdapter, check_plan
from descant.contract.plan import (
    NO_LOGPROBS,
    Admit,
    EngineLimits,
    LogprobRows,
    Row,
    RowResult,
    StepPlan,
    StepResult,
    pack_floats,
    pack_ints,
    unpack_ints,
)

_NUM_BYTES = 256  # ids 0..255 are bytes, then come the tokenizer's special tokens
_END = 257
_LOREM = (
    b"Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore et dolore "
    b"magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut aliquip ex ea commodo "
    b"consequat. "
)
_WORD_STARTS = (0, *(i + 1 for i, byte in enumerate(_LOREM[:-1]) if byte == ord(" ")))


@dataclass(frozen=True, slots=True)
class DummyOptions:
    """Sizes and pace of a dummy engine. `tokens_per_s` is per sequence; 0 = no limit."""

    tokens_per_s: float = 50.0
    num_blocks: int = 4096
    block_size: int = 16
    max_context: int = 4096
    vocab_size: int = _NUM_BYTES + 16
    num_adapter_slots: int = 64
    num_adapter_bytes: int = 256 * 1024 * 1024
    max_num_batched_tokens: int = 1024
    max_steps_in_flight: int = 1


@dataclass(frozen=True, slots=True)
class _Nothing:
    num_bytes: int = 0


_NOTHING = _Nothing()


class DummyEngine:
    """An engine that emits lorem ipsum, from a word selected by seed and choice. Adapters change nothing."""

    def __init__(self, options: DummyOptions) -> None:
        self._options = options
        self._rows: dict[int, _DummyRow] = {}
        self._epoch = 0
        self._due_s = 0.0  # monotonic time at which the latest tokens are released
        self._launched: deque[tuple[StepResult, float | None]] = deque()  # each with its own due time
        self.limits = EngineLimits(
            num_blocks=options.num_blocks,
            block_size=options.block_size,
            max_context=options.max_context,
            vocab_size=options.vocab_size,
            num_adapter_slots=options.num_adapter_slots,
            max_steps_in_flight=options.max_steps_in_flight,
        )
        self.info = EngineInfo(
            dtype="float32",
            device="cpu",
            eos_token_ids=(_END,),
            num_parameters=0,
            num_adapter_bytes=options.num_adapter_bytes,
            is_invariant=True,
        )

    def stage_adapter(self, path: Path | str) -> StagedAdapter:
        """Return an empty version without reading: every adapter loads."""
        return _NOTHING

    def place_adapter(self, adapter_slot: int, offset: int, staged: StagedAdapter) -> None:
        """Do nothing."""

    def move_adapter(self, adapter_slot: int, offset: int) -> None:
        """Do nothing."""

    def launch(self, plan: StepPlan) -> None:
        """Start a step. Its result is due when the pace allows its tokens.

        Raises:
            InvalidRequest: as the model's engine.
            UnsupportedRequest: as the model's engine.
        """
        started_s = time.monotonic()
        if plan.epoch != self._epoch:  # a new scheduler, which does not know the existing rows
            self._rows.clear()
            self._epoch = plan.epoch
        check_plan(plan, self.limits, self._rows, self._options.max_num_batched_tokens)
        for dropped in unpack_ints(plan.drop):
            self._rows.pop(dropped, None)
        for admit in plan.admit:
            self._rows[admit.row] = _DummyRow(admit)
        results = tuple(self._rows[row.row].advance(row) for row in plan.rows)
        due_s = None
        if any(result.token_ids for result in results) and self._options.tokens_per_s > 0:
            # Counting from the last due time compensates for time spent between steps, but not for idle time.
            due_s = self._due_s = max(started_s, self._due_s + 1 / self._options.tokens_per_s)
        self._launched.append((StepResult(plan.epoch, plan.step, results, (due_s or started_s) - started_s), due_s))

    def block_until_done(self) -> None:
        """Block until the oldest launched step is due."""
        due_s = self._launched[0][1]
        if due_s is not None:
            time.sleep(max(0.0, due_s - time.monotonic()))

    def collect(self) -> StepResult:
        """Return the result of the oldest launched step. Blocks until it is due."""
        self.block_until_done()
        return self._launched.popleft()[0]

    def step(self, plan: StepPlan) -> StepResult:
        """Carry out a plan: `launch` and `collect` in one.

        Raises:
            InvalidRequest: as the model's engine.
            UnsupportedRequest: as the model's engine.
        """
        self.launch(plan)
        return self.collect()


class _DummyRow:
    def __init__(self, admit: Admit) -> None:
        self.num_computed = admit.num_cached_tokens
        self.num_blocks = len(unpack_ints(admit.blocks))
        self._prompt_ids = unpack_ints(admit.token_ids)[: admit.num_prompt_tokens]
        self.num_tokens = len(unpack_ints(admit.token_ids))
        self._first = _WORD_STARTS[_mix(admit.seed, admit.choice) % len(_WORD_STARTS)]
        self._num_logprobs = admit.num_logprobs

    def advance(self, planned: Row) -> RowResult:
        start, end = self.num_computed, self.num_computed + planned.num_new_tokens
        self.num_computed = end
        self.num_blocks += len(unpack_ints(planned.blocks))
        scored = self._prompt_ids[start + 1 : end + 1]
        prompt_logprobs = _logprobs(scored, planned.num_prompt_logprobs) if scored else None
        if end < self.num_tokens:
            return RowResult(planned.row, end, prompt_logprobs=prompt_logprobs)
        token_id = _LOREM[(self._first + self.num_tokens - len(self._prompt_ids)) % len(_LOREM)]
        self.num_tokens += 1
        logprobs = _logprobs([token_id], self._num_logprobs)
        return RowResult(planned.row, end, pack_ints([token_id]), logprobs, prompt_logprobs)


def _mix(seed: int, choice: int) -> int:
    """Return a hash that spreads choices and neighboring seeds over the text (Knuth's multiplicative hash)."""
    return ((seed + 31 * choice) * 2_654_435_761 % 2**32) >> 16


def _logprobs(token_ids: list[int], num_top: int) -> LogprobRows | None:
    """Return made-up log-probabilities: each alternative is the next byte, and e times less likely than the last."""
    if num_top == NO_LOGPROBS:
        return None
    top_ids = [(token_id + i) % _NUM_BYTES for token_id in token_ids for i in range(num_top)]
    top = [-1.0 - i for _ in token_ids for i in range(num_top)]
    chosen = [-1.0] * len(token_ids)
    return LogprobRows(len(token_ids), num_top, pack_floats(chosen), pack_ints(top_ids), pack_floats(top))
