"""An executor that takes the next step before it has answered the one before says the same in every stream."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from descant.assembly.system import System
from descant.config import Config
from descant_client import connect
from descant_client.client import Client
from descant_client.stream import Stream
from pipelined_executor import FACTORY
from servers import ADAPTERS, Checkpoint, answers, crash, dummy_config, kill_executor, model_config, results, serve
from servers import wait_until as wait_for

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PACE = 100.0  # steps per second


@pytest.fixture(autouse=True, scope="module")
def _child_finds_the_factory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
async def expected(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the choir sings one step at a time."""
    async with serve(model_config(checkpoint, tmp_path_factory.mktemp("data"))) as (_, uri), connect(uri) as client:
        return answers(await results(choir(client)))


@pytest.fixture(scope="module")
async def server(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[System, Client]]:
    config = model_config(checkpoint, tmp_path_factory.mktemp("data"))
    async with pipelined(config) as (system, uri), connect(uri) as client:
        yield system, client


def pipelined(config: Config) -> Any:
    return serve(config, executor_factory=FACTORY)


def choir(client: Client) -> list[Stream]:
    """Streams of all lengths over the base and four adapters, with and without sampling; some stop by themselves."""
    voices = [None, *ADAPTERS]
    return [
        client.generate(
            f"voice number {i} " * (1 + i % 3),
            adapter=voices[i % len(voices)],
            seed=i,
            temperature=float(i % 2),
            max_tokens=8 + 9 * i,
            ignore_eos=i % 4 != 3,
            stop=["e"] if i % 4 == 2 else [],
            n=1 + i % 2,
            logprobs=0,
        )
        for i in range(8)
    ]


def num_tokens(streams: list[Stream]) -> int:
    return sum(len(delta.token_ids) for stream in streams for delta in stream._transcript.deltas)


async def test_every_stream_is_the_same(server: tuple[System, Client], expected: list[Any]) -> None:
    system, client = server

    assert answers(await results(choir(client))) == expected
    assert system.services.model.engine.limits.max_steps_in_flight == 2


async def test_no_kill_is_seen_in_any_stream(server: tuple[System, Client], expected: list[Any]) -> None:
    system, client = server
    lives = system.services.model.num_lives
    streams = choir(client)
    for moment in (60, 200):
        await wait_for(lambda: num_tokens(streams) >= moment)  # noqa: B023
        await kill_executor(system)

    assert answers(await results(streams)) == expected
    assert system.services.model.num_lives == lives + 2


async def test_nor_is_a_crash_of_the_scheduler(server: tuple[System, Client], expected: list[Any]) -> None:
    system, client = server
    pid = system.executor.pid
    streams = choir(client)
    for moment in (60, 200):
        await wait_for(lambda: num_tokens(streams) >= moment)  # noqa: B023
        crash(system.services.scheduler)

    assert answers(await results(streams)) == expected
    assert system.executor.pid == pid


async def test_an_executor_may_die_with_two_steps_in_flight(tmp_path: Path) -> None:
    async with pipelined(dummy_config(tmp_path, PACE)) as (system, uri), connect(uri) as client:
        undisturbed = answers(await results([client.generate("x", max_tokens=20, seed=i) for i in range(4)]))
        streams = [client.generate("x", max_tokens=20, seed=i) for i in range(4)]
        await wait_for(lambda: num_tokens(streams) >= 12)
        await kill_executor(system)

        assert answers(await results(streams)) == undisturbed
        assert system.services.model.num_lives == 2


async def test_a_stream_that_leaves_in_flight_disturbs_nobody(tmp_path: Path) -> None:
    async with pipelined(dummy_config(tmp_path, PACE)) as (system, uri), connect(uri) as client:
        undisturbed = answers(await results([client.generate("x", max_tokens=20, seed=1)]))
        leaving, staying = (client.generate("x", max_tokens=20, seed=i) for i in range(2))
        await wait_for(lambda: num_tokens([leaving]) >= 3)
        leaving.cancel()

        assert answers(await results([staying])) == undisturbed
        await wait_for(lambda: not len(system.services.sequences))


async def test_a_full_step_ahead_keeps_the_pace_of_the_device(tmp_path: Path) -> None:
    async with pipelined(dummy_config(tmp_path, PACE)) as (system, uri), connect(uri) as client:
        await client.generate("x", max_tokens=1).result()
        first = system.services.model.num_steps
        with anyio.fail_after(60):
            await client.generate("x", max_tokens=30, seed=1).result()

        assert system.services.model.num_steps == first + 30
