"""Actors: one object, one bounded mailbox, one message at a time.

An actor is a subclass of `Actor`. Other actors hold its `Ref`, which stays valid over restarts. The mailbox loop and
the handling of exceptions are in `cell`, start and restart in `supervision`, actors in child processes in `remote`.

All actors run on one event loop. A `Ref` may not be used from another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from anyio.abc import TaskGroup

from descant.actor.address import Address
from descant.actor.mailbox import Reply
from descant.actor.ref import Ref

MessageT = TypeVar("MessageT")


class Later:
    """The result of `Actor.later`: the reply is sent when `work` is done."""

    __slots__ = ("work",)

    def __init__(self, work: Coroutine[Any, Any, Any] | Reply) -> None:
        self.work = work


class Actor(Generic[MessageT]):
    """Base of every actor. A life is one object: `on_start`, then `on_receive` for each message, then `on_stop`.

    State that must outlive a crash belongs to the system and is passed in by the supervisor's factory.
    """

    # Whether this life clears the record of earlier crashes. Its own end does not count then.
    is_productive = False
    # Whether messages still queued at a crash go to the next life; if not, their asks get ActorFailed.
    keeps_mailbox = True
    # How long on_stop may take, in seconds, before it is cancelled.
    stop_grace_s = 10.0

    ref: Ref[MessageT]
    _address: Address
    _tasks: TaskGroup

    async def on_start(self) -> None:
        """Run before the first message. A DescantError other than an ActorError is a refusal: no restart follows."""

    async def on_receive(self, message: MessageT) -> Any:
        """Handle one message. Return the reply to an ask, or `self.later(...)`."""
        raise NotImplementedError

    async def on_stop(self) -> None:
        """Run at the end of every life, crashed or not, shielded from cancellation for `stop_grace_s`.

        After a crash the tasks of this life are cancelled already; otherwise they still run.
        """

    def later(self, work: Coroutine[Any, Any, Any] | Reply) -> Later:
        """Return a value for `on_receive` to return: `work` answers the ask while the next messages are handled.

        A coroutine runs as a task of this life. A future is only awaited.
        """
        return Later(work)

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Run a task beside the mailbox. It is cancelled when this life ends; an exception in it ends this life."""
        self._tasks.start_soon(function, *args)

    @property
    def is_asked(self) -> bool:
        """Whether the current message is an ask."""
        return self._address.handling is not None

    @property
    def is_abandoned(self) -> bool:
        """Whether the sender of the current ask no longer waits: it was cancelled, or its deadline has passed."""
        return self._address.handling is not None and self._address.handling.done()

    @property
    def is_stopping(self) -> bool:
        """Whether this actor was requested to stop."""
        return self._address.is_stopping

    def begin(self, ref: Ref[MessageT], address: Address, tasks: TaskGroup) -> None:
        """Bind a new life to its address. Called by the cell only."""
        self.ref, self._address, self._tasks = ref, address, tasks
