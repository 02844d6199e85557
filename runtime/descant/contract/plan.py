"""`StepPlan` and `StepResult`: everything that passes between scheduling and the engine.

The engine keeps one *row* per sequence: its tokens, block table, sampling state and the number of positions whose K/V
is in the cache. The scheduler's sequences are authoritative: any row can be rebuilt with one `Admit`. A step first
drops rows, then admits rows, then runs one forward pass over its `rows`. A plan may be sent before the result of the
previous one is known; it then assumes that the previous step computes and samples as planned.

Integers travel packed: little-endian int32 in bytes (`pack_ints`), floats likewise as float32.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

from descant_client.errors import InvalidRequest, UnsupportedRequest
from descant_client.protocol import SamplingParams

NO_ADAPTER = -1  # adapter slot of the base model
NO_LOGPROBS = -1

_ITEM_BYTES = 4

_Number = TypeVar("_Number", int, float)


def pack_ints(values: Iterable[int]) -> bytes:
    """Return `values` as little-endian int32. Raises OverflowError beyond 32 bits."""
    return _little_endian(array("i", values)).tobytes()


def unpack_ints(data: bytes) -> list[int]:
    """Invert `pack_ints`. Raises ValueError if `data` is not a whole number of int32."""
    values = array("i")
    values.frombytes(data)
    return _little_endian(values).tolist()


def num_packed(data: bytes) -> int:
    """Return the number of integers packed in `data`."""
    return len(data) // _ITEM_BYTES


def pack_floats(values: Iterable[float]) -> bytes:
    """Return `values` as little-endian float32."""
    return _little_endian(array("f", values)).tobytes()


def unpack_floats(data: bytes) -> list[float]:
    """Invert `pack_floats`."""
    values = array("f")
    values.frombytes(data)
    return _little_endian(values).tolist()


def _little_endian(values: array[_Number]) -> array[_Number]:
    if sys.byteorder == "big":
        values.byteswap()
    return values


class AdapterSpan(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of a sequence: from this position on, the adapter in this slot applies (`NO_ADAPTER`: none)."""

    from_position: int
    adapter_slot: int


BASE_SPANS = (AdapterSpan(0, NO_ADAPTER),)


class TokenDraft(msgspec.Struct, frozen=True):
    """A token tree to verify: `parents[i]` is the node before node i (smaller than i), -1 for the row's last token."""

    token_ids: bytes
    parents: bytes


class Admit(msgspec.Struct, frozen=True):
    """Everything the engine needs to make a row for a sequence.

    `token_ids` are prompt and output so far. The K/V of the first `num_cached_tokens` (fewer than all) is already in
    `blocks`, the packed ids of the row's first blocks. `num_logprobs` alternatives are reported per output token.
    """

    row: int
    token_ids: bytes
    num_prompt_tokens: int
    num_cached_tokens: int
    blocks: bytes
    sampling: SamplingParams
    seed: int
    choice: int = 0
    num_logprobs: int = NO_LOGPROBS


