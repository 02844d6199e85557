"""Who runs, who waits, and what a step's result does to them."""

from __future__ import annotations

import pytest

from descant.contract.plan import EngineLimits, Row, StepPlan, unpack_ints
from descant.scheduling.sequence import Sequence
from descant_client.errors import InvalidRequest
from fake_engine import FakeEngine
from fake_model import counter, echo
from fakes import FakeSink, Loop, version


def tiny(num_blocks: int, block_size: int = 4, max_context: int = 200, **behavior: object) -> FakeEngine:
    return FakeEngine(EngineLimits(num_blocks, block_size, max_context, 1000, 2), **behavior)


def row_of(plan: StepPlan, seq: Sequence) -> Row | None:
    return next((row for row in plan.rows if row.row == seq.id), None)


# ---- one sequence -------------------------------------------------------------------------------------------------


def test_a_sequence_runs_until_max_tokens() -> None:
    loop = Loop(FakeEngine(behavior=counter))
    (seq,) = loop.submit([7, 8, 9], max_tokens=4)

    loop.run()

    assert (seq.output_ids, seq.finish_reason, seq.status) == ([0, 1, 2, 3], "length", "finished")
    assert len(loop.table) == 0


def test_a_stop_token_ends_a_sequence() -> None:
    loop = Loop(FakeEngine(behavior=echo))
    (seq,) = loop.submit([7, 8, 9], stop=frozenset({8}))

    loop.run()

    assert (seq.output_ids, seq.finish_reason) == ([7, 8], "stop")


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_a_full_context_ends_a_sequence(max_tokens: int | None) -> None:
    loop = Loop(tiny(64, max_context=10))
    (seq,) = loop.submit([1] * 6, max_tokens=max_tokens)

    loop.run()

    assert (seq.num_tokens, seq.finish_reason) == (10, "length")


def test_a_sequence_that_fills_the_whole_cache_ends_by_length() -> None:
    loop = Loop(tiny(3))
    (seq,) = loop.submit([1] * 6, max_tokens=None)

    loop.run()

    assert (seq.num_tokens, seq.finish_reason) == (12, "length")


@pytest.mark.parametrize("num_blocks", [3, 64])
def test_a_prompt_that_leaves_no_room_is_refused(num_blocks: int) -> None:
    loop = Loop(tiny(num_blocks, max_context=12))

    with pytest.raises(InvalidRequest):
        loop.submit([1] * 12)
    assert len(loop.table) == 0


def test_a_prompt_that_turns_out_too_long_ends_through_its_sink() -> None:
    loop = Loop(tiny(3))
    loop.policy.on_executor_lost("off")
    (seq,) = loop.submit([1] * 12)

    loop._start_executor()

    assert isinstance(seq.error, InvalidRequest)
    assert seq.finish_reason == "error"


def test_a_smaller_executor_ends_what_is_too_long_for_it() -> None:
    loop = Loop(tiny(8))
    (seq,) = loop.submit([1] * 6, max_tokens=20)
    while seq.num_tokens < 16:
        loop.step()
    loop.engine.limits = tiny(4).limits

    loop.crash()
    loop.run()

    assert (seq.num_tokens, seq.finish_reason) == (16, "length")


def test_timestamps_come_from_the_injected_clock() -> None:
    loop = Loop(max_num_batched_tokens=4)
    (seq,) = loop.submit([1] * 6, max_tokens=2)

    loop.run()

    times = (seq.arrival_s, seq.first_scheduled_s, seq.first_token_s, seq.finished_s)
    assert times == (0, 1, 2, 3)


def test_log_probabilities_are_kept_with_their_tokens() -> None:
    loop = Loop(max_num_batched_tokens=4)
    (seq,) = loop.submit([1, 2, 3, 4, 5, 6], max_tokens=3, num_logprobs=2, num_prompt_logprobs=1)

    loop.run()

    assert [entry.token_id for entry in seq.output.logprobs] == seq.output_ids
    assert [entry.token_id for entry in seq.output.prompt_logprobs] == [2, 3, 4, 5, 6]
    assert {len(entry.top) for entry in seq.output.logprobs} == {2}


# ---- many sequences -----------------------------------------------------------------------------------------------


