"""The client when the connection drops: every stream continues unbroken, or ends with one typed error."""

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import anyio
import pytest

from descant_client import Client, Stream, connect
from descant_client.dialer import Backoff
from descant_client.errors import ConnectionLost, InternalError, StreamNotFound, Unauthorized
from descant_client.protocol import Accepted, Ack, Cancel, Delta, Done, Generate, Resume, ServerMessage
from fake_server import SEED, FakeServer, error_frame, text_of

pytestmark = pytest.mark.anyio


class FakeTime:
    """A clock that advances only in `sleep`, which returns at once."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sleeps: list[float] = []

    async def sleep(self, delay_s: float) -> None:
        self.sleeps.append(delay_s)
        self.now_s += delay_s
        await anyio.lowlevel.checkpoint()

    def backoff(self) -> Backoff:
        return Backoff(rng=random.Random(0), clock=lambda: self.now_s, sleep=self.sleep)


class HeldTime(FakeTime):
    """A time in which the client reconnects only when the test allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.began = anyio.Event()
        self.over = anyio.Event()

    async def sleep(self, delay_s: float) -> None:
        self.began.set()
        await self.over.wait()


def patient(server: FakeServer, time: FakeTime | None = None, **options) -> AbstractAsyncContextManager[Client]:
    """Connect with a clock that advances only while the client waits to reconnect."""
    return connect(server.uri, backoff=(time or FakeTime()).backoff(), **options)


async def read(stream: Stream, num_choices: int) -> tuple[list[str], list[list[int]]]:
    """Return texts and tokens by choice, and check that every delta continues its choice."""
    texts, tokens = [""] * num_choices, [[] for _ in range(num_choices)]
    async for delta in stream:
        assert delta.index == len(tokens[delta.choice])
        texts[delta.choice] += delta.text
        tokens[delta.choice] += delta.token_ids
    return texts, tokens


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("seed", range(12))
async def test_drops_at_random_points_change_nothing(encoding, seed: int) -> None:
    rng = random.Random(seed)
    drops = [rng.randint(0, 12) for _ in range(rng.randint(1, 12))]
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 30))] for _ in range(3)]
    async with FakeServer(drops=drops, rng_seed=seed) as server, patient(server, encoding=encoding) as client:
        streams = [client.generate(prompt, n=2) for prompt in prompts]
        for stream, prompt in zip(streams, prompts, strict=True):
            outputs = [prompt, [token_id + 1 for token_id in prompt]]
            assert await read(stream, 2) == ([text_of(output) for output in outputs], outputs)
            assert [choice.token_ids for choice in (await stream.result()).choices] == outputs
    assert server.num_connections > 1


async def test_a_resumed_stream_says_what_it_has() -> None:
    async with FakeServer(hold=2) as server, patient(server) as client:
        stream = client.generate([1, 2, 3])
        async for delta in stream:
            if delta.index + len(delta.token_ids) == 2:
                server.hold = None
                server.abort()
    assert Resume("1", {0: 2}) in server.received
    assert (await stream.result()).token_ids == [1, 2, 3]


async def test_a_request_the_drop_swallowed_is_sent_again() -> None:
    async with FakeServer(drops=[0]) as server, patient(server) as client:
        assert await client.generate([1, 2, 3]).text() == "1 2 3 "
    assert [type(message) for message in server.received] == [Resume, Generate, Ack]


async def test_a_question_the_drop_swallowed_is_asked_again() -> None:
    async with FakeServer(drops=[0, 0]) as server, patient(server) as client:
        assert [adapter.name for adapter in await client.adapters.list()] == ["reverse", "upper"]


async def test_the_session_is_asked_for_and_kept() -> None:
    async with FakeServer(drops=[3]) as server, patient(server, token="key") as client:
        session = client.hello.session
        await client.generate(list(range(9))).result()
        assert client.hello.session == session
        assert server.num_connections == 2
        assert server.authorization == "Bearer key"


async def restart(server: FakeServer, client: Client) -> None:
    """Restart the server and wait until the client has noticed."""
    server.forget()
    server.abort()
    await client.models()


async def test_a_restarted_server_gets_requests_without_output_again_with_their_seed() -> None:
    async with FakeServer(hold=0) as server, patient(server) as client:
        stream = client.generate([1, 2])
        while stream.stage is None:
            await anyio.lowlevel.checkpoint()
        server.hold = None
        await restart(server, client)
        assert await stream.text() == "1 2 "
    assert [one.seed for one in server.received if isinstance(one, Generate)] == [None, SEED]


async def test_a_restarted_server_ends_streams_with_output() -> None:
    async with FakeServer(hold=1) as server, patient(server) as client:
        deltas = aiter(stream := client.generate([1, 2]))
        await anext(deltas)
        await restart(server, client)
        with pytest.raises(StreamNotFound):
            await anext(deltas)
        with pytest.raises(StreamNotFound):
            await stream.result()


