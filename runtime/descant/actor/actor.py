"""Actors: one object, one bounded mailbox, one message at a time.

What one writes and what one holds: `Actor` and `Ref`. The loop between them, and what becomes of exceptions, is
in `cell`; who starts an actor, and starts it again, in `supervision`; an actor in a child process in `remote`.

An actor is a subclass of `Actor`; everybody else holds its `Ref`, which stays valid over restarts. All of it
runs on one event loop: a `Ref` may not be used from another thread.
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
    """What `Actor.later` returns: the reply comes when `work` is done."""

    __slots__ = ("work",)

    def __init__(self, work: Coroutine[Any, Any, Any] | Reply) -> None:
        self.work = work


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
    _address: Address
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
        return self._address.handling is not None

    @property
    def is_stopping(self) -> bool:
        """Whether somebody asked this actor to stop for good."""
        return self._address.is_stopping

    def begin(self, ref: Ref[MessageT], address: Address, tasks: TaskGroup) -> None:
        """Bind a new life to its address. Called by the cell only."""
        self.ref, self._address, self._tasks = ref, address, tasks
