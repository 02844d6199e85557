"""An operation over the wire: done once, answered once, and its answer kept for a client that lost its connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from descant.actors.dummy_registry import DummyRegistry
from descant.assembly.system import System
from descant.messages import AdapterList, ChangeAdapter
from descant_client.errors import AdapterExists, AdapterUnsupported, StoreFull
from servers import RawClient, crash, dummy_config, raw, serve, wait_until

pytestmark = pytest.mark.anyio

REFUSALS = {
    "taken": AdapterExists("taken"),
    "odd": AdapterUnsupported("odd", "lora_bias"),
    "large": StoreFull("large", 10, 5),
}


class Changes:
    """The changes that the registry was asked for, and a way to hold them up."""

    def __init__(self) -> None:
        self.num_done: Counter[str] = Counter()  # by name
        self.go_on = anyio.Event()

    async def make(self, registry: DummyRegistry, message: ChangeAdapter) -> AdapterList:
        name = message.change.name
        self.num_done[name] += 1
        if name in REFUSALS:
            raise REFUSALS[name]
        if name == "broken":
            raise RuntimeError("injected by a test")
        if name == "held":
            await self.go_on.wait()
        return await _answer(registry, message)  # type: ignore[return-value]


_answer = DummyRegistry.on_receive


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> Changes:
    changes = Changes()

    async def receive(registry: DummyRegistry, message: Any) -> Any:
        if isinstance(message, ChangeAdapter):
            return registry.later(changes.make(registry, message))
        return await _answer(registry, message)

    monkeypatch.setattr(DummyRegistry, "on_receive", receive)
    return changes


@pytest.fixture
async def server(changes: Changes, tmp_path: Path) -> AsyncIterator[tuple[System, str]]:
    async with serve(dummy_config(tmp_path, max_streams=4)) as running:
        yield running


@pytest.fixture
async def client(server: tuple[System, str]) -> AsyncIterator[RawClient]:
    async with raw(server[1]) as client:
        yield client


EVERY_CHANGE = {
    "adapter.create": {},
    "adapter.load": {"ref": "/a"},
    "adapter.merge": {"adapters": [["b", 0.5]]},
    "adapter.fork": {"new_name": "c"},
    "adapter.save": {"path": "/a"},
    "adapter.merge_and_save": {"path": "/a"},
    "adapter.pin": {},
    "adapter.unpin": {},
    "adapter.disable": {},
    "adapter.enable": {},
    "adapter.destroy": {},
}


async def test_every_change_is_answered_by_the_adapter_as_it_is_now(client: RawClient) -> None:
    answers: dict[str, list[dict[str, Any]]] = {}
    for kind, fields in EVERY_CHANGE.items():
        await client.send(kind, kind, name="a", **fields)
        answers[kind] = (await client.until("adapters"))[-1]["adapters"]

    assert [one["name"] for one in answers.pop("adapter.fork")] == ["c"]
    assert answers.pop("adapter.destroy") == []
    assert answers["adapter.pin"][0]["is_pinned"] is True
    assert answers["adapter.disable"][0]["is_enabled"] is False
    assert {answer[0]["name"] for answer in answers.values()} == {"a"}


@pytest.mark.parametrize(
    ("name", "code"), [("taken", "adapter_exists"), ("odd", "adapter_unsupported"), ("large", "store_full")]
)
async def test_a_refusal_is_that_error_on_the_wire(client: RawClient, name: str, code: str) -> None:
    await client.send("adapter.create", name=name)

    error = (await client.until("error"))[-1]

    assert (error["code"], error["request_id"], error["data"]["adapter"]) == (code, "r", name)


async def test_a_crash_of_the_registry_is_a_fault_of_ours_and_is_not_tried_again(
    client: RawClient, changes: Changes
) -> None:
    await client.send("adapter.create", name="broken")

    error = (await client.until("error"))[-1]
    assert error["code"] == "internal_error"
    assert "List the adapters to see whether it was done." in error["message"]
    assert changes.num_done["broken"] == 1


async def test_a_combination_that_lacks_something_never_reaches_the_registry(
    client: RawClient, changes: Changes
) -> None:
    await client.send("adapter.merge", name="a", adapters=[["b", 1.0]], combination={"type": "ties"})

    assert (await client.until("error"))[-1]["data"]["field"] == "combination.density"
    assert not changes.num_done


async def test_a_client_that_waits_long_is_told_what_for(client: RawClient, changes: Changes) -> None:
    await client.send("adapter.load", name="held", ref="/a")

    progress = (await client.until("progress"))[-1]
    changes.go_on.set()

    assert (progress["request_id"], progress["stage"]) == ("r", "loading")
    assert (await client.until("adapters"))[-1]["adapters"][0]["name"] == "held"


# ---- connections that drop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_done_meanwhile", [False, True])
async def test_an_answer_waits_for_the_client_to_come_back(
    server: tuple[System, str], changes: Changes, is_done_meanwhile: bool
) -> None:
    async with raw(server[1]) as first:
        session = (await first.receive())["session"]
        await first.send("adapter.create", name="held")
        await wait_until(lambda: changes.num_done["held"])
        first.vanish()
    if is_done_meanwhile:
        changes.go_on.set()
        await wait_until(lambda: all(one.is_ended for session in server[0].services.sessions for one in session))
    async with raw(server[1], session=session) as second:
        await second.send("resume")
        changes.go_on.set()
        answer = (await second.until("adapters"))[-1]

    assert (answer["request_id"], answer["adapters"][0]["name"]) == ("r", "held")
    assert changes.num_done["held"] == 1


async def test_an_answer_can_be_had_again_until_it_is_acknowledged(client: RawClient, changes: Changes) -> None:
    await client.send("adapter.create", name="a")
    first = (await client.until("adapters"))[-1]
    await client.send("adapter.create", name="a")
    repeated = (await client.until("error"))[-1]
    await client.send("resume", have={"0": 1})
    claimed = (await client.until("error"))[-1]
    await client.send("resume")
    again = (await client.until("adapters"))[-1]
    await client.send("ack")
    await client.send("resume")
    gone = (await client.until("error"))[-1]

    assert (repeated["data"]["field"], claimed["data"]["field"], again) == ("request_id", "have", first)
    assert gone["code"] == "stream_not_found"
    assert changes.num_done["a"] == 1


async def test_cancelling_does_not_stop_it(client: RawClient, changes: Changes) -> None:
    await client.send("adapter.create", name="held")
    await client.send("cancel")
    await client.send("ack")  # not answered: not released
    await client.send("models.list", "m")
    await client.until("models")
    changes.go_on.set()

    assert (await client.until("adapters"))[-1]["request_id"] == "r"


# ---- limits and ends -----------------------------------------------------------------------------------------------


async def test_operations_count_against_the_limit_of_the_session(client: RawClient, changes: Changes) -> None:
    for number in range(5):
        await client.send("adapter.create", str(number), name="held")

    error = (await client.until("error"))[-1]
    changes.go_on.set()

    assert (error["code"], error["request_id"]) == ("overloaded", "4")
    assert changes.num_done["held"] <= 4


async def test_a_draining_server_finishes_operations_and_takes_no_new_ones(
    server: tuple[System, str], client: RawClient, changes: Changes
) -> None:
    await client.send("adapter.create", name="held")
    await wait_until(lambda: changes.num_done["held"])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server[0].drain, "maintenance.")
        await wait_until(lambda: server[0].gateway.stats().handled)
        await client.send("adapter.create", "late", name="a")
        error = (await client.until("error"))[-1]
        assert (error["code"], error["request_id"]) == ("draining", "late")
        changes.go_on.set()

    assert (await client.until("adapters"))[-1]["request_id"] == "r"


async def test_a_crash_of_the_gateway_ends_it_with_an_error_that_says_to_look(
    server: tuple[System, str], changes: Changes
) -> None:
    async with raw(server[1]) as first:
        session = (await first.receive())["session"]
        await first.send("adapter.create", name="held")
        await wait_until(lambda: changes.num_done["held"])
        crash(server[0].gateway)
        await first.drained()
    async with raw(server[1], session=session) as second:
        await second.send("resume")
        error = (await second.until("error"))[-1]

    assert (error["code"], error["request_id"]) == ("internal_error", "r")
    assert "list the adapters" in error["message"]
    assert changes.num_done["held"] == 1


async def test_a_principal_with_too_many_connections_is_told_so(tmp_path: Path) -> None:
    async with serve(dummy_config(tmp_path, max_sessions=2)) as (_, uri), raw(uri) as one, raw(uri) as two:
        session = (await one.receive())["session"]
        await two.receive()
        async with raw(uri) as three:
            assert (await three.receive())["code"] == "overloaded"
            await three.drained()
        one.vanish()
        async with raw(uri, session=session) as again:
            assert (await again.receive())["session"] == session
