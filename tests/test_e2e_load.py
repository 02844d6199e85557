"""Many clients at once, and one that does not read: everybody is served, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from descant.config import SchedulingConfig
from descant_client import connect
from servers import (
    Checkpoint,
    answers,
    dummy_config,
    is_alive,
    model_config,
    raw,
    resident_bytes,
    results,
    serve,
    tokens_of,
    wait_until,
)

pytestmark = pytest.mark.anyio

NUM_STREAMS = 200
NUM_LATE_TOKENS = 400  # more than the buffers between the server and a client that does not read hold


@pytest.mark.parametrize("num_connections", [1, NUM_STREAMS])
async def test_two_hundred_streams_leave_nothing_behind(tmp_path: Path, num_connections: int) -> None:
    async with serve(dummy_config(tmp_path)) as (system, uri):
        async with connect(uri) as client:
            expected = [await client.generate("x", seed=seed, max_tokens=20).result() for seed in range(10)]
        tasks, threads = len(asyncio.all_tasks()), threading.active_count()

        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connect(uri)) for _ in range(num_connections)]
            streams = [
                clients[i % num_connections].generate("x", seed=i % 10, max_tokens=20) for i in range(NUM_STREAMS)
            ]
            finished = await results(streams)

        assert answers(finished) == answers(expected) * (NUM_STREAMS // 10)
        await wait_until(lambda: len(asyncio.all_tasks()) == tasks)
        assert threading.active_count() == threads
        assert (len(system.services.sessions), len(system.services.sequences)) == (0, 0)


async def test_leaving_the_server_leaves_no_task_and_no_child(tmp_path: Path) -> None:
    tasks = asyncio.all_tasks()

    async with serve(dummy_config(tmp_path, 20)) as (system, uri), connect(uri) as client:
        client.generate("unfinished")
        pid = system.executor.pid or 0
        await wait_until(lambda: len(system.services.sequences))

    assert asyncio.all_tasks() == tasks
    assert not is_alive(pid)


async def test_a_client_that_does_not_read_delays_nobody_and_misses_nothing(
    tmp_path: Path, small_send_buffers: None
) -> None:
    config = dummy_config(tmp_path, stream_buffer_bytes=1600)  # 100 tokens
    async with serve(config) as (system, uri), connect(uri) as client:
        async with raw(uri, max_queue=1, sock=_small_socket(system.port)) as late:
            for seed in range(2):
                await late.generate(str(seed), seed=seed, max_tokens=NUM_LATE_TOKENS, logprobs=20)
            await wait_until(lambda: [s.status for s in system.services.sequences] == ["parked"] * 2)
            before = {s.request_id: len(s.output_ids) for s in system.services.sequences}

            others = [client.generate("x", seed=seed % 2, max_tokens=NUM_LATE_TOKENS) for seed in range(4)]
            finished = await results(others)

            assert {s.request_id: len(s.output_ids) for s in system.services.sequences} == before
            assert max(before.values()) < NUM_LATE_TOKENS
            messages = [message for _ in range(2) for message in await late.until("done")]
        for seed in range(2):
            said = tokens_of(message for message in messages if message.get("request_id") == str(seed))
            assert said == finished[seed].token_ids


def _small_socket(port: int) -> socket.socket:
    """A connection that holds little of what nobody reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    return connection


@pytest.mark.slow
async def test_memory_is_flat_over_two_thousand_requests(checkpoint: Checkpoint, tmp_path: Path) -> None:
    # Small steps and a small cache: what the CPU library keeps for each number of rows is there by half-time.
    config = model_config(checkpoint, tmp_path)
    replace = msgspec.structs.replace
    scheduling = SchedulingConfig(max_num_seqs=16, max_num_batched_tokens=32)
    config = replace(config, scheduling=scheduling, model=replace(config.model, kv_bytes=4 << 20))
    async with serve(config) as (system, uri):
        sizes = []
        for _ in range(20):
            async with connect(uri) as client:
                await results(
                    [
                        client.generate(f"request {i}", adapter=["alpha", "beta"][i % 2], max_tokens=16)
                        for i in range(100)
                    ]
                )
            gc.collect()
            sizes.append([resident_bytes(pid) for pid in (os.getpid(), system.executor.pid or 0)])

    for halfway, end in zip(sizes[9], sizes[-1], strict=True):
        assert end - halfway < 10 << 20, [[size >> 20 for size in pair] for pair in sizes]
