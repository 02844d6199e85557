"""Steps planned before the one before is applied: the same tokens, and nothing is taken from a step in flight.

The fake engine reads and writes when a step is collected; it refuses plans that give away what one in flight has.
"""

from __future__ import annotations

import msgspec
import pytest

from descant.contract.plan import EngineLimits, unpack_ints
from descant.scheduling.sequence import Sequence
from descant_client.errors import ExecutorFailed, InternalError
from fake_engine import LIMITS, FakeEngine
from fake_model import Behavior, counter, hash_history
from fakes import FakeSink, Loop, version

POISON = 666


def deep(depth: int = 2, **changes: int) -> EngineLimits:
    return msgspec.structs.replace(LIMITS, max_steps_in_flight=depth, **changes)


def deep_loop(behavior: Behavior = hash_history, depth: int = 2, *, seqs: int = 16, **changes: int) -> Loop:
    return Loop(FakeEngine(deep(depth, **changes), behavior), max_num_seqs=seqs)


def num_available(loop: Loop) -> int:
    assert loop.policy.states.life is not None
    return loop.policy.states.life.blocks.num_available


def is_evictable(loop: Loop, digest: str) -> bool:
    return loop.policy.states.life is not None and digest in loop.policy.states.life.gate.residency._unused


def rows_of(loop: Loop) -> list[list[int]]:
    return [[row.row for row in plan.rows] for plan in loop.engine.plans]


# ---- planning ahead -----------------------------------------------------------------------------------------------


def test_as_many_steps_are_planned_as_may_be_in_flight() -> None:
    for depth in (1, 2, 3):
        loop = deep_loop(depth=depth)
        loop.submit([1, 2, 3])

        loop.step()

        assert [plan.step for plan in loop.engine.plans] == list(range(1, depth + 1))
        assert loop.policy.plan() is not None or depth == 1


def test_what_is_sampled_in_flight_is_the_input_of_the_next_step() -> None:
    loop = deep_loop(counter)
    (seq,) = loop.submit([7, 7, 7], max_tokens=4)
    loop.launch()
    loop.launch()

    prefill, decode = (plan.rows[0] for plan in loop.engine.plans)
    assert (prefill.num_new_tokens, decode.num_new_tokens) == (3, 1)
    assert seq.output_ids == []
    loop.run()
    assert seq.output_ids == [0, 1, 2, 3]


def test_who_ends_for_certain_in_flight_is_not_planned_again() -> None:
    loop = deep_loop(counter)
    (short,), (long,) = loop.submit([1], max_tokens=2), loop.submit([2], max_tokens=4)

    loop.run()

    assert rows_of(loop) == [[short.id, long.id], [short.id, long.id], [long.id], [long.id]]
    assert [seq.output_ids for seq in (short, long)] == [[0, 1], [0, 1, 2, 3]]


def test_a_full_context_ends_for_certain_too() -> None:
    loop = deep_loop(counter, max_context=5)
    (seq,) = loop.submit([1, 2], max_tokens=None)

    loop.run()

    assert seq.output_ids == [0, 1, 2]
    assert len(loop.engine.plans) == 3


def test_the_chunks_of_a_prompt_follow_one_another_in_flight() -> None:
    loop = Loop(FakeEngine(deep(), counter), max_num_batched_tokens=4)
    (seq,) = loop.submit(list(range(10)), max_tokens=2, num_prompt_logprobs=0)

    loop.run()

    assert [plan.rows[0].num_new_tokens for plan in loop.engine.plans] == [4, 4, 2, 1]
    assert (seq.output_ids, len(seq.output.prompt_logprobs)) == ([0, 1], 9)


def test_a_block_is_shared_only_when_it_is_known_to_be_computed() -> None:
    loop = deep_loop()
    loop.submit([1] * 9, max_tokens=5)
    loop.launch()
    (second,) = loop.submit([1] * 9, max_tokens=5)
    loop.launch()

    (third,) = loop.submit([1] * 9, max_tokens=5)
    loop.collect()
    loop.run()

    assert [seq.num_cached_tokens for seq in (second, third)] == [0, 8]


def test_service_is_charged_once_for_every_token() -> None:
    loop = deep_loop(counter, num_blocks=5)
    seqs = [loop.submit([i] * 5, max_tokens=8, sinks=[FakeSink(budget=4 if i else 99)])[0] for i in range(4)]
    for _ in range(200):
        loop.step()
        for seq in seqs:
            loop.policy.unpark(seq.id)

    assert [seq.output_ids for seq in seqs] == [list(range(8))] * 4
    assert sum(seq.num_preemptions for seq in seqs) > 0
    assert loop.policy.states.lineup.fairness.accounts[""].service == 4 * (5 + 2 * 8)


