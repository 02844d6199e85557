"""The lives of one actor: the mailbox loop, what becomes of exceptions, and every reply answered.

A `Cell` outlives the actor objects it runs, one after the other; `supervision` says when and how often.

    raised by                    an ask's handler or `later`        a tell's handler or `later`
    a DescantError               is the asker's reply               is logged
    any other exception          the asker gets ActorFailed; if     ends this life
                                 the handler raised it, ends
                                 this life

Any exception of `on_start`, of `on_stop` or of a task from `start_soon` ends the life.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from time import perf_counter
from typing import Any

import anyio

from descant.actor.actor import Actor, Later
from descant.actor.address import Address
from descant.actor.errors import ActorFailed, ActorStopped
from descant.actor.mailbox import Reply
from descant.actor.ref import Ref
from descant_client.errors import DescantError
from descant_client.task_groups import first_leaf

logger = logging.getLogger(__name__)

# Messages handled in a row before the loop gets a turn, when no handler waits for anything.
BATCH_SIZE = 64


class Cell:
    """Runs the lives of one actor, driven by a supervisor."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.ref: Ref[Any] = Ref(address)
        self._owed: set[Reply] = set()  # replies owed by `later`

    async def live(self, factory: Callable[[], Actor[Any]]) -> Exception | None:
        """Run one life. Return None after a stop, else what it died of; every reply it owed is answered."""
        address = self.address
        address.num_lives += 1
        address.is_up, address.actor = False, None
        make_error: Callable[[], DescantError] = partial(ActorStopped, address.name)
        try:
            async with anyio.create_task_group() as tasks:
                address.tasks = tasks
                address.actor = actor = factory()
                actor.begin(self.ref, address, tasks)
                await self._run(actor)
                tasks.cancel_scope.cancel()
            return None
        except Exception as exc:  # noqa: BLE001 - a life may end of anything; the supervisor decides
            failure = first_leaf(exc)
            assert isinstance(failure, Exception), "a group of Exceptions holds nothing else"
            address.num_failures += 1
            make_error = partial(failure_of, address.name, failure)
            if address.actor is not None and not address.actor.keeps_mailbox:
                address.mailbox.flush(make_error)
            return failure
        finally:
            address.tasks = None
            self._settle_owed(make_error)

    async def _run(self, actor: Actor[Any]) -> None:
        try:
            await actor.on_start()
            self.address.is_up = True
            await self._handle_messages(actor)
        finally:
            with anyio.move_on_after(actor.stop_grace_s, shield=True):
                await actor.on_stop()

    async def _handle_messages(self, actor: Actor[Any]) -> None:
        mailbox = self.address.mailbox
        queue = mailbox.queue
        loop = asyncio.get_running_loop()
        streak = 0
        while not self.address.is_stopping:
            if not queue:
                mailbox.waker = loop.create_future()
                await mailbox.waker
                streak = 0
                continue
            message, self.address.handling = mailbox.take()
            started = perf_counter()
            try:
                result = await actor.on_receive(message)
                if type(result) is Later:
                    self._owe(actor, message, result.work)
                elif self.address.handling is not None and not self.address.handling.done():
                    self.address.handling.set_result(result)
            except DescantError as error:
                self._refuse(self.address.handling, message, error)
            self.address.handling_s += perf_counter() - started
            self.address.num_handled += 1
            self.address.handling = None
            streak += 1
            if streak == BATCH_SIZE:
                streak = 0
                await asyncio.sleep(0)

    def _owe(self, actor: Actor[Any], message: Any, work: Coroutine[Any, Any, Any] | Reply) -> None:
        reply = self.address.handling
        if reply is not None:
            self._owed.add(reply)
        if isinstance(work, asyncio.Future):
            work.add_done_callback(partial(self._settle_from, reply, message))
        else:
            actor.start_soon(self._settle_by, reply, message, work)

    async def _settle_by(self, reply: Reply | None, message: Any, work: Coroutine[Any, Any, Any]) -> None:
        try:
            result = await work
        except DescantError as error:
            self._refuse(reply, message, error)
        except Exception as exc:
            if reply is None:
                raise
            logger.exception("%s: %s failed", self.address.name, type(message).__name__)
            self._refuse(reply, message, failure_of(self.address.name, exc))
        else:
            if reply is not None and not reply.done():
                reply.set_result(result)
        if reply is not None:  # a cancelled task leaves the reply to the end of this life
            self._owed.discard(reply)

    def _settle_from(self, reply: Reply | None, message: Any, work: Reply) -> None:
        if work.cancelled():
            return  # the end of this life answers
        failure = work.exception()
        if failure is not None:
            error = failure if isinstance(failure, DescantError) else failure_of(self.address.name, failure)
            self._refuse(reply, message, error)
        elif reply is not None and not reply.done():
            reply.set_result(work.result())
        if reply is not None:
            self._owed.discard(reply)

    def _refuse(self, reply: Reply | None, message: Any, error: DescantError) -> None:
        if reply is None:
            logger.warning("%s: %s refused: %s", self.address.name, type(message).__name__, error)
        elif not reply.done():
            reply.set_exception(error)

    def _settle_owed(self, make_error: Callable[[], DescantError]) -> None:
        owed = [*self._owed, *([self.address.handling] if self.address.handling is not None else [])]
        self._owed.clear()
        self.address.handling = None
        for reply in owed:
            if not reply.done():
                reply.set_exception(make_error())


def failure_of(name: str, failure: BaseException) -> ActorFailed:
    """Return the ActorFailed that askers of `name` get; one that `name` itself raised keeps its data."""
    if isinstance(failure, ActorFailed) and failure.actor == name:
        return ActorFailed(**failure.data())
    return ActorFailed(name, f"{type(failure).__name__}: {failure}")
