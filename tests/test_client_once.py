"""A change to an adapter is made once, wherever the connection drops, or ends in an error about the uncertainty."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import pytest

from descant_client import Adapter, Client, connect
from descant_client.dialer import Backoff
from descant_client.errors import AdapterExists, ConnectionLost
from descant_client.lifecycle import CreateAdapter
from descant_client.protocol import Ack, ClientMessage, Resume
from fake_server import FakeServer

pytestmark = pytest.mark.anyio

Use = Callable[[Client, Adapter], Awaitable[Any]]
ONCE: dict[str, Use] = {
    "create": lambda client, a: client.adapters.create("new"),
    "fork": lambda client, a: a.fork("new"),
    "merge": lambda client, a: client.adapters.merge("new", [("upper", 1.0)]),
    "merge_and_save": lambda client, a: a.merge_and_save("/x"),  # its own files would be in its way
    "destroy": lambda client, a: a.destroy(),
}
AGAIN: dict[str, Use] = {
    "load": lambda client, a: a.load("/x"),
    "load anew": lambda client, a: client.adapters.load("new", "/x"),
    "save": lambda client, a: a.save("/x"),
    "pin": lambda client, a: a.pin(),
    "unpin": lambda client, a: a.unpin(),
    "enable": lambda client, a: a.enable(),
    "disable": lambda client, a: a.disable(),
}


async def _no_time(seconds: float) -> None:
    await anyio.lowlevel.checkpoint()


class HeldTime:
    """A time in which the client reconnects only when the test allows it."""

    def __init__(self) -> None:
        self.began, self.over = anyio.Event(), anyio.Event()

    async def sleep(self, seconds: float) -> None:
        self.began.set()
        await self.over.wait()


def patient(server: FakeServer) -> AbstractAsyncContextManager[Client]:
    """Connect. Reconnecting takes no time."""
    return connect(server.uri, backoff=Backoff(rng=random.Random(0), clock=lambda: 0.0, sleep=_no_time))


def _changes(server: FakeServer) -> list[ClientMessage]:
    return [one for one in server.received if type(one).__name__ not in ("Ack", "Resume", "OpenAdapter", "ListModels")]


async def _begin(server: FakeServer, client: Client, use: Use, tasks: anyio.abc.TaskGroup, outcome: list[Any]) -> None:
    """Begin a change that the server makes but does not answer. Its outcome goes into the list."""
    adapter = await client.adapters.open("reverse")
    assert adapter is not None

    async def run() -> None:
        try:
            outcome.append(await use(client, adapter))
        except ConnectionLost as error:
            outcome.append(error)

    server.holds_answers = True
    tasks.start_soon(run)
    await server.wait_for(lambda one: one in _changes(server))
    server.holds_answers = False


@pytest.mark.parametrize("use", [*ONCE.values(), *AGAIN.values()], ids=[*ONCE, *AGAIN])
async def test_a_drop_before_the_answer_changes_nothing(use: Use) -> None:
    async with FakeServer() as server, patient(server) as client:
        outcome: list[Any] = []
        async with anyio.create_task_group() as tasks:
            await _begin(server, client, use, tasks, outcome)
            server.abort()
        await client.models()
        request_id = _changes(server)[0].request_id
        assert not isinstance(outcome[0], ConnectionLost)
        assert len(_changes(server)) == 1
        assert [one for one in server.received if isinstance(one, Resume | Ack)] == [
            Resume(request_id),
            Ack(request_id),
        ]


@pytest.mark.parametrize("num_drops", [1, 3])
async def test_a_change_the_drop_swallowed_is_asked_for_again(num_drops: int) -> None:
    async with FakeServer(drops=[0] * num_drops) as server, patient(server) as client:
        assert (await client.adapters.create("a")).name == "a"
        await server.wait_for(lambda one: one == Ack("1"))
    assert [type(one) for one in server.received] == [Resume, CreateAdapter, Ack]


@pytest.mark.parametrize("seed", range(8))
async def test_drops_at_random_points_make_every_change_once(seed: int) -> None:
    rng = random.Random(seed)
    drops = [rng.randint(0, 5) for _ in range(10)]
    async with FakeServer(drops=drops) as server, patient(server) as client:
        for number in range(6):
            a = await client.adapters.create(f"a{number}")
            await (await a.fork(f"b{number}")).destroy()
            await client.adapters.merge(f"c{number}", [(a, 1.0)])
            with pytest.raises(AdapterExists):
                await client.adapters.create(f"a{number}")
    assert server.num_connections == len(drops) + 1
    counts = {name: server.catalog.num_changes[name] for name in ("a0", "b0", "c0", "a5", "b5", "c5")}
    assert counts == {"a0": 3, "b0": 1, "c0": 1, "a5": 3, "b5": 1, "c5": 1}  # a: created, forked, refused


@pytest.mark.parametrize("use", ONCE.values(), ids=ONCE)
async def test_after_a_restart_nobody_knows_what_cannot_be_done_twice(use: Use) -> None:
    async with FakeServer() as server, patient(server) as client:
        outcome: list[Any] = []
        async with anyio.create_task_group() as tasks:
            await _begin(server, client, use, tasks, outcome)
            server.forget()
            server.abort()
        await client.models()
        assert isinstance(outcome[0], ConnectionLost)
        assert "may or may not" in str(outcome[0])
        assert "adapters.open" in str(outcome[0])
        assert len(_changes(server)) == 1


@pytest.mark.parametrize("use", AGAIN.values(), ids=AGAIN)
async def test_after_a_restart_what_comes_to_the_same_is_asked_for_again(use: Use) -> None:
    async with FakeServer() as server, patient(server) as client:
        outcome: list[Any] = []
        async with anyio.create_task_group() as tasks:
            await _begin(server, client, use, tasks, outcome)
            server.forget()
            server.abort()
        assert isinstance(outcome[0], Adapter)
        first, second = _changes(server)
        assert first == second


async def test_what_was_never_sent_is_sent_to_a_restarted_server() -> None:
    time = HeldTime()
    async with FakeServer() as server, connect(server.uri, backoff=Backoff(sleep=time.sleep)) as client:
        async with anyio.create_task_group() as tasks:
            server.forget()
            server.abort()
            await time.began.wait()
            cancelled = anyio.CancelScope()

            async def cancel_at_once() -> None:
                with cancelled:
                    await client.adapters.create("unwanted")

            tasks.start_soon(client.adapters.create, "a")
            tasks.start_soon(cancel_at_once)
            await anyio.wait_all_tasks_blocked()
            cancelled.cancel()
            await anyio.wait_all_tasks_blocked()
            time.over.set()
        assert [one.name for one in await client.adapters.list()] == ["reverse", "upper", "a"]
        assert not [one for one in server.received if isinstance(one, Resume)]


async def test_a_change_whose_caller_left_is_not_asked_for_again() -> None:
    time = HeldTime()
    async with FakeServer(drops=[0]) as server, connect(server.uri, backoff=Backoff(sleep=time.sleep)) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.adapters.create, "a")
            await time.began.wait()
            tasks.cancel_scope.cancel()
        time.over.set()
        assert await client.adapters.open("a") is None
        assert Resume("1") in server.received
    assert not server.catalog.num_changes
