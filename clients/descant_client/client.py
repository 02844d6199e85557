"""The client of a server, and `connect`, which makes one."""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypedDict, Unpack, cast

import msgspec

from descant_client.adapters import Adapter, AdapterCatalog, reference, weighted
from descant_client.connection import Connection
from descant_client.dialer import Backoff, Dialer
from descant_client.errors import DescantError, InvalidRequest
from descant_client.lifecycle import Combination
from descant_client.protocol import (
    JSON_SUBPROTOCOL,
    SUBPROTOCOLS,
    ChatMessage,
    Generate,
    Hello,
    ListModels,
    ModelInfo,
    Models,
    SamplingParams,
)
from descant_client.question import Question
from descant_client.speculation import SpeculationChoice
from descant_client.stream import Stream
from descant_client.task_groups import running_beside
from descant_client.transcript import Transcript
from descant_client.wire import AdapterSource

Prompt = str | Sequence[int] | Sequence[ChatMessage | Mapping[str, Any]]


class SamplingOptions(TypedDict, total=False):
    """The fields of `protocol.SamplingParams`, as keywords of `Client.generate`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]


class Client:
    """A session with a server, made by `connect`. Any number of tasks may use it at once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.adapters = AdapterCatalog(connection)

    @property
    def hello(self) -> Hello:
        """The server's latest hello: version, limits, base model."""
        return self._connection.hello

    async def models(self) -> list[ModelInfo]:
        """Return the base model, in a list of one. Cancelling is safe. Raises as `adapters.list`."""
        answer = await Question(ListModels(self._connection.new_request_id()), Models).ask(self._connection)
        return answer.models

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str | Adapter | None = None,
        adapters: Sequence[tuple[str | Adapter, float]] | None = None,
        combination: Combination | None = None,
        adapter_source: AdapterSource | None = None,
        max_tokens: int | None = None,
        n: int = 1,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        queue_timeout_s: float | None = None,
        timeout_s: float | None = None,
        speculation: SpeculationChoice | None = None,
        mark_guessed: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Queue a request for a generation and return its stream, without waiting.

        `prompt` is text, token ids or chat messages (`ChatMessage`, or mappings of `role` and `content`). `adapters`
        are weighted members: they are summed, or combined by `combination`. A local path is made absolute, as by
        `adapters.reference`. `protocol.Generate` and `protocol.SamplingParams` document the other parameters. An error
        of the server is raised by the stream.

        Raises:
            InvalidRequest: a chat message is malformed.
            AdapterNotFound: an adapter was destroyed through its handle.
        """
        request = Generate(
            request_id=self._connection.new_request_id(),
            adapter=None if adapter is None else reference(adapter, adapter_source),
            adapters=None if adapters is None else weighted(adapters, adapter_source),
            combination=combination,
            adapter_source=adapter_source,
            sampling=SamplingParams(**sampling),
            max_tokens=max_tokens,
            n=n,
            seed=seed,
            stop=list(stop),
            stop_token_ids=_ints(stop_token_ids),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            queue_timeout_s=queue_timeout_s,
            timeout_s=timeout_s,
            speculation=speculation,
            mark_guessed=mark_guessed,
        )
        return self._start(_with_prompt(request, prompt))

    def _start(self, request: Generate) -> Stream:
        transcript = Transcript(request, self._connection.send)
        self._connection.add(transcript)
        return Stream(transcript)


@asynccontextmanager
async def connect(
    uri: str,
    token: str | None = None,
    *,
    encoding: Literal["msgpack", "json"] = "msgpack",
    reconnect_s: float = 60.0,
    backoff: Backoff | None = None,
) -> AsyncIterator[Client]:
    """Connect to a server at `ws://host:port` (or `wss`, `http`, `https`) for the length of an `async with`.

    A dropped connection is opened again, for up to `reconnect_s` seconds, and every stream continues where it was.
    After that, all requests, later ones included, fail with `ConnectionLost`, or with `Unauthorized` if the server no
    longer accepts `token`. Leaving the block cancels open streams at the server.

    Raises:
        InvalidRequest: `uri` is not a server's address.
        ConnectionLost: no server answers. The first attempt is not repeated.
        Unauthorized: the server refuses `token`.
        DescantError: another refusal of the server, such as `Overloaded` or `ModelInvalid`.
    """
    subprotocols = (JSON_SUBPROTOCOL,) if encoding == "json" else SUBPROTOCOLS
    try:
        connection = Connection(Dialer(uri, token, subprotocols, reconnect_s, backoff or Backoff()))
        await connection.open()
    except DescantError as error:
        raise error.with_traceback(None) from None  # the sentence has the reason: an uncaught error ends with it
    try:
        async with running_beside(connection.run):
            yield Client(connection)
    finally:
        await connection.close()


def _with_prompt(request: Generate, prompt: Prompt) -> Generate:
    if isinstance(prompt, str):
        return msgspec.structs.replace(request, prompt=prompt)
    if prompt and isinstance(prompt[0], ChatMessage | Mapping):
        try:
            messages = msgspec.convert(prompt, list[ChatMessage])
        except msgspec.ValidationError as exc:
            raise InvalidRequest("messages", f"{exc}.") from exc
        return msgspec.structs.replace(request, messages=messages)
    return msgspec.structs.replace(request, token_ids=_ints(cast("Sequence[int]", prompt)))


def _ints(token_ids: Sequence[int]) -> list[int]:
    return [operator.index(token_id) for token_id in token_ids]  # NumPy integers too, which the wire cannot encode
