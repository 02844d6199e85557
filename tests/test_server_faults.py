"""Parts of the server fail, stop or restart: every accepted request still ends, in its answer or one error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from descant.actors.dummy_registry import DummyRegistry
from descant.assembly.system import System, running
from descant.config import Config, SchedulingConfig
from descant.messages import ResolveAdapters
from descant.websocket.connection import WebSocketConnection
from descant_client import connect
from descant_client.errors import Draining, ExecutorFailed
from servers import LONG, crash, dummy_config, kill_executor, raw, serve, tokens_of, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[System, str]]:
    async with serve(dummy_config(tmp_path, 200)) as system_and_uri:
        yield system_and_uri


@pytest.fixture
def preparing(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.Event]:
    """Adapters that are being prepared until this event is set."""
    is_prepared = asyncio.Event()
    answer = DummyRegistry.on_receive

    async def wait(registry: DummyRegistry, message: Any) -> Any:
        if isinstance(message, ResolveAdapters):
            message.lease.hold("a member")
        await is_prepared.wait()
        return await answer(registry, message)

    monkeypatch.setattr(DummyRegistry, "on_receive", wait)
    yield is_prepared
    is_prepared.set()


async def test_questions_of_a_client_that_does_not_read_wait_where_they_cost_nothing(
    server: tuple[System, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_answered, num_asked = asyncio.Event(), 0
    answer = DummyRegistry.on_receive

    async def count(registry: DummyRegistry, message: Any) -> Any:
        nonlocal num_asked
        num_asked += 1

        async def wait() -> Any:
            await is_answered.wait()
            return await answer(registry, message)

        return registry.later(wait())

    monkeypatch.setattr(DummyRegistry, "on_receive", count)
    async with raw(server[1]) as flooding, raw(server[1]) as other:
        for number in range(30):
            await flooding.send("adapter.list", f"{number}")
            await flooding.send("adapter.open", f"open {number}", name="upper")
        for _ in range(30):  # time enough to read all of them
            await other.send("models.list")
            await other.until("models")

        assert num_asked == 1
        is_answered.set()
        answered = [await flooding.until("adapters") for _ in range(60)]
        assert [messages[-1]["request_id"] for messages in answered[:2]] == ["0", "open 0"]


@pytest.mark.parametrize("kind", ["generate", "adapter.list"])
async def test_a_registry_that_takes_too_long_is_a_deadline_exceeded(
    server: tuple[System, str], preparing: asyncio.Event, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("descant.requests.generate.RESOLVE_TIMEOUT_S", 0.01)
    monkeypatch.setattr("descant.websocket.connection.ASK_TIMEOUT_S", 0.01)
    async with raw(server[1]) as client:
        await client.send(kind, **({"prompt": "x", "adapter": "upper"} if kind == "generate" else {}))

        error = (await client.until("error", "r"))[-1]

    assert (error["code"], error["data"]["deadline_s"]) == ("deadline_exceeded", 0.01)


# ---- actors --------------------------------------------------------------------------------------------------------


async def test_a_request_that_was_being_prepared_when_the_gateway_crashed_ends_in_an_error(
    server: tuple[System, str], preparing: asyncio.Event
) -> None:
    system, uri = server
    async with raw(uri) as client:
        session = (await client.receive())["session"]
        await client.generate(adapter="slow")
        await client.until("progress")
        crash(system.gateway)
        await wait_until(lambda: system.gateway.stats().restarts)
        client.vanish()
    async with raw(uri, session=session) as back:
        await back.receive()
        await back.send("resume", have={})

        assert (await back.until("error", "r"))[-1]["code"] == "internal_error"


@pytest.mark.parametrize("n", [1, 3])
async def test_a_request_is_cancelled_at_once_while_it_is_being_prepared(
    server: tuple[System, str], preparing: asyncio.Event, n: int
) -> None:
    async with raw(server[1]) as client:
        await client.generate(adapter="slow", n=n, prompt_logprobs=0)
        await client.until("progress")

        await client.send("cancel")
        done = (await client.until("done", "r"))[-1]
        await client.generate("at once", adapter="slow")
        await client.send("cancel", "at once")
        other = (await client.until("done", "at once"))[-1]

        assert [choice["finish_reason"] for choice in done["choices"]] == ["cancelled"] * n
        assert (other["choices"][0]["finish_reason"], other["usage"]["num_output_tokens"]) == ("cancelled", 0)
        assert not preparing.is_set()
        assert len(server[0].services.leases) == len(server[0].services.sequences) == 0
        preparing.set()
        await client.generate("next", adapter="slow", max_tokens=3)
        assert (await client.until("done", "next"))[-1]["usage"]["num_output_tokens"] == 3


async def test_streams_go_on_over_a_crash_of_the_gateway_and_of_the_scheduler(server: tuple[System, str]) -> None:
    system, uri = server
    async with connect(uri) as client:
        expected = await client.generate("x", max_tokens=80, seed=1).result()
        stream = client.generate("x", max_tokens=80, seed=1)
        async for delta in stream:
            if delta.index == 10:
                crash(system.gateway)
            if delta.index == 30:
                crash(system.services.scheduler)
        result = await stream.result()

    assert (result.token_ids, result.text) == (expected.token_ids, expected.text)


def _one_try(config: Config) -> Config:
    return msgspec.structs.replace(config, scheduling=SchedulingConfig(max_executor_restarts=1))


async def test_running_and_later_requests_end_in_an_error_when_the_executor_is_given_up(tmp_path: Path) -> None:
    async with serve(_one_try(dummy_config(tmp_path, 50))) as (system, uri), connect(uri) as client:
        stream = client.generate("x")
        await wait_until(lambda: stream._transcript.deltas)
        system.executor.program = msgspec.structs.replace(system.executor.program, factory="no_such_module:start")
        await kill_executor(system)
        with anyio.fail_after(LONG):
            await system.failed.wait()
            for each in (stream, client.generate("too late")):
                with pytest.raises(ExecutorFailed):
                    await each.result()
            await system.drain("it has nothing left to do.")


async def test_a_client_of_a_server_that_cannot_start_hears_why(tmp_path: Path) -> None:
    async with running(_one_try(dummy_config(tmp_path)), executor_factory="no_such_module:start") as system:
        with anyio.fail_after(LONG), pytest.raises(ExecutorFailed, match="no_such_module"):
            async with connect(f"ws://127.0.0.1:{system.port}"):
                pass


# ---- draining ------------------------------------------------------------------------------------------------------


async def test_draining_waits_until_the_end_of_every_stream_was_sent(tmp_path: Path, preparing: asyncio.Event) -> None:
    async with serve(dummy_config(tmp_path, 200)) as (system, uri), connect(uri) as client:
        slow = client.generate("x", adapter="slow", max_tokens=40)
        await wait_until(lambda: slow.stage)
        drain = asyncio.create_task(system.drain("it was told to stop."))
        with pytest.raises(Draining):
            await _refused(client)
        assert not drain.done()

        preparing.set()
        await drain

        assert all(stream.end_sent_s for session in system.services.sessions for stream in session)
        assert len((await slow.result()).token_ids) == 40


async def _refused(client: Any) -> None:
    while True:  # until the gateway has heard of it
        await client.generate("y", max_tokens=1).result()


# ---- connections ---------------------------------------------------------------------------------------------------


async def test_the_goodbye_of_a_replaced_connection_does_not_end_the_session(
    server: tuple[System, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = WebSocketConnection._write

    async def write_unless_stuck(connection: WebSocketConnection, number: int, scope: anyio.CancelScope) -> None:
        await (anyio.sleep_forever() if number == 1 else write(connection, number, scope))

    monkeypatch.setattr(WebSocketConnection, "_write", write_unless_stuck)
    async with raw(server[1]) as old:
        session = (await old.receive())["session"]
        await old.generate(max_tokens=50, seed=1)
        async with raw(server[1], session=session) as new:
            await new.receive()
            await old.websocket.close()
            done = await new.until("done", "r")

    assert len(tokens_of(done)) == 50
    assert done[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_stream_may_be_resumed_with_nothing_before_it_is_accepted(
    server: tuple[System, str], preparing: asyncio.Event
) -> None:
    async with raw(server[1]) as client:
        await client.generate(adapter="slow", max_tokens=3)
        await client.send("resume", have={"0": 0})
        await client.send("models.list", "after")
        answered = await client.until("models")
        preparing.set()

        assert not [message for message in answered if message["type"] == "error"]
        assert len(tokens_of(await client.until("done", "r"))) == 3


@pytest.mark.parametrize(
    ("origin", "is_welcome"),
    [
        ("http://localhost:3000", True),
        ("http://[::1]", True),
        ("https://evil.example", False),
        ("http://127.evil.example", False),
        ("null", False),
    ],
)
async def test_pages_of_other_machines_do_not_get_in_through_the_browser(
    server: tuple[System, str], origin: str, is_welcome: bool
) -> None:
    async with raw(server[1], origin=origin) as client:
        message = await client.receive()

    assert message["type"] == ("hello" if is_welcome else "error")
    assert message.get("code") == (None if is_welcome else "unauthorized")


# ---- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"stop": ["a" * 1025]}, "stop"),
        ({"sampling": {"logit_bias": {"9999999": 1.0}}}, "logit_bias"),
        ({"prompt": None, "token_ids": [9999999]}, "token_ids"),
    ],
)
async def test_what_the_model_cannot_do_is_refused_by_field(
    server: tuple[System, str], fields: dict[str, Any], field: str
) -> None:
    async with raw(server[1]) as client:
        await client.generate(max_tokens=1, **fields)
        (error,) = await client.until("error", "r")

    assert (error["code"], error["data"]["field"]) == ("invalid_request", field)
