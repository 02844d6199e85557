"""The executor may die, and so may the policy: no sequence is lost, and only the guilty fail."""

from __future__ import annotations

import pytest

from descant.contract.plan import EngineLimits
from descant.scheduling.sequence import Sequence
from descant_client.errors import ExecutorFailed
from fake_engine import FakeEngine
from fake_model import FakeRow, counter
from fakes import FakeSink, Loop, version

POISON = 666


def poisoned(row: FakeRow) -> bool:
    return POISON in row.tokens


def expected(prompt_ids: list[int]) -> list[int]:
    """Return what an undisturbed loop answers."""
    loop = Loop()
    (seq,) = loop.submit(prompt_ids)
    loop.run()
    return seq.output_ids


def assert_all_but(poison: list[Sequence], seqs: list[Sequence]) -> None:
    assert [seq for seq in seqs if seq.finish_reason == "error"] == poison
    assert all(isinstance(seq.error, ExecutorFailed) for seq in poison)
    assert all(seq.output_ids == expected(seq.prompt_ids) for seq in seqs if seq not in poison)


def test_a_crash_between_steps_changes_no_token() -> None:
    loop = Loop()
    seqs = [loop.submit([i] * 9)[0] for i in range(3)]
    for _ in range(4):
        loop.step()

    loop.crash()
    loop.run()

    assert_all_but([], seqs)
    assert [seq.num_preemptions for seq in seqs] == [1, 1, 1]


def test_the_result_of_a_step_that_an_executor_did_not_survive_is_discarded() -> None:
    loop = Loop(FakeEngine(behavior=counter))
    (seq,) = loop.submit([1], max_tokens=3)
    loop.step()

    loop.step(loop.crash)
    assert seq.output_ids == [0]

    loop.run()
    assert seq.output_ids == [0, 1, 2]


def test_every_life_has_its_epoch() -> None:
    loop = Loop()
    loop.submit([1])
    loop.step()
    loop.crash()
    loop.run()
    loop.restart_policy()
    loop.submit([1])
    loop.run()

    assert sorted({plan.epoch for plan in loop.engine.plans}) == [1, 2, 3]


def test_sequences_submitted_while_the_executor_is_down_run_when_it_is_up() -> None:
    loop = Loop()
    loop.policy.on_executor_lost("off")
    (seq,) = loop.submit([1], adapter=version("a"))
    assert loop.policy.plan() is None
    assert loop.policy.num_waiting == 1

    loop._start_executor()
    loop.run()

    assert seq.finish_reason == "length"


def test_what_is_cancelled_while_the_executor_is_down_is_finished_at_once() -> None:
    loop = Loop()
    (seq,) = loop.submit([1])
    loop.policy.on_executor_lost("off")

    loop.policy.cancel(seq.request_id)

    assert (seq.finish_reason, loop.policy.num_waiting) == ("cancelled", 0)


def test_a_new_policy_goes_on_with_the_sequences_of_the_old_one() -> None:
    loop = Loop()
    seqs = [loop.submit([i] * 9, adapter=version("a") if i else None)[0] for i in range(3)]
    (parked,) = loop.submit([5], sinks=[sink := FakeSink(budget=1)])
    for _ in range(3):
        loop.step()

    sink.budget = 100
    loop.restart_policy()  # the news that the sink has room may have been lost with the old one
    loop.run()

    assert [seq.num_output_tokens for seq in [*seqs, parked]] == [8, 8, 8, 8]


def test_a_single_crash_is_held_against_nobody() -> None:
    loop = Loop()
    (seq,) = loop.submit([1])
    loop.crash()

    loop.step(loop.crash)
    loop.run()

    assert seq.finish_reason == "length"


def test_who_gains_a_token_in_every_life_is_never_blamed() -> None:
    loop = Loop(FakeEngine(behavior=counter))
    (seq,) = loop.submit([1], max_tokens=6)
    while not seq.is_finished:
        loop.step()
        loop.step(loop.crash)

    assert seq.output_ids == [0, 1, 2, 3, 4, 5]
    assert set(loop.lives) == {True}


def test_who_is_cancelled_in_the_fatal_step_may_have_been_the_killer() -> None:
    loop = Loop()
    (kept,), (cancelled,) = loop.submit([1]), loop.submit([2])
    loop.step(loop.crash)

    def die_cancelled() -> None:
        loop.policy.cancel(cancelled.request_id)
        loop.crash()

    loop.step(die_cancelled)
    loop.run()

    assert (kept.finish_reason, loop.policy.states.blame.is_watching) == ("length", False)


