"""The executor is killed under running streams: none loses, repeats or changes a token, and nobody pays for another."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from descant.assembly.system import System
from descant_client import connect
from descant_client.client import Client
from descant_client.errors import DescantError, ExecutorFailed
from descant_client.stream import Result, Stream
from poison_executor import FACTORY, POISON
from servers import (
    ADAPTERS,
    LONG,
    Checkpoint,
    answers,
    crash,
    dummy_config,
    kill_executor,
    model_config,
    results,
    serve,
    wait_until,
)

pytestmark = pytest.mark.anyio

NUM_STREAMS, NUM_TOKENS = 16, 48


@pytest.fixture(autouse=True)
def _child_finds_the_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


@pytest.fixture(scope="module")
async def server(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, str]]:
    async with serve(model_config(checkpoint, tmp_path_factory.mktemp("data"))) as running:
        yield running


def _start_choir(client: Client) -> list[Stream]:
    """16 streams over the base and four adapters, every other one greedy."""
    voices = [None, *ADAPTERS]
    return [
        client.generate(
            f"voice number {i}",
            adapter=voices[i % len(voices)],
            seed=i,
            temperature=float(i % 2),
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            logprobs=0,
        )
        for i in range(NUM_STREAMS)
    ]


def _num_tokens(streams: list[Stream]) -> int:
    return sum(len(delta.token_ids) for stream in streams for delta in stream._transcript.deltas)


async def _sing_under_kills(system: System, client: Client, moments: list[int]) -> list[Result]:
    """Kill the executor when that many tokens have come, all streams together."""
    streams = _start_choir(client)
    async with anyio.create_task_group() as tasks:

        async def kill() -> None:
            for moment in moments:
                await wait_until(lambda: _num_tokens(streams) >= moment)  # noqa: B023
                await kill_executor(system)

        tasks.start_soon(kill)
        return await results(streams)


async def test_no_kill_is_seen_in_any_stream(server: tuple[System, str]) -> None:
    system, uri = server
    moments = sorted(random.Random(1).sample(range(NUM_STREAMS * NUM_TOKENS * 3 // 4), 3))
    async with connect(uri) as client:
        undisturbed = await results(_start_choir(client))
        lives = system.services.model.num_lives

        disturbed = await _sing_under_kills(system, client, moments)

    assert answers(disturbed) == answers(undisturbed)
    assert [result.logprobs for result in disturbed] == [result.logprobs for result in undisturbed]
    assert system.services.model.num_lives > lives
    assert max(result.timings.num_preemptions for result in disturbed) >= 1


async def test_a_crash_of_the_scheduler_is_not_seen_either_though_the_executor_lives(
    server: tuple[System, str],
) -> None:
    system, uri = server
    async with connect(uri) as client:
        undisturbed = await results(_start_choir(client))
        pid = system.executor.pid
        streams = _start_choir(client)
        for minimum in (100, 450):
            await wait_until(lambda: _num_tokens(streams) > minimum)  # noqa: B023
            crash(system.services.scheduler)

        assert answers(await results(streams)) == answers(undisturbed)
        assert system.executor.pid == pid


@pytest.mark.slow
async def test_twenty_kills_at_random_moments_are_not_seen_either(server: tuple[System, str]) -> None:
    system, uri = server
    rng = random.Random(2)
    async with connect(uri) as client:
        undisturbed = await results(_start_choir(client))
        for _ in range(5):
            moments = sorted(rng.sample(range(NUM_STREAMS * NUM_TOKENS * 3 // 4), 4))
            assert answers(await _sing_under_kills(system, client, moments)) == answers(undisturbed)


async def test_a_death_while_the_next_executor_starts_changes_nothing(tmp_path: Path) -> None:
    async with serve(dummy_config(tmp_path, 200)) as (system, uri), connect(uri) as client:
        stream = client.generate("x", max_tokens=40, seed=3)
        await wait_until(lambda: _num_tokens([stream]) > 10)
        first = system.executor.life
        await kill_executor(system)
        await wait_until(lambda: system.executor.life > first and system.executor.pid)
        await kill_executor(system)
        disturbed = await results([stream])

        assert answers(disturbed) == answers(await results([client.generate("x", max_tokens=40, seed=3)]))
        assert system.executor.life == 3


async def test_requests_made_while_there_is_no_executor_wait_for_the_next(tmp_path: Path) -> None:
    async with serve(dummy_config(tmp_path)) as (system, uri), connect(uri) as client:
        expected = answers(await results([client.generate("x", max_tokens=9, seed=3)]))
        await kill_executor(system)
        await wait_until(lambda: not system.services.model.is_up)

        assert answers(await results([client.generate("x", max_tokens=9, seed=3)])) == expected


@pytest.mark.parametrize("num_poisoned", [1, pytest.param(3, marks=pytest.mark.slow)])
async def test_only_a_request_that_kills_every_executor_fails(tmp_path: Path, num_poisoned: int) -> None:
    prompts = [[50 + i, 1, 2, 3] for i in range(8)]
    async with (
        serve(dummy_config(tmp_path, 200), executor_factory=FACTORY) as (system, uri),
        connect(uri) as client,
    ):
        undisturbed = await results([client.generate(prompt, max_tokens=60, seed=1) for prompt in prompts])
        healthy = [client.generate(prompt, max_tokens=60, seed=1) for prompt in prompts]
        await wait_until(lambda: _num_tokens(healthy) > 30)
        poisoned = [client.generate([i, POISON], max_tokens=60) for i in range(num_poisoned)]

        endings = [await _ending(stream) for stream in poisoned]

        assert [type(ending) for ending in endings] == [ExecutorFailed] * num_poisoned
        assert answers(await results(healthy)) == answers(undisturbed)
        assert system.failure is None


async def _ending(stream: Stream) -> DescantError | None:
    try:
        with anyio.fail_after(LONG):
            await stream.result()
    except DescantError as error:
        return error
    return None


async def test_the_first_request_ever_may_be_poisoned(tmp_path: Path) -> None:
    async with (
        serve(dummy_config(tmp_path), executor_factory=FACTORY) as (_, uri),
        connect(uri) as client,
    ):
        assert isinstance(await _ending(client.generate([POISON], max_tokens=1)), ExecutorFailed)
        assert len((await client.generate([1], max_tokens=5, seed=1).result()).token_ids) == 5
