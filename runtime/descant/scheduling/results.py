"""`take_result`: takes over the result of a step for one sequence."""

from __future__ import annotations

from descant.contract.plan import LogprobRows, Row, RowResult, TokenDraft, num_packed, unpack_ints
from descant.scheduling.life import ExecutorLife
from descant.scheduling.sequence import Sequence, TokenLogprobs, unpack_logprobs
from descant.scheduling.speculation.drafting import depth_of
from descant_client.errors import InternalError


def take_result(life: ExecutorLife, sequence: Sequence, row: Row, result: RowResult) -> int | None:
    """Update a running sequence from its row's result. Return the number of new tokens, None if none was sampled.

    Raises:
        InternalError: the row failed, or its result does not match the plan.
        ValueError: packed numbers are cut off, or their count is wrong.
    """
    if result.error is not None:
        raise InternalError(result.error)
    device = sequence.device
    start, end = device.num_computed, device.num_computed + row.num_new_tokens
    is_sampled = end == sequence.num_prompt_tokens + len(sequence.output.token_ids)
    num_sampled = num_packed(result.token_ids)
    if row.draft is not None and num_sampled:
        num_accepted = _take_verdict(sequence, row.draft, num_sampled)
        device.num_planned += num_accepted  # the plan assumed that no node is accepted
        end += num_accepted
    elif num_sampled != is_sampled:
        raise InternalError("the engine computed something else than was planned")
    if result.num_computed != end:
        raise InternalError("the engine computed something else than was planned")
    device.num_computed = end
    if result.prompt_logprobs is not None:
        _put_prompt_logprobs(sequence, start + 1, result.prompt_logprobs)
    if end // life.blocks.block_size > device.num_registered:
        life.register(sequence)
    return _take_sampled(life, sequence, result) if is_sampled else None


def _take_verdict(sequence: Sequence, draft: TokenDraft, num_sampled: int) -> int:
    """Record the outcome of a draft in its drafter; return the number of accepted tokens.

    Raises:
        InternalError: more tokens were accepted than drafted.
    """
    assert sequence.drafter is not None, "a sequence with a draft has a drafter"
    depth = depth_of(unpack_ints(draft.parents))
    num_accepted = num_sampled - 1
    if num_accepted > depth:
        raise InternalError("the engine accepted more than was drafted")
    sequence.drafter.learn(depth, num_accepted)
    return num_accepted


def _take_sampled(life: ExecutorLife, sequence: Sequence, result: RowResult) -> int:
    """Append the sampled tokens, up to the one that ends the sequence; return the number of new tokens."""
    sequence.device.num_pending -= 1
    if len(result.token_ids) == 4:
        token_ids = [int.from_bytes(result.token_ids, "little", signed=True)]
    else:
        token_ids = unpack_ints(result.token_ids)
    logprobs: list[TokenLogprobs] = [] if result.logprobs is None else unpack_logprobs(result.logprobs, token_ids)
    output = sequence.output
    start = len(output.token_ids)
    num_new = sequence.append(token_ids, logprobs)
    if len(token_ids) > 1:
        life.register(sequence)  # blocks filled by the draft, now that its tokens are known
        num_guessed = min(num_new, len(token_ids) - 1)
        if sequence.drafter is not None:
            sequence.drafter.on_gained(num_guessed)
        if output.guessed is not None:
            output.guessed += range(start, start + num_guessed)
    if result.candidates is not None and sequence.drafter is not None:
        sequence.drafter.take_candidates(sequence.num_tokens, result.candidates)
    return num_new


def _put_prompt_logprobs(sequence: Sequence, start: int, rows: LogprobRows) -> None:
    """Store the log-probabilities of the prompt from position `start` on."""
    token_ids = sequence.prompt_ids[start : start + rows.num_tokens]
    sequence.output.prompt_logprobs[start - 1 :] = unpack_logprobs(rows, token_ids)
