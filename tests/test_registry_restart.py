"""The next server, and the next life of the registry, find every name as it was, and the configured ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from descant.catalog.configured import reconcile
from descant.catalog.entry import SHARED, Entry
from descant.catalog.journal import open_journal
from descant.config import AdapterEntry
from descant_client.errors import AdapterInvalid, AdapterNotFound, ConfigInvalid
from registry_desk import ANNA, crash, open_desk, wait_until, write_adapter

pytestmark = pytest.mark.anyio


async def test_every_name_comes_back_as_it_was(tmp_path: Path) -> None:
    write_adapter(tmp_path, "one", "one")
    async with open_desk(tmp_path, ("one",)) as desk:
        await desk.change("load", "mine", ref=desk.write("x", "x"), principal=ANNA)
        await desk.change("create", "made", principal=ANNA)
        await desk.change("fork", "mine", new_name="copy", principal=ANNA)
        await desk.change("merge", "sum", adapters=[("one", 1.0), ("made", 2.0)], principal=ANNA)
        await desk.change("disable", "copy", principal=ANNA)
        await desk.change("pin", "mine", principal=ANNA)
        await desk.change("destroy", "made", principal=ANNA)
        before = await desk.listed(principal=ANNA)
        contents = [await desk.content(name, principal=ANNA) for name in ("mine", "copy", "sum")]
    async with open_desk(tmp_path, ("one",)) as desk:
        after = await desk.listed(principal=ANNA)

        assert after[1:] == before[1:]
        assert after[0].digest is None  # configured: read anew when it is next used
        assert [await desk.content(name, principal=ANNA) for name in ("mine", "copy", "sum")] == contents
        assert desk.asked == []


async def test_a_crash_of_the_registry_loses_nothing_and_reads_nothing_anew(tmp_path: Path) -> None:
    write_adapter(tmp_path, "one", "one")
    async with open_desk(tmp_path, ("one", "two")) as desk:
        await desk.resolve("one")
        await desk.change("load", "mine", ref=desk.write("x", "x"))
        running = await desk.holding("mine")
        await desk.change("destroy", "mine")
        before = await desk.listed()
        write_adapter(tmp_path, "one", "changed")

        crash(desk.registry)
        await wait_until(lambda: desk.registry.stats().restarts == 1)

        assert await desk.listed() == before
        assert await desk.content("one") == b"one"
        assert len(desk.asked) == 2
        running.release()
        assert await desk.content(str(tmp_path / "one")) == b"changed"


async def test_configured_content_is_read_anew_at_each_start_and_marks_stay_with_the_name(tmp_path: Path) -> None:
    write_adapter(tmp_path, "one", "one")
    async with open_desk(tmp_path, ("one",)) as desk:
        await desk.resolve("one")
        await desk.change("pin", "one")
        await desk.change("disable", "one")
    write_adapter(tmp_path, "one", "changed")
    async with open_desk(tmp_path, ("one",)) as desk:
        (info,) = await desk.listed()
        assert (info.is_pinned, info.is_enabled) == (True, False)
        await desk.change("enable", "one")
        assert await desk.content("one") == b"changed"


async def test_what_a_client_put_under_a_configured_name_stays_while_the_configuration_does(tmp_path: Path) -> None:
    for name in ("one", "elsewhere"):
        write_adapter(tmp_path, name, name)
    async with open_desk(tmp_path, ("one",)) as desk:
        await desk.change("load", "one", ref=desk.write("x", "mine"))
    for _ in range(2):
        async with open_desk(tmp_path, ("one",)) as desk:
            assert await desk.content("one") == b"mine"
    async with open_desk(tmp_path, ()) as desk:  # no longer configured, but a client's
        assert await desk.content("one") == b"mine"
    elsewhere = [AdapterEntry(name="one", ref=str(tmp_path / "elsewhere"))]
    async with open_journal(tmp_path / "model", 1) as journal:
        await journal.apply(*reconcile(await journal.entries(), elsewhere))
        (entry,) = await journal.entries()
        assert (entry.version, entry.reference, entry.is_replaced) == (None, str(tmp_path / "elsewhere"), False)


@pytest.mark.parametrize("kind", ["load", "create", "fork", "merge"])
async def test_what_a_client_made_under_a_configured_name_it_destroyed_stays_too(tmp_path: Path, kind: str) -> None:
    write_adapter(tmp_path, "poet", "configured")
    write_adapter(tmp_path, "other", "other")
    async with open_desk(tmp_path, ("poet", "other")) as desk:
        fields = {
            "load": {"ref": str(tmp_path / "other")},
            "create": {},
            "fork": {"new_name": "poet"},
            "merge": {"adapters": [("other", 2.0)]},
        }[kind]
        await desk.change("destroy", "poet")
        await desk.change(kind, "other" if kind == "fork" else "poet", is_shared=True, **fields)
        made = await desk.content("poet")
        await desk.change("create", "other", principal=ANNA)
        assert [entry.configured for entry in await desk.journal.entries() if entry.owner == ANNA.name] == [None]
    async with open_desk(tmp_path, ("poet", "other")) as desk:
        assert made != b"configured"
        assert await desk.content("poet") == made
        assert await desk.content("other", principal=ANNA) == b"\0" * 8
        await desk.change("destroy", "poet")
    async with open_desk(tmp_path, ("poet", "other")) as desk:
        assert await desk.content("poet") == b"configured"
    async with open_desk(tmp_path, ("other",)) as desk:
        assert [info.name for info in await desk.listed(principal=ANNA)] == ["other"]


async def test_configured_names_go_with_the_configuration_and_destroyed_ones_come_back(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write_adapter(tmp_path, name, name)
    async with open_desk(tmp_path, ("one", "two")) as desk:
        await desk.resolve("one")
        await desk.change("create", "mine")
        await desk.change("destroy", "two")
        assert [info.name for info in await desk.listed()] == ["one", "mine"]
    async with open_desk(tmp_path, ("two", "three")) as desk:
        assert [info.name for info in await desk.listed()] == ["mine", "two", "three"]
        assert await desk.content("two") == b"two"
        with pytest.raises(AdapterNotFound):
            await desk.resolve("one")


async def test_a_version_that_is_missing_at_the_start_is_made_again_if_its_source_is_the_same(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        for name in ("same", "changed"):
            await desk.change("load", name, ref=desk.write(name, name))
        await desk.change("create", "made")
        before = await desk.listed()
    write_adapter(tmp_path, "changed", "other")
    async with open_desk(tmp_path, spoil=shutil.rmtree) as desk:
        assert await desk.listed() == before
        assert await desk.content("same") == b"same"
        with pytest.raises(AdapterInvalid, match="load it again"):
            await desk.resolve("changed")
        with pytest.raises(AdapterInvalid, match="make it again"):
            await desk.resolve("made")
        await desk.change("load", "changed", ref=str(tmp_path / "changed"))
        assert await desk.content("changed") == b"other"


def test_a_configured_name_takes_the_place_of_a_shared_one_of_clients_but_of_nobodys_own() -> None:
    shared = Entry(owner=SHARED, name="a", position=0, source="create", is_pinned=True)
    own = Entry(owner="anna", name="a", position=1, source="create")

    ((changed,), removed) = reconcile([shared, own], [AdapterEntry(name="a", ref="/a")])

    assert removed == []
    assert (changed.key, changed.position, changed.is_pinned) == (("", "a"), 0, True)
    assert (changed.reference, changed.source, changed.sources) == ("/a", "local", ("operator:/a",))


@pytest.mark.parametrize("ref", ["org/repo", "s3://bucket/key", "no name"])
def test_a_configured_reference_that_is_not_served_is_a_fault_of_the_configuration(ref: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"adapters\.entries"):
        reconcile([], [AdapterEntry(name="a", ref=ref)])
