"""An adapter is destroyed in every state: its name is gone at once, and every accepted request still has its answer."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from descant.assembly.system import System
from descant_client import connect
from descant_client.client import Client
from descant_client.errors import AdapterNotFound
from servers import Checkpoint, model_config, results, serve, wait_until
from tiny_models import save_adapter

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

LONG_ANSWER = {"seed": 7, "max_tokens": 120, "ignore_eos": True}
LONGER_ANSWER = LONG_ANSWER | {"max_tokens": 400}


def _files(tmp_path: Path, digest: str | None) -> list[Path]:
    return list(tmp_path.rglob(f"{digest}.safetensors"))


async def _is_gone(system: System, client: Client, name: str, digest: str | None, tmp_path: Path) -> None:
    """Check that nothing is left of a name, and nothing of its version once nobody uses it."""
    assert await client.adapters.open(name) is None
    with pytest.raises(AdapterNotFound):
        await client.generate("x", adapter=name).result()
    if digest is not None:
        await wait_until(lambda: not _files(tmp_path, digest))
    assert len(system.services.leases) == 0


async def test_while_it_is_running(checkpoint: Checkpoint, tmp_path: Path) -> None:
    own = save_adapter(tmp_path / "own", checkpoint.base, seed=99)  # nobody else has this version
    async with serve(model_config(checkpoint, tmp_path / "data")) as (system, uri), connect(uri) as client:
        adapter = await client.adapters.load("mine", own)
        (expected,) = await results([client.generate("x", adapter="mine", **LONGER_ANSWER)])
        stream = client.generate("x", adapter="mine", **LONGER_ANSWER)
        await wait_until(lambda: any(sequence.output_ids for sequence in system.services.sequences))

        await adapter.destroy()

        assert len(system.services.sequences) == 1, "it was destroyed while the answer was being made"
        assert _files(tmp_path, adapter.digest), "its file stays with its last stream"
        assert (await results([stream]))[0].token_ids == expected.token_ids
        await _is_gone(system, client, "mine", adapter.digest, tmp_path)


async def test_while_streams_use_it_they_end_in_their_full_answers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with serve(model_config(checkpoint, tmp_path)) as (system, uri), connect(uri) as client:
        adapter = await client.adapters.merge("mine", [("alpha", 0.7), ("delta", -0.4)])
        (expected,) = await results([client.generate("x", adapter="mine", **LONG_ANSWER)])
        streams = [client.generate("x", adapter="mine", **LONG_ANSWER) for _ in range(8)]
        await wait_until(lambda: any(sequence.output_ids for sequence in system.services.sequences))

        await adapter.destroy()
        assert system.executor.pid is not None
        os.kill(system.executor.pid, 9)  # the next executor needs the version's file once more

        assert {tuple(one.token_ids) for one in await results(streams)} == {tuple(expected.token_ids)}
        await _is_gone(system, client, "mine", adapter.digest, tmp_path)


async def test_while_it_is_being_prepared_and_loaded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    one, other = (save_adapter(tmp_path / name, checkpoint.base, seed=seed) for seed, name in ((98, "a"), (97, "b")))
    async with serve(model_config(checkpoint, tmp_path / "data")) as (system, uri), connect(uri) as client:
        first = await client.adapters.load("first", one)
        (expected,) = await results([client.generate("x", adapter="first", **LONG_ANSWER)])
        await first.destroy()
        for _ in range(5):
            adapter = await client.adapters.load("mine", one)
            streams = [client.generate("x", adapter="mine", **LONG_ANSWER) for _ in range(3)]
            loading = asyncio.ensure_future(adapter.load(other))

            await adapter.destroy()

            for outcome in await asyncio.gather(*[stream.result() for stream in streams], return_exceptions=True):
                assert isinstance(outcome, AdapterNotFound) or getattr(outcome, "token_ids", None) == expected.token_ids
            await asyncio.gather(loading, return_exceptions=True)
            if (left := await client.adapters.open("mine")) is not None:  # the load came after
                await left.destroy()
        await _is_gone(system, client, "mine", first.digest, tmp_path)  # a load that was dropped may leave a version


async def test_what_it_was_forked_into_stays(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with serve(model_config(checkpoint, tmp_path)) as (system, uri), connect(uri) as client:
        adapter = await client.adapters.create("mine", rank=3)
        fork = await adapter.fork("fork")
        await adapter.destroy()
        await _is_gone(system, client, "mine", None, tmp_path)

        answer, base = await results([client.generate("x", adapter=one, **LONG_ANSWER) for one in ("fork", None)])

        assert answer.token_ids == base.token_ids
        assert answer.adapter_digest == fork.digest
        await fork.destroy()
        await _is_gone(system, client, "fork", fork.digest, tmp_path)


async def test_while_it_is_pinned(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with serve(model_config(checkpoint, tmp_path)) as (system, uri), connect(uri) as client:
        adapter = await client.adapters.create("mine", rank=2)
        await adapter.pin()

        await adapter.destroy()

        await _is_gone(system, client, "mine", adapter.digest, tmp_path)
