"""Adapters in the client: the request of each method, the state of the handle afterwards, and paths."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from descant_client import Adapter, Client, Combination, connect
from descant_client.adapters import reference
from descant_client.errors import AdapterExists, AdapterNotFound
from descant_client.lifecycle import (
    Adapters,
    CreateAdapter,
    DestroyAdapter,
    DisableAdapter,
    EnableAdapter,
    ForkAdapter,
    LoadAdapter,
    MergeAdapters,
    MergeAndSave,
    PinAdapter,
    SaveAdapter,
    UnpinAdapter,
)
from descant_client.protocol import Ack, Generate, Progress, ServerMessage
from descant_client.wire import WeightedAdapter
from fake_server import FakeServer

pytestmark = pytest.mark.anyio

MEMBERS = [WeightedAdapter("reverse", 0.5), WeightedAdapter("upper", -1.0)]


async def test_the_example_of_the_documentation_runs() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        a = await client.adapters.create("draft", rank=8, target_modules=["q_proj", "v_proj"])
        b = await a.fork("draft-v2")
        await b.load("hub:org/repo@rev")
        await b.save("draft-v2.dir")
        await b.destroy()
        assert [one.name for one in await client.adapters.list()] == ["reverse", "upper", "draft"]


async def test_every_method_of_the_catalog_asks_for_what_it_is_given() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        upper = await client.adapters.open("upper")
        assert upper is not None
        await client.adapters.create("a", rank=4, alpha=2.0, target_modules=("o_proj",), shared=True)
        await client.adapters.load("b", "org/repo", source="hub", shared=True)
        await client.adapters.merge(
            "c",
            [("reverse", 0.5), (upper, -1.0)],
            type="ties_svd",
            rank=3,
            clamp=0.75,
            density=0.5,
            majority_sign_method="frequency",
            seed=7,
            shared=True,
        )
        await client.adapters.merge("d", [("reverse", 0.5), ("upper", -1.0)])
    combination = Combination("ties_svd", 3, 0.75, 0.5, "frequency", 7)
    assert [one for one in server.received if not isinstance(one, Ack)][1:] == [
        CreateAdapter("2", "a", 4, 2.0, ["o_proj"], True),
        LoadAdapter("3", "b", "org/repo", "hub", True),
        MergeAdapters("4", "c", MEMBERS, None, combination, True),
        MergeAdapters("5", "d", MEMBERS),
    ]


async def test_every_method_of_a_handle_asks_for_what_it_is_given() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        a = await client.adapters.create("a", shared=True)
        await a.load("s3://bucket/key")
        for change in (a.pin, a.unpin, a.disable, a.enable):
            assert await change() is a
        await a.save("/somewhere")
        await a.merge_and_save("/elsewhere")
        await a.fork("b", shared=True)
        await a.destroy()
    assert [one for one in server.received if not isinstance(one, Ack)][1:] == [
        LoadAdapter("2", "a", "s3://bucket/key", None, True),  # into the shared name, not a new name of this client
        PinAdapter("3", "a"),
        UnpinAdapter("4", "a"),
        DisableAdapter("5", "a"),
        EnableAdapter("6", "a"),
        SaveAdapter("7", "a", "/somewhere"),
        MergeAndSave("8", "a", "/elsewhere"),
        ForkAdapter("9", "a", "b", True),
        DestroyAdapter("a", "a"),
    ]


async def test_every_answer_is_acknowledged_a_refusal_too() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        await client.adapters.create("a")
        with pytest.raises(AdapterExists, match="'a'"):
            await client.adapters.create("a")
        await client.models()
        acks = [one.request_id for one in server.received if isinstance(one, Ack)]
    assert acks == ["1", "2"]


async def test_a_handle_says_what_was_last_heard() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        a = await client.adapters.create("a", rank=4)
        first = a.digest
        assert (a.source, a.rank, a.num_bytes, a.is_shared, a.is_pinned, a.is_enabled) == (
            ("create", 4, 256, False, False, True)
        )
        await a.pin()
        await a.disable()
        assert (a.is_pinned, a.is_enabled, a.digest) == (True, False, first)
        await a.load("/other")
        assert (a.source, a.rank, a.digest != first) == ("/other", 16, True)
        fork = await a.fork("b")
        assert (fork.name, fork.digest, a.name) == ("b", a.digest, "a")


USES: list[Callable[[Client, Adapter], Awaitable[Any]]] = [
    lambda client, a: a.fork("b"),
    lambda client, a: a.load("/x"),
    lambda client, a: a.save("/x"),
    lambda client, a: a.merge_and_save("/x"),
    lambda client, a: a.pin(),
    lambda client, a: a.unpin(),
    lambda client, a: a.enable(),
    lambda client, a: a.disable(),
    lambda client, a: a.destroy(),
    lambda client, a: client.adapters.merge("m", [(a, 1.0)]),
]


async def test_a_destroyed_handle_is_refused_without_asking() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        a = await client.adapters.create("a")
        await a.destroy()
        await client.models()
        num_received = len(server.received)
        for use in USES:
            with pytest.raises(AdapterNotFound, match="'a'"):
                await use(client, a)
        with pytest.raises(AdapterNotFound):
            client.generate("x", adapter=a)
        with pytest.raises(AdapterNotFound):
            client.generate("x", adapters=[(a, 0.5)])
        assert (len(server.received), repr(a)) == (num_received, "Adapter('a')")


async def test_what_another_client_destroyed_is_not_found() -> None:
    async with FakeServer() as server, connect(server.uri) as client, connect(server.uri) as other:
        a = await client.adapters.create("a")
        same = await other.adapters.open("a")
        assert same is not None
        await same.destroy()
        with pytest.raises(AdapterNotFound):
            await a.pin()


async def test_a_request_may_combine_and_set_deadlines() -> None:
    ties = Combination("ties", density=0.5)
    async with FakeServer() as server, connect(server.uri) as client:
        members = [("reverse", 0.5), ("upper", -1.0)]
        await client.generate("x", adapters=members, combination=ties, queue_timeout_s=1.5, timeout_s=9.0).result()
    assert server.received[0] == Generate(
        "1", prompt="x", adapters=MEMBERS, combination=ties, queue_timeout_s=1.5, timeout_s=9.0
    )


# ---- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./a", "../a", ".", "..", "~/a", "local:a", "local:./a", Path("a"), Path("./b/c")])
def test_local_paths_are_made_absolute(name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    text = reference(name)

    local = text.removeprefix("local:")
    assert text.startswith("local:") == str(name).startswith("local:")
    assert Path(local).is_absolute()
    wanted = Path(str(name).removeprefix("local:")).expanduser()
    assert Path(local) == (here / wanted).resolve()


@pytest.mark.parametrize("name", ["a", "org/repo", "hub:org/repo", "s3://b/./k", "/a/../b", "local:/a", "pbase:x", ""])
def test_everything_else_is_left_as_it_is(name: str) -> None:
    assert reference(name) == name


@pytest.mark.parametrize(("source", "is_path"), [("local", True), ("hub", False), ("s3", False), ("pbase", False)])
def test_an_explicit_source_decides(source: Any, is_path: bool) -> None:
    assert reference("a/b", source) == (str(Path.cwd() / "a/b") if is_path else "a/b")
    assert reference("./a", source) == (str(Path.cwd() / "a") if is_path else "./a")


async def test_every_path_goes_to_the_server_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with FakeServer() as server, connect(server.uri) as client:
        a = await client.adapters.load("a", Path("in"))
        await a.load("./in")
        await a.save("out")
        await a.merge_and_save(Path("merged"))
        await client.adapters.merge("m", [("./in", 1.0)])
        client.generate("x", adapters=[("./in", 1.0)])
        client.generate("x", adapter="./in")
        await server.wait_for(lambda one: isinstance(one, Generate) and one.adapter is not None)
    said = [one for one in server.received if not isinstance(one, Ack)]
    paths = [getattr(one, "ref", None) or getattr(one, "path", None) for one in said[:4]]
    assert paths == [str(tmp_path / name) for name in ("in", "in", "out", "merged")]
    assert [one.adapters for one in said if isinstance(one, MergeAdapters | Generate)][:2] == (
        [[WeightedAdapter(str(tmp_path / "in"), 1.0)]] * 2
    )
    assert [one.adapter for one in said if isinstance(one, Generate)] == [None, str(tmp_path / "in")]


async def test_cancelling_the_wait_leaves_the_change_and_no_trace() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        with anyio.CancelScope() as scope:
            server.tamper = lambda message: (scope.cancel(), [message])[1]
            await client.adapters.create("a")
        assert scope.cancelled_caught
        server.tamper = lambda message: [message]
        await server.wait_for(lambda message: message == Ack("1"))
        assert await client.adapters.open("a") is not None


async def test_a_question_waits_past_what_is_said_in_between() -> None:
    def chatty(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        return [Progress("1", "thinking"), message] if isinstance(message, Adapters) else [message]

    async with FakeServer(tamper=chatty) as server, connect(server.uri) as client:
        assert [one.name for one in await client.adapters.list()] == ["reverse", "upper"]
