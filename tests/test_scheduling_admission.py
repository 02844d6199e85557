"""How many may wait, and when those who are too many are told to come again."""

from __future__ import annotations

from typing import Any

import pytest

from descant.scheduling.admission import MEMORY_S, Rate
from descant_client.errors import InvalidRequest, Overloaded
from fakes import FakeSink, Loop, version


def refused(loop: Loop, **options: Any) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        loop.submit([1], **options)
    return caught.value


def test_only_so_many_sequences_of_a_principal_may_wait() -> None:
    loop = Loop(max_num_seqs=1, max_queued=2)
    for _ in range(2):
        loop.submit([1])

    error = refused(loop)

    assert "2 sequences wait already, and at most 2 may (max_queued)" in str(error)
    assert error.retry_after_s == 1  # nobody has left yet
    loop.submit([1], principal="other")


def test_a_principal_may_have_a_limit_of_its_own() -> None:
    loop = Loop(max_num_seqs=1, max_queued=1)
    for _ in range(5):
        loop.submit([1], principal="large", max_queued=5)

    refused(loop, principal="large", max_queued=5)


def test_a_request_is_refused_as_a_whole_and_leaves_no_trace() -> None:
    loop = Loop(max_num_seqs=1, max_queued=3)
    loop.submit([1], n=2)

    refused(loop, n=2)
    assert len(loop.table) == 2
    loop.submit([1])
    loop.run()

    assert loop.policy.states.lineup.limits.num_waiting_by_principal() == {}


def test_more_choices_than_may_ever_wait_are_no_matter_of_time() -> None:
    loop = Loop(max_queued=3)

    with pytest.raises(InvalidRequest, match="at n: at most 3"):
        loop.submit([1], n=4)


def test_running_and_parked_sequences_do_not_count() -> None:
    loop = Loop(max_queued=1)
    (running,), (parked,) = [
        loop.submit([1], sinks=[sink])
        for sink in (FakeSink(), FakeSink(budget=0))
        if loop.step() or True  # each is let in before the next one comes
    ]
    loop.step()

    assert (running.status, parked.status) == ("running", "parked")
    loop.submit([1])


def test_those_who_wait_for_the_executor_or_an_adapter_count() -> None:
    loop = Loop(max_queued=2)
    loop.submit([1], adapter=version("a"))
    loop.crash()
    loop.submit([1], adapter=version("a"))

    refused(loop)
    loop.policy.cancel(next(iter(loop.table)).request_id)
    loop.submit([1])


def test_what_is_preempted_waits_again() -> None:
    loop = Loop(max_num_seqs=2, max_queued=1)
    (seq,) = loop.submit([1], max_tokens=50)
    loop.step()
    loop.policy.states.preempt(seq)

    refused(loop)
    loop.step()
    loop.submit([1])


def test_who_is_refused_is_told_when_there_may_be_room() -> None:
    loop = Loop(max_num_seqs=1, max_queued=40)
    for _ in range(40):
        loop.submit([1], max_tokens=4)
    for _ in range(100):
        loop.step()  # one leaves every 4 s
    for _ in range(25):
        loop.submit([1], max_tokens=4)

    assert 3 <= refused(loop).retry_after_s <= 5
    loop.policy.states.lineup.limits._max_queued = 30
    assert 37 <= refused(loop).retry_after_s <= 50  # eleven have to leave
    loop.policy.states.lineup.limits._max_queued = 10
    assert refused(loop).retry_after_s == 60


def test_coming_back_after_a_preemption_is_no_sign_of_room() -> None:
    loop = Loop(max_num_seqs=1, max_queued=1)
    (seq,) = loop.submit([1], max_tokens=100)
    for _ in range(20):
        loop.step()
        loop.policy.states.preempt(seq)

    assert refused(loop).retry_after_s > 10


@pytest.mark.parametrize("per_second", [0.3, 2.0, 50.0])
@pytest.mark.parametrize("seconds", [10.0, 100.0])
def test_a_rate_is_right_from_the_beginning_and_forgets(per_second: float, seconds: float) -> None:
    rate = Rate(since_s=7.0)
    for number in range(int(seconds * per_second)):
        rate.add_event(7.0 + (number + 1) / per_second)

    assert rate.per_second(7.0 + seconds) == pytest.approx(per_second, rel=0.25)
    assert rate.per_second(7.0 + seconds + 20 * MEMORY_S) < 1e-6
