"""Adapters on their way to the device, in real processes: a cold, broken or blocked one is nobody else's trouble."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from descant.assembly.system import System
from descant.scheduling.placement.residency import AdapterResidency
from descant_client import connect
from descant_client.client import Client
from descant_client.errors import AdapterInvalid
from servers import (
    ADAPTERS,
    LONG,
    Checkpoint,
    Neighbor,
    answers,
    crash,
    kill_executor,
    model_config,
    results,
    serve,
    wait_until,
)
from tiny_models import save_adapter

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

NUM_TOKENS = 24


@asynccontextmanager
async def cramped(checkpoint: Checkpoint, data_dir: Path, **adapters: int) -> AsyncIterator[tuple[System, Client]]:
    """A server with little room for adapters, and none in host memory unless it is given."""
    config = model_config(checkpoint, data_dir)
    tiers = msgspec.structs.replace(config.adapters, **{"num_slots": 2, "host_bytes": 0} | adapters)
    async with serve(msgspec.structs.replace(config, adapters=tiers)) as (system, uri), connect(uri) as client:
        yield system, client


async def say(client: Client, *adapters: str | None) -> list[object]:
    """Ask all of them at once."""
    streams = [client.generate("hello", adapter=name, seed=3, max_tokens=NUM_TOKENS) for name in adapters]
    return answers(await results(streams))


def stored_files(data_dir: Path) -> set[Path]:
    return set(data_dir.rglob("versions/*.safetensors"))


def residency_of(system: System) -> AdapterResidency:
    return system.services.scheduler._address.actor._policy.states.life.gate.residency


async def evict(client: Client, *others: str) -> None:
    """Give the device to others."""
    for name in others:
        await say(client, name)


@pytest.mark.parametrize("host_bytes", [0, 200_000, 1 << 20])
async def test_more_adapters_than_fit_all_answer_as_if_alone(
    checkpoint: Checkpoint, tmp_path: Path, host_bytes: int
) -> None:
    more = {f"more{i}": save_adapter(tmp_path / f"more{i}", checkpoint.base, seed=i, r=1 + 3 * i) for i in range(6)}
    many = Checkpoint(checkpoint.base, checkpoint.adapters | more)
    names = list(many.adapters)
    async with cramped(many, tmp_path / "data", num_slots=5, memory_bytes=150_000, host_bytes=host_bytes) as (
        _,
        client,
    ):
        alone = [(await say(client, name))[0] for name in names]
        assert len({str(answer) for answer in alone}) == len(names)

        assert await say(client, *names, *reversed(names), *names[::2]) == [*alone, *reversed(alone), *alone[::2]]


async def test_a_damaged_file_fails_its_own_requests_and_is_made_anew(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with cramped(checkpoint, tmp_path) as (_, client):
        (expected,) = await say(client, "alpha")
        (file,) = stored_files(tmp_path)
        neighbor = await Neighbor.beside(client, adapter="beta")
        await evict(client, "gamma", "beta")
        damage(file)

        async with neighbor.singing():
            with pytest.raises(AdapterInvalid):
                await say(client, "alpha")
            await healed(client, expected)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


async def healed(client: Client, expected: object) -> None:
    """A request that came too early may still fail."""
    with anyio.fail_after(LONG):
        while True:
            try:
                assert await say(client, "alpha") == [expected]
                return
            except AdapterInvalid:
                await anyio.sleep(0.01)


async def test_a_version_that_cannot_be_read_to_its_end_delays_nobody_else(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with cramped(checkpoint, tmp_path) as (_, client):
        await say(client, "alpha")
        (file,) = stored_files(tmp_path)
        expected = await say(client, None, "beta", "gamma", "delta")
        await evict(client, "gamma", "beta")
        file.unlink()
        os.mkfifo(file)  # whoever opens it waits for somebody who writes

        blocked = client.generate("hello", adapter="alpha", seed=3, max_tokens=NUM_TOKENS)
        for _ in range(2):
            assert [(await say(client, name))[0] for name in (None, "beta", "gamma", "delta")] == expected

        with file.open("wb"):
            pass
        with pytest.raises(AdapterInvalid):
            await blocked.result()


async def test_pins_outlive_the_scheduler_and_the_executor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with cramped(checkpoint, tmp_path) as (system, client):
        expected = await say(client, *ADAPTERS)
        adapter = await client.adapters.open("alpha")
        assert adapter is not None
        await adapter.pin()
        (pinned,) = system.services.model.pinned

        for end in (crash_scheduler, kill_executor):
            before = system.services.model.num_lives, system.services.scheduler.stats().restarts
            await end(system)
            await wait_until(lambda: (system.services.model.num_lives, restarts_of(system)) != before)  # noqa: B023
            assert await say(client, *ADAPTERS) == expected
            await wait_until(lambda: residency_of(system).is_pinned(pinned.digest))
            await evict(client, "beta", "gamma", "delta")
            assert residency_of(system).is_loaded(pinned.digest)


def restarts_of(system: System) -> int:
    return system.services.scheduler.stats().restarts


async def crash_scheduler(system: System) -> None:
    crash(system.services.scheduler)