# ---- endings in flight --------------------------------------------------------------------------------------------


def stopped_in_flight(loop: Loop, **options: object) -> Sequence:
    """Return a sequence that has stopped while the next step is in flight."""
    (seq,) = loop.submit([1] * 4, max_tokens=9, stop=frozenset([1]), **options)  # type: ignore[arg-type]
    loop.step()
    while loop.loads:
        loop.finish_load()
        loop.step()
    loop.step()
    assert (seq.output_ids, seq.finish_reason, len(loop.in_flight)) == ([0, 1], "stop", 1)
    return seq


def test_who_has_stopped_keeps_blocks_adapter_and_row_until_the_last_step_with_it_is_applied() -> None:
    loop = deep_loop(counter)
    seq = stopped_in_flight(loop, adapter=version("a"))
    (other,) = loop.submit([5], max_tokens=9)
    loop.launch()

    assert num_available(loop) == 64 - 2 - 1
    assert not is_evictable(loop, "a")
    loop.collect()
    assert num_available(loop) == 64 - 1
    assert is_evictable(loop, "a")
    loop.launch()
    assert [unpack_ints(plan.drop) for plan in loop.engine.plans[-2:]] == [[], [seq.id]]
    assert loop.engine.rows.keys() == {other.id}


def test_what_is_computed_beyond_a_stop_is_ignored() -> None:
    loop = deep_loop(counter)
    seq = stopped_in_flight(loop)

    loop.run()

    assert seq.output_ids == [0, 1]
    assert isinstance(seq.request.sink, FakeSink)
    assert (seq.request.sink.token_ids, seq.request.sink.ended) == ([0, 1], [seq])


def test_its_seat_is_free_with_everything_else() -> None:
    loop = deep_loop(counter, seqs=1)
    seq = stopped_in_flight(loop)
    (other,) = loop.submit([5], max_tokens=1)

    assert loop.policy.plan() is None
    loop.step()
    loop.run()

    assert rows_of(loop)[-2:] == [[seq.id], [other.id]]


@pytest.mark.parametrize("is_read_in_flight", [False, True])
def test_the_token_of_who_is_parked_in_flight_is_sampled_again(is_read_in_flight: bool) -> None:
    loop = deep_loop(counter)
    sink = FakeSink(budget=1)
    (seq,) = loop.submit([1] * 4, max_tokens=4, sinks=[sink])
    loop.step()
    loop.step()
    assert (seq.status, seq.output_ids, len(loop.in_flight)) == ("parked", [0, 1], 1)

    sink.budget = 100
    if is_read_in_flight:
        loop.policy.unpark(seq.id)
        assert seq.status == "waiting"
    loop.run()
    assert seq.output_ids == ([0, 1, 2, 3] if is_read_in_flight else [0, 1])
    loop.policy.unpark(seq.id)
    loop.run()

    assert (seq.output_ids, sink.token_ids, seq.finish_reason) == ([0, 1, 2, 3], [0, 1, 2, 3], "length")


def test_who_is_parked_in_flight_can_be_cancelled_there() -> None:
    loop = deep_loop(counter)
    (seq,) = loop.submit([1] * 4, max_tokens=4, sinks=[FakeSink(budget=1)])
    loop.step()
    loop.step()

    loop.policy.unpark(seq.id)
    loop.policy.cancel(seq.request_id)
    loop.run()

    assert (seq.finish_reason, num_available(loop), len(loop.policy.states.lineup.leaving)) == ("cancelled", 64, 0)


# ---- giving way ---------------------------------------------------------------------------------------------------


def test_nobody_is_preempted_in_flight() -> None:
    loop = deep_loop(counter, num_blocks=4)
    first, second = loop.submit([1] * 7, max_tokens=9)[0], loop.submit([2] * 7, max_tokens=9)[0]
    num_in_flight = 2
    while not second.num_preemptions:
        num_in_flight = len(loop.in_flight)
        if not loop.launch():
            loop.collect()

    assert num_in_flight == 0
    loop.run()
    assert [seq.output_ids for seq in (first, second)] == [list(range(9))] * 2


