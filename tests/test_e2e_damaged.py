"""A version whose stored file is damaged: whatever reads it has it made again, and says whose it is if it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from descant_client import connect
from descant_client.errors import AdapterInvalid
from descant_client.lifecycle import Combination
from servers import Checkpoint, answers, model_config, results, serve, wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

OPTIONS = {"seed": 7, "max_tokens": 12, "ignore_eos": True}


def _damage(data_dir: Path, digest: str | None) -> None:
    (path,) = data_dir.rglob(f"{digest}.safetensors")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


async def test_combinations_merges_and_exports_go_on_over_a_damaged_file(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with serve(model_config(checkpoint, tmp_path / "data")) as (_, uri), connect(uri) as client:
        mine = await client.adapters.load("mine", checkpoint.adapters["alpha"])
        members = [("mine", 0.5), ("beta", 0.25)]
        expected = await results([client.generate("x", adapters=members, **OPTIONS)])

        _damage(tmp_path / "data", mine.digest)
        merged = await client.adapters.merge("merged", members)
        _damage(tmp_path / "data", mine.digest)
        await mine.save(tmp_path / "saved")
        _damage(tmp_path / "data", mine.digest)
        await mine.merge_and_save(tmp_path / "whole")
        _damage(tmp_path / "data", mine.digest)
        svd = await results([client.generate("x", adapters=members, combination=Combination("svd"), **OPTIONS)])

        again = await results([client.generate("x", adapter="merged", **OPTIONS)])
        assert answers(again) == answers(expected)
        assert (await client.adapters.load("saved", tmp_path / "saved")).digest == mine.digest
        assert (svd[0].adapter_digest, merged.digest) != (None, mine.digest)


async def test_what_was_made_here_is_named_and_nothing_of_the_store_is_said(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with serve(model_config(checkpoint, tmp_path / "data")) as (system, uri), connect(uri) as client:
        made = await client.adapters.merge("made", [("alpha", 0.5), ("beta", 0.5)])
        _damage(tmp_path / "data", made.digest)

        with pytest.raises(AdapterInvalid, match=r"'made'.*make it again"):
            await client.generate("x", adapters=[("made", 0.5), ("beta", 0.25)], **OPTIONS).result()
        with pytest.raises(AdapterInvalid, match=r"'made'.*make it again"):
            await made.save(tmp_path / "saved")

        await client.adapters.merge("made", [("alpha", 0.5), ("beta", 0.5)])
        await made.save(tmp_path / "saved")
        await wait_until(lambda: len(system.services.leases) == 0, 30)
