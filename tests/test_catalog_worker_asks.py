"""Asks that run beside each other, and asks that run alone after a crash of the worker."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import anyio
import pytest

from descant.actor.errors import ActorFailed, AskTimeout
from descant.actor.remote_child import NUM_SIDE_THREADS
from descant.catalog.changes import EXPORT_TIMEOUT_S
from descant.catalog.worker_asks import MAX_ASKS, MAX_EXPORTS, WorkerAsks
from descant.contract.version import AdapterVersion
from descant.contract.worker import ExportMerged, PrepareAdapter
from descant.requests.change import OPERATION_TIMEOUT_S
from descant_client.errors import AdapterInvalid, DeadlineExceeded, DescantError

pytestmark = pytest.mark.anyio


VERSION = AdapterVersion("0", "/", 1, 1, 1)


async def settle() -> None:
    """Let every task go on as far as it can. None of them waits for anything but the others."""
    for _ in range(100):
        await asyncio.sleep(0)


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
    """Asks in flight, and the results of those that have ended."""

    def __init__(self, tasks: anyio.abc.TaskGroup, max_asks: int = 3, max_exports: int = 2) -> None:
        self.worker = Worker()
        self.endings: dict[str, str] = {}
        self._asks = WorkerAsks(cast(Any, self.worker), max_asks, max_exports)
        self._tasks = tasks

    async def ask(self, *names: str) -> None:
        for name in names:
            self._tasks.start_soon(self._ask, name)
        await settle()

    async def _ask(self, name: str) -> None:
        try:
            self.endings[name] = await self._asks.ask(PrepareAdapter(name, "/"), 1.0)
        except DescantError as error:
            self.endings[name] = error.code

    async def export(self, principal: str, *names: str) -> None:
        for name in names:
            self._tasks.start_soon(self._export, principal, name)
        await settle()

    async def _export(self, principal: str, name: str) -> None:
        try:
            self.endings[name] = await self._asks.export(principal, ExportMerged(name, VERSION, "/"), 1.0)
        except DescantError as error:
            self.endings[name] = error.code

    async def answer(self, name: str) -> None:
        self.worker.asks[name].set_result("fine")
        await settle()

    async def die(self) -> None:
        self.worker.die()
        await settle()


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


# ---- exports -------------------------------------------------------------------------------------------------------


async def test_exports_take_no_turns_of_others_and_one_for_each_principal() -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(tasks)
        await scene.export("anna", "a1", "a2")
        await scene.export("bert", "b1")
        await scene.export("carl", "c1")
        await scene.ask(*"xyz")
        assert list(scene.worker.asks) == ["a1", "b1", "x", "y", "z"]
        await scene.answer("b1")
        assert list(scene.worker.asks) == ["a1", "x", "y", "z", "c1"]
        await scene.answer("a1")
        assert list(scene.worker.asks) == ["x", "y", "z", "c1", "a2"]
        for name in ("x", "y", "z", "c1", "a2"):
            await scene.answer(name)

    assert set(scene.endings.values()) == {"fine"}


async def test_after_a_death_exports_go_on_beside_others_once_the_suspects_are_through() -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(tasks)
        await scene.export("anna", "export", "next")
        await scene.export("bert", "other")
        await scene.export("carl", "waiting")
        await scene.ask(*"ab")
        await scene.die()
        assert list(scene.worker.asks) == ["a"]
        await scene.answer("a")
        assert list(scene.worker.asks) == ["b"]
        await scene.answer("b")
        assert len(scene.worker.asks) == 2
        await scene.ask("new")
        await scene.answer("new")
        while scene.worker.asks:
            await scene.answer(next(iter(scene.worker.asks)))

    assert scene.endings == dict.fromkeys(("a", "b", "new", "export", "next", "other", "waiting"), "fine")


async def test_an_export_that_the_worker_dies_of_time_and_again_is_given_up() -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(tasks)
        await scene.export("anna", "bad")
        for _ in range(3):
            assert list(scene.worker.asks) == ["bad"]
            await scene.die()
        await scene.ask("a")
        await scene.answer("a")

    assert scene.endings == {"bad": "adapter_invalid", "a": "fine"}


def test_the_worker_has_a_thread_for_each_and_a_client_hears_of_an_export_that_takes_too_long() -> None:
    assert MAX_ASKS + MAX_EXPORTS <= NUM_SIDE_THREADS
    assert EXPORT_TIMEOUT_S < OPERATION_TIMEOUT_S
