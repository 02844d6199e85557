"""Real servers for end-to-end tests: a tiny checkpoint, a server on a free port, frames by hand, processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import anyio
import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import bytes_to_unicode
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from descant.actor.ref import Ref
from descant.assembly.system import System, running
from descant.config import AdapterConfig, AdapterEntry, Config, ModelConfig, SchedulingConfig, ServerConfig
from descant_client.client import Client
from descant_client.protocol import JSON_SUBPROTOCOL
from descant_client.stream import Result, Stream
from tiny_models import save_adapter, save_model, tiny_config

LONG = 240.0  # limit of waits that a correct server ends much earlier
BEGIN, END, PAD, ANSWER = 256, 257, 258, 259
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|answer|>")
VOCAB_SIZE = 264  # four ids beyond the tokenizer
CONTEXT = 512
ADAPTERS = ("alpha", "beta", "gamma", "delta")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|begin|>{{ message.role }}: {{ message.content }}{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)


@dataclass(frozen=True)
class Checkpoint:
    """A base model and adapters for it, on disk."""

    base: Path
    adapters: dict[str, Path]


def tiny_checkpoint(directory: Path) -> Checkpoint:
    """Write a random Llama over bytes and four random adapters of different ranks, with Transformers and PEFT."""
    base = directory / "base"
    config = tiny_config(
        "llama",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    save_model(base, config)
    save_tokenizer(base)
    adapters = {
        name: save_adapter(directory / name, base, seed=rank, r=rank)
        for name, rank in zip(ADAPTERS, (2, 4, 8, 16), strict=True)
    }
    return Checkpoint(base, adapters)


def save_tokenizer(
    directory: Path, merges: Sequence[tuple[str, str]] = (), template: str | None = CHAT_TEMPLATE
) -> None:
    """Write a tokenizer of bytes (ids 0 to 255), special tokens, then `merges`. It wraps a text as a prompt."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab |= {one + other: 256 + len(SPECIAL_TOKENS) + i for i, (one, other) in enumerate(merges)}
    vocab |= {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|answer|>", special_tokens=[("<|begin|>", BEGIN), ("<|answer|>", ANSWER)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


# ---- servers -------------------------------------------------------------------------------------------------------


def model_config(checkpoint: Checkpoint, data_dir: Path, **server: Any) -> Config:
    """Return settings of a server of the tiny model with its adapters by name. `server` goes to `ServerConfig`."""
    entries = [AdapterEntry(name=name, ref=f"local:{path}") for name, path in checkpoint.adapters.items()]
    return Config(
        data_dir=str(data_dir),
        server=ServerConfig(port=0, **server),
        model=ModelConfig(path=str(checkpoint.base), kv_bytes=16 << 20, num_threads=1),
        scheduling=SchedulingConfig(max_num_batched_tokens=256),
        adapters=AdapterConfig(entries=entries, memory_bytes=16 << 20),
    )


def dummy_config(data_dir: Path, tokens_per_s: float = 0.0, **server: Any) -> Config:
    """Return settings of a server with the dummy engine, by default without a pace."""
    return Config(
        data_dir=str(data_dir),
        server=ServerConfig(port=0, **server),
        model=ModelConfig(engine="dummy", dummy_tokens_per_s=tokens_per_s),
    )


@asynccontextmanager
async def serve(config: Config, **options: Any) -> AsyncIterator[tuple[System, str]]:
    """Run a server in this event loop, with real child processes. Yield the ready system and its address."""
    async with running(config, **options) as system:
        with anyio.fail_after(LONG):
            await system.ready()
        yield system, f"ws://127.0.0.1:{system.port}"


def crash(actor: Ref[Any]) -> None:
    """End the current life of an actor with an unexpected exception."""

    async def fail() -> None:
        raise RuntimeError("injected by a test")

    assert actor._address.tasks is not None
    actor._address.tasks.start_soon(fail)


async def wait_until(condition: Callable[[], Any], deadline_s: float = LONG) -> None:
    """Wait until the condition is true. Raise TimeoutError after `deadline_s`."""
    with anyio.fail_after(deadline_s):
        while not condition():  # noqa: ASYNC110 - many conditions have no event
            await anyio.sleep(0.005)


async def results(streams: Iterable[Stream]) -> list[Result]:
    """Wait for the results of all streams."""
    with anyio.fail_after(LONG):
        return list(await asyncio.gather(*[stream.result() for stream in streams]))


def answers(finished: Iterable[Result]) -> list[Any]:
    """Return the promised part of results: tokens, text and finish reason of every choice."""
    return [[(one.token_ids, one.text, one.finish_reason) for one in result.choices] for result in finished]


async def kill_executor(system: System) -> None:
    """Send SIGKILL to the executor, once there is one."""
    await wait_until(lambda: system.executor.pid is not None)
    assert system.executor.pid is not None
    os.kill(system.executor.pid, signal.SIGKILL)


class Neighbor:
    """A valid request that runs beside the actions of a test and must not be disturbed by them."""

    def __init__(self, client: Client, options: dict[str, Any], expected: list[Any]) -> None:
        self._client = client
        self._options = options
        self._expected = expected

    @classmethod
    async def beside(cls, client: Client, num_tokens: int = 64, **options: Any) -> Self:
        """Run the request undisturbed and remember its answer."""
        options |= {"seed": 5, "ignore_eos": True, "max_tokens": num_tokens}
        return cls(client, options, answers(await results([client.generate("healthy", **options)])))

    @asynccontextmanager
    async def singing(self) -> AsyncIterator[None]:
        """Run the request beside the block and check that its answer is the remembered one."""
        stream = self._client.generate("healthy", **self._options)
        yield
        assert answers(await results([stream])) == self._expected


# ---- frames by hand ------------------------------------------------------------------------------------------------


class RawClient:
    """JSON over one WebSocket, message by message, including frames that `descant_client` never sends."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket

    async def send(self, kind: str, request_id: str = "r", **fields: Any) -> None:
        await self.websocket.send(json.dumps({"type": kind, "request_id": request_id, **fields}))

    async def generate(self, request_id: str = "r", **fields: Any) -> None:
        await self.send("generate", request_id, **{"prompt": "hi", **fields})

    async def receive(self) -> dict[str, Any]:
        with anyio.fail_after(LONG):
            return decode(await self.websocket.recv())

    async def until(self, kind: str, request_id: str | None = None) -> list[dict[str, Any]]:
        """Return all messages (of one request) up to the first of a kind."""
        messages: list[dict[str, Any]] = []
        while not messages or messages[-1]["type"] != kind:
            message = await self.receive()
            if request_id is None or message.get("request_id") == request_id:
                messages.append(message)
        return messages

    async def error_after(self, frame: str | bytes) -> dict[str, Any]:
        """Send a raw frame and return the error that answers it."""
        await self.websocket.send(frame)
        return (await self.until("error"))[-1]

    async def drained(self) -> None:
        """Read until the server closes the connection."""
        with anyio.fail_after(LONG), contextlib.suppress(ConnectionClosed):
            while True:
                await self.websocket.recv()

    def vanish(self) -> None:
        """Abort the connection without a closing handshake."""
        self.websocket.transport.abort()


def decode(frame: str | bytes) -> dict[str, Any]:
    """Decode a frame of either encoding."""
    return json.loads(frame) if isinstance(frame, str) else msgspec.msgpack.decode(frame)


@asynccontextmanager
async def raw(
    uri: str,
    *,
    subprotocol: str | None = JSON_SUBPROTOCOL,
    session: str | None = None,
    token: str | None = None,
    **options: Any,
) -> AsyncIterator[RawClient]:
    """Open a WebSocket. The test itself reads the `hello` and everything after it."""
    async with open_websocket(
        f"{uri}/ws" + (f"?session={session}" if session else ""),
        subprotocols=None if subprotocol is None else [Subprotocol(subprotocol)],
        additional_headers={} if token is None else {"Authorization": f"Bearer {token}"},
        compression=None,
        close_timeout=1,
        **options,
    ) as websocket:
        yield RawClient(websocket)


def tokens_of(messages: Iterable[dict[str, Any]], choice: int = 0) -> list[int]:
    """Return the tokens of one choice in these deltas, and check that each delta continues the one before."""
    token_ids: list[int] = []
    deltas = [message for message in messages if message["type"] == "delta" and message["choice"] == choice]
    for delta in deltas:
        assert delta["index"] == deltas[0]["index"] + len(token_ids), "deltas follow one another"
        token_ids += delta["token_ids"]
    return token_ids


async def fetch(system: System, path: str) -> tuple[int, str]:
    """GET a path of the server; return status and body."""
    stream = await anyio.connect_tcp("127.0.0.1", system.port)
    async with stream:
        await stream.send(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join([chunk async for chunk in stream]).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


# ---- processes (Linux) ---------------------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    """Return the process ids of a process's descendants."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [descendant for child in children for descendant in (child, *children_of(child))]


def worker_of(pid: int) -> int:
    """Return the process id of the worker of the server in process `pid`."""
    return next(child for child in children_of(pid) if Path(f"/proc/{child}/comm").read_text() == "descant-worker\n")


def is_alive(pid: int) -> bool:
    """Return whether a process is running. A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
