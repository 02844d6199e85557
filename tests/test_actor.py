"""One actor: order, back-pressure, deadlines, and that every ask is answered."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest

from descant.actor.actor import Actor
from descant.actor.errors import ActorFailed, ActorStopped, AskTimeout, MailboxFull
from descant.actor.ref import Ref
from descant.actor.supervision import Supervisor
from descant_client.errors import InvalidRequest

pytestmark = pytest.mark.anyio

LONG = 30.0  # a deadline that is never meant to pass


class Note(msgspec.Struct, frozen=True, tag=True):
    """Kept, in order; the reply is the number of notes."""

    text: str


class Wait(msgspec.Struct, frozen=True, tag=True):
    """Answered when the gate opens; the mailbox waits unless `aside`."""

    aside: bool = False


class Fail(msgspec.Struct, frozen=True, tag=True):
    """Raises; a typed refusal, or a fault."""

    typed: bool
    aside: bool = False


class Notebook(Actor[Note | Wait | Fail]):
    """Does what its messages say."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.events: list[str] = []
        self.is_waiting = anyio.Event()
        self.gate = anyio.Event()

    async def on_start(self) -> None:
        self.events.append("start")

    async def on_receive(self, message: Note | Wait | Fail) -> Any:
        match message:
            case Note(text):
                self.notes.append(text)
                return len(self.notes)
            case Wait(aside):
                return self.later(self.wait()) if aside else await self.wait()
            case Fail(typed, aside):
                return self.later(self.fail(typed)) if aside else await self.fail(typed)

    async def on_stop(self) -> None:
        self.events.append("stop")

    async def wait(self) -> str:
        self.is_waiting.set()
        await self.gate.wait()
        return "opened"

    async def fail(self, typed: bool) -> None:
        raise InvalidRequest("text", "no") if typed else ValueError("a fault")


@pytest.fixture
def actor() -> Notebook:
    return Notebook()


@pytest.fixture
async def ref(actor: Notebook) -> AsyncIterator[Ref[Any]]:
    """The address of `actor`, with room for two messages; a crash ends it for good."""
    lives = iter([actor])
    async with Supervisor(on_escalate=lambda name, error: None) as supervisor:
        yield supervisor.spawn(lambda: next(lives), "notebook", mailbox_size=2)
        actor.gate.set()


async def ask_soon(ref: Ref[Any], message: Any) -> asyncio.Task[Any]:
    """Start an ask and return once the message is sent."""
    task = asyncio.create_task(ref.ask(message, timeout=LONG))
    await asyncio.sleep(0)
    return task


