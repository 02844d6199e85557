"""`Address`: the state of an actor that outlives its lives, shared by its `Ref` and its `Cell`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from descant.actor.errors import ActorStopped
from descant.actor.mailbox import Mailbox, Reply
from descant_client.errors import DescantError


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


class Address:
    """Mailbox, stop flags and counters of one actor."""

    def __init__(self, name: str, mailbox_size: int) -> None:
        self.name = name
        self.mailbox = Mailbox(mailbox_size)
        self.actor: Any = None  # the actor object of the current life, or of the last one
        self.is_up = False  # the current life has returned from on_start
        self.is_stopping = False
        self.stopped = anyio.Event()
        self.handling: Reply | None = None  # the reply owed by the current message
        self.tasks: TaskGroup | None = None  # of the current life
        self.num_lives = 0
        self.num_failures = 0
        self.num_handled = 0
        self.handling_s = 0.0

    def stats(self) -> ActorStats:
        """Return the current counters."""
        depth = len(self.mailbox.queue)
        return ActorStats(
            name=self.name,
            depth=depth,
            high_water=max(self.mailbox.high_water, depth),
            mailbox_size=self.mailbox.size,
            handled=self.num_handled,
            handling_s=self.handling_s,
            failures=self.num_failures,
            restarts=max(self.num_lives - 1, 0),
        )

    def request_stop(self) -> None:
        """Stop after the current message. A life that is still starting is cancelled."""
        self.is_stopping = True
        self.mailbox.wake()
        if not self.is_up:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the current life, if there is one."""
        if self.tasks is not None:
            self.tasks.cancel_scope.cancel()

    def close(self, make_error: Callable[[], DescantError] | None = None) -> None:
        """Mark the actor as stopped. Queued and later messages get ActorStopped unless `make_error` is given."""
        self.mailbox.close(make_error or partial(ActorStopped, self.name))
        self.stopped.set()
