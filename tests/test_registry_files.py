"""Stored versions read by the worker: made again if they are damaged, exported without delaying other requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from descant.contract.worker import ComposeAdapters, ExportAdapter, ExportMerged, PrepareAdapter
from descant_client.errors import AdapterInvalid
from registry_desk import ANNA, BERT, Desk, digest_of, open_desk, wait_until, write_adapter

pytestmark = pytest.mark.anyio


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    write_adapter(tmp_path, "one", "one")
    async with open_desk(tmp_path, ("one",)) as desk:
        await desk.change("load", "mine", ref=desk.write("x", "x"))
        await desk.change("create", "made")
        yield desk


def damage(desk: Desk, content: bytes | str) -> None:
    """Change the stored file of the version with this content."""
    (desk.bench.store_dir / "versions" / f"{digest_of(content)}.safetensors").write_bytes(b"other")
    desk.asked.clear()


def kinds(desk: Desk) -> list[type]:
    return [type(message) for message in desk.asked]


@pytest.mark.parametrize("member", ["mine", "path"])
async def test_a_request_for_a_combination_has_its_members_made_again(desk: Desk, member: str) -> None:
    name = {"path": str(desk.root / "x")}.get(member, member)
    await desk.resolve(name)
    damage(desk, "x")

    found = await desk.content((name, 0.5), ("one", 1.0))

    assert found == f"cat {[(digest_of('x'), 0.5), (digest_of('one'), 1.0)]}".encode()
    assert kinds(desk).count(ComposeAdapters) == 2
    assert await desk.content("mine") == b"x"


async def test_a_merge_has_its_members_made_again(desk: Desk) -> None:
    damage(desk, "x")

    await desk.change("merge", "sum", adapters=[("mine", 1.0), ("one", 2.0)])

    assert kinds(desk).count(ComposeAdapters) == 2
    assert await desk.content("mine") == b"x"


@pytest.mark.parametrize(("kind", "message"), [("save", ExportAdapter), ("merge_and_save", ExportMerged)])
async def test_what_is_written_out_is_made_again(desk: Desk, kind: str, message: type) -> None:
    damage(desk, "x")

    info = await desk.change(kind, "mine", path=str(desk.root / "out"))

    assert info is not None
    assert info.digest == digest_of("x")
    assert kinds(desk) == [message, PrepareAdapter, message]


async def test_two_damaged_members_are_one_too_many_for_one_request_but_not_for_two(desk: Desk) -> None:
    await desk.resolve("one")
    damage(desk, "x")
    damage(desk, "one")

    with pytest.raises(AdapterInvalid) as caught:
        await desk.resolve(("mine", 0.5), ("one", 1.0))

    assert caught.value.adapter == "one"  # and not the combination of them
    assert await desk.content(("mine", 0.5), ("one", 1.0))


async def test_what_cannot_be_made_again_is_said_by_its_name(desk: Desk) -> None:
    damage(desk, b"\0" * 8)

    for _ in range(2):
        with pytest.raises(AdapterInvalid, match=r"'made'.*make it again"):
            await desk.resolve(("mine", 0.5), ("made", 1.0))
    with pytest.raises(AdapterInvalid, match=r"'made'.*make it again"):
        await desk.change("merge", "sum", adapters=[("mine", 1.0), ("made", 2.0)])
    with pytest.raises(AdapterInvalid, match=r"'made'.*make it again"):
        await desk.change("save", "made", path=str(desk.root / "out"))


async def test_exports_of_one_principal_hold_up_nobody_elses_loads_and_exports(desk: Desk) -> None:
    gate = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for number in range(8):
            await desk.change("load", f"a{number}", ref=str(desk.root / "x"), principal=ANNA)
            desk.bench.gates[f"a{number}"] = gate
            path = str(desk.root / f"out{number}")
            tasks.start_soon(lambda name=f"a{number}", path=path: _export(desk, name, path))
        await wait_until(lambda: [kind for kind in kinds(desk) if kind is ExportMerged])

        assert await desk.content(desk.write("y", "y"), principal=BERT) == b"y"
        assert await desk.change("save", "mine", path=str(desk.root / "out"))
        assert kinds(desk).count(ExportMerged) == 1
        gate.set()

    assert kinds(desk).count(ExportMerged) == 8


async def _export(desk: Desk, name: str, path: str) -> None:
    await desk.change("merge_and_save", name, path=path, principal=ANNA)


async def test_other_faults_are_not_tried_again(desk: Desk) -> None:
    desk.asked.clear()
    desk.bench.refused.add("sum")

    with pytest.raises(AdapterInvalid):
        await desk.change("merge", "sum", adapters=[("mine", 1.0), ("made", 2.0)])

    assert kinds(desk) == [ComposeAdapters]
