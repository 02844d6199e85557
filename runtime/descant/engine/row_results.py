"""The results of a resolved step's rows, and the update of the engine's row states."""

from __future__ import annotations

import numpy as np

from descant.contract.plan import HeadCandidates, LogprobRows, RowResult, pack_ints
from descant.engine.batch import ScheduledRow
from descant.engine.sampling import NOT_FINITE
from descant.engine.tree import Accepted


def row_result(
    row: ScheduledRow,
    accepted: Accepted | None,
    prompt_logprobs: LogprobRows | None,
    candidates: HeadCandidates | None = None,
) -> RowResult:
    """Store the sampled tokens in the row's state and return the row's result. A lost row stays lost."""
    state, tokens = row.state, () if accepted is None else accepted.tokens
    for position, token in enumerate(tokens, start=row.end):
        state.learn(position, max(0, token.token_id))
        state.error = state.error or token.error
    num_computed = row.end + max(0, len(tokens) - 1)
    state.num_computed = max(state.num_computed, num_computed)  # steps launched since may have computed more
    if prompt_logprobs is not None and not _is_finite(prompt_logprobs):
        state.error = state.error or NOT_FINITE
        prompt_logprobs = None
    if state.error is not None:
        return RowResult(state.row, row.end, prompt_logprobs=prompt_logprobs, error=state.error)
    logprobs = [token.logprobs for token in tokens if token.logprobs is not None]
    return RowResult(
        state.row,
        num_computed,
        pack_ints([token.token_id for token in tokens]),
        concatenated(logprobs) if logprobs else None,
        prompt_logprobs,
        candidates=candidates,
    )


def _is_finite(logprobs: LogprobRows) -> bool:
    return all(
        bool(np.isfinite(np.frombuffer(packed, dtype="<f4")).all()) for packed in (logprobs.chosen, logprobs.top)
    )


def concatenated(parts: list[LogprobRows]) -> LogprobRows:
    """Join log-probabilities of successive tokens, all with the same number of alternatives."""
    return LogprobRows(
        num_tokens=sum(part.num_tokens for part in parts),
        num_top=parts[0].num_top,
        chosen=b"".join(part.chosen for part in parts),
        top_ids=b"".join(part.top_ids for part in parts),
        top=b"".join(part.top for part in parts),
    )
