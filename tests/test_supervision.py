"""Restarts, their limit, escalation and ordered shutdown."""

import asyncio
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from descant.actor.actor import Actor
from descant.actor.errors import ActorFailed, ActorStopped, AskTimeout, Escalated
from descant.actor.supervision import RestartPolicy, Supervisor
from descant_client.errors import ModelInvalid

pytestmark = pytest.mark.anyio

LONG = 30.0  # a deadline that is never meant to pass


class Worker(Actor[str]):
    """Crashes on "crash", refuses to start with `refusal`, and keeps a diary that outlives it."""

    def __init__(self, diary: list[str], name: str = "", refusal: Exception | None = None) -> None:
        self.diary = diary
        self.name = name
        self.refusal = refusal

    async def on_start(self) -> None:
        self.diary.append(f"start{self.name}")
        if self.refusal is not None:
            raise self.refusal

    async def on_receive(self, message: str) -> Any:
        match message:
            case "crash":
                raise ValueError("a fault")
            case "useful":
                self.is_productive = True
            case "wait":
                await anyio.sleep_forever()
            case _:
                self.diary.append(message)
        return self

    async def on_stop(self) -> None:
        await anyio.lowlevel.checkpoint()  # a cancelled life would end here
        self.diary.append(f"stop{self.name}")


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def diary() -> list[str]:
    return []


