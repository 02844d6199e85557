"""Names and sums to versions: each content is prepared once, and a crash of the worker is blamed on its cause."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from descant.actor.errors import ActorFailed
from descant.catalog import versions
from descant.catalog.worker_asks import MAX_ASKS
from descant.contract.principal import Principal
from descant.contract.worker import ComposeAdapters, PrepareAdapter
from descant_client.errors import (
    AdapterForbidden,
    AdapterInvalid,
    AdapterNotFound,
    DeadlineExceeded,
    DescantError,
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


async def endings(desk: Desk, *names: str) -> dict[str, str]:
    """Resolve all of these at once. Return their digests or the codes of their errors."""
    found: dict[str, str] = {}

    async def resolve(name: str) -> None:
        try:
            version = await desk.resolve(name)
            found[name] = "base" if version is None else version.digest
        except DescantError as error:
            found[name] = error.code

    async with anyio.create_task_group() as tasks:
        for name in names:
            tasks.start_soon(resolve, name)
    return found


async def test_names_are_listed_in_order_of_registration_with_what_is_known_of_them(desk: Desk) -> None:
    assert [(info.name, info.digest) for info in await desk.listed()] == [("two", None), ("one", None)]

    await desk.resolve("one")

    assert [(info.name, info.digest) for info in await desk.listed()] == [("two", None), ("one", digest_of("one"))]
    (info,) = await desk.listed("one")
    assert (info.source, info.rank, info.num_bytes, info.is_shared) == ("local", 8, 3, True)
    assert await desk.listed("nobody") == []


async def test_one_content_is_prepared_once_for_all_who_want_it(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "one")
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(desk.resolve, "one")

    found = await endings(desk, str(tmp_path / "one"), f"local:{tmp_path}/link", f"{tmp_path}/two/../one")

    assert set(found.values()) == {digest_of("one")}
    assert len(desk.asked) == 1


async def test_errors_speak_of_nobody_elses_adapters(desk: Desk) -> None:
    """Two principals ask for one content at once, under names of their own. A link and a sum of it are refused."""
    (desk.root / "secret").symlink_to(desk.root / "one")
    anna, bert = (str(desk.root / "secret"), "annas0", "annas1"), (str(desk.root / "one"), "b0", "b1")
    for (_, first, second), who in ((anna, ANNA), (bert, BERT)):
        await desk.change("load", first, ref=str(desk.root / "two"), principal=who)
        await desk.change("load", second, ref=str(desk.root / "three"), principal=who)
    desk.bench.refused = {label for path, a, b in (anna, bert) for label in (path, f"1*{a} + 1*{b}")}
    desk.bench.gates = {label: anyio.Event() for label in desk.bench.refused}
    heard: dict[str, list[str]] = {ANNA.name: [], BERT.name: []}

    async def ask(who: Principal, *members: str) -> None:
        with pytest.raises(AdapterInvalid) as caught:
            await desk.resolve(*members, principal=who)
        heard[who.name].append(str(caught.value))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, ANNA, anna[0])
        tasks.start_soon(ask, ANNA, *anna[1:])
        await wait_until(lambda: len(desk.bench.in_flight) == 2)
        tasks.start_soon(ask, BERT, bert[0])
        tasks.start_soon(ask, BERT, *bert[1:])
        await anyio.wait_all_tasks_blocked()
        for gate in desk.bench.gates.values():
            gate.set()

    assert [len(sentences) for sentences in heard.values()] == [2, 2]
    assert not [sentence for sentence in heard[BERT.name] if "annas" in sentence or "secret" in sentence]


async def test_a_read_that_was_slow_does_not_undo_a_newer_load(desk: Desk) -> None:
    path = desk.write("p", "old")
    gate = desk.bench.slow_gates[path] = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(desk.resolve, path)
        await wait_until(lambda: desk.bench.in_flight)
        await anyio.wait_all_tasks_blocked()
        desk.write("p", "new")
        await desk.change("load", "name", ref=path)
        gate.set()

    assert await desk.content("name") == b"new"
    assert await desk.content(path) == b"new"


async def test_what_was_loaded_is_not_read_again_by_requests_for_its_path(desk: Desk) -> None:
    path = desk.write("p", "old")
    await desk.resolve(path)
    desk.write("p", "new")
    await desk.change("load", "name", ref=path)
    num_asked = len(desk.asked)

    assert await desk.content(path) == b"new"
    assert len(desk.asked) == num_asked


async def test_a_sum_asks_for_each_member_and_then_for_the_sum_once(desk: Desk) -> None:
    for _ in range(2):
        found = await desk.content(("one", 0.5), ("two", -2.0))

    assert found == f"cat {[(digest_of('one'), 0.5), (digest_of('two'), -2.0)]}".encode()
    assert [type(message) for message in desk.asked] == [PrepareAdapter, PrepareAdapter, ComposeAdapters]
    assert desk.asked[-1].adapter == "0.5*one + -2*two"


async def test_one_member_with_weight_one_is_itself_unless_it_is_combined_otherwise(desk: Desk) -> None:
    assert await desk.content("one") == b"one"
    assert (await desk.content(("one", 2.0)) or b"").startswith(b"cat")

    svd = await desk.resolve("one", combination=Combination(type="svd"))
    ties = await desk.resolve("one", combination=Combination(type="ties", density=0.5))

    assert svd is not None
    assert ties is not None
    assert len({svd.digest, ties.digest, digest_of("one")}) == 3


async def test_a_failure_is_not_remembered(desk: Desk) -> None:
    desk.bench.failures.append(AdapterInvalid("one", "half written"))
    with pytest.raises(AdapterInvalid):
        await desk.resolve("one")

    assert await desk.content("one") == b"one"


async def test_a_caller_that_goes_away_fails_nobody_else(desk: Desk) -> None:
    gate = desk.bench.gates["one"] = anyio.Event()
    with anyio.move_on_after(0):
        await desk.resolve("one")
    found: dict[str, str] = {}
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            found.update(await endings(desk, "one"))

        tasks.start_soon(wait)
        await wait_until(lambda: desk.asked)
        gate.set()

    assert found == {"one": digest_of("one")}
    assert len(desk.asked) == 1


async def test_unknown_names_are_not_found_and_ask_nobody(desk: Desk) -> None:
    with pytest.raises(AdapterNotFound):
        await desk.resolve("nobody")
    with pytest.raises(InvalidRequest):
        await desk.resolve("no name")

    assert desk.asked == []


async def test_roots_hold_for_paths_but_not_for_names_and_for_what_others_have_loaded(
    desk: Desk, tmp_path: Path
) -> None:
    guarded = Principal("guarded", roots=(str(tmp_path / "two"),))
    await desk.resolve(str(tmp_path / "one"))

    assert await desk.resolve("one", principal=guarded)
    assert await desk.resolve(str(tmp_path / "two"), principal=guarded)
    with pytest.raises(AdapterForbidden):
        await desk.resolve(str(tmp_path / "one"), principal=guarded)
    with pytest.raises(AdapterForbidden):
        await desk.resolve("one", str(tmp_path / "three"), principal=guarded)


# ---- the worker ----------------------------------------------------------------------------------------------------


async def test_a_worker_that_dies_once_is_asked_again_and_twice_is_the_adapters_fault(desk: Desk) -> None:
    desk.bench.failures.append(ActorFailed("worker", "killed by SIGKILL"))
    assert await desk.content("one") == b"one"

    desk.bench.killers.add("two")
    with pytest.raises(AdapterInvalid, match=r"two.*SIGSEGV"):
        await desk.resolve("two")


async def test_only_the_adapter_that_kills_the_worker_is_blamed_by_all_it_took_along(desk: Desk) -> None:
    names = [desk.write(f"good{index}", f"good {index}") for index in range(20)]
    killers = [desk.write("bad0", ""), desk.write("bad1", "")]
    desk.bench.killers.update(killers)

    found = await endings(desk, *names[:10], *killers, *names[10:])

    assert {found[name] for name in killers} == {"adapter_invalid"}
    assert [found[name] for name in names] == [digest_of(f"good {index}") for index in range(20)]


async def test_several_are_prepared_at_once_but_not_any_number(desk: Desk) -> None:
    names = [desk.write(f"many{index}", f"{index}") for index in range(30)]
    gate = anyio.Event()
    desk.bench.gates.update(dict.fromkeys(names, gate))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(endings, desk, *names)
        await wait_until(lambda: len(desk.bench.in_flight) == MAX_ASKS)
        gate.set()

    assert len(desk.asked) == 30
    assert desk.bench.most_in_flight == MAX_ASKS


async def test_a_slow_adapter_delays_nobody_else(desk: Desk) -> None:
    gate = desk.bench.gates["two"] = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(desk.resolve, "two")

        assert await desk.content("one") == b"one"
        assert await desk.change("create", "new")
        gate.set()


async def test_a_preparation_that_takes_too_long_is_given_up(desk: Desk, monkeypatch: Any) -> None:
    monkeypatch.setattr(versions, "PREPARE_TIMEOUT_S", 0.001)
    desk.bench.gates["one"] = anyio.Event()

    with pytest.raises(DeadlineExceeded):
        await desk.resolve("one")


# ---- disabled members ----------------------------------------------------------------------------------------------


async def test_a_disabled_adapter_is_the_base_and_is_left_out_of_sums(desk: Desk) -> None:
    await desk.change("disable", "one")

    assert await desk.resolve("one") is None
    assert await desk.content(("one", 0.5), ("two", 1.0)) == b"two"
    assert await desk.content(("one", 0.5), ("two", 0.5)) == f"cat {[(digest_of('two'), 0.5)]}".encode()
    await desk.change("disable", "two")
    assert await desk.resolve(("one", 0.5), ("two", 0.5)) is None
    with pytest.raises(AdapterNotFound):
        await desk.resolve("one", "nobody")

    await desk.change("enable", "one")
    assert await desk.content("one", principal=ADMIN) == b"one"