def test_sequences_are_admitted_in_order_of_arrival() -> None:
    loop = Loop(max_num_seqs=2)
    seqs = [loop.submit([i], max_tokens=2)[0] for i in range(5)]

    loop.run()

    assert [[row.row for row in plan.rows] for plan in loop.engine.plans[::2]] == [[1, 2], [3, 4], [5]]
    assert all(seq.num_output_tokens == 2 for seq in seqs)


def test_a_long_prompt_is_computed_in_chunks_beside_the_decoding_rows() -> None:
    loop = Loop(max_num_batched_tokens=8)
    (short,) = loop.submit([1], max_tokens=20)
    loop.step()
    (long,) = loop.submit([2] * 20, max_tokens=1)

    while not long.is_finished:
        loop.step()

    rows = [(row_of(plan, short), row_of(plan, long)) for plan in loop.engine.plans[1:]]
    assert [(a.num_new_tokens, b.num_new_tokens) for a, b in rows if a and b] == [(1, 7), (1, 7), (1, 6)]


def test_the_token_budget_is_never_exceeded() -> None:
    loop = Loop(max_num_batched_tokens=5, max_num_seqs=50)
    for i in range(12):
        loop.submit([i] * (i + 1), max_tokens=5)

    loop.run()

    assert max(sum(row.num_new_tokens for row in plan.rows) for plan in loop.engine.plans) == 5


def test_a_later_request_reuses_the_blocks_of_an_earlier_one_and_its_answer() -> None:
    loop = Loop()
    (first,) = loop.submit([1] * 9, max_tokens=4)
    loop.run()

    (second,) = loop.submit([*first.prompt_ids, *first.output_ids, 5], max_tokens=1)
    loop.run()

    assert second.num_cached_tokens == 12
    assert loop.engine.plans[-1].rows[0].num_new_tokens == 2


def test_the_last_prompt_token_is_always_computed() -> None:
    loop = Loop()
    seqs = [loop.submit([1] * 8, max_tokens=1)[0] for _ in range(2) if loop.run() is None]
    loop.run()

    assert seqs[1].num_cached_tokens == 4
    assert seqs[0].output_ids == seqs[1].output_ids


def test_prompt_logprobs_are_computed_not_skipped() -> None:
    loop = Loop()
    loop.submit([1] * 9, max_tokens=1)
    loop.run()
    (seq,) = loop.submit([1] * 9, max_tokens=1, num_prompt_logprobs=0)
    loop.run()

    assert seq.num_cached_tokens == 0
    assert len(seq.output.prompt_logprobs) == 8


@pytest.mark.parametrize(
    "other", [{"scope": "b"}, {"adapter": version("v")}, {"scope": "b", "adapter": version("v")}], ids=str
)
def test_nothing_is_shared_across_scopes_and_versions(other: dict[str, object]) -> None:
    loop = Loop()
    loop.submit([1] * 9, max_tokens=1, scope="a")
    loop.run()
    (seq,) = loop.submit([1] * 9, max_tokens=1, **other)
    loop.run()

    assert seq.num_cached_tokens == 0


def test_the_choices_of_a_request_compute_their_prompt_once() -> None:
    loop = Loop(max_num_batched_tokens=200)
    seqs = loop.submit([1] * 33, n=3, max_tokens=2)

    loop.run()

    assert [seq.num_cached_tokens for seq in seqs] == [0, 32, 32]
    assert len({tuple(seq.output_ids) for seq in seqs}) == 3


def test_choices_that_share_nothing_do_not_wait_for_each_other() -> None:
    loop = Loop()
    seqs = loop.submit([1] * 9, n=2, num_prompt_logprobs=0) + loop.submit([1] * 4, n=2)

    loop.step()

    assert {seq.status for seq in seqs} == {"running"}


def test_other_requests_do_not_wait_for_a_choice_that_waits_for_its_sibling() -> None:
    loop = Loop(max_num_batched_tokens=16)
    loop.submit([1] * 20, n=2)
    (other,) = loop.submit([2])

    loop.step()
    loop.step()

    assert other.status == "running"


# ---- preemption and parking ---------------------------------------------------------------------------------------