async def crash(ref: Any, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(ActorFailed):
            await ref.ask("crash", timeout=LONG)


async def test_a_crashed_actor_is_a_new_object_behind_the_same_ref(diary):
    async with Supervisor() as supervisor:
        ref = supervisor.spawn(lambda: Worker(diary), "worker")
        before = await ref.ask("a", timeout=LONG)
        await crash(ref)
        assert await ref.ask("b", timeout=LONG) is not before

    assert diary == ["start", "a", "stop", "start", "b", "stop"]


async def test_messages_behind_the_one_that_crashed_go_to_the_next_life(diary):
    async with Supervisor() as supervisor:
        ref = supervisor.spawn(lambda: Worker(diary), "worker")
        for message in ("crash", "a", "b"):
            ref.tell_nowait(message)
        await ref.ask("c", timeout=LONG)

    assert diary == ["start", "stop", "start", "a", "b", "c", "stop"]
    assert ref.stats().failures == ref.stats().restarts == 1


async def test_too_many_crashes_within_the_window_escalate(diary):
    with pytest.raises(Escalated, match="worker cannot be kept running: ValueError: a fault"):  # noqa: PT012
        async with Supervisor(clock=FakeClock()) as supervisor:
            policy = RestartPolicy(max_restarts=2, within_s=60)
            await crash(supervisor.spawn(lambda: Worker(diary), "worker", restarts=policy), times=3)
            await anyio.sleep_forever()

    assert diary == ["start", "stop"] * 3


async def test_crashes_outside_the_window_do_not_count(diary):
    clock = FakeClock()
    async with Supervisor(clock=clock) as supervisor:
        policy = RestartPolicy(max_restarts=1, within_s=60)
        ref = supervisor.spawn(lambda: Worker(diary), "worker", restarts=policy)
        for clock.now in (0.0, 61.0, 122.0):
            await crash(ref)
        await ref.ask("a", timeout=LONG)


async def test_a_productive_life_clears_the_record_of_crashes(diary):
    async with Supervisor(clock=FakeClock()) as supervisor:
        policy = RestartPolicy(max_restarts=1, within_s=60)
        ref = supervisor.spawn(lambda: Worker(diary), "worker", restarts=policy)
        for _ in range(3):
            await crash(ref)
            await ref.ask("useful", timeout=LONG)
            await crash(ref)
        await ref.ask("a", timeout=LONG)


async def test_on_escalate_is_told_and_the_other_actors_go_on(diary):
    told = []
    async with Supervisor(on_escalate=lambda name, error: told.append((name, str(error)))) as supervisor:
        other = supervisor.spawn(lambda: Worker(diary), "other")
        ref = supervisor.spawn(lambda: Worker(diary), "worker", restarts=RestartPolicy(max_restarts=0))
        await crash(ref)
        with pytest.raises(ActorFailed, match="a fault"):
            await ref.ask("a", timeout=LONG)
        await other.ask("a", timeout=LONG)

    assert told == [("worker", "a fault")]


async def test_a_typed_refusal_to_start_is_not_tried_again(diary):
    refusal = ModelInvalid("tiny", "no weights")
    with pytest.raises(Escalated, match="no weights"):  # noqa: PT012
        async with Supervisor() as supervisor:
            supervisor.spawn(lambda: Worker(diary, refusal=refusal), "worker")
            await anyio.sleep_forever()

    assert diary == ["start", "stop"]


async def test_a_start_that_failed_on_another_actor_is_tried_again(diary):
    refusals = iter([AskTimeout("other", "Ping", 1.0), None])
    async with Supervisor() as supervisor:
        ref = supervisor.spawn(lambda: Worker(diary, refusal=next(refusals)), "worker")
        await ref.ask("a", timeout=LONG)

    assert diary == ["start", "stop", "start", "a", "stop"]


async def test_a_factory_that_raises_is_a_crash(diary):
    diaries = iter([diary])
    with pytest.raises(Escalated, match="StopIteration"):  # noqa: PT012
        async with Supervisor() as supervisor:
            ref = supervisor.spawn(lambda: Worker(next(diaries)), "worker")
            await crash(ref)
            await anyio.sleep_forever()


async def test_leaving_stops_the_last_spawned_first(diary):
    async with Supervisor() as supervisor:
        for name in "123":
            await supervisor.spawn(lambda name=name: Worker(diary, name), name).ask("a", timeout=LONG)

    assert diary[-3:] == ["stop3", "stop2", "stop1"]


async def test_an_exception_in_the_block_stops_in_order_too(diary):
    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with Supervisor() as supervisor:
            for name in "12":
                await supervisor.spawn(lambda name=name: Worker(diary, name), name).ask("a", timeout=LONG)
            raise KeyError("block")

    assert raised.group_contains(KeyError)
    assert diary[-2:] == ["stop2", "stop1"]


async def test_cancelling_the_block_answers_every_ask(diary):
    asks: list[asyncio.Task[Any]] = []
    with anyio.CancelScope() as scope:
        async with Supervisor() as supervisor:
            ref = supervisor.spawn(lambda: Worker(diary), "worker")
            asks += [asyncio.create_task(ref.ask(text, timeout=LONG)) for text in ("wait", "a")]
            await anyio.lowlevel.checkpoint()
            scope.cancel()
            await anyio.sleep_forever()

    outcomes = await asyncio.gather(*asks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ActorStopped, ActorStopped]
    assert diary == ["start", "stop"]


async def test_stopping_during_the_start_cancels_it(diary):
    class Slow(Worker):
        async def on_start(self) -> None:
            await anyio.sleep_forever()

    async with Supervisor() as supervisor:
        ref = supervisor.spawn(lambda: Slow(diary), "slow")
        await anyio.lowlevel.checkpoint()
        with anyio.fail_after(LONG):
            await ref.stop(timeout=2 * LONG)

    assert diary == ["stop"]


async def test_a_name_is_free_again_once_its_actor_stopped(diary):
    async with Supervisor() as supervisor:
        await supervisor.spawn(lambda: Worker(diary), "worker").stop()
        supervisor.spawn(lambda: Worker(diary), "worker")
        assert [stats.name for stats in supervisor.stats()] == ["worker"]


async def test_messages_to_a_reserved_address_wait_until_its_actor_is_started(diary):
    async with Supervisor() as supervisor:
        ref = supervisor.reserve("worker", mailbox_size=2)
        ref.tell_nowait("a")
        await anyio.lowlevel.checkpoint()
        assert diary == []
        supervisor.start(ref, lambda: Worker(diary))
        await ref.ask("b", timeout=LONG)

    assert diary == ["start", "a", "b", "stop"]


async def test_a_reserved_actor_stops_in_order_of_its_start(diary):
    async with Supervisor() as supervisor:
        late = supervisor.reserve("late")
        supervisor.spawn(lambda: Worker(diary, " early"), "early")
        supervisor.start(late, lambda: Worker(diary, " late"))
        await late.ask("a", timeout=LONG)

    assert diary[-2:] == ["stop late", "stop early"]


async def test_an_actor_that_was_reserved_and_never_started_is_stopped_at_the_end():
    replies: list[BaseException | None] = []

    async def ask(ref: Any) -> None:
        with pytest.raises(ActorStopped) as raised:
            await ref.ask("a", timeout=LONG)
        replies.append(raised.value)

    async with anyio.create_task_group() as tasks, Supervisor() as supervisor:
        ref = supervisor.reserve("worker")
        tasks.start_soon(ask, ref)
        await anyio.lowlevel.checkpoint()

    assert len(replies) == 1
    assert ref.is_stopped
    with pytest.raises(ActorStopped):
        ref.tell_nowait("b")
