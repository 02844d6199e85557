"""Actors: one object, one bounded mailbox, one message at a time.

What one writes and what one holds: `Actor` and `Ref`. The loop between them, and what becomes of exceptions, is
in `cell`; who starts an actor, and starts it again, in `supervision`; an actor in a child process in `remote`.

An actor is a subclass of `Actor`; everybody else holds its `Ref`, which stays valid over restarts. All of it
runs on one event loop: a `Ref` may not be used from another thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import msgspec
from anyio.abc import TaskGroup

from descant.mailbox import ActorError, ActorFailed, ActorStopped, AskTimeout, Mailbox, MailboxFull, Reply

if TYPE_CHECKING:
    from descant.cell import Cell

__all__ = [
    "Actor",
    "ActorError",
    "ActorFailed",
    "ActorStats",
    "ActorStopped",
    "AskTimeout",
    "Later",
    "MailboxFull",
    "Ref",
]

MessageT = TypeVar("MessageT")
SentT = TypeVar("SentT", contravariant=True)


class ActorStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one actor since it was spawned, over all its lives."""

    name: str
    depth: int  # messages in the mailbox now
    high_water: int  # most messages the mailbox ever held
    mailbox_size: int
    handled: int  # messages handled, refusals included
    handling_s: float  # time spent in on_receive, waiting included
    failures: int  # lives that ended in a crash
    restarts: int  # lives begun after the first


class Later:
    """What `Actor.later` returns: the reply comes when `work` is done."""

    __slots__ = ("work",)

    def __init__(self, work: Coroutine[Any, Any, Any] | Reply) -> None:
        self.work = work


class Ref(Generic[SentT]):
    """The address of an actor. All its methods belong to the event loop's thread."""

    __slots__ = ("_cell", "_mailbox", "name")

    def __init__(self, cell: Cell, mailbox: Mailbox) -> None:
        self.name = cell.name
        self._cell = cell
        self._mailbox = mailbox

    async def tell(self, message: SentT) -> None:
        """Send one way; wait while the mailbox is full.

        Cancellation while waiting: the message is not delivered. An actor that tells itself must use
        `tell_nowait`, or it may wait for itself.

        Raises:
            ActorStopped: the actor has stopped.
        """
        envelope = (message, None)
        mailbox = self._mailbox
        if mailbox.offer(envelope):
            return
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mailbox.overflow.append((envelope, room))
        try:
            await room
        except asyncio.CancelledError:
            mailbox.forget(envelope)
            raise

    def tell_nowait(self, message: SentT) -> None:
        """Send one way without waiting.

        Raises:
            MailboxFull: there is no room; the message is not delivered.
            ActorStopped: the actor has stopped.
        """
        if not self._mailbox.offer((message, None)):
            raise MailboxFull(self.name, self._mailbox.size)

    async def ask(self, message: SentT, *, timeout: float) -> Any:
        """Send and return the reply. Waiting for room in the mailbox counts against the deadline.

        Cancelling is safe: if the message was accepted it is handled, and its reply is dropped.

        Raises:
            AskTimeout: no reply within `timeout` seconds.
            ActorFailed: the actor crashed while handling this message.
            ActorStopped: the actor has stopped, or stopped first.
            DescantError: whatever the handler refused with.
        """
        loop = asyncio.get_running_loop()
        reply: Reply = loop.create_future()
        envelope = (message, reply)
        mailbox = self._mailbox
        if not mailbox.offer(envelope):
            mailbox.overflow.append((envelope, None))
        deadline = loop.call_later(timeout, self._expire, reply, message, timeout)
        try:
            return await reply
        except (AskTimeout, asyncio.CancelledError):
            if mailbox.overflow:
                mailbox.forget(envelope)
            raise
        finally:
            deadline.cancel()

    def _expire(self, reply: Reply, message: SentT, timeout_s: float) -> None:
        if not reply.done():
            reply.set_exception(AskTimeout(self.name, type(message).__name__, timeout_s))

    async def stop(self, *, timeout: float = 10.0) -> None:
        """Stop the actor for good, after the message in hand, and return when it has stopped.

        Asks in the mailbox are answered with ActorStopped. After `timeout` seconds the life is cancelled. An
        actor that is still starting is cancelled at once. Stopping twice is fine; an actor that stops itself
        uses `request_stop`.
        """
        self.request_stop()
        with anyio.move_on_after(timeout):
            await self._cell.stopped.wait()
            return
        self._cell.cancel()
        await self._cell.stopped.wait()

    def request_stop(self) -> None:
        """Begin to stop, without waiting for it."""
        self._cell.request_stop()

    @property
    def is_stopped(self) -> bool:
        """Whether the actor is gone for good."""
        return self._mailbox.closed is not None

    def stats(self) -> ActorStats:
        """Return the counters of now."""
        return self._cell.stats()


class Actor(Generic[MessageT]):
    """Base of every actor. A life is one object: `on_start`, then `on_receive` for each message, then `on_stop`.

    State that must outlive a crash belongs to the system and is passed in by the supervisor's factory.
    """

    # A life that proved useful clears the record of crashes before it, and its own end does not count.
    is_productive = False
    # Whether messages still queued at a crash go to the next life; if not, their asks get ActorFailed.
    keeps_mailbox = True
    # How long on_stop may take, in seconds, before it is cancelled.
    stop_grace_s = 10.0

    ref: Ref[MessageT]
    _cell: Cell
    _tasks: TaskGroup

    async def on_start(self) -> None:
        """Run before the first message; messages wait. A typed refusal (no ActorError) is not retried."""

    async def on_receive(self, message: MessageT) -> Any:
        """Handle one message; what is returned (or `self.later(...)`) answers the ask."""
        raise NotImplementedError

    async def on_stop(self) -> None:
        """Run at the end of every life, crashed or not, shielded from cancellation for `stop_grace_s`.

        After a crash the tasks of this life are cancelled already; otherwise they still run.
        """

    def later(self, work: Coroutine[Any, Any, Any] | Reply) -> Later:
        """Let `work` answer the ask, so that the next message need not wait for it.

        To be returned from `on_receive`. A coroutine runs as a task of this life; a future is only listened to.
        """
        return Later(work)

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Run a task of this life beside the mailbox: cancelled when the life ends, ending it if it raises."""
        self._tasks.start_soon(function, *args)

    @property
    def is_asked(self) -> bool:
        """Whether somebody waits for the reply to the message in hand."""
        return self._cell.handling is not None

    @property
    def is_stopping(self) -> bool:
        """Whether somebody asked this actor to stop for good."""
        return self._cell.is_stopping

    def begin(self, cell: Cell, tasks: TaskGroup) -> None:
        """Bind a new life to its address; called by the cell only."""
        self.ref, self._cell, self._tasks = cell.ref, cell, tasks
