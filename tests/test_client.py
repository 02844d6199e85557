"""The client against the fake server: requests, streams, errors, and cleaning up."""

import asyncio
import subprocess
import sys

import anyio
import pytest

from descant_client import Client, connect
from descant_client.client import SamplingOptions
from descant_client.errors import (
    AdapterNotFound,
    ConnectionLost,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unauthorized,
)
from descant_client.lifecycle import Adapters
from descant_client.protocol import (
    JSON_SUBPROTOCOL,
    MSGPACK_SUBPROTOCOL,
    Accepted,
    Ack,
    Cancel,
    ChatMessage,
    Delta,
    Generate,
    Progress,
    SamplingParams,
    ServerMessage,
)
from descant_client.wire import WeightedAdapter
from fake_server import MODEL, SEED, FakeServer, error_frame, text_of

pytestmark = pytest.mark.anyio


async def test_the_example_of_the_documentation_runs() -> None:
    async with FakeServer() as server, connect(server.uri, token=None) as client:
        adapters = await client.adapters.list()
        assert [adapter.name for adapter in adapters] == ["reverse", "upper"]
        adapter = await client.adapters.open("reverse")
        stream = client.generate("hello", adapter=adapter, max_tokens=64, temperature=0.0, seed=7)
        text = "".join([delta.text async for delta in stream])
        assert text == text_of(list(b"hello"))
        result = await client.generate([1, 2, 3], ignore_eos=True).result()
        assert (result.text, result.token_ids, result.finish_reason) == ("1 2 3 ", [1, 2, 3], "stop")
        text = await client.generate("hi", adapters=[("reverse", 0.5), ("upper", 0.5)]).text()
        assert text == text_of(list(b"hi"))


async def test_a_result_carries_what_the_server_reports() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        result = await client.generate([1, 2], logprobs=1, prompt_logprobs=0).result()
    assert result.seed == SEED
    assert (result.usage.num_prompt_tokens, result.usage.num_output_tokens) == (2, 2)
    assert result.timings.ttft_s == 0.1
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == [1, 2]
    assert result.prompt_logprobs == [None]


async def test_every_choice_has_its_own_answer() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        result = await client.generate([1, 2, 3], n=3).result()
    assert [choice.token_ids for choice in result.choices] == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert [choice.text for choice in result.choices] == ["1 2 3 ", "2 3 4 ", "3 4 5 "]
    assert {choice.finish_reason for choice in result.choices} == {"stop"}


async def test_deltas_add_up_to_the_result_and_may_be_read_again() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        stream = client.generate(list(range(20)))
        result = await stream.result()
        for _ in range(2):
            deltas = [delta async for delta in stream]
            assert "".join(delta.text for delta in deltas) == result.text
            assert [token_id for delta in deltas for token_id in delta.token_ids] == result.token_ids


async def test_every_option_reaches_the_server() -> None:
    sampling = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "logit_bias": {3: -1.0}}
    sampling |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    fields = {"max_tokens": 5, "n": 2, "seed": 9, "stop": ["x"], "stop_token_ids": [8], "ignore_eos": True}
    fields |= {"logprobs": 1, "prompt_logprobs": 2, "adapter_source": "hub"}
    async with FakeServer() as server, connect(server.uri) as client:
        await client.generate("p", adapter="upper", **fields, **sampling).result()
    expected = Generate("1", prompt="p", adapter="upper", sampling=SamplingParams(**sampling), **fields)
    assert server.received[0] == expected


def test_every_sampling_parameter_is_an_option() -> None:
    assert set(SamplingOptions.__annotations__) == set(SamplingParams.__struct_fields__)


async def test_a_prompt_is_text_or_token_ids_or_messages() -> None:
    turn = {"role": "user", "content": "hi"}
    async with FakeServer() as server, connect(server.uri) as client:
        await client.generate("hi", adapters=[("upper", 0.5)]).result()
        await client.generate((1, 2)).result()
        await client.generate([turn, ChatMessage("assistant", "ho")]).result()
    requests = [message for message in server.received if isinstance(message, Generate)]
    assert (requests[0].prompt, requests[0].adapters) == ("hi", [WeightedAdapter("upper", 0.5)])
    assert requests[1].token_ids == [1, 2]
    assert requests[2].messages == [ChatMessage("user", "hi"), ChatMessage("assistant", "ho")]