def test_the_latest_to_arrive_gives_way_when_blocks_run_out() -> None:
    loop = Loop(tiny(6))
    (first,) = loop.submit([1] * 8, max_tokens=10)
    (second,) = loop.submit([2] * 8, max_tokens=10)

    loop.run()

    assert (first.num_preemptions, second.num_preemptions > 0) == (0, True)
    assert [first.num_output_tokens, second.num_output_tokens] == [10, 10]


def test_a_preempted_sequence_comes_back_before_those_that_arrived_later() -> None:
    loop = Loop(tiny(6), max_num_seqs=2)
    seqs = [loop.submit([i] * 8, max_tokens=10)[0] for i in range(3)]

    loop.run()

    finished = [seq.finished_s or 0 for seq in seqs]
    assert finished == sorted(finished)


def test_a_sequence_over_its_sinks_budget_is_parked_and_holds_nothing() -> None:
    loop = Loop()
    sink = FakeSink(budget=2)
    (seq,) = loop.submit([1] * 5, sinks=[sink], adapter=version("a"))

    loop.run()

    assert (seq.status, seq.num_output_tokens, seq.device.block_table, seq.device.spans) == ("parked", 3, [], None)
    assert loop.policy.states.life is not None
    assert loop.policy.states.life.blocks.num_available == 64


def test_a_parked_sequence_goes_on_where_it_was() -> None:
    loop, sink = Loop(FakeEngine(behavior=counter)), FakeSink(budget=2)
    (seq,) = loop.submit([1] * 5, sinks=[sink], max_tokens=5)
    loop.run()

    sink.unread = 0
    loop.policy.unpark(seq.id)
    loop.run()

    assert sink.token_ids == [0, 1, 2, 3, 4]
    assert loop.engine.plans[3].rows[0].num_new_tokens == 4  # 4 of 8 positions were still in the prefix cache


def test_unparking_what_is_not_parked_does_nothing() -> None:
    loop = Loop()
    (seq,) = loop.submit([1], max_tokens=3)
    loop.step()

    loop.policy.unpark(seq.id)
    loop.policy.unpark(99)
    loop.run()

    assert seq.num_output_tokens == 3


def test_the_first_run_is_what_is_reported_of_a_preempted_sequence() -> None:
    loop = Loop()
    (seq,) = loop.submit([1] * 9, max_tokens=3, num_prompt_logprobs=0)
    loop.step()

    loop.policy.states.preempt(seq)
    loop.run()

    assert (seq.first_scheduled_s, seq.first_token_s, seq.num_cached_tokens, seq.num_preemptions) == (1, 1, 0, 1)
    assert [plan.rows[0].num_prompt_logprobs for plan in loop.engine.plans] == [0, -1, -1]


# ---- cancellation -------------------------------------------------------------------------------------------------


def test_all_choices_of_a_request_are_cancelled_and_no_others() -> None:
    loop = Loop()
    cancelled, kept = loop.submit([1], n=2, request_id="a"), loop.submit([1], request_id="b")
    loop.step()

    loop.policy.cancel("a")
    loop.policy.cancel("unknown")
    loop.run()

    assert [seq.finish_reason for seq in cancelled + kept] == ["cancelled", "cancelled", "length"]


def test_the_blocks_and_slot_of_what_is_cancelled_in_flight_are_kept_until_the_step_is_done() -> None:
    loop = Loop()
    (seq,) = loop.submit([1] * 5, adapter=version("a"))
    loop.step()
    loop.finish_load()

    def cancel() -> None:
        loop.policy.cancel(seq.request_id)
        assert loop.policy.states.life is not None
        assert loop.policy.states.life.blocks.num_available < 64
        assert not loop.policy.states.life.gate.residency._unused

    loop.step(cancel)

    assert loop.policy.states.life is not None
    assert loop.policy.states.life.blocks.num_available == 64
    assert (seq.output_ids, seq.finish_reason) == ([], "cancelled")


def test_the_engine_is_told_to_drop_what_has_left() -> None:
    loop = Loop()
    (first,) = loop.submit([1], max_tokens=1)
    loop.submit([2], max_tokens=5)
    loop.step()
    loop.step()

    assert unpack_ints(loop.engine.plans[1].drop) == [first.id]
    assert list(loop.engine.rows) == [2]
