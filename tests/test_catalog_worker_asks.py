"""Who is asked beside whom, and who is alone with the worker after it died."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import anyio
import pytest

from descant.actor import ActorFailed, AskTimeout
from descant.catalog.worker_asks import WorkerAsks
from descant.messages import PrepareAdapter
from descant_client.errors import AdapterInvalid, DeadlineExceeded, DescantError

pytestmark = pytest.mark.anyio


class Worker:
    """Stands for the worker's address: each ask is answered by the test."""

    def __init__(self) -> None:
        self.asks: dict[str, asyncio.Future[str]] = {}

    async def ask(self, message: PrepareAdapter, *, timeout: float) -> str:
        reply = self.asks[message.adapter] = asyncio.get_running_loop().create_future()
        try:
            return await reply
        finally:
            del self.asks[message.adapter]

    def die(self) -> None:
        for reply in self.asks.values():
            reply.set_exception(ActorFailed("worker", "killed by SIGSEGV"))


class Scene:
    """Asks under way, and what became of those that have ended."""

    def __init__(self, tasks: anyio.abc.TaskGroup, max_asks: int = 3) -> None:
        self.worker = Worker()
        self.endings: dict[str, str] = {}
        self._asks = WorkerAsks(cast(Any, self.worker), max_asks)
        self._tasks = tasks

    async def ask(self, *names: str) -> None:
        for name in names:
            self._tasks.start_soon(self._ask, name)
        await anyio.wait_all_tasks_blocked()

    async def _ask(self, name: str) -> None:
        try:
            self.endings[name] = await self._asks.ask(PrepareAdapter(name, "/"), 1.0)
        except DescantError as error:
            self.endings[name] = error.code

    async def answer(self, name: str) -> None:
        self.worker.asks[name].set_result("fine")
        await anyio.wait_all_tasks_blocked()

    async def die(self) -> None:
        self.worker.die()
        await anyio.wait_all_tasks_blocked()


async def test_so_many_are_asked_at_once_and_the_next_when_one_is_answered() -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(tasks)
        await scene.ask(*"abcde")
        assert list(scene.worker.asks) == ["a", "b", "c"]
        await scene.answer("b")
        assert list(scene.worker.asks) == ["a", "c", "d"]
        for name in "acde":
            await scene.answer(name)

    assert scene.endings == dict.fromkeys("abcde", "fine")


async def test_after_a_death_each_is_asked_alone_and_nobody_else_before_they_are_through() -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(tasks)
        await scene.ask(*"abc")
        await scene.die()
        await scene.ask("new")
        assert list(scene.worker.asks) == ["a"]
        await scene.answer("a")
        assert list(scene.worker.asks) == ["b"]
        await scene.die()
        assert list(scene.worker.asks) == ["c"]
        await scene.answer("c")
        assert list(scene.worker.asks) == ["new"]
        await scene.answer("new")

    assert scene.endings == {"a": "fine", "b": "adapter_invalid", "c": "fine", "new": "fine"}


async def test_a_refusal_is_no_death_and_a_timeout_neither() -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(tasks)
        await scene.ask(*"ab")
        scene.worker.asks["a"].set_exception(AdapterInvalid("a", "half written"))
        scene.worker.asks["b"].set_exception(AskTimeout("worker", "PrepareAdapter", 1.0))

    assert scene.endings == {"a": "adapter_invalid", "b": DeadlineExceeded.code}
