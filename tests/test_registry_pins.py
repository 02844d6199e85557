"""Pins: the versions kept on the device, their budget, and that the scheduler is told of every change."""

from __future__ import annotations

from pathlib import Path

import pytest

from descant.messages import VersionFailed
from descant_client.errors import AdapterTooLarge, InvalidRequest
from registry_desk import ANNA, BERT, Desk, crash, digest_of, open_desk, wait_until, write_adapter

pytestmark = pytest.mark.anyio


def pinned(desk: Desk) -> list[str]:
    """Return the digests that are to be on the device now."""
    return [version.digest for version in desk.pins[-1]]


async def load(desk: Desk, name: str, content: str) -> str:
    await desk.change("load", name, ref=desk.write(f"dir-{name}", content))
    return digest_of(content)


async def test_pins_are_told_at_the_start_and_whenever_they_change_and_only_then(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        a, b = await load(desk, "a", "aaa"), await load(desk, "b", "bbb")
        info = await desk.change("pin", "b")
        await desk.change("pin", "a")
        await desk.change("pin", "a")
        assert info is not None
        assert info.is_pinned
        await load(desk, "c", "ccc")
        assert [[v.digest for v in pins] for pins in desk.pins] == [[], [b], [a, b]]

        other = await load(desk, "a", "other")
        assert pinned(desk) == [other, b]
        await desk.change("unpin", "b")
        assert pinned(desk) == [other]
        await desk.change("destroy", "a")
        assert pinned(desk) == []
        assert len(desk.pins) == 6


async def test_pinning_a_name_nobody_has_used_prepares_it(tmp_path: Path) -> None:
    write_adapter(tmp_path, "one", "one")
    async with open_desk(tmp_path, ("one",)) as desk:
        await desk.change("pin", "one")

        assert pinned(desk) == [digest_of("one")]


async def test_pins_have_a_share_of_the_devices_bytes(tmp_path: Path) -> None:
    async with open_desk(tmp_path, memory_bytes=20, max_pinned_share=0.5) as desk:
        await load(desk, "a", "aaaaaa")
        await load(desk, "b", "bbbbb")
        await desk.change("fork", "a", new_name="a2")
        await desk.change("pin", "a")
        await desk.change("pin", "a2")  # the same version

        with pytest.raises(InvalidRequest, match=r"max_pinned_share.*unpin another"):
            await desk.change("pin", "b")
        await load(desk, "large", "c" * 11)
        with pytest.raises(AdapterTooLarge) as caught:
            await desk.change("pin", "large")
        assert (caught.value.num_bytes, caught.value.max_bytes) == (11, 10)
        await load(desk, "b", "bbbb")
        await desk.change("pin", "b")
        with pytest.raises(InvalidRequest):
            await load(desk, "b", "ccccc")
        assert await desk.content("b") == b"bbbb"
        assert pinned(desk) == [digest_of("aaaaaa"), digest_of("bbbb")]


@pytest.mark.parametrize(("share", "num_slots", "num_pins"), [(0.5, 5, 2), (0.1, 5, 1), (0.0, 5, 0), (1.0, 3, 3)])
async def test_pins_have_a_share_of_the_slots(tmp_path: Path, share: float, num_slots: int, num_pins: int) -> None:
    async with open_desk(tmp_path, num_slots=num_slots, max_pinned_share=share) as desk:
        for index in range(num_pins + 1):
            await load(desk, f"n{index}", f"{index}")
            if index < num_pins:
                await desk.change("pin", f"n{index}")

        with pytest.raises(InvalidRequest, match=f"{num_pins} adapters"):
            await desk.change("pin", f"n{num_pins}")
        assert len(pinned(desk)) == num_pins


async def test_each_principal_has_a_share_of_pins_of_its_own_and_shared_ones_have_not(tmp_path: Path) -> None:
    async with open_desk(tmp_path, memory_bytes=40, num_slots=10, max_pinned_share=0.5, max_owner_share=0.5) as desk:
        for who in (ANNA, BERT):
            for name in "abc":
                content = f"{who.name} {name}"[:6] if name != "c" else "cc"
                await desk.change("load", name, ref=desk.write(f"{who.name}{name}", content), principal=who)
        await desk.change("pin", "a", principal=ANNA)
        with pytest.raises(InvalidRequest, match=r"10 in all.*max_owner_share"):
            await desk.change("pin", "b", principal=ANNA)
        await desk.change("pin", "c", principal=ANNA)
        await desk.change("load", "d", ref=desk.write("d", "d"), principal=ANNA)
        with pytest.raises(InvalidRequest, match=r"2 adapters.*max_owner_share"):
            await desk.change("pin", "d", principal=ANNA)

        for name in "wxyz":
            await desk.change("load", name, ref=desk.write(name, name), is_shared=True)
            if name != "z":
                await desk.change("pin", name)
        with pytest.raises(InvalidRequest, match=r"5 adapters.*max_pinned_share"):
            await desk.change("pin", "z")
        await desk.change("unpin", "w")
        await desk.change("pin", "a", principal=BERT)


async def test_pins_come_back_with_the_next_server_and_configured_ones_are_read_for_it(tmp_path: Path) -> None:
    entries = ("one", "two", "three")
    for name in entries:
        write_adapter(tmp_path, name, name)
    async with open_desk(tmp_path, entries) as desk:
        for name in entries:
            await desk.change("pin", name)
        mine = await load(desk, "mine", "mine")
        await desk.change("pin", "mine")
    write_adapter(tmp_path, "one", "anew")
    (tmp_path / "two/content").unlink()
    (tmp_path / "two").rmdir()
    async with open_desk(tmp_path, entries) as desk:
        await wait_until(lambda: desk.pins and len(pinned(desk)) == 3)

        assert [version.digest for version in desk.pins[0]] == [mine]
        assert pinned(desk) == [digest_of("anew"), digest_of("three"), mine]
        assert [info.is_pinned for info in await desk.listed()] == [True] * 4
        write_adapter(tmp_path, "two", "two")
        await desk.resolve("two")
        assert len(pinned(desk)) == 4


async def test_a_damaged_pin_is_off_the_device_until_it_is_mended(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        digest = await load(desk, "a", "aaa")
        await desk.change("pin", "a")
        await desk.registry.tell(VersionFailed(digest))
        await desk.listed()
        assert pinned(desk) == []

        await desk.resolve("a")
        assert pinned(desk) == [digest]


async def test_what_no_longer_fits_is_not_pinned_on_the_device(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        digests = [await load(desk, name, name * 4) for name in "abc"]
        for name in "abc":
            await desk.change("pin", name)
    async with open_desk(tmp_path, memory_bytes=18, max_pinned_share=0.5) as desk:
        await desk.listed()
        assert pinned(desk) == digests[:2]


async def test_the_next_life_of_the_registry_tells_them_again(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        digest = await load(desk, "a", "aaa")
        await desk.change("pin", "a")
        crash(desk.registry)
        await wait_until(lambda: desk.registry.stats().restarts == 1)
        await desk.listed()

        assert pinned(desk) == [digest]
        assert len(desk.pins) == 3
