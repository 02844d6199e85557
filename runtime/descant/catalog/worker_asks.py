"""`WorkerAsks`: concurrent asks to the worker, with a crash blamed on the message that caused it.

A crash of the worker fails everything in flight there. Each version that was being made is then asked for once more,
alone, so a second crash is its own fault. Exports may take an hour, so versions never wait for them: exports have
`MAX_EXPORTS` slots of their own, at most one for each principal, and run beside others after a crash, too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from descant.actor.errors import ActorFailed, AskTimeout
from descant.actor.message import Ask, ReplyT
from descant.actor.ref import Ref
from descant.contract.worker import Export, Exported, MakeVersion, Prepared, WorkerMessage
from descant_client.errors import AdapterInvalid, DeadlineExceeded

# Most at once, of either kind. Their sum is at most the worker's threads, or one kind would wait there for the other.
MAX_ASKS = 6
MAX_EXPORTS = 2
NUM_EXPORT_TRIES = 3


class WorkerAsks:
    """Every ask of the registry to the worker goes through here."""

    def __init__(self, worker: Ref[WorkerMessage], max_asks: int = MAX_ASKS, max_exports: int = MAX_EXPORTS) -> None:
        self._worker = worker
        self._max_asks = max_asks
        self._max_exports = max_exports
        self._num_asks = 0  # for versions, in flight beside each other
        self._exporters: set[str] = set()  # principals with an export in flight
        self._num_suspects = 0  # versions that wait to be made alone, or are being so; no other ask starts meanwhile
        self._turn_over = anyio.Condition()
        self._alone = anyio.Lock()

    async def ask(self, message: MakeVersion, timeout_s: float) -> Prepared:
        """Have a version made, and return the worker's reply.

        Raises:
            AdapterInvalid: the worker crashed twice, the second time with no other version in flight. DeadlineExceeded:
            it takes longer than `timeout_s`, not counting the wait for a turn. DescantError: a refusal of the worker.
        """
        try:
            async with self._beside_others():
                return await self._ask(message, message.adapter, timeout_s)
        except ActorFailed:
            pass  # perhaps because of another message
        try:
            async with self._by_itself():
                return await self._ask(message, message.adapter, timeout_s)
        except ActorFailed as error:
            reason = f"working on it ended the worker: {error.data()['reason']}"
            raise AdapterInvalid(message.adapter, reason) from error

    async def export(self, principal: str, message: Export, timeout_s: float) -> Exported:
        """Have a version exported, one at a time for each principal, and return the worker's reply.

        Raises:
            AdapterInvalid: the worker crashed at each of `NUM_EXPORT_TRIES` tries. Others as `ask`.
        """
        num_left = NUM_EXPORT_TRIES
        while True:
            try:
                async with self._exporting(principal):
                    return await self._ask(message, message.adapter, timeout_s)
            except ActorFailed as error:
                num_left -= 1
                if not num_left:
                    reason = f"the worker ended {NUM_EXPORT_TRIES} times while writing it: {error.data()['reason']}"
                    raise AdapterInvalid(message.adapter, reason) from error

    async def _ask(self, message: Ask[ReplyT], adapter: str, timeout_s: float) -> ReplyT:
        try:
            return await self._worker.ask(message, timeout=timeout_s)
        except AskTimeout as exc:
            raise DeadlineExceeded(f"working on adapter {adapter!r}", timeout_s) from exc

    @asynccontextmanager
    async def _beside_others(self) -> AsyncIterator[None]:
        async with self._turn_over:
            while self._num_suspects or self._num_asks >= self._max_asks:
                await self._turn_over.wait()
            self._num_asks += 1
        try:
            yield
        except ActorFailed:
            self._num_suspects += 1  # before another ask may start
            raise
        finally:
            self._num_asks -= 1
            await self._wake()

    @asynccontextmanager
    async def _by_itself(self) -> AsyncIterator[None]:
        """Run a suspect of `_beside_others` with no other version in flight. No export starts until it has ended."""
        try:
            async with self._alone:
                async with self._turn_over:
                    while self._num_asks:
                        await self._turn_over.wait()
                yield
        finally:
            self._num_suspects -= 1
            await self._wake()

    @asynccontextmanager
    async def _exporting(self, principal: str) -> AsyncIterator[None]:
        async with self._turn_over:
            while self._num_suspects or principal in self._exporters or len(self._exporters) >= self._max_exports:
                await self._turn_over.wait()
            self._exporters.add(principal)
        try:
            yield
        finally:
            self._exporters.discard(principal)
            await self._wake()

    async def _wake(self) -> None:
        with anyio.CancelScope(shield=True):
            async with self._turn_over:
                self._turn_over.notify_all()
