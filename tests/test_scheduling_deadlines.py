"""Who takes too long is told so in time, whatever the executor does, and nobody else is touched."""

from __future__ import annotations

import math
from typing import Any

import pytest

from descant.scheduling.deadlines import MAX_DEAD, Deadlines
from descant.scheduling.sequence import Sequence, SequenceTable
from descant_client.errors import DeadlineExceeded
from fakes import FakeSink, Loop, version


def late(seq: Sequence) -> tuple[Any, ...]:
    assert isinstance(seq.error, DeadlineExceeded)
    return seq.finish_reason, seq.error.what, seq.error.deadline_s


def test_a_sequence_that_has_not_run_by_its_queue_deadline_fails() -> None:
    loop = Loop(max_num_seqs=1)
    (first,) = loop.submit([1], max_tokens=9)
    (second,) = loop.submit([2], received_s=0.5, queue_deadline_s=5.0)

    loop.run()

    assert late(second) == ("error", "waiting in the queue", 4.5)
    assert (second.finished_s, first.finish_reason) == (5.0, "length")


def test_who_has_run_by_then_may_wait_again() -> None:
    loop = Loop()
    (seq,) = loop.submit([1], max_tokens=9, queue_deadline_s=2.0)
    loop.step()

    loop.policy.states.preempt(seq)
    loop.crash()
    loop.run()

    assert seq.finish_reason == "length"


def test_an_answer_that_takes_too_long_fails_with_what_there_is_of_it() -> None:
    loop, sink = Loop(), FakeSink()
    (seq,) = loop.submit([1], max_tokens=90, sinks=[sink], deadline_s=5.0)

    loop.run()

    assert late(seq) == ("error", "answering", 5.0)
    assert len(sink.token_ids) == 4


def test_who_is_parked_runs_out_of_time_too() -> None:
    loop = Loop()
    (seq,) = loop.submit([1], sinks=[FakeSink(budget=0)], deadline_s=5.0)
    loop.run()
    assert seq.status == "parked"

    loop.clock = 5.0
    loop.policy.expire()

    assert late(seq) == ("error", "answering", 5.0)


@pytest.mark.parametrize("deadline", ["queue_deadline_s", "deadline_s"])
def test_deadlines_pass_while_the_executor_is_down(deadline: str) -> None:
    loop = Loop()
    loop.policy.on_executor_lost("off")
    fields: dict[str, Any] = {deadline: 5.0}
    (seq,) = loop.submit([1], **fields)
    assert loop.policy.seconds_to_deadline() == 5.0

    loop.clock = 5.0
    assert loop.policy.seconds_to_deadline() == 0.0
    loop.policy.expire()

    assert seq.finish_reason == "error"
    assert math.isinf(loop.policy.seconds_to_deadline())


def test_deadlines_pass_while_an_adapter_is_loaded() -> None:
    loop = Loop()
    (seq,) = loop.submit([1], adapter=version("slow"), queue_deadline_s=3.0)
    for _ in range(3):
        loop.step()

    assert late(seq)[1] == "waiting in the queue"
    loop.finish_load()
    assert not loop.step()


def test_a_new_policy_keeps_the_deadlines_of_the_old_one() -> None:
    loop = Loop()
    (seq,) = loop.submit([1], max_tokens=90, deadline_s=5.0)
    loop.step()

    loop.restart_policy()
    loop.run()

    assert late(seq) == ("error", "answering", 5.0)


def test_one_late_choice_ends_its_request_and_no_other() -> None:
    loop = Loop()
    late_ones = loop.submit([1], n=2, max_tokens=90, deadline_s=5.0)
    (other,) = loop.submit([2], max_tokens=20)

    loop.run()

    assert [seq.finish_reason for seq in late_ones] == ["error", "cancelled"]
    assert other.finish_reason == "length"


def test_looking_costs_nothing_while_nobody_is_late_and_the_finished_are_swept_out() -> None:
    loop = Loop()
    for _ in range(3 * MAX_DEAD):
        loop.submit([1], request_id="x", max_tokens=1, deadline_s=1e6)
        loop.policy.cancel("x")

    assert len(loop.policy._deadlines._heap) <= MAX_DEAD + 1


def test_without_deadlines_nothing_is_next() -> None:
    deadlines = Deadlines(SequenceTable())

    assert (deadlines.next_s, deadlines.take_expired(1e9)) == (math.inf, None)