def test_a_suspect_that_is_cancelled_while_on_trial_makes_way_for_the_next() -> None:
    loop = Loop()
    (first,), (second,) = loop.submit([1]), loop.submit([2])
    for _ in range(2):
        loop.step(loop.crash)
    assert loop.policy.states.blame.trial == {first.id}

    loop.policy.cancel(first.request_id)
    loop.run()

    assert second.finish_reason == "length"


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_only_the_poison_fails(count: int) -> None:
    loop = Loop(FakeEngine(kills=poisoned))
    seqs = [loop.submit([POISON if i == count // 2 else i] * 5)[0] for i in range(count)]

    loop.run()

    assert_all_but([seqs[count // 2]], seqs)
    assert len(loop.lives) <= 6


def test_several_poisons_are_all_found() -> None:
    loop = Loop(FakeEngine(kills=poisoned))
    seqs = [loop.submit([POISON if i in (2, 3, 11) else i] * 5)[0] for i in range(14)]

    loop.run()

    assert_all_but([seqs[2], seqs[3], seqs[11]], seqs)


def test_poison_that_kills_while_it_decodes_is_found() -> None:
    loop = Loop(FakeEngine(kills=lambda row: row.tokens[0] == POISON and row.output_index == 3))
    (bad,), (good,) = loop.submit([POISON]), loop.submit([1])

    loop.run()

    assert (bad.num_output_tokens, bad.finish_reason) == (3, "error")
    assert good.output_ids == expected([1])


def test_poison_found_among_adapters_and_few_seats() -> None:
    loop = Loop(FakeEngine(kills=poisoned), max_num_seqs=3, max_num_batched_tokens=6, adapter_bytes=128)
    adapters = [None, version("a"), version("b"), version("c")]
    seqs = [loop.submit([POISON if i == 5 else i] * 7, adapter=adapters[i % 4])[0] for i in range(12)]

    loop.run()

    assert [seq.finish_reason for seq in seqs] == ["length"] * 5 + ["error"] + ["length"] * 6


def test_every_death_but_the_first_is_productive_while_the_poison_is_looked_for() -> None:
    loop = Loop(FakeEngine(kills=poisoned))
    for i in range(16):
        loop.submit([POISON if i == 0 else i])

    loop.run()

    assert loop.lives == [False, True, True, True, True, True]


def test_a_life_that_completed_a_step_is_productive_and_one_without_is_not() -> None:
    loop = Loop()
    loop.submit([1])
    loop.step()
    loop.crash()
    loop.crash()

    assert loop.lives == [True, False]


def test_while_a_trial_is_on_nobody_else_runs() -> None:
    loop = Loop(FakeEngine(kills=poisoned))
    seqs = [loop.submit([POISON if i == 3 else i])[0] for i in range(4)]
    for _ in range(2):
        loop.step()
    (newcomer,) = loop.submit([9])

    loop.step()
    assert [row.row for row in loop.engine.plans[-1].rows] == [seqs[0].id, seqs[1].id]
    loop.run()

    assert newcomer.output_ids == expected([9])


def test_the_members_of_a_cleared_half_wait_for_the_next() -> None:
    loop = Loop(FakeEngine(behavior=counter), adapter_bytes=64)
    seqs = [loop.submit([i], adapter=version("ab"[i // 2]))[0] for i in range(4)]
    for _ in range(2):
        loop.policy.states.blame.on_executor_lost([seq.id for seq in seqs])
    loop.policy.on_executor_lost("twice")
    loop._start_executor()

    loop.run()

    assert [seq.output_ids for seq in seqs] == [list(range(8))] * 4


def test_an_adapter_that_kills_the_executor_while_it_is_loaded_is_found() -> None:
    loop = Loop()
    bad, good = (loop.submit([1], adapter=version(digest))[0] for digest in ("bad", "good"))
    for _ in range(20):
        loop.step()
        if any(load.version.digest == "bad" for load in loop.loads):
            loop.crash("killed by a load")
        elif loop.loads:
            loop.finish_load()

    assert isinstance(bad.error, ExecutorFailed)
    assert good.output_ids != []
    loop.run()
    assert good.finish_reason == "length"


def test_who_waits_for_a_version_whose_reading_ahead_kills_is_to_blame_and_nobody_else() -> None:
    loop = Loop(FakeEngine(EngineLimits(4000, 4, 400, 1000, 1)), adapter_bytes=64)
    (good,) = loop.submit([1] * 5, adapter=version("good"))
    (bad,) = loop.submit([2] * 5, adapter=version("bad"))

    for _ in range(60):
        loop.clock += 1
        planned, work = loop.policy.plan(), loop.policy.adapters.take_work()
        loop.loads += work.loads
        if "bad" in [*(load.version.digest for load in work.loads), *(ahead.digest for ahead in work.prefetches)]:
            loop.crash("reading it ended the process")
            continue
        while loop.loads:
            loop.finish_load()
        if planned is not None:
            loop.policy.apply(planned, loop.engine(planned.plan))

    assert (good.finish_reason, bad.finish_reason) == ("length", "error")
