"""Every change of an adapter: its effect, the permission it needs, and that running requests do not notice it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from descant.contract.principal import Principal
from descant.contract.worker import CreateVersion, ExportAdapter, ExportMerged
from descant_client.errors import (
    AdapterExists,
    AdapterForbidden,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    InvalidRequest,
)
from descant_client.lifecycle import Combination
from registry_desk import ADMIN, ANNA, BERT, Desk, digest_of, open_desk, wait_until, write_adapter

pytestmark = pytest.mark.anyio


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    for name in ("one", "two", "three"):
        write_adapter(tmp_path, name, name)
    async with open_desk(tmp_path, ("two", "one")) as desk:
        yield desk


async def names(desk: Desk, principal: Principal) -> list[str]:
    return [info.name for info in await desk.listed(principal=principal)]


async def test_own_names_come_before_shared_ones_and_nobody_elses_are_seen(desk: Desk) -> None:
    await desk.change("create", "one", principal=ANNA, rank=3)

    assert await desk.content("one", principal=ANNA) == b"\0" * 3
    assert await desk.content("one", principal=BERT) == b"one"
    assert await names(desk, ANNA) == ["two", "one"]
    assert [(i.name, i.is_shared) for i in await desk.listed("one", principal=ANNA)] == [("one", False)]
    await desk.change("create", "hers", principal=ANNA)
    with pytest.raises(AdapterNotFound):
        await desk.resolve("hers", principal=BERT)
    for kind in ("pin", "unpin", "enable", "disable", "destroy"):
        with pytest.raises(AdapterNotFound):
            await desk.change(kind, "hers", principal=BERT)
    assert await names(desk, BERT) == ["two", "one"]

    await desk.change("destroy", "one", principal=ANNA)
    assert await desk.content("one", principal=ANNA) == b"one"


async def test_only_administrators_change_what_is_shared(desk: Desk) -> None:
    path = desk.write("x", "x")
    attempts: list[tuple[str, str, dict[str, Any]]] = [
        ("create", "new", {"is_shared": True}),
        ("fork", "one", {"new_name": "new", "is_shared": True}),
        ("load", "one", {"ref": path}),
        ("load", "new", {"ref": path, "is_shared": True}),
        ("merge", "one", {"adapters": [("two", 1.0)]}),
        *((kind, "one", {}) for kind in ("pin", "unpin", "enable", "disable", "destroy")),
    ]
    for kind, name, fields in attempts:
        with pytest.raises(AdapterForbidden, match="administrator"):
            await desk.change(kind, name, principal=ANNA, **fields)
    assert desk.asked == []

    for kind, name, fields in attempts:
        if (kind, fields.get("new_name", name)) != ("fork", "new"):
            await desk.change(kind, name, **fields)
    assert await names(desk, ANNA) == ["two", "new"]


async def test_create_makes_an_adapter_of_the_callers(desk: Desk) -> None:
    info = await desk.change("create", "new", principal=ANNA, rank=4, alpha=8.0, target_modules=["q_proj"])

    assert info is not None
    assert (info.source, info.digest, info.is_shared) == ("create", digest_of(b"\0" * 4), False)
    assert desk.asked == [CreateVersion("new", 4, 8.0, ("q_proj",))]
    with pytest.raises(AdapterExists):
        await desk.change("create", "new", principal=ANNA)
    for name in ("", "-x", "a/b", "x" * 129, "a\n"):
        with pytest.raises(InvalidRequest):
            await desk.change("create", name)
    with pytest.raises(InvalidRequest):
        await desk.change("create", "other", alpha=math.nan)
    assert len(desk.asked) == 1


async def test_a_fork_is_a_name_on_the_same_version_and_costs_no_work(desk: Desk) -> None:
    await desk.resolve("one")
    num_asked, stored = len(desk.asked), desk.stored()

    info = await desk.change("fork", "one", new_name="copy", principal=ANNA)

    assert info is not None
    assert (info.name, info.source, info.digest) == ("copy", "local", digest_of("one"))
    assert (len(desk.asked), desk.stored()) == (num_asked, stored)
    with pytest.raises(AdapterExists):
        await desk.change("fork", "two", new_name="copy", principal=ANNA)
    await desk.change("load", "copy", ref=desk.write("x", "other"), principal=ANNA)
    assert await desk.content("one") == b"one"
    assert await desk.content("copy", principal=ANNA) == b"other"


async def test_forking_what_nobody_has_used_yet_prepares_it(desk: Desk) -> None:
    await desk.change("fork", "one", new_name="copy")

    assert await desk.content("copy") == b"one"
    assert len(desk.asked) == 1
    with pytest.raises(AdapterNotFound):
        await desk.change("fork", "nobody", new_name="another")


async def test_load_reads_anew_and_running_requests_keep_what_they_have(desk: Desk) -> None:
    path = desk.write("x", "first")
    await desk.change("load", "mine", ref=path, principal=ANNA)
    running = await desk.holding("mine", principal=ANNA)
    for content in ("second", "third"):
        desk.write("x", content)
        info = await desk.change("load", "mine", ref=path, principal=ANNA)
        assert info is not None
        assert info.digest == digest_of(content)
        assert await desk.content("mine", principal=ANNA) == content.encode()

    assert desk.stored() == {"first", "third"}
    running.release()
    await wait_until(lambda: desk.stored() == {"third"})
    assert desk.forgotten == [digest_of("second"), digest_of("first")]


async def test_a_load_that_fails_leaves_the_name_as_it_was_and_makes_none(desk: Desk) -> None:
    path = desk.write("x", "x")
    await desk.change("load", "mine", ref=path)
    for name in ("mine", "new"):
        desk.bench.failures.append(AdapterInvalid(name, "half written"))
        with pytest.raises(AdapterInvalid):
            await desk.change("load", name, ref=desk.write("y", "y"))
    with pytest.raises(AdapterNotFound):
        await desk.change("load", "new", ref=f"{path}/nothing")
    with pytest.raises(AdapterUnsupported):
        await desk.change("load", "new", ref="org/repo")
    with pytest.raises(InvalidRequest):
        await desk.change("load", "new", ref="mine")
    guarded = Principal("guarded", roots=(f"{path}/below",))
    with pytest.raises(AdapterForbidden):
        await desk.change("load", "new", ref=path, principal=guarded)

    assert await desk.content("mine") == b"x"
    assert await names(desk, ADMIN) == ["two", "one", "mine"]
    assert await names(desk, guarded) == ["two", "one"]


async def test_a_merge_puts_the_content_of_its_members_under_a_name(desk: Desk) -> None:
    path = desk.write("x", "x")
    await desk.change("disable", "one")
    combination = Combination(type="ties", density=0.5)
    members = [("one", 1.0), (path, -0.5)]

    info = await desk.change("merge", "sum", adapters=members, combination=combination, principal=ANNA)

    expected = f"ties {[(digest_of('one'), 1.0), (digest_of('x'), -0.5)]}"
    assert await desk.content("sum", principal=ANNA) == expected.encode()
    assert info is not None
    assert (info.source, info.is_shared) == ("merge", False)
    entry = next(entry for entry in await desk.journal.entries() if entry.name == "sum")
    assert entry.sources == (f"operator:local:{desk.root / 'one'}", f"local:{path}")
    with pytest.raises(AdapterNotFound):
        await desk.change("merge", "another", adapters=[("nobody", 1.0)], principal=ANNA)


async def test_a_merge_reads_its_paths_anew(desk: Desk) -> None:
    path = desk.write("x", "old")
    await desk.resolve(path)
    desk.write("x", "new")

    await desk.change("merge", "sum", adapters=[(path, 2.0)])

    assert await desk.content("sum") == f"cat {[(digest_of('new'), 2.0)]}".encode()


@pytest.mark.parametrize("meanwhile", ["load", "destroy"])
async def test_what_is_read_for_a_name_is_not_put_under_what_it_stands_for_by_then(desk: Desk, meanwhile: str) -> None:
    gate = desk.bench.slow_gates["one"] = anyio.Event()
    found: list[bytes | None] = []

    async def use() -> None:
        lease = desk.leases.lease()
        version = await desk.resolve("one", principal=ANNA, lease=lease)
        found.append(None if version is None else Path(version.path).read_bytes())  # noqa: ASYNC240 - a few bytes
        lease.release()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use)
        await wait_until(lambda: desk.bench.in_flight)
        await anyio.wait_all_tasks_blocked()
        desk.bench.slow_gates.clear()
        await desk.change(meanwhile, "one", **({"ref": desk.write("x", "x")} if meanwhile == "load" else {}))
        gate.set()

    assert found == [b"one"]
    if meanwhile == "load":
        assert await desk.content("one") == b"x"
    else:
        assert "one" not in await names(desk, ADMIN)


async def test_a_destroyed_name_is_gone_at_once_and_its_version_when_nothing_uses_it(desk: Desk) -> None:
    await desk.change("load", "mine", ref=desk.write("x", "x"))
    await desk.change("fork", "mine", new_name="copy")
    running = await desk.holding("mine")

    assert await desk.change("destroy", "mine") is None

    with pytest.raises(AdapterNotFound):
        await desk.resolve("mine")
    with pytest.raises(AdapterNotFound):
        await desk.change("destroy", "mine")
    await desk.change("destroy", "copy")
    assert (desk.stored(), desk.forgotten) == ({"x"}, [])
    running.release()
    await wait_until(lambda: desk.forgotten == [digest_of("x")])
    assert desk.stored() == set()


async def test_destroying_a_name_that_is_being_loaded_drops_what_is_loaded(desk: Desk) -> None:
    await desk.change("load", "mine", ref=desk.write("x", "x"))
    gate = desk.bench.gates["mine"] = anyio.Event()
    outcome: list[str] = []
    async with anyio.create_task_group() as tasks:

        async def load() -> None:
            try:
                await desk.change("load", "mine", ref=desk.write("y", "y"))
            except AdapterNotFound as error:
                outcome.append(error.code)

        tasks.start_soon(load)
        await wait_until(lambda: desk.bench.in_flight)
        assert await desk.change("destroy", "mine") is None
        gate.set()

    assert outcome == ["adapter_not_found"]
    assert "mine" not in await names(desk, ADMIN)


async def test_a_load_that_waited_for_an_own_name_does_not_go_to_the_shared_one_instead(desk: Desk) -> None:
    await desk.change("create", "one")
    gate = desk.bench.gates["one"] = anyio.Event()
    outcomes: list[str] = []

    async def load(content: str) -> None:
        try:
            await desk.change("load", "one", ref=desk.write(content, content))
        except AdapterNotFound as error:
            outcomes.append(error.code)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(load, "x")
        await wait_until(lambda: desk.bench.in_flight)
        tasks.start_soon(load, "y")
        await anyio.wait_all_tasks_blocked()
        await desk.change("destroy", "one")
        gate.set()

    assert outcomes == ["adapter_not_found"] * 2
    assert await desk.content("one") == b"one"


async def test_a_load_that_waited_for_the_shared_name_goes_to_the_own_one_made_meanwhile(desk: Desk) -> None:
    gate = desk.bench.gates["one"] = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: desk.change("load", "one", ref=desk.write("x", "x")))
        await wait_until(lambda: desk.bench.in_flight)
        tasks.start_soon(lambda: desk.change("load", "one", ref=desk.write("y", "y")))
        await anyio.wait_all_tasks_blocked()
        await desk.change("fork", "two", new_name="one")
        gate.set()

    assert await desk.content("one") == b"y"
    assert await desk.content("one", principal=ANNA) == b"x"


async def test_loads_of_one_name_happen_in_the_order_they_came(desk: Desk) -> None:
    gate = desk.bench.gates["mine"] = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for index in range(4):
            path = desk.write(f"x{index}", f"{index}")
            tasks.start_soon(lambda path=path: desk.change("load", "mine", ref=path))
            await wait_until(lambda: desk.bench.in_flight)
        assert await desk.change("create", "other") is not None
        assert len(desk.bench.in_flight) == 1
        gate.set()

    assert await desk.content("mine") == b"3"


async def test_saving_needs_a_path_that_is_absolute_and_below_the_roots(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/out").symlink_to(tmp_path)
    guarded = Principal("guarded", roots=(str(tmp_path / "root"),))
    target = str(tmp_path / "root/new/dir")
    await desk.change("disable", "one")

    info = await desk.change("save", "one", path=target, principal=guarded)
    await desk.change("merge_and_save", "one", path=target, principal=guarded)

    assert info is not None
    assert (info.name, info.is_enabled) == ("one", False)
    assert [(type(message), message.directory) for message in desk.asked[1:]] == [
        (ExportAdapter, target),
        (ExportMerged, target),
    ]
    for kind in ("save", "merge_and_save"):
        with pytest.raises(InvalidRequest):
            await desk.change(kind, "one", path="relative/dir")
        for path in (tmp_path / "other", tmp_path / "root/../other", tmp_path / "root/out/new"):
            with pytest.raises(AdapterForbidden):  # and not that there is no such adapter
                await desk.change(kind, "nobody", path=str(path), principal=guarded)
        with pytest.raises(AdapterNotFound):
            await desk.change(kind, "nobody", path=target, principal=guarded)
    assert len(desk.asked) == 3