async def test_a_malformed_message_is_refused_at_the_call() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        with pytest.raises(InvalidRequest, match="role"):
            client.generate([{"content": "hi"}])


async def _break(client: Client) -> None:
    async for _ in client.generate([1, 2, 3]):
        break


async def _raise(client: Client) -> None:
    try:
        async for _ in client.generate([1, 2, 3]):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


async def _cancel_the_loop(client: Client) -> None:
    with anyio.CancelScope() as scope:
        async for _ in client.generate([1, 2, 3]):
            scope.cancel()


async def _cancel_the_result(client: Client) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await client.generate([1, 2, 3]).result()


async def _close(client: Client) -> None:
    await client.generate([1, 2, 3]).aclose()


async def _close_the_iterator(client: Client) -> None:
    deltas = aiter(client.generate([1, 2, 3]))
    await anext(deltas)
    await deltas.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("leave", [_break, _raise, _cancel_the_loop, _cancel_the_result, _close, _close_the_iterator])
async def test_leaving_a_stream_cancels_it_at_the_server(leave) -> None:
    async with FakeServer(hold=2) as server, connect(server.uri) as client:
        await leave(client)
        await server.wait_for(lambda message: message == Cancel("1"))
        await server.wait_for(lambda message: message == Ack("1"))


async def test_a_finished_stream_is_acknowledged_and_not_cancelled() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        async for _ in client.generate([1, 2, 3]):
            pass
        await server.wait_for(lambda message: message == Ack("1"))
    assert not [message for message in server.received if isinstance(message, Cancel)]


async def test_a_cancelled_stream_keeps_what_came() -> None:
    async with FakeServer(hold=2) as server, connect(server.uri) as client:
        stream = client.generate([1, 2, 3])
        async for delta in stream:
            if delta.index + len(delta.token_ids) == 2:
                stream.cancel()
        result = await stream.result()
    assert (result.text, result.token_ids, result.finish_reason) == ("1 2 ", [1, 2], "cancelled")


async def test_streams_of_one_connection_run_side_by_side() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        unread = client.generate(list(range(100)))
        one, two = aiter(client.generate([1] * 50)), aiter(client.generate([2] * 50))
        for _ in range(10):
            assert set((await anext(one)).token_ids) == {1}
            assert set((await anext(two)).token_ids) == {2}
        assert len((await unread.result()).token_ids) == 100


async def test_a_refused_request_raises_its_error_and_disturbs_no_other() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        good, bad = client.generate([1, 2]), client.generate([1], adapter="nobody")
        with pytest.raises(AdapterNotFound) as caught:
            await bad.result()
        assert caught.value.adapter == "nobody"
        with pytest.raises(AdapterNotFound):
            [delta async for delta in bad]
        assert await good.text() == "1 2 "


async def test_a_wrong_token_is_unauthorized() -> None:
    async with FakeServer(token="right") as server:
        with pytest.raises(Unauthorized):
            async with connect(server.uri, token="wrong"):
                pass
        async with connect(server.uri, token="right"):
            assert server.authorization == "Bearer right"


async def test_a_refusal_in_place_of_the_hello_is_raised() -> None:
    async with FakeServer(refusal=Unauthorized("No key was given.")) as server:
        with pytest.raises(Unauthorized, match="No key was given"):
            async with connect(server.uri):
                pass


async def test_no_server_is_a_lost_connection_at_once(free_tcp_port: int) -> None:
    with pytest.raises(ConnectionLost, match=str(free_tcp_port)):
        async with connect(f"ws://127.0.0.1:{free_tcp_port}"):
            pass


@pytest.mark.parametrize("uri", ["127.0.0.1:8080", "ftp://x", "ws://", "ws://x:port"])
async def test_what_is_no_address_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest, match="uri"):
        async with connect(uri):
            pass


@pytest.mark.parametrize(("encoding", "subprotocol"), [("json", JSON_SUBPROTOCOL), ("msgpack", MSGPACK_SUBPROTOCOL)])
async def test_the_encoding_is_the_callers_choice(encoding, subprotocol: str) -> None:
    async with FakeServer() as server, connect(server.uri, encoding=encoding) as client:
        assert await client.generate([1, 2], n=2).text() == "1 2 "
        assert server.subprotocol == subprotocol


