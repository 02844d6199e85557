"""A name is reloaded again and again under running traffic: every stream keeps to the version it began with."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest

from descant.assembly.system import System
from descant_client import connect
from descant_client.client import Client
from descant_client.stream import Stream
from servers import Checkpoint, model_config, resident_bytes, results, serve, wait_until
from tiny_models import EVERY_MODULE, save_adapter

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

NUM_STREAMS = 32
NUM_RELOADS = 100
NUM_TOKENS = 24
RANKS = (1, 3, 8, 16, 5)
TARGETS = (EVERY_MODULE, ["q_proj", "v_proj"], ["down_proj"], ["gate_proj", "lm_head"], EVERY_MODULE)


@pytest.fixture(scope="module")
def versions(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of other ranks, scalings and modules each."""
    directory = tmp_path_factory.mktemp("versions")
    return [
        save_adapter(directory / str(i), checkpoint.base, seed=i, r=rank, lora_alpha=3 + i, target_modules=targets)
        for i, (rank, targets) in enumerate(zip(RANKS, TARGETS, strict=True))
    ]


async def test_every_stream_has_the_tokens_of_exactly_one_version_while_its_name_is_reloaded(
    checkpoint: Checkpoint, versions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The CPU library keeps code for so many shapes only: what a version left behind would not show beside more.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    async with serve(model_config(checkpoint, tmp_path)) as (system, uri), connect(uri) as client:
        alone = {}
        for path in versions:
            adapter = await client.adapters.load("song", path)
            alone[adapter.digest] = (await results([_start_stream(client)]))[0].token_ids
        assert len(alone) == len({tuple(token_ids) for token_ids in alone.values()}) == len(versions)
        stop = asyncio.Event()
        choir = asyncio.ensure_future(_choir(client, stop))

        sizes = [await _sizes_after_reloads(system, client, versions, NUM_RELOADS // 4) for _ in range(4)]
        stop.set()
        finished = await choir

        assert len(finished) >= NUM_STREAMS
        assert 1 < len({digest for digest, _ in finished}) <= len(alone)
        assert all(token_ids == alone[digest] for digest, token_ids in finished)
        await wait_until(lambda: len(system.services.leases) == 0)
        current = await client.adapters.open("song")
        assert current is not None
        await wait_until(lambda: alone.keys() & _stored(tmp_path) == {current.digest})
        for early, late in zip(sizes[1], sizes[-1], strict=True):
            assert late - early < 10 << 20, sizes


def _stored(data_dir: Path) -> set[str]:
    return {path.stem for path in data_dir.rglob("versions/*.safetensors")}


def _start_stream(client: Client) -> Stream:
    return client.generate("sing", adapter="song", seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)


async def _choir(client: Client, stop: asyncio.Event) -> list[tuple[str | None, list[int]]]:
    """Keep `NUM_STREAMS` streams running until told to stop; return the version and the tokens of each."""
    finished: list[tuple[str | None, list[int]]] = []

    async def voice() -> None:
        while not stop.is_set():
            result = await _start_stream(client).result()
            finished.append((result.adapter_digest, result.token_ids))

    await asyncio.gather(*[voice() for _ in range(NUM_STREAMS)])
    return finished


async def _sizes_after_reloads(system: System, client: Client, versions: list[Path], num_reloads: int) -> list[int]:
    for i in range(num_reloads):
        await client.adapters.load("song", versions[i % len(versions)])
    gc.collect()
    return [resident_bytes(pid) for pid in (os.getpid(), system.executor.pid or 0)]
