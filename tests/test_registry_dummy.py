"""The dummy engine's registry: everything succeeds, and names that were made can be found."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from descant.actor.supervision import Supervisor
from descant.actors.dummy_registry import DummyRegistry
from descant.config import AdapterEntry
from descant.messages import ChangeAdapter, ListRegistered, ResolveAdapters, VersionFailed, VersionUnused
from descant.sessions.leases import LeaseTable
from descant_client.errors import AdapterExists
from descant_client.wire import WeightedAdapter
from registry_desk import ADMIN, ANNA, BERT, CHANGES

pytestmark = pytest.mark.anyio

Ask = Callable[[Any], Any]


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    async with Supervisor() as supervisor:
        registry = supervisor.spawn(lambda: DummyRegistry([AdapterEntry(name="one", ref="/one")]), "registry")
        yield lambda message: registry.ask(message, timeout=30)


async def change(ask: Ask, kind: str, name: str, principal: Any = ANNA, **fields: Any) -> list[Any]:
    message = ChangeAdapter(principal, CHANGES[kind](request_id="r", name=name, **fields))
    return [(info.name, info.is_pinned, info.is_enabled) for info in (await ask(message)).adapters]


async def names(ask: Ask, principal: Any = ANNA) -> list[str]:
    return [info.name for info in (await ask(ListRegistered(principal))).adapters]


async def test_names_that_were_made_are_listed_until_they_are_destroyed(ask: Ask) -> None:
    assert await change(ask, "create", "new") == [("new", False, True)]
    await change(ask, "fork", "new", new_name="copy")
    await change(ask, "load", "loaded", ref="hub:any/thing")
    await change(ask, "merge", "sum", adapters=[WeightedAdapter("a", 1.0)])
    with pytest.raises(AdapterExists):
        await change(ask, "create", "new")

    assert await names(ask) == ["one", "new", "copy", "loaded", "sum"]
    assert await names(ask, BERT) == ["one"]
    assert await change(ask, "destroy", "copy") == []
    assert await change(ask, "destroy", "one", ADMIN) == []
    assert await names(ask) == ["new", "loaded", "sum"]


async def test_marks_are_kept_and_files_are_not_written(ask: Ask) -> None:
    assert await change(ask, "pin", "mine") == [("mine", True, True)]
    assert await change(ask, "disable", "mine") == [("mine", True, False)]
    assert await change(ask, "save", "mine", path="/nowhere/at/all") == [("mine", True, False)]
    assert await change(ask, "merge_and_save", "mine", path="/nowhere/at/all") == [("mine", True, False)]
    assert await change(ask, "unpin", "mine") == [("mine", False, False)]
    assert await change(ask, "enable", "mine") == [("mine", False, True)]


async def test_every_adapter_exists_and_is_something_of_its_own(ask: Ask) -> None:
    lease = LeaseTable().lease()
    found = [
        await ask(ResolveAdapters((WeightedAdapter(name, weight),), ANNA, lease))
        for name, weight in (("a", 1.0), ("a", 0.5), ("b", 1.0), ("a", 1.0))
    ]
    assert found[0] == found[3]
    assert len({version.digest for version in found}) == 3
    assert [info.name for info in (await ask(ListRegistered(ANNA, "any"))).adapters] == ["any"]
    for message in (VersionFailed("digest"), VersionUnused("digest")):
        assert await ask(message) is None
