"""What a step's result says of the sequences in it."""

from __future__ import annotations

from descant.scheduling.life import ExecutorLife
from descant.scheduling.plan import LogprobRows, Row, RowResult, unpack_ints
from descant.scheduling.sequence import Sequence, TokenLogprobs, unpack_logprobs
from descant_client.errors import InternalError


def take_computed(life: ExecutorLife, sequence: Sequence, row: Row, result: RowResult) -> bool:
    """Take note of the positions that were computed; return whether a token was sampled after them.

    Raises:
        InternalError: the row failed, or the engine did something else than was planned.
    """
    if result.error is not None:
        raise InternalError(result.error)
    start, end = sequence.num_computed, sequence.num_computed + row.num_new_tokens
    is_sampled = end == len(sequence.prompt_ids) + len(sequence.output_ids)
    if result.num_computed != end or (len(result.token_ids) == 4) != is_sampled:
        raise InternalError("the engine computed something else than was planned")
    sequence.num_computed = end
    if result.prompt_logprobs is not None:
        _put_prompt_logprobs(sequence, start + 1, result.prompt_logprobs)
    if end // life.blocks.block_size > sequence.num_registered:
        life.register(sequence)
    return is_sampled


def take_sampled(sequence: Sequence, result: RowResult) -> int:
    """Append what was sampled, up to what ends the sequence; return how many tokens."""
    sequence.num_pending -= 1
    if len(result.token_ids) == 4:
        token_ids = [int.from_bytes(result.token_ids, "little", signed=True)]
    else:
        token_ids = unpack_ints(result.token_ids)
    logprobs: list[TokenLogprobs] = [] if result.logprobs is None else unpack_logprobs(result.logprobs, token_ids)
    return sequence.append(token_ids, logprobs)


def _put_prompt_logprobs(sequence: Sequence, start: int, rows: LogprobRows) -> None:
    """Store the log-probabilities of the prompt from position `start` on."""
    token_ids = sequence.prompt_ids[start : start + rows.num_tokens]
    sequence.prompt_logprobs[start - 1 :] = unpack_logprobs(rows, token_ids)
