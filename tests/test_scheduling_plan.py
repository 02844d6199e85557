"""Plans and results survive the socket, and no bytes upset who reads them."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descant.contract.plan import (
    NO_ADAPTER,
    AdapterSpan,
    Admit,
    EngineLimits,
    HeadCandidates,
    LogprobRows,
    Row,
    RowResult,
    StepPlan,
    StepResult,
    TokenDraft,
    num_packed,
    pack_floats,
    pack_ints,
    unpack_floats,
    unpack_ints,
    validate_plan,
)
from descant_client.errors import InvalidRequest, UnsupportedRequest
from descant_client.protocol import SamplingParams

LIMITS = EngineLimits(num_blocks=8, block_size=4, max_context=32, vocab_size=100, num_adapter_slots=2)
PLANS, RESULTS = msgspec.msgpack.Decoder(StepPlan), msgspec.msgpack.Decoder(StepResult)

# msgspec lets the error of a str that is not UTF-8 through as it is.
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError)

INT32 = st.integers(-(2**31), 2**31 - 1)
PACKED = st.lists(st.integers(-2, 10), max_size=6).map(pack_ints) | st.binary(max_size=9)
FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=6).map(pack_floats)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.1, 1),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-5, 5), max_size=3),
)
SPANS = st.lists(st.builds(AdapterSpan, st.integers(0, 9), st.integers(-1, 3)), max_size=3).map(tuple)
DRAFTS = st.none() | st.builds(TokenDraft, PACKED, PACKED)
ADMITS = st.builds(
    Admit, INT32, PACKED, INT32, INT32, PACKED, SAMPLING, st.integers(0, 2**63 - 1), INT32, st.integers(-1, 20)
)
ROWS = st.builds(Row, INT32, INT32, SPANS, PACKED, DRAFTS)
STEPS = st.builds(
    StepPlan,
    INT32,
    INT32,
    st.lists(ADMITS, max_size=3).map(tuple),
    st.lists(ROWS, max_size=3).map(tuple),
    PACKED,
)
LOGPROBS = st.none() | st.builds(LogprobRows, INT32, INT32, FLOATS, PACKED, FLOATS)
CANDIDATES = st.none() | st.builds(HeadCandidates, INT32, PACKED, PACKED)
ERRORS = st.none() | st.text(max_size=9)
ROW_RESULTS = st.builds(RowResult, INT32, INT32, PACKED, LOGPROBS, LOGPROBS, ERRORS, CANDIDATES)
ANSWERS = st.builds(StepResult, INT32, INT32, st.lists(ROW_RESULTS, max_size=3).map(tuple), st.floats(0, 1))


def admit(**changes: object) -> Admit:
    fields: dict[str, object] = {
        "row": 1,
        "token_ids": pack_ints([1, 2, 3]),
        "num_prompt_tokens": 3,
        "num_cached_tokens": 0,
        "blocks": pack_ints([0]),
        "sampling": SamplingParams(),
        "seed": 0,
    }
    return Admit(**(fields | changes))


@settings(deadline=None)
@given(st.lists(INT32, max_size=20))
def test_packed_integers_come_back(values: list[int]) -> None:
    assert unpack_ints(pack_ints(values)) == values
    assert len(pack_ints(values)) == 4 * len(values)
    assert num_packed(pack_ints(values)) == len(values)


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_packed_floats_come_back(values: list[float]) -> None:
    assert unpack_floats(pack_floats(values)) == values


def test_integers_are_little_endian() -> None:
    assert pack_ints([1, -2]) == b"\x01\0\0\0\xfe\xff\xff\xff"


@settings(deadline=None)
@given(STEPS)
def test_plans_come_back_as_they_were(plan: StepPlan) -> None:
    assert PLANS.decode(msgspec.msgpack.encode(plan)) == plan


@settings(deadline=None)
@given(ANSWERS)
def test_results_come_back_as_they_were(result: StepResult) -> None:
    assert RESULTS.decode(msgspec.msgpack.encode(result)) == result


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_in_the_proper_way(data: bytes) -> None:
    for decoder in (PLANS, RESULTS):
        with contextlib.suppress(*UNDECODABLE):
            decoder.decode(data)


@settings(deadline=None)
@given(STEPS, st.integers(0, 2**32), st.integers(1, 4))
def test_damaged_plans_are_refused_in_the_proper_way(plan: StepPlan, seed: int, num_changes: int) -> None:
    rng, data = random.Random(seed), bytearray(msgspec.msgpack.encode(plan))
    for _ in range(num_changes):
        data[rng.randrange(len(data))] = rng.randrange(256)

    with contextlib.suppress(*UNDECODABLE, InvalidRequest):
        validate_plan(PLANS.decode(bytes(data)), LIMITS, [1, 2])


@settings(deadline=None)
@given(STEPS)
def test_random_plans_are_accepted_or_refused_in_the_proper_way(plan: StepPlan) -> None:
    with contextlib.suppress(InvalidRequest):
        validate_plan(plan, LIMITS, [row.row for row in plan.rows])


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": b""},
        {"token_ids": b"\0\0"},
        {"token_ids": pack_ints([1, 2, 100])},
        {"token_ids": pack_ints([-1, 2, 3])},
        {"token_ids": pack_ints([1] * 33)},
        {"num_prompt_tokens": 0},
        {"num_prompt_tokens": 4},
        {"num_cached_tokens": 3},
        {"num_cached_tokens": -1},
        {"num_cached_tokens": 1, "blocks": b""},
        {"blocks": pack_ints([8])},
        {"blocks": pack_ints([-1])},
    ],
)
def test_a_wrong_admit_is_refused(changes: dict[str, object]) -> None:
    validate_plan(StepPlan(1, 1, (admit(),)), LIMITS)

    with pytest.raises(InvalidRequest, match=r"admit\[1\]"):
        validate_plan(StepPlan(1, 1, (admit(**changes),)), LIMITS)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ((Row(2, 1),), InvalidRequest),
        ((Row(1, 1), Row(1, 1)), InvalidRequest),
        ((Row(1, 0),), InvalidRequest),
        ((Row(1, 33),), InvalidRequest),
        ((Row(1, 1, (AdapterSpan(0, 2),)),), InvalidRequest),
        ((Row(1, 1, (AdapterSpan(1, NO_ADAPTER),)),), InvalidRequest),
        ((Row(1, 1, ()),), InvalidRequest),
        ((Row(1, 1, blocks=pack_ints([8])),), InvalidRequest),
        ((Row(1, 1, heads_slot=99),), InvalidRequest),
        ((Row(1, 1, num_candidates=1),), InvalidRequest),
        ((Row(1, 1, num_candidates=-1),), InvalidRequest),
        ((Row(1, 1, heads_slot=0, num_candidates=1),), UnsupportedRequest),  # of an engine that verifies none
    ],
)
def test_a_wrong_row_is_refused(rows: tuple[Row, ...], kind: type[InvalidRequest]) -> None:
    validate_plan(StepPlan(1, 1, rows=(Row(1, 1),)), LIMITS, [1])

    with pytest.raises(kind, match=r"rows\["):
        validate_plan(StepPlan(1, 1, rows=rows), LIMITS, [1])


def test_a_dropped_row_is_no_row_any_more_unless_it_is_admitted_again() -> None:
    drop, rows = pack_ints([1]), (Row(1, 1),)
    validate_plan(StepPlan(1, 1, (admit(),), rows, drop), LIMITS, [1])

    with pytest.raises(InvalidRequest):
        validate_plan(StepPlan(1, 1, (), rows, drop), LIMITS, [1])
