"""The listener and its surroundings: probes, draining, crashes of the server's own actors, the dummy engine."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from descant.actors.gateway import open_listener
from descant.assembly.system import System, running
from descant.config import ServerConfig
from descant_client import connect
from descant_client.client import Client
from descant_client.errors import ConfigInvalid, ConnectionLost, Draining
from servers import (
    LONG,
    answers,
    crash,
    dummy_config,
    fetch,
    is_alive,
    kill_executor,
    raw,
    results,
    serve,
    tokens_of,
    wait_until,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, str]]:
    async with serve(dummy_config(tmp_path_factory.mktemp("data"), 200)) as running:
        yield running


@pytest.fixture
async def client(server: tuple[System, str]) -> AsyncIterator[Client]:
    async with connect(server[1]) as client:
        yield client


# ---- probes --------------------------------------------------------------------------------------------------------


async def test_ready_is_answered_only_after_a_first_step_and_health_always(tmp_path: Path) -> None:
    async with running(dummy_config(tmp_path)) as system:
        before = (await fetch(system, "/ready"))[0], json.loads((await fetch(system, "/health"))[1])["status"]
        await wait_until(lambda: system.services.model.num_steps)

        assert before == (503, "starting")
        assert (await fetch(system, "/ready"))[0] == 200
        await kill_executor(system)
        await wait_until(lambda: not system.services.model.is_up)
        assert (await fetch(system, "/ready"))[0] == 503


async def test_health_counts_what_happens(server: tuple[System, str], client: Client) -> None:
    await client.generate("x", max_tokens=3).result()

    status, body = await fetch(server[0], "/health")

    health = json.loads(body)
    assert (status, health["status"], health["sessions"]) == (200, "ok", 1)
    assert health["steps"] >= 3
    by_name = {actor["name"]: actor for actor in health["actors"]}
    assert set(by_name) == {"fetch", "auth", "registry", "executor", "scheduler", "gateway"}
    assert by_name["scheduler"]["handled"] > 0


async def test_health_names_the_process_of_the_executor_while_there_is_one(tmp_path: Path) -> None:
    async with serve(dummy_config(tmp_path)) as (system, _):
        before = json.loads((await fetch(system, "/health"))[1])
        await kill_executor(system)
        await wait_until(lambda: system.services.model.num_lives == 2)
        after = json.loads((await fetch(system, "/health"))[1])

        assert before["executor_pid"] != after["executor_pid"] == system.executor.pid
        assert is_alive(after["executor_pid"])
        assert before["worker_pid"] is None  # the dummy engine has none


async def test_other_paths_are_not_found(server: tuple[System, str]) -> None:
    assert [(await fetch(server[0], path))[0] for path in ("/", "/etc/passwd", "/ws/x")] == [404] * 3


async def test_a_taken_port_is_said_so(server: tuple[System, str]) -> None:
    with pytest.raises(ConfigInvalid, match=str(server[0].port)):
        open_listener("127.0.0.1", server[0].port)


async def test_a_server_open_to_others_without_keys_does_not_start_and_says_how_to_add_one(tmp_path: Path) -> None:
    config = msgspec.structs.replace(dummy_config(tmp_path), server=ServerConfig(host="0.0.0.0", port=0))

    with pytest.raises(ConfigInvalid, match="descant key NAME"):
        async with running(config):
            pass


async def test_clients_that_connect_early_wait_for_the_model(tmp_path: Path) -> None:
    async with running(dummy_config(tmp_path)) as system:
        assert not system.services.model.is_up
        async with connect(f"ws://127.0.0.1:{system.port}") as client:
            assert len((await client.generate("x", max_tokens=3).result()).token_ids) == 3


# ---- the end -------------------------------------------------------------------------------------------------------


async def test_draining_finishes_what_runs_and_refuses_what_comes(tmp_path: Path) -> None:
    async with anyio.create_task_group() as clients, serve(dummy_config(tmp_path, 100)) as (system, uri):
        finished: list[Any] = []
        clients.start_soon(_collect, uri, finished)
        await wait_until(lambda: len(system.services.sequences) == 8)

        async with connect(uri) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(system.drain, "maintenance.")
            await wait_until(lambda: system.gateway.stats().handled)
            with pytest.raises(Draining, match="maintenance"):
                await client.generate("late").result()
            assert (await fetch(system, "/ready"))[0] == 503

    assert [len(result.token_ids) for result in finished] == [60] * 8


async def _collect(uri: str, finished: list[Any]) -> None:
    async with connect(uri, reconnect_s=0.0) as client:
        finished += await results([client.generate("x", max_tokens=60, seed=1) for _ in range(8)])


async def test_draining_waits_until_what_was_computed_has_been_sent(tmp_path: Path, small_send_buffers: None) -> None:
    messages: list[Any] = []

    async def read() -> None:
        messages.extend(await slow.until("done"))

    async with (
        anyio.create_task_group() as tasks,
        serve(dummy_config(tmp_path)) as (system, uri),
        raw(uri, max_queue=1) as slow,
    ):
        await slow.generate(max_tokens=1000, logprobs=5)
        await wait_until(lambda: system.services.model.num_steps > 1 and not len(system.services.sequences))
        assert system.services.sessions.is_busy
        tasks.start_soon(read)
        await system.drain("maintenance.")
        assert not system.services.sessions.is_busy
        await wait_until(lambda: messages)

    assert len(tokens_of(messages)) == 1000


async def test_draining_does_not_wait_forever(tmp_path: Path) -> None:
    async with serve(dummy_config(tmp_path, 20, drain_s=0.2)) as (system, uri), connect(uri) as client:
        stream = client.generate("x")
        await wait_until(lambda: len(system.services.sequences))

        await system.drain("maintenance.")

        assert not stream.is_finished


async def test_a_stopped_server_closes_its_connections_and_its_clients_hear_of_it(tmp_path: Path) -> None:
    async with serve(dummy_config(tmp_path, 20)) as (_, uri), connect(uri, reconnect_s=0.0) as client:
        stream = client.generate("x")
        await wait_until(lambda: stream.seed is not None)
        scope = anyio.CancelScope()
        scope.cancel()
    with pytest.raises(ConnectionLost):
        await stream.result()


async def test_cancelling_a_server_ends_it_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with anyio.CancelScope() as scope:
        async with serve(dummy_config(tmp_path, 20)) as (system, uri), connect(uri) as client:
            client.generate("unfinished")
            pid = system.executor.pid or 0
            scope.cancel()
            await anyio.sleep_forever()

    assert not is_alive(pid)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


# ---- crashes of the server's own actors ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scheduler", "gateway", "registry", "auth"])
async def test_streams_go_on_when_an_actor_crashes(server: tuple[System, str], client: Client, name: str) -> None:
    system = server[0]
    options = {"max_tokens": 40, "seed": 2, "adapter": "any"}
    expected = answers([await client.generate("x", **options).result()])
    streams = [client.generate("x", **options) for _ in range(5)]
    await wait_until(
        lambda: len(system.services.sequences) == 5 and all(s.output_ids for s in system.services.sequences)
    )
    actor = system.gateway if name == "gateway" else getattr(system.services, name)
    failures = actor.stats().failures

    crash(actor)

    assert answers(await results(streams)) == expected * 5
    assert actor.stats().failures == failures + 1
    assert answers([await client.generate("x", **options).result()]) == expected
    assert system.failure is None


async def test_a_scheduler_that_crashes_between_steps_of_many_streams_repeats_nothing(
    server: tuple[System, str], client: Client
) -> None:
    system = server[0]
    prompts = [[50 + i] * (1 + 7 * i) for i in range(8)]
    expected = answers(await results([client.generate(p, max_tokens=80, seed=1, n=2) for p in prompts]))
    streams = [client.generate(prompt, max_tokens=80, seed=1, n=2) for prompt in prompts]
    for minimum in (5, 40):
        await wait_until(lambda: min((len(s.output_ids) for s in system.services.sequences), default=0) > minimum)  # noqa: B023
        crash(system.services.scheduler)

    assert answers(await results(streams)) == expected


async def test_a_gateway_that_always_crashes_is_given_up(tmp_path: Path) -> None:
    async with serve(dummy_config(tmp_path)) as (system, _):
        for number in range(6):
            await wait_until(lambda: system.gateway.stats().restarts == number and system.gateway._address.is_up)  # noqa: B023
            crash(system.gateway)
        with anyio.fail_after(LONG):
            await system.failed.wait()

    assert "injected" in str(system.failure)


# ---- the dummy engine ----------------------------------------------------------------------------------------------


async def test_every_adapter_exists_for_the_dummy_and_changes_nothing(client: Client) -> None:
    options = {"max_tokens": 30, "seed": 3}

    plain, named, at_path, summed = await results(
        [
            client.generate("x", **options),
            client.generate("x", adapter="no-such-adapter", **options),
            client.generate("x", adapter="/no/such/path", **options),
            client.generate("x", adapters=[("one", 0.5), ("other", 2.0)], **options),
        ]
    )

    assert answers([plain]) == answers([named]) == answers([at_path]) == answers([summed])
    assert (await client.adapters.open("no-such-adapter")) is not None


async def test_the_dummy_keeps_its_pace(server: tuple[System, str], client: Client) -> None:
    result = await client.generate("x", max_tokens=40, seed=1).result()

    assert result.timings.e2e_s >= 39 / 200


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_the_dummy_has_everything_a_client_may_ask_for(server: tuple[System, str], encoding: Any) -> None:
    async with connect(server[1], encoding=encoding) as client:
        result = await client.generate("words", max_tokens=9, n=2, logprobs=2, prompt_logprobs=1).result()

    assert [len(choice.logprobs or []) for choice in result.choices] == [9, 9]
    assert len(result.prompt_logprobs or []) == len("words") + 2
    assert len({choice.text for choice in result.choices}) == 2


async def test_the_dummys_executor_has_not_loaded_torch(server: tuple[System, str]) -> None:
    maps = await anyio.Path(f"/proc/{server[0].executor.pid}/maps").read_text()

    assert "msgspec" in maps
    assert "torch" not in maps


def test_small_frames_are_sent_at_once() -> None:
    with open_listener("127.0.0.1", 0) as listener:  # asyncio sets it on sockets that are marked as TCP
        assert listener.proto == socket.IPPROTO_TCP
