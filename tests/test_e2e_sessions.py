"""Streams by their ids, sessions by theirs: taken up again by those who may, cleaned up after those who vanish."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from descant.assembly.system import System
from descant.config import KeyConfig, hash_key
from descant_client import connect
from descant_client.errors import Overloaded, Unauthorized
from servers import Neighbor, RawClient, answers, dummy_config, raw, serve, tokens_of, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, str]]:
    async with serve(dummy_config(tmp_path_factory.mktemp("data"), 500, max_streams=8)) as running:
        yield running


@pytest.fixture(autouse=True)
async def _undisturbed(neighbor: Neighbor, server: tuple[System, str]) -> AsyncIterator[None]:
    """Beside every test here a stream runs, and none of them may leave anything."""
    async with neighbor.singing():
        yield
    await wait_until(lambda: len(server[0].services.sessions) == 1 and not len(server[0].services.sequences), 30.0)


@pytest.fixture
async def client(server: tuple[System, str]) -> AsyncIterator[RawClient]:
    async with raw(server[1]) as client:
        yield client


async def test_a_new_connection_resumes_a_stream_by_token_offset(server: tuple[System, str]) -> None:
    async with raw(server[1]) as first:
        session = (await first.receive())["session"]
        await first.generate(seed=1, max_tokens=80, ignore_eos=True, n=2)
        received: list[dict[str, Any]] = []
        while len(tokens_of(received)) < 3:
            received += await first.until("delta", "r")
        first.vanish()
    async with raw(server[1], session=session) as second:
        hello = await second.receive()
        await second.send("resume", have={"0": 3, "1": 0})
        await second.until("accepted", "r")  # what came before was not resumed
        resumed = await second.until("done", "r")

    assert hello["session"] == session
    expected = await _whole(server[1], seed=1, max_tokens=80, ignore_eos=True, n=2)
    assert tokens_of(resumed, 0) == tokens_of(expected, 0)[3:]
    assert tokens_of(resumed, 1) == tokens_of(expected, 1)


async def _whole(uri: str, **fields: Any) -> list[dict[str, Any]]:
    async with raw(uri) as client:
        await client.generate(**fields)
        return await client.until("done", "r")


async def test_a_finished_stream_can_be_read_again_until_it_is_acknowledged(server: tuple[System, str]) -> None:
    async with raw(server[1]) as client:
        await client.generate(seed=1, max_tokens=10, ignore_eos=True)
        first = await client.until("done", "r")
        await client.send("resume", have={"0": 4})
        again = await client.until("done", "r")
        await client.send("ack")
        await client.send("resume", have={})
        (gone,) = await client.until("error", "r")

    assert tokens_of(again) == tokens_of(first)[4:]
    assert gone["code"] == "stream_not_found"


# ---- streams -------------------------------------------------------------------------------------------------------


async def test_a_request_id_in_use_is_refused_and_its_stream_goes_on(client: RawClient) -> None:
    await client.generate(max_tokens=20, seed=1)
    await client.generate(max_tokens=20, seed=2)

    messages = await client.until("done")

    (error,) = [message for message in messages if message["type"] == "error"]
    assert (error["code"], error["data"]["field"]) == ("invalid_request", "request_id")
    assert messages[-1]["seed"] == 1
    assert len(tokens_of(messages)) == 20


async def test_resuming_and_cancelling_what_is_not_there_is_stream_not_found(client: RawClient) -> None:
    for kind in ("resume", "cancel"):
        await client.send(kind, "nothing")
        error = (await client.until("error"))[-1]
        assert (error["code"], error["request_id"]) == ("stream_not_found", "nothing")


@pytest.mark.parametrize("have", [{"0": 10_000}, {"1": 1}, {"-1": 1}, {"0": -1}, {"x": 1}, [1], 3])
async def test_a_resume_that_claims_too_much_is_refused(client: RawClient, have: Any) -> None:
    await client.generate(max_tokens=5)
    await client.until("done")

    await client.send("resume", have=have)

    assert (await client.until("error"))[-1]["code"] == "invalid_request"


async def test_what_is_sent_for_an_unknown_stream_or_twice_does_no_harm(client: RawClient) -> None:
    await client.send("ack", "nothing")
    await client.generate(max_tokens=100)
    await client.send("ack")  # not finished: not released
    for _ in range(3):
        await client.send("cancel")

    assert (await client.until("done"))[-1]["choices"][0]["finish_reason"] == "cancelled"


async def test_more_streams_than_allowed_are_overload(client: RawClient, server: tuple[System, str]) -> None:
    for number in range(9):
        await client.generate(str(number), max_tokens=1000)

    error = (await client.until("error"))[-1]

    assert (error["code"], error["request_id"]) == ("overloaded", "8")
    async with connect(server[1]) as other:  # somebody else has their own allowance
        streams = [other.generate("x", max_tokens=1000) for _ in range(9)]
        with pytest.raises(Overloaded):
            await streams[8].result()


async def test_a_session_is_nobody_elses(server: tuple[System, str]) -> None:
    async with raw(server[1]) as owner, raw(server[1], session="guessed") as other:
        session = (await owner.receive())["session"]
        await owner.generate(max_tokens=100)
        await owner.until("accepted")

        await other.send("resume", have={})
        await other.send("cancel")

        errors = [message for _ in range(2) for message in await other.until("error")]
        assert {message["code"] for message in errors if message["type"] == "error"} == {"stream_not_found"}
        assert errors[0]["session"] not in ("guessed", session)
        assert (await owner.until("done"))[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_newer_connection_takes_the_session_over(server: tuple[System, str]) -> None:
    async with raw(server[1]) as older:
        session = (await older.receive())["session"]
        await older.generate(max_tokens=100, seed=1)
        await older.until("delta")
        async with raw(server[1], session=session) as newer:
            await newer.receive()
            await newer.send("resume", have={"0": 0})
            await newer.until("accepted")
            messages = await newer.until("done")
            await older.drained()

    assert len(tokens_of(messages)) == 100


# ---- clients that vanish -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_choices", [1, 4])
async def test_a_client_that_never_comes_back_is_cleaned_up_after_the_window(tmp_path: Path, num_choices: int) -> None:
    async with serve(dummy_config(tmp_path, 500, resume_window_s=0.2)) as (system, uri):
        async with raw(uri) as client:
            session = (await client.receive())["session"]
            await client.generate(max_tokens=4000, n=num_choices)
            await client.until("delta")
            client.vanish()

        await wait_until(lambda: not len(system.services.sessions) and not len(system.services.sequences))
        async with raw(uri, session=session) as late:
            assert (await late.receive())["session"] != session
            await late.send("resume", have={})
            assert (await late.until("error"))[-1]["code"] == "stream_not_found"


async def test_a_client_that_says_goodbye_leaves_nothing_at_once(server: tuple[System, str]) -> None:
    system, uri = server
    async with raw(uri) as client:
        await client.receive()
        await client.generate(max_tokens=4000)
        await client.until("delta")

    await wait_until(lambda: len(system.services.sessions) == 1, deadline_s=30.0)


@pytest.mark.parametrize("num_bytes", [0, 20, 160, 165])
async def test_a_peer_that_breaks_off_anywhere_is_no_trouble(tmp_path: Path, num_bytes: int) -> None:
    handshake = (
        b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    async with serve(dummy_config(tmp_path, 500, resume_window_s=0.2)) as (system, uri):
        for _ in range(5):
            async with await anyio.connect_tcp("127.0.0.1", system.port) as stream:
                await stream.send((handshake + b"\x81\xfe\x7f\xff garbage")[:num_bytes])

        async with raw(uri) as client:
            await client.generate(max_tokens=3)
            await client.until("done")
        await wait_until(lambda: not len(system.services.sessions))


# ---- keys ----------------------------------------------------------------------------------------------------------


async def test_only_a_known_key_is_let_in(tmp_path: Path) -> None:
    keys = [KeyConfig(name=name, sha256=hash_key(f"key of {name}")) for name in ("ann", "bob")]
    config = msgspec.structs.replace(dummy_config(tmp_path, 200), keys=keys)
    async with serve(config) as (system, uri):
        for token in (None, "", "key of eve", "key of an"):
            with pytest.raises(Unauthorized):
                async with connect(uri, token):
                    pass
        async with connect(uri, "key of ann") as ann:
            assert answers([await ann.generate("x", max_tokens=3, seed=1).result()])

        async with raw(uri, token="key of ann") as ann:
            session = (await ann.receive())["session"]
            await ann.generate(max_tokens=50)
            async with raw(uri, token="key of bob", session=session) as bob:
                assert (await bob.receive())["session"] != session
                await bob.send("cancel")
                assert (await bob.until("error"))[-1]["code"] == "stream_not_found"
            assert (await ann.until("done"))[-1]["choices"][0]["finish_reason"] == "length"
        assert system.failure is None