class Row(msgspec.Struct, frozen=True):
    """One row's part in a step: compute its next `num_new_tokens` positions.

    If the last known token is among them, the row is sampled: its result carries the next token, and the engine appends
    it to the row, so that the next step needs no ids. `blocks` are packed ids appended to the block table, enough for
    the longest case. `num_prompt_logprobs` >= 0 asks for the log-probability of each token that follows a computed
    prompt position. A row with a draft computes only its last known token and the draft's nodes. The nodes lie in the
    cache behind that token, in their order, so the blocks must reach that far. The result of such a row carries every
    token sampled on the accepted path through the tree, and the K/V of that path is moved into place. With
    `num_candidates`, each of the draft heads in `heads_slot` proposes as many tokens for the positions that follow the
    sampled token.
    """

    row: int
    num_new_tokens: int
    spans: tuple[AdapterSpan, ...] = BASE_SPANS
    blocks: bytes = b""
    draft: TokenDraft | None = None
    num_prompt_logprobs: int = NO_LOGPROBS
    heads_slot: int = NO_ADAPTER
    num_candidates: int = 0


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass, and the rows that change before it. `drop` is packed row ids."""

    epoch: int
    step: int
    admit: tuple[Admit, ...] = ()
    rows: tuple[Row, ...] = ()
    drop: bytes = b""


class LogprobRows(msgspec.Struct, frozen=True):
    """Log-probabilities of `num_tokens` tokens, packed: the chosen ones, and `num_top` alternatives each."""

    num_tokens: int
    num_top: int
    chosen: bytes  # float32 [num_tokens]
    top_ids: bytes  # int32 [num_tokens, num_top]
    top: bytes  # float32 [num_tokens, num_top]


class HeadCandidates(msgspec.Struct, frozen=True):
    """Proposals of draft heads: head i proposes the token i + 1 after the last one sampled, the likeliest first."""

    num_candidates: int  # of each head
    token_ids: bytes  # int32 [num_heads, num_candidates]
    probabilities: bytes  # float32 likewise


class RowResult(msgspec.Struct, frozen=True):
    """The effect of a step on a row. `num_computed` is the number of positions whose K/V is valid now."""

    row: int
    num_computed: int
    token_ids: bytes = b""  # sampled in this step, packed; several if a draft was accepted
    logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None  # of the prompt tokens after the computed positions
    error: str | None = None
    candidates: HeadCandidates | None = None


class StepResult(msgspec.Struct, frozen=True):
    """The answer to a `StepPlan` of the same epoch and step, one entry per row of the plan, in its order."""

    epoch: int
    step: int
    rows: tuple[RowResult, ...]
    device_s: float = 0.0


class EngineLimits(msgspec.Struct, frozen=True):
    """Limits of an engine, which `validate_plan` checks plans against.

    With `max_steps_in_flight` above 1, the engine takes a plan before it has answered the previous one. A row's draft
    has at most `max_draft_nodes` nodes; 0 means that the engine verifies no drafts.
    """

    num_blocks: int
    block_size: int
    max_context: int
    vocab_size: int
    num_adapter_slots: int
    max_steps_in_flight: int = 1
    max_draft_nodes: int = 0


def validate_plan(plan: StepPlan, limits: EngineLimits, rows: Sequence[int] = ()) -> None:
    """Check a plan against the engine's limits and its present `rows`, before any of it is carried out.

    Raises:
        InvalidRequest: the plan contradicts itself or the limits; the field names the row.
        UnsupportedRequest: the plan uses a feature that this engine does not have yet.
    """
    known = (set(rows) - set(_ints(plan.drop, "drop"))) | {admit.row for admit in plan.admit}
    for admit in plan.admit:
        _validate_admit(admit, limits)
    seen: set[int] = set()
    for row in plan.rows:
        where = f"rows[{row.row}]"
        if row.row not in known or row.row in seen:
            raise InvalidRequest(where, "is not a row of the engine" if row.row not in known else "is planned twice")
        seen.add(row.row)
        _validate_row(row, limits, where)


def _validate_admit(admit: Admit, limits: EngineLimits) -> None:
    where = f"admit[{admit.row}]"
    token_ids = _ints(admit.token_ids, where)
    if not 0 < len(token_ids) <= limits.max_context:
        raise InvalidRequest(where, f"has {len(token_ids)} tokens; 1 to {limits.max_context} fit the context")
    if not 0 < admit.num_prompt_tokens <= len(token_ids):
        raise InvalidRequest(where, "num_prompt_tokens is not within its tokens")
    if min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
        raise InvalidRequest(where, f"a token id is outside the vocabulary of {limits.vocab_size}")
    num_slots = _check_blocks(admit.blocks, limits, where) * limits.block_size
    if not 0 <= admit.num_cached_tokens < len(token_ids) or admit.num_cached_tokens > num_slots:
        raise InvalidRequest(where, "num_cached_tokens exceeds its blocks or covers its last token")


def _validate_row(row: Row, limits: EngineLimits, where: str) -> None:
    if not 0 < row.num_new_tokens <= limits.max_context:
        raise InvalidRequest(where, f"num_new_tokens {row.num_new_tokens} is not within the context")
    _check_blocks(row.blocks, limits, where)
    if not row.spans or row.spans[0].from_position != 0:
        raise InvalidRequest(where, "spans must begin at position 0")
    for span in row.spans:
        if not NO_ADAPTER <= span.adapter_slot < limits.num_adapter_slots:
            raise InvalidRequest(where, f"adapter slot {span.adapter_slot} does not exist")
    if not NO_ADAPTER <= row.heads_slot < limits.num_adapter_slots or (row.num_candidates and row.heads_slot < 0):
        raise InvalidRequest(where, f"there are no draft heads in slot {row.heads_slot}")
    if not 0 <= row.num_candidates <= limits.vocab_size:
        raise InvalidRequest(where, f"{row.num_candidates} candidates")
    if row.num_candidates and not limits.max_draft_nodes:
        raise UnsupportedRequest(where, "this engine runs no draft heads")
    if row.draft is not None:
        _validate_draft(row.draft, limits, f"{where}.draft")
    if len(row.spans) > 1:
        raise UnsupportedRequest(f"{where}.spans", "this engine does not do it yet")


def _validate_draft(draft: TokenDraft, limits: EngineLimits, where: str) -> None:
    token_ids, parents = _ints(draft.token_ids, where), _ints(draft.parents, where)
    if not limits.max_draft_nodes:
        raise UnsupportedRequest(where, "this engine verifies no drafts")
    if len(token_ids) != len(parents) or not 0 < len(token_ids) <= limits.max_draft_nodes:
        raise InvalidRequest(
            where, f"{len(token_ids)} nodes with {len(parents)} parents; 1 to {limits.max_draft_nodes}"
        )
    if min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
        raise InvalidRequest(where, f"a token id is outside the vocabulary of {limits.vocab_size}")
    if not all(-1 <= parent < node for node, parent in enumerate(parents)):
        raise InvalidRequest(where, "a parent does not come before its node")


def num_drafted(row: Row) -> int:
    """Return the number of draft nodes that the row verifies."""
    return num_packed(row.draft.token_ids) if row.draft is not None else 0


def _ints(data: bytes, where: str) -> list[int]:
    try:
        return unpack_ints(data)
    except ValueError as exc:
        raise InvalidRequest(where, "packed integers are cut off") from exc


def _check_blocks(data: bytes, limits: EngineLimits, where: str) -> int:
    blocks = _ints(data, where)
    if blocks and not (min(blocks) >= 0 and max(blocks) < limits.num_blocks):
        raise InvalidRequest(where, f"a block is outside the cache of {limits.num_blocks} blocks")
    return len(blocks)
