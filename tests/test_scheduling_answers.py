"""Adapters and rows may fail: only the sequences concerned do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from descant.contract.plan import NO_ADAPTER, EngineLimits, LogprobRows, RowResult, StepResult
from descant.scheduling.placement.loads import AdapterLoad
from descant.scheduling.sequence import Sequence
from descant_client.errors import AdapterInvalid, AdapterTooLarge, InternalError, UnsupportedRequest
from fake_engine import LIMITS, FakeEngine
from fake_model import FakeRow, counter
from fakes import Loop, version

# ---- adapters -----------------------------------------------------------------------------------------------------


def test_a_cold_adapter_delays_nobody_else() -> None:
    loop = Loop(FakeEngine(behavior=counter))
    (cold,) = loop.submit([1], adapter=version("a"))
    (base,) = loop.submit([1], max_tokens=3)
    while loop.step():
        pass

    assert (base.num_output_tokens, cold.status) == (3, "waiting")
    loop.run()
    assert cold.num_output_tokens == 8


def test_sequences_with_different_adapters_and_none_share_a_step() -> None:
    loop = Loop()
    seqs = [loop.submit([1], adapter=adapter)[0] for adapter in (None, version("a"), version("b"))]
    loop.run()

    slots = [row.spans[0].adapter_slot for row in loop.engine.plans[-1].rows]
    assert NO_ADAPTER in [row.spans[0].adapter_slot for row in loop.engine.plans[0].rows]
    assert len(set(slots)) == len(slots)
    assert len({tuple(seq.output_ids) for seq in seqs}) == 3


def test_a_failed_load_fails_only_the_sequences_of_its_version() -> None:
    loop = Loop()
    error = AdapterInvalid("a", "it is damaged")
    loop.load_error = lambda load: error if load.version.digest == "a" else None
    seqs = [loop.submit([1], adapter=version(digest))[0] for digest in "aab"]

    loop.run()

    assert [seq.error for seq in seqs] == [error, error, None]
    assert seqs[2].num_output_tokens == 8


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_fails_as_a_whole_and_no_choice_runs_on_unread(n: int) -> None:
    loop = Loop(FakeEngine(row_error=lambda row: "no" if row.admit.choice == n - 1 and row.output_index else None))
    choices = loop.submit([1], n=n)
    (other,) = loop.submit([2], max_tokens=1)

    loop.run()

    assert sorted(str(seq.finish_reason) for seq in choices) == ["cancelled"] * (n - 1) + ["error"]
    assert other.finish_reason == "length"
    assert not len(loop.table)


def test_all_choices_of_a_request_end_when_its_adapter_cannot_be_loaded() -> None:
    loop = Loop()
    loop.load_error = lambda load: AdapterInvalid("a", "it is damaged")
    choices = loop.submit([1], n=3, adapter=version("a"))

    loop.run()

    assert [seq.is_finished for seq in choices] == [True] * 3
    assert choices[0].finish_reason == "error"


def test_a_version_whose_load_failed_may_be_tried_again() -> None:
    loop = Loop()
    loop.load_error = lambda load: AdapterInvalid("a", "not yet")
    loop.submit([1], adapter=version("a"))
    loop.run()
    loop.load_error = lambda load: None

    (seq,) = loop.submit([1], adapter=version("a"))
    loop.run()

    assert seq.finish_reason == "length"


HEADS = msgspec.structs.replace(version("h"), num_modules=0, num_heads=2)


def for_speed(loop: Loop, num_bytes: int = 64, **options: Any) -> Sequence:
    heads = msgspec.structs.replace(HEADS, num_bytes=num_bytes)
    return loop.submit([1], adapter=heads, is_adapter_optional=True, **options)[0]


@pytest.mark.parametrize("num_bytes", [64, 1025])  # what cannot be loaded, and what has no room
def test_who_has_an_adapter_for_speed_alone_goes_on_without_it(num_bytes: int) -> None:
    loop = Loop()
    loop.load_error = lambda load: AdapterInvalid("h", "it is damaged")

    early = for_speed(loop, num_bytes)
    loop.run()
    late = for_speed(loop, num_bytes)
    loop.run()

    assert [(seq.finish_reason, seq.adapter) for seq in (early, late)] == [("length", None)] * 2


def test_who_has_an_adapter_for_speed_alone_uses_it_once_it_is_there_and_never_waits() -> None:
    loop = Loop()

    early = for_speed(loop, max_tokens=3)
    assert loop.step()
    loop.run()
    late = for_speed(loop, max_tokens=3)
    loop.run()

    assert (early.adapter, early.is_cold) == (None, False)
    assert (late.adapter, late.is_cold) == (HEADS, False)


def test_nobody_gives_way_to_what_is_there_for_speed_alone() -> None:
    loop = Loop(FakeEngine(msgspec.structs.replace(LIMITS, num_adapter_slots=1)))
    (busy,) = loop.submit([1], max_tokens=20, adapter=version("a"), principal="ann")
    loop.step()
    loop.finish_load()

    fast = for_speed(loop, max_tokens=3, principal="bob")
    while not fast.is_finished:
        assert loop.step()

    assert not busy.is_finished
    assert (busy.num_preemptions, fast.adapter) == (0, None)


def test_what_is_there_for_speed_alone_gives_way_to_those_who_wait() -> None:
    loop = Loop(FakeEngine(msgspec.structs.replace(LIMITS, num_adapter_slots=1)))
    for_speed(loop, max_tokens=1)
    loop.run()
    (waits,) = [for_speed(loop, max_tokens=40), loop.submit([1], max_tokens=3, adapter=version("a"))[0]][1:]
    for _ in range(200):
        for_speed(loop, max_tokens=5)
        loop.step()
        while loop.loads:
            loop.finish_load()
        if waits.is_finished:
            return

    raise AssertionError("it starves")


def test_no_pin_gives_way_to_what_is_there_for_speed_alone() -> None:
    loop = Loop()
    for_speed(loop, max_tokens=1)
    loop.run()
    seq = for_speed(loop, max_tokens=20)
    loop.step()
    loop.policy.adapters.set_pins([version("p", 1024)])  # all there is

    loop.crash()
    loop.run()

    assert (seq.num_output_tokens, seq.adapter) == (20, None)


def test_a_pin_that_has_come_since_takes_the_place_of_what_is_there_for_speed_alone() -> None:
    loop = Loop(adapter_bytes=128)
    for_speed(loop, max_tokens=1)
    loop.run()
    loop.submit([1], max_tokens=50, adapter=version("a"))  # so that the pin waits
    loop.step()
    loop.policy.adapters.set_pins([version("p", 128)])

    seq = for_speed(loop, max_tokens=3)
    loop.run()

    assert (seq.finish_reason, seq.adapter) == ("length", None)


def test_answers_about_loads_of_an_earlier_executor_are_ignored() -> None:
    loop = Loop()
    (seq,) = loop.submit([1], adapter=version("a"))
    loop.step()
    stale: AdapterLoad = loop.loads[0]
    loop.crash()

    loop.policy.adapters.on_placed(stale)
    loop.policy.adapters.on_load_failed(stale, AdapterInvalid("a", "the executor is gone"))
    assert loop.policy.plan() is None

    loop.start_loads()
    loop.run()
    assert seq.finish_reason == "length"


def test_an_adapter_that_never_fits_is_refused() -> None:
    loop = Loop(adapter_bytes=256)

    with pytest.raises(AdapterTooLarge):
        loop.submit([1], adapter=version("a", 257))


def test_an_engine_without_slots_refuses_adapters() -> None:
    loop = Loop(FakeEngine(EngineLimits(8, 4, 32, 1000, 0)))

    with pytest.raises(UnsupportedRequest):
        loop.submit([1], adapter=version("a"))


# ---- what the engine may answer -----------------------------------------------------------------------------------


def test_an_error_of_a_row_fails_only_its_sequence() -> None:
    def row_error(row: FakeRow) -> str | None:
        return "not a number" if row.tokens[0] == 1 else None

    loop = Loop(FakeEngine(row_error=row_error))
    (bad,), (good,) = loop.submit([1]), loop.submit([2])

    loop.run()

    assert isinstance(bad.error, InternalError)
    assert "not a number" in str(bad.error)
    assert good.finish_reason == "length"


@pytest.mark.parametrize("num_computed", [0, 2, 4])
def test_a_row_that_computed_something_else_fails(num_computed: int) -> None:
    loop = Loop()
    (seq,) = loop.submit([1, 2, 3])
    planned = loop.policy.plan()
    assert planned is not None

    result = StepResult(planned.plan.epoch, planned.plan.step, (RowResult(seq.id, num_computed, b"\0\0\0\0"),))
    loop.policy.apply(planned, result)

    assert isinstance(seq.error, InternalError)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": b"\0\0\0\0\0"},
        {"logprobs": LogprobRows(1, 2, b"\0\0\0\0", b"", b"")},
        {"logprobs": LogprobRows(1, 0, b"\0", b"", b"")},
    ],
)
def test_an_answer_that_cannot_be_unpacked_fails_only_its_sequence(changes: dict[str, Any]) -> None:
    loop = Loop()
    (bad,), (good,) = loop.submit([1, 2, 3], num_logprobs=2), loop.submit([4])
    planned = loop.policy.plan()
    assert planned is not None

    result = loop.engine(planned.plan)
    rows = (msgspec.structs.replace(result.rows[0], **changes), *result.rows[1:])
    loop.policy.apply(planned, msgspec.structs.replace(result, rows=rows))
    loop.run()

    assert isinstance(bad.error, InternalError)
    assert good.finish_reason == "length"


def test_a_result_is_applied_once() -> None:
    loop = Loop()
    (seq,) = loop.submit([1])
    planned = loop.policy.plan()
    assert planned is not None
    result = loop.engine(planned.plan)

    loop.policy.apply(planned, result)
    loop.policy.apply(planned, result)

    assert (seq.num_output_tokens, seq.finish_reason) == (1, None)


def test_an_answer_to_another_plan_is_not_applied() -> None:
    loop = Loop()
    (seq,) = loop.submit([1])
    planned = loop.policy.plan()
    assert planned is not None

    for result in (StepResult(planned.plan.epoch, 99, ()), StepResult(planned.plan.epoch, planned.plan.step, ())):
        with pytest.raises(InternalError):
            loop.policy.apply(planned, result)

    loop.crash()
    loop.run()
    assert seq.finish_reason == "length"
