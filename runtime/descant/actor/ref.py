"""`Ref`: the address of an actor, held by its senders."""

from __future__ import annotations

import asyncio
from typing import Any, Generic, TypeVar

import anyio

from descant.actor.address import ActorStats, Address
from descant.actor.errors import AskTimeout, MailboxFull
from descant.actor.mailbox import Reply
from descant.actor.message import Ask, ReplyT

SentT = TypeVar("SentT", contravariant=True)


class Ref(Generic[SentT]):
    """The address of an actor. Call its methods in the event loop's thread only."""

    __slots__ = ("_address", "_mailbox", "name")

    def __init__(self, address: Address) -> None:
        self.name = address.name
        self._address = address
        self._mailbox = address.mailbox

    async def tell(self, message: SentT) -> None:
        """Send one way. Wait while the mailbox is full.

        If cancelled while waiting, the message is not delivered. An actor that tells itself must use `tell_nowait`;
        `tell` could wait for ever.

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
            MailboxFull: the message is not delivered.
            ActorStopped: the actor has stopped.
        """
        if not self._mailbox.offer((message, None)):
            raise MailboxFull(self.name, self._mailbox.size)

    async def ask(self, message: Ask[ReplyT], *, timeout: float) -> ReplyT:
        """Send and return the reply. Waiting for room in the mailbox counts against the deadline.

        Cancelling is safe: an accepted message is handled, and its reply is dropped.

        Raises:
            AskTimeout: no reply within `timeout` seconds.
            ActorFailed: the actor crashed while handling this message.
            ActorStopped: the actor has stopped, or stopped before it handled the message.
            DescantError: the refusal of the handler.
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

    def _expire(self, reply: Reply, message: Ask[Any], timeout_s: float) -> None:
        if not reply.done():
            reply.set_exception(AskTimeout(self.name, type(message).__name__, timeout_s))

    async def stop(self, *, timeout: float = 10.0) -> None:
        """Stop the actor after its current message, and return when it has stopped.

        Asks in the mailbox are answered with ActorStopped. After `timeout` seconds the life is cancelled; an actor
        that is still starting is cancelled at once. May be called twice. An actor that stops itself uses
        `request_stop`.
        """
        self.request_stop()
        with anyio.move_on_after(timeout):
            await self._address.stopped.wait()
            return
        self._address.cancel()
        await self._address.stopped.wait()

    def request_stop(self) -> None:
        """Begin to stop, without waiting for it."""
        self._address.request_stop()

    @property
    def is_stopped(self) -> bool:
        """Whether the actor has stopped, or was given up."""
        return self._mailbox.closed is not None

    def stats(self) -> ActorStats:
        """Return the current counters."""
        return self._address.stats()
