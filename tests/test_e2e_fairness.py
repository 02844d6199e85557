"""Several principals on one server: limits and deadlines over the wire, and a flood beside a trickle."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest

from descant.config import Config, KeyConfig, SchedulingConfig, hash_key
from descant.contract.principal import Principal
from descant.messages import Submit
from descant.model.tokenizer import Tokenizer
from descant.requests.default_heads import DefaultHeads
from descant.requests.generate import start_stream
from descant.requests.time_limits import TimeLimits
from descant.scheduling.sequence import SequenceTable
from descant.sessions.stream import OutgoingStream
from descant.sources.demo import DEMO_MODEL
from descant_client import connect
from descant_client.errors import DeadlineExceeded, InvalidRequest, Overloaded
from descant_client.protocol import Delta, Error, Generate
from descant_client.stream import Stream as Answer
from fake_engine import LIMITS
from servers import dummy_config, raw, results, serve

pytestmark = pytest.mark.anyio

SLOW = 20.0  # tokens per second


@asynccontextmanager
async def server(data_dir: Path, tokens_per_s: float = 0.0, **scheduling: Any) -> AsyncIterator[str]:
    """Serve the principals `flood`, whose sequences may not wait in numbers, and `trickle`."""
    keys = [KeyConfig(name="flood", sha256=hash_key("flood"), max_queued=30)]
    keys.append(KeyConfig(name="trickle", sha256=hash_key("trickle"), weight=2.0))
    config = dummy_config(data_dir, tokens_per_s)
    config = msgspec.structs.replace(config, keys=keys, scheduling=SchedulingConfig(**scheduling))
    async with serve(config) as (_, uri):
        yield uri


async def begun(stream: Answer) -> AsyncIterator[Delta]:
    """Wait for the beginning of an answer; whoever forgets what is returned cancels it."""
    deltas = aiter(stream)
    await anext(deltas)
    return deltas


async def test_who_queues_too_much_is_told_to_come_again(tmp_path: Path) -> None:
    async with server(tmp_path, SLOW, max_num_seqs=2) as uri, raw(uri, token="flood") as client:
        for number in range(34):
            await client.generate(str(number), n=1, max_tokens=400, ignore_eos=True)
        messages = await client.until("error")

    error = messages[-1]
    assert (error["code"], error["data"]["retry_after_s"]) == ("overloaded", 1)
    assert "at most 30 may" in error["message"]
    assert not [one for one in messages if one["type"] == "accepted" and one["request_id"] == error["request_id"]]


async def test_a_limit_holds_for_each_principal_and_for_all_choices_at_once(tmp_path: Path) -> None:
    async with (
        server(tmp_path, SLOW, max_num_seqs=2, max_queued=3) as uri,
        connect(uri, token="flood") as flood,
        connect(uri, token="trickle") as trickle,
    ):
        running = await begun(flood.generate([1], n=2, ignore_eos=True, max_tokens=400))
        waiting = [flood.generate([1], n=10, ignore_eos=True, max_tokens=400) for _ in range(3)]
        with pytest.raises(Overloaded, match="30 sequences wait already"):
            await flood.generate([1], n=2).result()
        with pytest.raises(InvalidRequest, match="at n: at most 3"):
            await trickle.generate([1], n=4).result()

        assert len((await trickle.generate([1], n=3, max_tokens=1).result()).choices) == 3
        assert not any(stream.is_finished for stream in waiting)
        del running


async def test_deadlines_end_requests_over_the_wire(tmp_path: Path) -> None:
    async with server(tmp_path, SLOW, max_num_seqs=1, timeout_s=30.0) as uri, connect(uri, token="trickle") as client:
        running = client.generate([1], ignore_eos=True, max_tokens=400, timeout_s=0.5)
        waiting = client.generate([1], queue_timeout_s=0.2, timeout_s=100.0)

        with pytest.raises(DeadlineExceeded, match=r"waiting in the queue took longer than 0\.2 s"):
            await waiting.result()
        with pytest.raises(DeadlineExceeded, match=r"answering took longer than 0\.5 s"):
            await running.result()


async def test_the_servers_limit_cannot_be_lengthened(tmp_path: Path) -> None:
    async with server(tmp_path, SLOW, timeout_s=0.3) as uri, connect(uri, token="trickle") as client:
        with pytest.raises(DeadlineExceeded, match=r"answering took longer than 0\.3 s"):
            await client.generate([1], ignore_eos=True, max_tokens=400, timeout_s=100.0).result()


@pytest.mark.slow
async def test_a_flood_leaves_room_for_a_trickle(tmp_path: Path) -> None:
    async with (
        server(tmp_path, SLOW, max_num_seqs=4) as uri,
        connect(uri, token="flood") as flood,
        connect(uri, token="trickle") as trickle,
    ):
        streams = [flood.generate([1, 2, number], ignore_eos=True, max_tokens=20) for number in range(20)]
        deltas = await begun(streams[0])

        for _ in range(3):
            result = await trickle.generate([1], ignore_eos=True, max_tokens=2).result()
            assert len(result.token_ids) == 2
        assert sum(stream.is_finished for stream in streams) < 15
        assert {len(one.token_ids) for one in await results(streams)} == {20}
        del deltas


@pytest.mark.parametrize(
    ("asked", "configured", "what"),
    [({"queue_timeout_s": 0.01, "timeout_s": 9.0}, {}, "waiting"), ({}, {"timeout_s": 0.01}, "answering")],
)
async def test_the_time_to_prepare_a_request_is_part_of_its_time(asked: Any, configured: Any, what: str) -> None:
    request = Generate(request_id="r", prompt="x", **asked)
    limits = TimeLimits.of(request, SchedulingConfig(**configured), time.monotonic())

    with pytest.raises(DeadlineExceeded, match=what), limits.bounding_preparation():
        await anyio.sleep_forever()


async def test_a_client_hears_nothing_of_its_request_before_the_scheduler_took_it() -> None:
    stream = OutgoingStream("r", "session/r", 1024, lambda stream: None)
    heard: list[Any] = []

    async def ask(message: Submit, timeout: float) -> None:
        heard.append(stream.render())
        raise Overloaded("Full.", 3)

    model = SimpleNamespace(ready=ready, eos_token_ids=())
    services: Any = SimpleNamespace(
        config=Config(),
        model=model,
        tokenizer=Tokenizer(DEMO_MODEL),
        default_heads=DefaultHeads("auto"),
        sequences=SequenceTable(),
        scheduler=SimpleNamespace(ask=ask, tell_nowait=lambda message: None),
    )
    await start_stream(services, Generate(request_id="r", token_ids=[1]), stream, Principal("p"))

    assert heard == [[]]
    assert [message.code for message in stream.render() if isinstance(message, Error)] == ["overloaded"]


async def ready() -> Any:
    return SimpleNamespace(limits=LIMITS)