async def turn() -> None:
    """Let every task that is ready run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_messages_are_handled_in_the_order_they_were_sent(ref, actor):
    for text in "abcdefgh":
        await ref.tell(Note(text))

    assert await ref.ask(Note("i"), timeout=LONG) == 9
    assert "".join(actor.notes) == "abcdefghi"


async def test_tell_waits_while_the_mailbox_is_full_and_nobody_overtakes(ref, actor):
    await ask_soon(ref, Wait())
    await actor.is_waiting.wait()
    tells = [asyncio.create_task(ref.tell(Note(text))) for text in "abcde"]
    await turn()

    assert [task.done() for task in tells] == [True, True, False, False, False]
    actor.gate.set()
    await asyncio.gather(*tells)
    assert await ref.ask(Note("f"), timeout=LONG) == 6
    assert "".join(actor.notes) == "abcdef"


async def test_tell_nowait_refuses_when_the_mailbox_is_full(ref):
    ref.tell_nowait(Note("a"))
    ref.tell_nowait(Note("b"))

    with pytest.raises(MailboxFull) as refusal:
        ref.tell_nowait(Note("c"))
    assert refusal.value.data() == {"actor": "notebook", "size": 2}


async def test_a_tell_cancelled_while_it_waits_for_room_is_not_delivered(ref, actor):
    await ask_soon(ref, Wait())
    await actor.is_waiting.wait()
    tells = [asyncio.create_task(ref.tell(Note(text))) for text in "abc"]
    await turn()

    tells[2].cancel()
    await turn()
    actor.gate.set()
    assert await ref.ask(Note("d"), timeout=LONG) == 3


async def test_an_ask_past_its_deadline_times_out_and_the_actor_goes_on(ref, actor):
    with pytest.raises(AskTimeout, match="did not answer Wait within"):
        await ref.ask(Wait(), timeout=0.01)

    actor.gate.set()
    assert await ref.ask(Note("a"), timeout=LONG) == 1


async def test_an_ask_that_finds_no_room_times_out_without_being_delivered(ref, actor):
    await ask_soon(ref, Wait())
    await actor.is_waiting.wait()
    ref.tell_nowait(Note("a"))
    ref.tell_nowait(Note("b"))

    with pytest.raises(AskTimeout):
        await ref.ask(Note("c"), timeout=0.01)
    actor.gate.set()
    assert await ref.ask(Note("d"), timeout=LONG) == 3


async def test_senders_that_gave_up_waiting_for_room_leave_nothing_behind(ref, actor):
    await ask_soon(ref, Wait())
    await actor.is_waiting.wait()
    ref.tell_nowait(Note("a"))
    ref.tell_nowait(Note("b"))

    senders = [asyncio.create_task(ref.tell(Note("c"))), await ask_soon(ref, Note("d"))]
    for sender in senders:
        sender.cancel()
    await turn()
    assert not ref._mailbox.overflow


async def test_the_reply_to_a_cancelled_ask_is_dropped(ref, actor):
    task = await ask_soon(ref, Wait())
    await actor.is_waiting.wait()

    task.cancel()
    await turn()
    actor.gate.set()
    assert await ref.ask(Note("a"), timeout=LONG) == 1
    assert task.cancelled()


async def test_a_typed_refusal_is_the_reply_and_the_actor_lives_on(ref, actor):
    for aside in (False, True):
        with pytest.raises(InvalidRequest, match="at text: no"):
            await ref.ask(Fail(typed=True, aside=aside), timeout=LONG)

    assert actor.events == ["start"]


async def test_a_typed_refusal_of_a_tell_is_logged(ref, actor, caplog):
    await ref.tell(Fail(typed=True))
    await ref.tell(Fail(typed=True, aside=True))
    await ref.ask(Note("a"), timeout=LONG)

    assert [record.getMessage() for record in caplog.records] == [
        "notebook: Fail refused: Invalid request at text: no"
    ] * 2
    assert actor.events == ["start"]


async def test_a_fault_in_a_handler_answers_the_asker_and_ends_the_life(ref, actor):
    with pytest.raises(ActorFailed, match="notebook crashed: ValueError: a fault"):
        await ref.ask(Fail(typed=False), timeout=LONG)

    await turn()
    assert actor.events == ["start", "stop"]


async def test_a_fault_in_later_answers_the_asker_and_the_actor_lives_on(ref, actor):
    with pytest.raises(ActorFailed, match="a fault"):
        await ref.ask(Fail(typed=False, aside=True), timeout=LONG)

    assert actor.events == ["start"]


async def test_a_fault_in_later_of_a_tell_ends_the_life(ref, actor):
    await ref.tell(Fail(typed=False, aside=True))
    await turn()

    assert actor.events == ["start", "stop"]


async def test_later_does_not_hold_up_the_next_message(ref, actor):
    waiting = await ask_soon(ref, Wait(aside=True))

    assert await ref.ask(Note("a"), timeout=LONG) == 1
    actor.gate.set()
    assert await waiting == "opened"


async def test_later_answers_with_the_result_of_a_future():
    class Listener(Actor[Note]):
        async def on_receive(self, message: Note) -> Any:
            return self.later(promise)

    promise: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with Supervisor() as supervisor:
        asked = await ask_soon(supervisor.spawn(Listener, "listener"), Note("a"))
        promise.set_result(7)
        assert await asked == 7


async def test_a_crash_answers_every_later_and_the_handler_in_hand(ref, actor):
    waiting = [await ask_soon(ref, Wait(aside=True)), await ask_soon(ref, Wait())]
    await actor.is_waiting.wait()
    await turn()

    actor.start_soon(actor.fail, False)
    for task in waiting:
        with pytest.raises(ActorFailed, match="a fault"):
            await task


async def test_stop_answers_asks_in_hand_queued_waiting_for_room_and_afterwards(ref, actor):
    in_hand = await ask_soon(ref, Wait())
    await turn()
    waiting = [await ask_soon(ref, Note(text)) for text in "abc"]

    ref.request_stop()
    actor.gate.set()
    await ref.stop()
    assert await in_hand == "opened"
    outcomes = await asyncio.gather(*waiting, ref.ask(Note("d"), timeout=LONG), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ActorStopped] * 4


async def test_stop_cancels_a_handler_that_outlasts_its_grace_and_every_later(ref, actor):
    waiting = [await ask_soon(ref, Wait(aside=True)), await ask_soon(ref, Wait())]
    await actor.is_waiting.wait()
    await turn()

    await ref.stop(timeout=0.01)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ActorStopped] * 2
    assert actor.events == ["start", "stop"]


async def test_nobody_may_send_to_a_stopped_actor(ref):
    await ref.stop()

    with pytest.raises(ActorStopped):
        await ref.tell(Note("a"))
    with pytest.raises(ActorStopped):
        ref.tell_nowait(Note("a"))
    assert ref.is_stopped


async def test_a_busy_actor_lets_the_loop_run_between_batches(actor):
    async with Supervisor() as supervisor:
        ref = supervisor.spawn(lambda: actor, "busy", mailbox_size=1000)
        for _ in range(500):
            ref.tell_nowait(Note("a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < len(actor.notes) < 500


async def test_the_counters_say_what_happened(ref, actor):
    ref.tell_nowait(Note("a"))
    ref.tell_nowait(Note("b"))
    await ref.ask(Note("c"), timeout=LONG)

    stats = ref.stats()
    assert (stats.name, stats.depth, stats.high_water, stats.mailbox_size) == ("notebook", 0, 2, 2)
    assert (stats.handled, stats.failures, stats.restarts) == (3, 0, 0)
    assert 0 < stats.handling_s < LONG
