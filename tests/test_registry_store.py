"""The store's quota, the deletion of versions, and versions that turn out to be damaged."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from descant.contract.worker import ComposeAdapters, PrepareAdapter
from descant.messages import VersionFailed
from descant_client.errors import AdapterInvalid, AdapterNotFound, InvalidRequest, StoreFull
from registry_desk import ADMIN, ANNA, BERT, Desk, digest_of, open_desk, wait_until, write_adapter

pytestmark = pytest.mark.anyio


def texts(desk: Desk, *letters: str) -> list[str]:
    """Write adapters of ten bytes. Return their paths."""
    return [desk.write(letter, letter * 10) for letter in letters]


async def test_what_is_used_least_recently_makes_room(tmp_path: Path) -> None:
    async with open_desk(tmp_path, store_bytes=30) as desk:
        a, b, c, d = texts(desk, *"abcd")
        for path in (a, b, c, a, d):
            await desk.resolve(path)

        assert desk.stored() == {"a" * 10, "c" * 10, "d" * 10}
        assert await desk.content(b) == b"b" * 10  # made again
        assert desk.stored() == {"a" * 10, "b" * 10, "d" * 10}
        assert len(desk.asked) == 5


async def test_what_has_a_name_or_is_in_use_stays_and_the_store_may_be_full(tmp_path: Path) -> None:
    async with open_desk(tmp_path, store_bytes=30) as desk:
        a, b, c, d = texts(desk, *"abcd")
        await desk.change("load", "named", ref=a)
        with pytest.raises(StoreFull):
            await desk.resolve(b, c)  # their sum is larger than the store
        lease = await desk.holding(b)
        other = await desk.holding(c)

        with pytest.raises(StoreFull):
            await desk.resolve(d)
        with pytest.raises(StoreFull):
            await desk.change("load", "named", ref=d)
        assert desk.stored() == {"a" * 10, "b" * 10, "c" * 10}
        assert await desk.content("named") == b"a" * 10
        other.release()
        assert await desk.content(d) == b"d" * 10
        assert desk.stored() == {"a" * 10, "b" * 10, "d" * 10}
        lease.release()


async def test_a_version_with_no_name_stays_as_cache_but_one_that_lost_its_name_goes(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        a, b = texts(desk, "a", "b")
        await desk.resolve(a)
        await desk.change("load", "named", ref=b)
        await desk.change("destroy", "named")

        assert desk.stored() == {"a" * 10}
        assert desk.forgotten == [digest_of("b" * 10)]


async def test_a_version_is_never_deleted_between_preparing_and_holding_it(tmp_path: Path) -> None:
    """Every request gets a file that exists, although the store has room for only two."""
    async with open_desk(tmp_path, store_bytes=20) as desk:
        paths = texts(desk, *"abcdefgh")
        outcomes: list[bytes | str | None] = []

        async def use(path: str) -> None:
            for _ in range(5):
                try:
                    outcomes.append(await desk.content(path))
                except StoreFull as error:
                    outcomes.append(error.code)

        async with anyio.create_task_group() as tasks:
            for path in paths * 2:
                tasks.start_soon(use, path)

    assert len(outcomes) == 80
    assert set(outcomes) <= {*(letter.encode() * 10 for letter in "abcdefgh"), "store_full"}
    assert any(outcome != "store_full" for outcome in outcomes)


async def test_a_version_that_was_deleted_in_the_moment_it_was_made_is_made_again(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        (path,) = texts(desk, "a")
        desk.bench.vanishing.add(path)

        assert await desk.content(path) == b"a" * 10
        assert len(desk.asked) == 2


async def test_destroying_while_others_fork_and_use_it_deletes_nothing_in_use(tmp_path: Path) -> None:
    async with open_desk(tmp_path, store_bytes=1000) as desk:
        (path,) = texts(desk, "a")

        async def churn(name: str) -> None:
            for _ in range(10):
                await desk.change("load", name, ref=path)
                await desk.change("fork", name, new_name=f"{name}2")
                await desk.change("destroy", name)
                assert await desk.content(f"{name}2") == b"a" * 10
                await desk.change("destroy", f"{name}2")

        async with anyio.create_task_group() as tasks:
            for name in ("x", "y", "z"):
                tasks.start_soon(churn, name)
        await wait_until(lambda: desk.stored() == set())


async def test_a_version_the_device_could_not_read_is_made_again(tmp_path: Path) -> None:
    write_adapter(tmp_path, "one", "one")
    async with open_desk(tmp_path, ("one",)) as desk:
        await desk.resolve(("one", 0.5))
        path = desk.write("x", "x")
        await desk.change("load", "mine", ref=path)
        for content in ("one", "x", f"cat {[(digest_of('one'), 0.5)]}"):
            await desk.registry.tell(VersionFailed(digest_of(content)))
        desk.asked.clear()

        assert await desk.content(("one", 0.5))
        assert await desk.content("mine") == b"x"
        assert await desk.content(path) == b"x"
        assert [type(message) for message in desk.asked] == [PrepareAdapter, ComposeAdapters, PrepareAdapter]


async def test_a_damaged_version_whose_source_has_changed_or_is_gone_says_so(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        path = desk.write("x", "x")
        await desk.change("load", "mine", ref=path)
        await desk.change("create", "made")
        for content in (b"x", b"\0" * 8):
            await desk.registry.tell(VersionFailed(digest_of(content)))

        desk.write("x", "y")
        with pytest.raises(AdapterInvalid, match="load it again"):
            await desk.resolve("mine")
        with pytest.raises(AdapterInvalid, match="make it again"):
            await desk.change("fork", "made", new_name="copy")
        (tmp_path / "x/content").unlink()
        (tmp_path / "x").rmdir()
        await desk.registry.tell(VersionFailed(digest_of("y")))
        with pytest.raises(AdapterNotFound):
            await desk.resolve("mine")
        await desk.change("load", "mine", ref=desk.write("x", "y"))
        assert await desk.content("mine") == b"y"


async def test_files_of_earlier_servers_count_and_make_room(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        a, b = texts(desk, "a", "b")
        await desk.change("load", "named", ref=a)
        await desk.resolve(b)
        (desk.bench.store_dir / "versions/foreign.safetensors").write_bytes(b"not ours")
    async with open_desk(tmp_path, store_bytes=20) as desk:
        assert desk.stored() == {"a" * 10, "b" * 10, "not ours"}
        (c,) = texts(desk, "c")
        await desk.resolve(c)
        assert desk.stored() == {"a" * 10, "c" * 10, "not ours"}
    async with open_desk(tmp_path, store_bytes=10) as desk:
        await desk.listed()
        assert desk.stored() == {"a" * 10, "not ours"}
        assert await desk.content("named", principal=ADMIN) == b"a" * 10
        assert desk.asked == []


async def test_each_principals_names_may_take_a_share_of_the_store_and_so_many(tmp_path: Path) -> None:
    async with open_desk(tmp_path, store_bytes=100, max_owner_share=0.25, max_names=3) as desk:
        a, b, c, d = texts(desk, *"abcd")
        await desk.change("load", "one", ref=a, principal=ANNA)
        await desk.change("fork", "one", new_name="copy", principal=ANNA)  # the same bytes
        await desk.change("load", "two", ref=b, principal=ANNA)
        for kind, fields in (("create", {}), ("load", {"ref": c}), ("merge", {"adapters": [("one", 2.0)]})):
            with pytest.raises(InvalidRequest, match=r"3 adapters.*max_names"):
                await desk.change(kind, "four", principal=ANNA, **fields)
        await desk.change("load", "two", ref=c, principal=ANNA)  # in the place of another
        with pytest.raises(StoreFull, match="max_owner_share") as caught:
            await desk.change("load", "copy", ref=d, principal=ANNA)
        assert (caught.value.num_bytes, caught.value.max_bytes) == (10, 25)
        await desk.change("load", "one", ref=d, principal=BERT)
        for name in "wxyz":
            await desk.change("load", name, ref=desk.write(name, name * 10), is_shared=True)

        assert await desk.content("copy", principal=ANNA) == b"a" * 10
        assert await desk.content("one", principal=BERT) == b"d" * 10
