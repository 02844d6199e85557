"""Asking the worker: several things at once, and whose fault it is when it dies of one.

The worker's death fails everything it was asked at that time. Each of these is asked once more, alone, with nothing
else under way: who kills it then is to blame, and nobody else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio

from descant.actor import ActorFailed, AskTimeout, Ref
from descant.messages import WorkerMessage
from descant_client.errors import AdapterInvalid, DeadlineExceeded

MAX_ASKS = 8  # at once


class WorkerAsks:
    """The one way from the registry to the worker."""

    def __init__(self, worker: Ref[WorkerMessage], max_asks: int = MAX_ASKS) -> None:
        self._worker = worker
        self._max_asks = max_asks
        self._num_asks = 0  # under way, beside each other
        self._num_suspects = 0  # waiting to be alone, or alone: nobody else starts
        self._turn_over = anyio.Condition()
        self._alone = anyio.Lock()

    async def ask(self, message: WorkerMessage, timeout_s: float) -> Any:
        """Return the worker's reply.

        Raises:
            AdapterInvalid: the worker dies of it. DeadlineExceeded: it takes longer than `timeout_s`, of which waiting
            for a turn is no part. DescantError: whatever the worker refuses with.
        """
        try:
            async with self._beside_others():
                return await self._ask(message, timeout_s)
        except ActorFailed:
            pass  # of whatever it was doing
        try:
            async with self._by_itself():
                return await self._ask(message, timeout_s)
        except ActorFailed as error:
            reason = f"working on it ended the worker: {error.data()['reason']}"
            raise AdapterInvalid(message.adapter, reason) from error

    async def _ask(self, message: WorkerMessage, timeout_s: float) -> Any:
        try:
            return await self._worker.ask(message, timeout=timeout_s)
        except AskTimeout as exc:
            raise DeadlineExceeded(f"working on adapter {message.adapter!r}", timeout_s) from exc

    @asynccontextmanager
    async def _beside_others(self) -> AsyncIterator[None]:
        async with self._turn_over:
            while self._num_suspects or self._num_asks >= self._max_asks:
                await self._turn_over.wait()
            self._num_asks += 1
        try:
            yield
        finally:
            self._num_asks -= 1
            await self._wake()

    @asynccontextmanager
    async def _by_itself(self) -> AsyncIterator[None]:
        self._num_suspects += 1
        try:
            async with self._alone:
                async with self._turn_over:
                    while self._num_asks:
                        await self._turn_over.wait()
                yield
        finally:
            self._num_suspects -= 1
            await self._wake()

    async def _wake(self) -> None:
        with anyio.CancelScope(shield=True):
            async with self._turn_over:
                self._turn_over.notify_all()
