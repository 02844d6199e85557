"""Frames no client of ours would send: a typed error each, and a stream beside them goes on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed

from descant.assembly.system import System
from descant_client.protocol import MSGPACK_SUBPROTOCOL
from servers import LONG, Neighbor, RawClient, decode, dummy_config, fetch, raw, serve, wait_until

pytestmark = pytest.mark.anyio

MAX_FRAME_BYTES = 100_000
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, str]]:
    config = dummy_config(tmp_path_factory.mktemp("data"), 500, max_frame_bytes=MAX_FRAME_BYTES, resume_window_s=0.2)
    async with serve(config) as running:
        yield running


@pytest.fixture(autouse=True)
async def _undisturbed(neighbor: Neighbor, server: tuple[System, str]) -> AsyncIterator[None]:
    """Beside every test here a stream runs, and none of them may leave anything."""
    async with neighbor.singing():
        yield
    await wait_until(lambda: len(server[0].services.sessions) == 1 and not len(server[0].services.sequences))
    _, body = await fetch(server[0], "/health")
    assert [actor["name"] for actor in json.loads(body)["actors"] if actor["failures"]] == []


@pytest.fixture
async def client(server: tuple[System, str]) -> AsyncIterator[RawClient]:
    async with raw(server[1]) as client:
        yield client


def _frame(**fields: Any) -> bytes:
    message = {"type": "generate", "request_id": "r", "prompt": "x", "max_tokens": 3} | fields
    return msgspec.msgpack.encode({key: value for key, value in message.items() if value is not None})


# ---- frames --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "{",
        "null",
        "[]",
        '"generate"',
        "{}",
        '{"type": 3}',
        '{"type": "hello"}',
        '{"type": "generate"}',
        '{"type": "generate", "request_id": ""}',
        "[" * 50_000,
        '{"a":' * 15_000,
        '"\\ud800"',
        b"",
        b"\xc1",
        b"\x00\xff\xfe garbage",
        b"\xdf\xff\xff\xff\xff",
        b"\xc7\xff\xff\xff",
        b"\x91" * 50_000,
        b'{"type": "models.list", "request_id": "r"}',
    ],
    ids=lambda frame: repr(frame[:24]),
)
async def test_garbage_is_an_invalid_request_and_the_connection_goes_on(client: RawClient, frame: str | bytes) -> None:
    error = await client.error_after(frame)
    await client.send("models.list", "m")

    assert error["code"] == "invalid_request"
    assert (await client.until("models"))[-1]["request_id"] == "m"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"sampling": {"temp": 1.0}}, "temp"),
        ({"sampling": {"temperature": "hot"}}, "sampling.temperature"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"top_k": -1}}, "sampling.top_k"),
        ({"sampling": {"top_k": 1.5}}, "sampling.top_k"),
        ({"sampling": {"logit_bias": {"x": 1}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {-1: 1}}}, "sampling.logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x"}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"token_ids": [1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": None, "token_ids": []}, "prompt"),
        ({"prompt": None, "token_ids": [-1]}, "token_ids"),
        ({"prompt": None, "token_ids": [272]}, "token_ids"),
        ({"prompt": None, "token_ids": [2**31]}, "token_ids"),
        ({"prompt": None, "token_ids": [1] * 4096}, "prompt"),
        ({"prompt": "x" * 4095}, "prompt"),
        ({"prompt": "x" * 90_000}, "prompt"),
        ({"prompt": None, "messages": [{"role": "user"}]}, "content"),
        ({"prompt": None, "messages": [{"role": "user", "content": "x", "extra": 1}]}, "extra"),
        ({"adapter": "x", "adapters": [["x", 1.0]]}, "adapters"),
        ({"adapters": []}, "adapters"),
        ({"adapters": [["x", NAN]]}, "sampling"),
        ({"adapters": [["x", INFINITY]]}, "sampling"),
        ({"adapters": [["x"]]}, "adapters"),
        ({"adapter": ""}, "adapter"),
        ({"adapter": "a b"}, "adapter"),
        ({"adapter_source": "ftp"}, "adapter_source"),
        *[
            ({"sampling": {field: value}}, "sampling")
            for field in (
                "temperature",
                "top_p",
                "min_p",
                "typical_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
            for value in (NAN, INFINITY, -INFINITY)
        ],
        ({"sampling": {"logit_bias": {1: NAN}}}, "sampling"),
        ({"sampling": {"logit_bias": {1: INFINITY}}}, "sampling"),
        ({"sampling": {"logit_bias": {272: 1.0}}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_a_wrong_field_is_refused_by_name(client: RawClient, fields: dict[str, Any], named: str) -> None:
    error = await client.error_after(_frame(**fields))

    assert (error["code"], error["request_id"]) == ("invalid_request", "r")
    assert named in error["message"]


async def test_a_number_too_large_for_a_float_is_no_crash(client: RawClient) -> None:
    error = await client.error_after(
        '{"type":"generate","request_id":"r","prompt":"x","sampling":{"temperature":1e999}}'
    )

    assert error["code"] == "invalid_request"


async def test_a_frame_over_the_limit_is_refused_and_the_connection_goes_on(client: RawClient) -> None:
    error = await client.error_after(json.dumps({"type": "generate", "prompt": "x" * MAX_FRAME_BYTES}))

    assert error["data"]["field"] == "frame"
    await client.send("models.list")
    await client.until("models")


async def test_a_huge_frame_ends_only_its_own_connection(client: RawClient) -> None:
    await client.receive()

    await client.websocket.send("x" * (8 * MAX_FRAME_BYTES))

    with pytest.raises(ConnectionClosed) as closed, anyio.fail_after(LONG):
        await client.websocket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


async def test_text_that_is_not_unicode_ends_only_its_own_connection(client: RawClient) -> None:
    await client.receive()

    await client.websocket.send(b"\xff\xfe", text=True)

    with pytest.raises(ConnectionClosed), anyio.fail_after(LONG):
        await client.websocket.recv()


@pytest.mark.parametrize("subprotocol", [None, "descant.v9.json"])
async def test_a_client_without_our_subprotocol_is_spoken_to_in_json(
    server: tuple[System, str], subprotocol: str | None
) -> None:
    async with raw(server[1], subprotocol=subprotocol) as client:
        assert (await client.receive())["type"] == "hello"


async def test_the_server_answers_in_the_encoding_agreed_on_whatever_it_is_asked_in(server: tuple[System, str]) -> None:
    async with raw(server[1], subprotocol=MSGPACK_SUBPROTOCOL) as client:
        await client.websocket.recv()
        await client.send("models.list")

        answer = await client.websocket.recv()

    assert isinstance(answer, bytes)
    assert decode(answer)["type"] == "models"