async def test_a_known_stream_that_is_gone_ends_with_that_error() -> None:
    def lose(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        is_resumed = server.num_connections == 2 and isinstance(message, Accepted)
        return [error_frame(StreamNotFound("1"), "1") if is_resumed else message]

    async with FakeServer(drops=[3], tamper=lose) as server, patient(server) as client:
        with pytest.raises(StreamNotFound):
            await client.generate(list(range(9))).result()


async def test_a_stream_cancelled_during_an_outage_is_cancelled_after_it() -> None:
    async with FakeServer(hold=1) as server, patient(server) as client:
        stream = client.generate([1, 2])
        await anext(deltas := aiter(stream))
        server.abort()
        stream.cancel()
        assert (await stream.result()).finish_reason == "cancelled"
        assert [delta async for delta in deltas][-1].text == "1 "
    assert Cancel("1") in server.received


async def test_a_request_made_during_an_outage_is_sent_once_after_it() -> None:
    time = HeldTime()
    async with FakeServer() as server, patient(server, time) as client:
        server.abort()
        await time.began.wait()
        kept, cancelled = client.generate([1, 2]), client.generate([3])
        cancelled.cancel()
        time.over.set()
        assert await kept.text() == "1 2 "
        await cancelled.result()
    requests = [type(one) for one in server.received if one.request_id == "2" and not isinstance(one, Ack)]
    assert requests == [Generate, Cancel]


async def test_patience_ends_in_connection_lost_for_all() -> None:
    time = FakeTime()
    async with FakeServer(hold=1) as server, patient(server, time, reconnect_s=30.0) as client:
        streams = [client.generate([1, 2]), client.generate([1, 2])]
        await anext(kept := aiter(streams[0]))
        await server.stop()
        for stream in [*streams, client.generate([3])]:
            with pytest.raises(ConnectionLost, match="Gave up after 30 s"):
                await stream.result()
        with pytest.raises(ConnectionLost):
            await client.models()
        with pytest.raises(ConnectionLost):
            await anext(kept)
    assert sum(time.sleeps) == pytest.approx(30.0)


async def test_connections_that_carry_nothing_do_not_renew_patience() -> None:
    time = FakeTime()
    async with FakeServer(drops=[0] * 1000) as server, patient(server, time, reconnect_s=20.0) as client:
        with pytest.raises(ConnectionLost):
            await client.generate([1]).result()
    assert sum(time.sleeps) == pytest.approx(20.0)


async def test_connections_that_carry_something_renew_patience() -> None:
    async with FakeServer(drops=[3] * 200) as server, patient(server, reconnect_s=1.0) as client:
        assert len((await client.generate(list(range(100))).result()).token_ids) == 100


async def test_a_server_that_no_longer_takes_the_token_ends_everything() -> None:
    async with FakeServer(hold=1) as server, patient(server) as client:
        stream = client.generate([1, 2])
        server.refusal = Unauthorized("The key was revoked.")
        server.abort()
        with pytest.raises(Unauthorized, match="revoked"):
            await stream.result()


async def test_an_unauthorized_error_in_between_ends_everything() -> None:
    def revoke(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        return [error_frame(Unauthorized("The key was revoked."))] if isinstance(message, Delta) else [message]

    async with FakeServer(tamper=revoke) as server, patient(server) as client:
        with pytest.raises(Unauthorized, match="revoked"):
            await client.generate([1]).result()
        with pytest.raises(Unauthorized, match="revoked"):
            await client.models()
    assert server.num_connections == 1


def test_delays_double_up_to_a_limit_and_vary() -> None:
    backoff = Backoff(0.1, 5.0, rng=random.Random(0))
    for attempt, longest in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]):
        delays = {backoff.delay_s(attempt) for _ in range(100)}
        assert len(delays) > 50
        assert longest / 2 <= min(delays) < max(delays) <= longest
    assert backoff.delay_s(10_000) <= 5.0


def losing(num_lost: int) -> Callable[[ServerMessage], list[ServerMessage | str | bytes]]:
    """Return a `tamper` function that drops the first delta of an output, `num_lost` times."""
    lost: list[ServerMessage] = []

    def lose(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        if isinstance(message, Delta) and message.index == 0 and len(lost) < num_lost:
            lost.append(message)
            return []
        return [message]

    return lose


@pytest.mark.parametrize("num_tokens", [1, 9])
async def test_a_gap_is_filled(num_tokens: int) -> None:
    async with FakeServer(tamper=losing(2)) as server, connect(server.uri) as client:
        assert await read(client.generate(list(range(num_tokens))), 1) == (
            [text_of(list(range(num_tokens)))],
            [list(range(num_tokens))],
        )
    assert server.received.count(Resume("1")) >= 2


async def test_a_gap_is_filled_before_the_end() -> None:
    async with FakeServer(hold=8, tamper=losing(2)) as server, connect(server.uri) as client:
        stream = client.generate(list(range(9)))
        async for delta in stream:
            if delta.index + len(delta.token_ids) == 8:
                break
        assert (await stream.result()).token_ids == list(range(8))


@pytest.mark.parametrize("num_tokens", [1, 9])
async def test_a_gap_that_stays_is_an_error(num_tokens: int) -> None:
    async with FakeServer(tamper=losing(100)) as server, connect(server.uri) as client:
        with pytest.raises(InternalError, match="tokens"):
            await client.generate(list(range(num_tokens))).result()


async def test_a_repetition_is_dropped() -> None:
    def repeat(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        return [message, message] if isinstance(message, Accepted | Delta | Done) else [message]

    async with FakeServer(tamper=repeat) as server, connect(server.uri) as client:
        assert await read(client.generate([1, 2, 3, 4]), 1) == (["1 2 3 4 "], [[1, 2, 3, 4]])
    assert not [one for one in server.received if isinstance(one, Resume)]
