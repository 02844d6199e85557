"""`StepBuilder`: turns decisions about sequences into the rows of a `StepPlan`."""

from __future__ import annotations

from typing import NamedTuple

from descant.scheduling.plan import NO_LOGPROBS, Admit, LogprobRows, Row, RowResult, StepPlan, pack_ints, unpack_ints
from descant.scheduling.sequence import Sequence, TokenLogprobs, unpack_logprobs


class PlannedStep(NamedTuple):
    """A plan, and the sequences behind its rows, in the same order."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]


class StepBuilder:
    """Collects the rows of one step within a budget of tokens."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self.num_tokens_left = max_num_batched_tokens
        self._admits: list[Admit] = []
        self._rows: list[Row] = []
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._rows)

    def decode(self, sequence: Sequence, new_blocks: list[int] | None = None) -> None:
        """Compute the sequence's last token."""
        if new_blocks is None:
            row = sequence.decode_row
            if row is None:
                assert sequence.spans is not None, "a running sequence has its adapter"
                row = sequence.decode_row = Row(sequence.id, 1, sequence.spans)
        else:
            assert sequence.spans is not None, "a running sequence has its adapter"
            row = Row(sequence.id, 1, sequence.spans, pack_ints(new_blocks))
        self._rows.append(row)
        self._sequences.append(sequence)
        self.num_tokens_left -= 1

    def prefill(self, sequence: Sequence) -> None:
        """Compute as many of the sequence's uncomputed tokens as the budget allows, at least one."""
        assert sequence.spans is not None, "a running sequence has its adapter"
        num_new_tokens = min(sequence.num_tokens - sequence.num_computed, self.num_tokens_left)
        assert num_new_tokens > 0, "a prefill without tokens"
        num_prompt_logprobs = sequence.num_prompt_logprobs if sequence.needs_prompt_logprobs else NO_LOGPROBS
        row = Row(sequence.id, num_new_tokens, sequence.spans, num_prompt_logprobs=num_prompt_logprobs)
        self._rows.append(row)
        self._sequences.append(sequence)
        self.num_tokens_left -= num_new_tokens

    def admit(self, sequence: Sequence) -> None:
        """Make the sequence a row of the engine, with all its blocks, and prefill it."""
        self._admits.append(
            Admit(
                row=sequence.id,
                token_ids=pack_ints(sequence.prompt_ids) + pack_ints(sequence.output_ids),
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_cached_tokens=sequence.num_computed,
                blocks=pack_ints(sequence.block_table),
                sampling=sequence.sampling,
                seed=sequence.seed,
                choice=sequence.choice,
                num_logprobs=sequence.num_logprobs,
            )
        )
        sequence.is_row = True
        self.prefill(sequence)

    def build(self, epoch: int, step: int, drop: list[int]) -> PlannedStep:
        """Return the step."""
        plan = StepPlan(epoch, step, tuple(self._admits), tuple(self._rows), pack_ints(drop))
        return PlannedStep(plan, tuple(self._sequences))


def sampled_tokens(result: RowResult) -> list[int]:
    """Return the ids a row's step sampled."""
    if len(result.token_ids) == 4:
        return [int.from_bytes(result.token_ids, "little", signed=True)]
    return unpack_ints(result.token_ids)


def sampled_logprobs(result: RowResult, token_ids: list[int]) -> list[TokenLogprobs]:
    """Return the log-probabilities of the sampled tokens, none if they were not asked for."""
    return [] if result.logprobs is None else unpack_logprobs(result.logprobs, token_ids)


def put_prompt_logprobs(sequence: Sequence, start: int, rows: LogprobRows) -> None:
    """Store the log-probabilities of the prompt from position `start` on."""
    token_ids = sequence.prompt_ids[start : start + rows.num_tokens]
    sequence.prompt_logprobs[start - 1 :] = unpack_logprobs(rows, token_ids)
