"""Work that is done once, for callers that come, go and wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest
from anyio.abc import TaskGroup

from descant.catalog.single_flight import SingleFlight
from descant_client.errors import AdapterNotFound
from registry_desk import wait_until

pytestmark = pytest.mark.anyio


class Work:
    """Waits until it is let go, then returns its number or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_done = 0
        self.released = anyio.Event()
        self._error = error

    async def __call__(self) -> str:
        await self.released.wait()
        self.num_done += 1
        if self._error:
            raise self._error
        return f"result {self.num_done}"


def callers(
    tasks: TaskGroup, flights: SingleFlight[str], work: Callable[[], Awaitable[str]], number: int
) -> tuple[list[str], list[anyio.CancelScope]]:
    """Start callers; return what they will have got, and how to cancel each."""
    endings: list[str] = []
    scopes = [anyio.CancelScope() for _ in range(number)]

    async def call(scope: anyio.CancelScope) -> None:
        with scope:
            try:
                endings.append(await flights.run("key", work))
            except AdapterNotFound:
                endings.append("failed")

    for scope in scopes:
        tasks.start_soon(call, scope)
    return endings, scopes


async def test_all_callers_get_the_result_of_one_piece_of_work_and_so_do_later_ones() -> None:
    async with anyio.create_task_group() as tasks:
        flights, work = SingleFlight[str](tasks.start_soon), Work()
        endings, _ = callers(tasks, flights, work, 3)
        await anyio.wait_all_tasks_blocked()
        work.released.set()
        await wait_until(lambda: len(endings) == 3)

        assert endings == ["result 1"] * 3
        assert await flights.run("key", work) == "result 1"
        assert await flights.run("other", work) == "result 2"


@pytest.mark.parametrize("cancelled", [0, 1, 2])
async def test_cancelling_any_caller_disturbs_no_other(cancelled: int) -> None:
    async with anyio.create_task_group() as tasks:
        flights, work = SingleFlight[str](tasks.start_soon), Work()
        endings, scopes = callers(tasks, flights, work, 3)
        await anyio.wait_all_tasks_blocked()
        scopes[cancelled].cancel()
        await anyio.wait_all_tasks_blocked()
        work.released.set()

    assert endings == ["result 1"] * 2


async def test_a_failure_fails_all_who_waited_and_is_not_remembered() -> None:
    async with anyio.create_task_group() as tasks:
        flights, work = SingleFlight[str](tasks.start_soon), Work(AdapterNotFound("x"))
        endings, _ = callers(tasks, flights, work, 3)
        await anyio.wait_all_tasks_blocked()
        work.released.set()
        await wait_until(lambda: len(endings) == 3)
        fine = Work()
        fine.released.set()

        assert endings == ["failed"] * 3
        assert await flights.run("key", fine) == "result 1"


async def test_results_are_claimed_before_anything_else_can_happen_to_them() -> None:
    """What runs as soon as it may after the work has ended finds every claim made, those of the cancelled included."""
    events: list[str] = []
    loop = asyncio.get_running_loop()

    async def work() -> str:
        await asyncio.sleep(0)
        loop.call_soon(events.append, "something else")
        return "result"

    async with anyio.create_task_group() as tasks:
        flights = SingleFlight[str](tasks.start_soon)
        for number in range(3):
            tasks.start_soon(
                flights.run, "key", work, lambda result, number=number: events.append(f"{result} {number}")
            )

    assert events == [*(f"result {number}" for number in range(3)), "something else"]
    await flights.run("key", work, lambda result: events.append("claimed again"))
    assert events[-1] == "claimed again"


async def test_no_more_results_are_kept_than_allowed_and_the_least_recently_used_go() -> None:
    async with anyio.create_task_group() as tasks:
        flights, work = SingleFlight[str](tasks.start_soon, max_results=2), Work()
        work.released.set()
        for key in ("a", "b", "a", "c"):
            await flights.run(key, work)
        assert (len(flights), work.num_done) == (2, 3)

        assert await flights.run("a", work) == "result 1"
        assert await flights.run("b", work) == "result 4"
        flights.drop(lambda result: result == "result 4")
        assert await flights.run("b", work) == "result 5"
