"""Names and sums to versions: each content is prepared once, and no crash of the worker is anybody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from descant.actor import Actor, ActorFailed, Ref
from descant.actors.fetch import Fetch
from descant.actors.registry import Registry, SingleFlight
from descant.config import AdapterEntry
from descant.messages import ComposeAdapters, ListRegistered, PrepareAdapter, Prepared, Principal, ResolveAdapters
from descant.scheduling.version import AdapterVersion
from descant.supervision import Supervisor
from descant_client.errors import AdapterForbidden, AdapterInvalid, AdapterNotFound, DescantError
from descant_client.wire import WeightedAdapter

pytestmark = pytest.mark.anyio

ANYBODY = Principal("local")


class FakeWorker(Actor[Any]):
    """Prepares whatever it is given, unless told what goes wrong."""

    def __init__(self, asked: list[Any], failures: list[Exception]) -> None:
        self._asked = asked
        self._failures = failures

    async def on_receive(self, message: PrepareAdapter | ComposeAdapters) -> Prepared:
        self._asked.append(message)
        if self._failures:
            raise self._failures.pop(0)
        name = Path(message.directory).name if isinstance(message, PrepareAdapter) else message.adapter
        return Prepared(AdapterVersion(f"digest of {name}", "/file", 64, 8, 1))


class Desk:
    """A registry of two names between a real fetch and a fake worker."""

    def __init__(self, registry: Ref[Any], asked: list[Any], failures: list[Exception]) -> None:
        self.registry = registry
        self.asked = asked
        self.failures = failures

    async def resolve(self, *members: str | tuple[str, float], principal: Principal = ANYBODY) -> AdapterVersion:
        weighted = [WeightedAdapter(*(m if isinstance(m, tuple) else (m, 1.0))) for m in members]
        return await self.registry.ask(ResolveAdapters(tuple(weighted), principal), timeout=30)

    async def listed(self, name: str | None = None) -> list[Any]:
        answer = await self.registry.ask(ListRegistered(ANYBODY, name), timeout=30)
        return [(info.name, info.digest) for info in answer.adapters]


@asynccontextmanager
async def _desk(tmp_path: Path) -> AsyncIterator[Desk]:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    entries = [AdapterEntry(name=name, ref=f"local:{tmp_path / name}") for name in ("two", "one")]
    asked: list[Any] = []
    failures: list[Exception] = []
    async with Supervisor() as supervisor:
        worker = supervisor.spawn(lambda: FakeWorker(asked, failures), "worker")
        fetch = supervisor.spawn(Fetch, "fetch")
        yield Desk(supervisor.spawn(lambda: Registry(entries, fetch, worker), "registry"), asked, failures)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with _desk(tmp_path) as desk:
        yield desk


async def test_names_are_listed_in_order_of_registration_with_what_is_known_of_them(desk: Desk) -> None:
    assert await desk.listed() == [("two", None), ("one", None)]

    await desk.resolve("one")

    assert await desk.listed() == [("two", None), ("one", "digest of one")]
    assert await desk.listed("one") == [("one", "digest of one")]
    assert await desk.listed("nobody") == []


async def test_one_content_is_prepared_once_for_all_who_want_it(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "one")
    found: list[AdapterVersion] = []
    async with anyio.create_task_group() as tasks:

        async def resolve(reference: str) -> None:
            found.append(await desk.resolve(reference))

        for reference in ("one", str(tmp_path / "one"), f"local:{tmp_path}/link", f"{tmp_path}/two/../one"):
            tasks.start_soon(resolve, reference)

    assert {version.digest for version in found} == {"digest of one"}
    assert len(desk.asked) == 1


async def test_a_sum_asks_for_each_member_and_then_for_the_sum_once(desk: Desk) -> None:
    for _ in range(2):
        version = await desk.resolve(("one", 0.5), ("two", -2.0))

    assert version.digest == "digest of 0.5*one + -2*two"
    assert [type(message) for message in desk.asked] == [PrepareAdapter, PrepareAdapter, ComposeAdapters]
    assert [member.weight for member in desk.asked[-1].members] == [0.5, -2.0]


async def test_a_failure_is_not_remembered(desk: Desk) -> None:
    desk.failures.append(AdapterInvalid("one", "half written"))
    with pytest.raises(AdapterInvalid):
        await desk.resolve("one")

    assert (await desk.resolve("one")).digest == "digest of one"


async def test_a_worker_that_dies_once_is_asked_again_and_twice_is_the_adapters_fault(desk: Desk) -> None:
    desk.failures.append(ActorFailed("worker", "killed by SIGKILL"))
    assert (await desk.resolve("one")).digest == "digest of one"

    desk.failures.extend([ActorFailed("worker", "killed by SIGSEGV")] * 2)
    with pytest.raises(AdapterInvalid, match=r"two.*SIGSEGV"):
        await desk.resolve("two")


async def test_who_waits_behind_an_adapter_that_kills_the_worker_is_not_blamed(desk: Desk) -> None:
    desk.failures.extend([ActorFailed("worker", "killed by SIGSEGV")] * 2)
    endings: dict[str, object] = {}
    async with anyio.create_task_group() as tasks:

        async def resolve(name: str) -> None:
            try:
                endings[name] = (await desk.resolve(name)).digest
            except DescantError as error:
                endings[name] = error.code

        for name in ("one", "two"):
            tasks.start_soon(resolve, name)

    assert sorted(map(str, endings.values())) in (
        ["adapter_invalid", "digest of one"],
        ["adapter_invalid", "digest of two"],
    )


async def test_unknown_names_are_not_found_and_ask_nobody(desk: Desk) -> None:
    with pytest.raises(AdapterNotFound):
        await desk.resolve("nobody")

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


async def test_the_first_of_a_flight_failing_fails_those_who_waited_with_it() -> None:
    flights, release = SingleFlight(), anyio.Event()
    endings: list[str] = []

    async def work() -> str:
        await release.wait()
        raise AdapterNotFound("x")

    async def fly() -> None:
        with pytest.raises(AdapterNotFound):
            await flights.run("key", work)
        endings.append("failed")

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(fly)
        await anyio.lowlevel.checkpoint()
        release.set()

    assert endings == ["failed"] * 3