def test_others_go_on_in_a_step_in_which_somebody_gets_no_block() -> None:
    loop = deep_loop(counter, num_blocks=4)
    first, second = loop.submit([1] * 8, max_tokens=5)[0], loop.submit([2] * 5, max_tokens=5)[0]
    loop.launch()
    loop.launch()

    assert rows_of(loop) == [[first.id, second.id], [second.id]]
    assert loop.policy.plan() is None
    loop.run()
    assert [seq.output_ids for seq in (first, second)] == [list(range(5))] * 2


def test_a_principal_that_gives_up_a_seat_does_so_when_nothing_is_in_flight() -> None:
    loop = deep_loop(counter, seqs=4)
    many = [loop.submit([i], max_tokens=50, principal="many")[0] for i in range(4)]
    loop.step()
    (one,) = loop.submit([9], max_tokens=2, principal="one")
    loop.run()

    assert (one.output_ids, many[-1].num_preemptions) == ([0, 1], 1)
    assert [seq.output_ids for seq in many] == [list(range(50))] * 4


def test_a_principal_that_gives_up_an_adapter_slot_does_so_when_nothing_is_in_flight() -> None:
    loop = deep_loop(counter, num_adapter_slots=2)
    many = [loop.submit([1], max_tokens=50, principal="many", adapter=version(digest))[0] for digest in "ab"]
    loop.step()
    while loop.loads:
        loop.finish_load()
    loop.step()
    (one,) = loop.submit([9], max_tokens=2, principal="one", adapter=version("c"))
    loop.run()

    assert one.first_token_s is not None
    assert one.first_token_s < min(seq.finished_s or 0 for seq in many)
    assert [seq.output_ids for seq in (*many, one)] == [list(range(50))] * 2 + [[0, 1]]


# ---- the executor dies --------------------------------------------------------------------------------------------


def test_everybody_in_any_step_in_flight_is_suspected() -> None:
    loop = deep_loop(counter)
    (first,) = loop.submit([1], max_tokens=1)
    loop.launch()
    (second,) = loop.submit([2], max_tokens=9)
    loop.launch()
    (waiting,) = loop.submit([3], max_tokens=9)

    loop.crash()

    assert loop.policy.states.blame._num_deaths == {first.id: 1, second.id: 1}
    loop.run()
    assert [seq.num_output_tokens for seq in (first, second, waiting)] == [1, 9, 9]


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_only_the_poison_fails(count: int) -> None:
    loop = deep_loop(counter)
    loop.engine.kills = lambda row: POISON in row.tokens
    seqs = [loop.submit([POISON if i == count // 2 else i] * 5)[0] for i in range(count)]

    loop.run()

    (bad,) = [seq for seq in seqs if seq.finish_reason == "error"]
    assert (bad, type(bad.error)) == (seqs[count // 2], ExecutorFailed)
    assert all(seq.output_ids == list(range(8)) for seq in seqs if seq is not bad)


def test_a_trial_begins_when_nothing_is_in_flight() -> None:
    loop = deep_loop(counter)
    seqs = [loop.submit([i], max_tokens=9)[0] for i in range(4)]
    for _ in range(2):
        loop.launch()
        loop.launch()
        loop.crash()
    (newcomer,) = loop.submit([9], max_tokens=9)

    loop.run()

    assert [seq.output_ids for seq in (*seqs, newcomer)] == [list(range(9))] * 5


def test_results_of_a_dead_executor_are_discarded() -> None:
    loop = deep_loop(counter)
    (seq,) = loop.submit([1], max_tokens=4)
    loop.launch()
    loop.launch()
    planned, result = loop.in_flight[0], loop.engine.collect()
    loop.crash()

    loop.policy.apply(planned, result)

    assert not loop.policy.is_in_flight(planned)
    assert seq.output_ids == []
    loop.run()
    assert seq.output_ids == [0, 1, 2, 3]


def test_a_result_of_another_step_is_refused() -> None:
    loop = deep_loop(counter)
    loop.submit([1], max_tokens=4)
    loop.launch()
    loop.launch()
    loop.engine.collect()

    with pytest.raises(InternalError):
        loop.policy.apply(loop.in_flight[0], loop.engine.collect())


def test_a_new_policy_knows_of_no_step_in_flight() -> None:
    loop = deep_loop(counter)
    (seq,) = loop.submit([1], max_tokens=4)
    loop.launch()
    loop.launch()

    loop.restart_policy()
    loop.run()

    assert seq.output_ids == [0, 1, 2, 3]
