"""Start of actors, restart after a crash, and stop in order.

A supervisor owns the task of every actor that it started. A crashed actor gets a new object from its factory behind
the same `Ref`. Too many crashes in a short time escalate, so that the system can drain with a clear message.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio
import msgspec

from descant.actor.actor import Actor
from descant.actor.address import Address
from descant.actor.cell import Cell, failure_of
from descant.actor.errors import ActorError, Escalated
from descant.actor.ref import ActorStats, Ref
from descant_client.errors import DescantError
from descant_client.task_groups import first_leaf

logger = logging.getLogger(__name__)


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """More than `max_restarts` crashes within `within_s` seconds escalate.

    A productive life (`Actor.is_productive`) clears the record, and its own end does not count.
    """

    max_restarts: int = 5
    within_s: float = 60.0


class Supervisor:
    """Runs actors inside `async with`; leaving the block stops them in reverse order of start.

    Cancelling the block, or an exception of `on_escalate`, cancels all actors at once. Every pending ask is answered
    in any case.

    `on_escalate(name, error)` is called once for an actor that is given up; the other actors continue. Without
    `on_escalate`, all actors are cancelled and leaving the block raises `Escalated`.
    """

    def __init__(
        self,
        *,
        on_escalate: Callable[[str, Exception], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_escalate = on_escalate
        self._clock = clock
        self._cells: dict[str, Cell] = {}  # in order of start, without the stopped
        self._reserved: dict[str, Cell] = {}  # not started yet
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._close_reserved()
        try:
            if kind is None or issubclass(kind, Exception):
                await self.stop()
        except anyio.get_cancelled_exc_class() as cancelled:
            kind, exc, trace = type(cancelled), cancelled, cancelled.__traceback__
        try:
            return await self._tasks.__aexit__(kind, exc, trace)
        except BaseExceptionGroup as group:
            escalated = group.subgroup(Escalated)
            if escalated is None:
                raise
            raise first_leaf(escalated) from None

    def spawn(
        self,
        factory: Callable[[], Actor[Any]],
        name: str,
        *,
        mailbox_size: int = 1024,
        restarts: RestartPolicy = RestartPolicy(),  # noqa: B008 - frozen
    ) -> Ref[Any]:
        """Start an actor and return its address at once; messages wait for the end of its `on_start`.

        The name is free again once the actor has stopped.
        """
        ref = self.reserve(name, mailbox_size=mailbox_size)
        self.start(ref, factory, restarts=restarts)
        return ref

    def reserve(self, name: str, *, mailbox_size: int = 1024) -> Ref[Any]:
        """Return the address of an actor that `start` starts later; until then its messages wait.

        If it is never started, it is stopped when the supervisor stops. It must not be stopped before by itself.
        """
        assert name not in self._cells | self._reserved, f"two actors named {name}"
        cell = self._reserved[name] = Cell(Address(name, mailbox_size))
        return cell.ref

    def start(
        self,
        ref: Ref[Any],
        factory: Callable[[], Actor[Any]],
        *,
        restarts: RestartPolicy = RestartPolicy(),  # noqa: B008 - frozen
    ) -> None:
        """Start the actor of a reserved address."""
        cell = self._cells[ref.name] = self._reserved.pop(ref.name)
        self._tasks.start_soon(self._supervise, cell, factory, restarts, name=ref.name)

    async def stop(self, *, timeout: float = 10.0) -> None:
        """Stop every actor, the last started first, each given `timeout` seconds for its current message."""
        self._close_reserved()
        for cell in reversed(list(self._cells.values())):
            await cell.ref.stop(timeout=timeout)

    def _close_reserved(self) -> None:
        for cell in self._reserved.values():
            cell.address.close()
        self._reserved.clear()

    def stats(self) -> list[ActorStats]:
        """Return the counters of every running actor, in order of start."""
        return [cell.address.stats() for cell in self._cells.values()]

    async def _supervise(self, cell: Cell, factory: Callable[[], Actor[Any]], restarts: RestartPolicy) -> None:
        crashes: deque[float] = deque()
        try:
            while not cell.address.is_stopping:
                failure = await cell.live(factory)
                if failure is None:
                    break
                logger.error(
                    "%s crashed: %s",
                    cell.address.name,
                    failure,
                    exc_info=None if isinstance(failure, DescantError) else failure,
                )
                if cell.address.is_stopping:
                    break
                if cell.address.actor is not None and cell.address.actor.is_productive:
                    crashes.clear()
                elif self._is_hopeless(cell, failure, crashes, restarts):
                    self._give_up(cell, failure)
                    break
        finally:
            cell.address.close()
            del self._cells[cell.address.name]

    def _is_hopeless(self, cell: Cell, failure: Exception, crashes: deque[float], restarts: RestartPolicy) -> bool:
        if not cell.address.is_up and isinstance(failure, DescantError) and not isinstance(failure, ActorError):
            return True
        now = self._clock()
        crashes.append(now)
        while crashes and crashes[0] < now - restarts.within_s:
            crashes.popleft()
        return len(crashes) > restarts.max_restarts

    def _give_up(self, cell: Cell, failure: Exception) -> None:
        cell.address.close(partial(failure_of, cell.address.name, failure))
        if self._on_escalate is None:
            raise Escalated(cell.address.name, f"{type(failure).__name__}: {failure}") from failure
        self._on_escalate(cell.address.name, failure)
