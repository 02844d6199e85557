"""Work done once for callers that arrive, wait and are cancelled."""

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
    """Work that waits for a release, then returns its number or fails."""

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
    """Start callers. Return their results, to be filled in, and a way to cancel each."""
    endings: list[str] = []
    scopes = [anyio.CancelScope() for _ in range(number)]

    async def call(scope: anyio.CancelScope) -> None:
        with scope:
            try:
                endings.append(await flights.run("key", "label", work))
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
        assert await flights.run("key", "label", work) == "result 1"
        assert await flights.run("other", "label", work) == "result 2"


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
        assert await flights.run("key", "label", fine) == "result 1"


async def test_callers_of_another_label_hear_no_words_of_this_one_but_share_its_result() -> None:
    async with anyio.create_task_group() as tasks:
        flights = SingleFlight[str](tasks.start_soon)
        heard: dict[str, str] = {}

        async def call(label: str, work: Work) -> None:
            try:
                heard[label] = await flights.run("key", label, work)
            except AdapterNotFound as error:
                heard[label] = str(error.adapter)

        works = {label: Work(AdapterNotFound(label)) for label in ("mine", "yours")}
        for label, work in works.items():
            tasks.start_soon(call, label, work)
        await anyio.wait_all_tasks_blocked()
        for work in works.values():
            work.released.set()
        await wait_until(lambda: len(heard) == 2)
        fine = Work()
        fine.released.set()

        assert heard == {"mine": "mine", "yours": "yours"}
        assert await flights.run("key", "mine", fine) == "result 1"
        assert await flights.run("key", "yours", fine) == "result 1"


async def test_what_was_come_by_otherwise_is_newer_than_what_is_under_way() -> None:
    async with anyio.create_task_group() as tasks:
        flights, slow, fresh = SingleFlight[str](tasks.start_soon), Work(), Work()
        endings, _ = callers(tasks, flights, slow, 1)
        await anyio.wait_all_tasks_blocked()

        flights.put("key", "newer")
        assert await flights.run("key", "label", fresh) == "newer"
        flights.drop(lambda result: True)
        others, _ = callers(tasks, flights, fresh, 1)
        await anyio.wait_all_tasks_blocked()
        slow.released.set()
        await wait_until(lambda: endings)
        more, _ = callers(tasks, flights, fresh, 1)
        await anyio.wait_all_tasks_blocked()
        assert (endings, others, more) == (["result 1"], [], [])
        fresh.num_done = 10
        fresh.released.set()
        await wait_until(lambda: others and more)

        assert (others, more) == (["result 11"], ["result 11"])
        assert await flights.run("key", "label", slow) == "result 11"


async def test_of_two_labels_under_way_the_first_to_end_is_kept() -> None:
    async with anyio.create_task_group() as tasks:
        flights, one, other = SingleFlight[str](tasks.start_soon), Work(), Work()
        other.num_done = 10
        endings: list[str] = []

        async def call(label: str, work: Work) -> None:
            endings.append(await flights.run("key", label, work))

        tasks.start_soon(call, "one", one)
        tasks.start_soon(call, "other", other)
        await anyio.wait_all_tasks_blocked()
        one.released.set()
        await wait_until(lambda: len(endings) == 1)
        other.released.set()
        await wait_until(lambda: len(endings) == 2)

        assert endings == ["result 1", "result 11"]
        assert await flights.run("key", "third", other) == "result 1"


async def test_results_are_claimed_before_anything_else_can_happen_to_them() -> None:
    """The first task to run after the end of the work finds every claim made, also those of cancelled callers."""
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
                flights.run, "key", "label", work, lambda result, number=number: events.append(f"{result} {number}")
            )

    assert events == [*(f"result {number}" for number in range(3)), "something else"]
    await flights.run("key", "label", work, lambda result: events.append("claimed again"))
    assert events[-1] == "claimed again"


async def test_no_more_results_are_kept_than_allowed_and_the_least_recently_used_go() -> None:
    async with anyio.create_task_group() as tasks:
        flights, work = SingleFlight[str](tasks.start_soon, max_results=2), Work()
        work.released.set()
        for key in ("a", "b", "a", "c"):
            await flights.run(key, "label", work)
        assert (len(flights), work.num_done) == (2, 3)

        assert await flights.run("a", "label", work) == "result 1"
        assert await flights.run("b", "label", work) == "result 4"
        flights.drop(lambda result: result == "result 4")
        assert await flights.run("b", "label", work) == "result 5"
