"""Runs a server and a batch of requests through its WebSocket: the answers, and the time that they took."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import uvloop

from descant.assembly.system import System, running
from descant.config import AdapterConfig, Config, MiB, ModelConfig, ServerConfig
from descant.contract.engine import Dtype
from descant_client.client import Client, connect
from descant_client.protocol import Delta, ServerMessage

KV_BYTES = 512 * MiB


class Request(NamedTuple):
    """A prompt and the name of its adapter; None: the base model."""

    prompt: str | list[int]
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers, in the order of the requests. Rates are tokens per second of all requests together."""

    token_ids: list[list[int]]
    seconds: float  # from the first request to the last answer
    decode_tokens_per_s: float  # once every request has its first token; NaN if there was nothing after that

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second over the whole time, prefill included."""
        return sum(map(len, self.token_ids)) / self.seconds


class _Clock:
    """Records the arrival times of the tokens of one stream."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []

    def __call__(self, message: ServerMessage) -> None:
        if isinstance(message, Delta):
            self.arrivals.append((time.perf_counter(), len(message.token_ids)))


def run(main: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """Run a benchmark's `main` on the event loop that servers use."""
    anyio.run(main, *arguments, backend_options={"loop_factory": uvloop.new_event_loop})


@asynccontextmanager
async def served(
    model: Path | None,
    dtype: Dtype | None = None,
    num_threads: int | None = None,
    adapters: AdapterConfig | None = None,
) -> AsyncIterator[tuple[System, Client]]:
    """Run a ready server and a client of it. None: the demo model, its dtype, the default number of threads."""
    with tempfile.TemporaryDirectory() as data_dir:
        config = Config(
            data_dir=data_dir,
            server=ServerConfig(port=0),
            model=ModelConfig(
                path=None if model is None else str(model), dtype=dtype, num_threads=num_threads, kv_bytes=KV_BYTES
            ),
            adapters=adapters or AdapterConfig(),
        )
        async with running(config) as system, connect(f"ws://127.0.0.1:{system.port}") as client:
            await system.ready()
            yield system, client


async def answer(client: Client, requests: Sequence[Request], new_tokens: int) -> Answers:
    """Send all requests at once and wait for all answers: greedy, of exactly `new_tokens` each."""
    clocks = [_Clock() for _ in requests]
    started_s = time.perf_counter()
    streams = [
        client.generate(
            request.prompt, adapter=request.adapter, max_tokens=new_tokens, ignore_eos=True, temperature=0.0
        )
        for request in requests
    ]
    for stream, clock in zip(streams, clocks, strict=True):
        stream.listen(clock)
    results = [await stream.result() for stream in streams]
    ended_s = time.perf_counter()
    assert {result.usage.num_output_tokens for result in results} == {new_tokens}, "an answer is short"
    rate = decode_rate([clock.arrivals for clock in clocks], ended_s)
    return Answers([result.token_ids for result in results], ended_s - started_s, rate)


def decode_rate(arrivals: Sequence[Sequence[tuple[float, int]]], ended_s: float) -> float:
    """Return tokens per second from the time at which the last stream has its first token.

    Args:
      arrivals: per stream, pairs of a time and a number of tokens. ended_s: the end of the measurement. In seconds.
    """
    begin_s = max(stream[0][0] for stream in arrivals)
    num_tokens = sum(num for stream in arrivals for at, num in stream if at > begin_s)
    return num_tokens / (ended_s - begin_s) if num_tokens else float("nan")


def deal(prompts: Sequence[str | list[int]], names: Sequence[str | None]) -> list[Request]:
    """Return a request for each prompt, with the adapters in turn. Without names, all are for the base model."""
    return [Request(prompt, names[i % len(names)] if names else None) for i, prompt in enumerate(prompts)]