async def test_messages_of_a_newer_server_are_ignored() -> None:
    def add_news(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        return ['{"type": "weather", "request_id": "1", "sky": "blue"}', message]

    async with FakeServer(tamper=add_news) as server, connect(server.uri, encoding="json") as client:
        assert await client.generate([1, 2]).text() == "1 2 "


async def test_fields_of_a_newer_server_are_ignored() -> None:
    def replace(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        frame = '{"type": "adapters", "request_id": "1", "adapters": [{"name": "a", "source": "s", "mood": 1}], "x": 2}'
        return [frame if isinstance(message, Adapters) else message]

    async with FakeServer(tamper=replace) as server, connect(server.uri, encoding="json") as client:
        assert [adapter.name for adapter in await client.adapters.list()] == ["a"]


async def test_an_unreadable_message_fails_its_request_alone() -> None:
    def spoil(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        is_first = isinstance(message, Delta) and message.request_id == "1"
        return ['{"type": "delta", "request_id": "1", "index": "five"}' if is_first else message]

    async with FakeServer(tamper=spoil) as server, connect(server.uri, encoding="json") as client:
        bad, good = client.generate([1, 2]), client.generate([1, 2])
        with pytest.raises(InternalError):
            await bad.result()
        assert await good.text() == "1 2 "


async def test_an_error_without_a_request_fails_what_has_no_answer_yet() -> None:
    def answer(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        is_second = isinstance(message, Accepted | Progress | Delta) and message.request_id == "2"
        return [error_frame(Overloaded("Full.", 1.0))] if is_second else [message]

    async with FakeServer(hold=1, tamper=answer) as server, connect(server.uri) as client:
        first = client.generate([1])
        await anext(aiter(first))
        second = client.generate([1])
        with pytest.raises(Overloaded):
            await second.result()
        assert (await first.result()).finish_reason in ("cancelled", "stop")


async def test_a_request_beyond_the_frame_limit_is_refused_here() -> None:
    async with FakeServer(max_frame_bytes=100) as server, connect(server.uri) as client:
        with pytest.raises(InvalidRequest, match="100"):
            await client.generate("x" * 100).result()
        assert await client.generate([1]).text() == "1 "
        assert server.num_connections == 1


async def test_a_request_that_cannot_be_encoded_fails_alone() -> None:
    async with FakeServer() as server, connect(server.uri) as client:
        bad, good = client.generate([1], max_tokens=object()), client.generate([2])  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest):
            await bad.result()
        assert await good.text() == "2 "


async def test_the_server_introduces_itself() -> None:
    async with FakeServer() as server, connect(server.uri.replace("ws:", "http:")) as client:
        assert client.hello.server == "fake/1"
        assert await client.models() == [MODEL]
        assert await client.adapters.open("nobody") is None


async def test_leaving_cancels_open_streams_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    async with FakeServer(hold=1) as server:
        async with connect(server.uri) as client:
            stream = client.generate([1, 2])
            await anext(aiter(client.generate([1, 2])))
        with pytest.raises(ConnectionLost, match="closed"):
            await stream.result()
        await server.wait_for(lambda message: message == Cancel("1"))
        await server.wait_for(lambda message: message == Cancel("2"))
    await anyio.wait_all_tasks_blocked()
    assert asyncio.all_tasks() == before


async def test_what_the_body_raises_comes_out_as_it_is() -> None:
    async with FakeServer() as server:
        with pytest.raises(ZeroDivisionError):
            async with connect(server.uri):
                raise ZeroDivisionError


async def test_cancelling_the_body_closes_the_connection() -> None:
    async with FakeServer(hold=1) as server:
        with anyio.CancelScope() as scope:
            async with connect(server.uri) as client:
                await anext(aiter(client.generate([1, 2])))
                scope.cancel()
                await client.models()
        assert scope.cancelled_caught
        await server.wait_for(lambda message: message == Cancel("1"))


def test_errors_and_protocol_load_no_socket_library() -> None:
    check = (
        "import sys, descant_client.errors, descant_client.protocol;"
        "print({'websockets', 'anyio', 'rich', 'asyncio'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
