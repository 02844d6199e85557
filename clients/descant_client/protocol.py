"""The wire: the messages between a client and the server over one WebSocket.

One tagged message per frame. The subprotocol chosen in the handshake fixes the encoding: `descant.v1.json` (text
frames) or `descant.v1.msgpack` (binary frames). The first message is the server's `hello`, or an `error` in its place,
after which the server closes the socket. Many streams share a connection and are told apart by `request_id`, which the
client chooses, unique within its session. The server refuses unknown fields by name. A client ignores unknown fields
and messages, so that it works with a newer server. The messages that change adapters are in `lifecycle`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from descant_client.errors import InvalidRequest
from descant_client.lifecycle import AdapterChange, Adapters, Combination, Members
from descant_client.speculation import SpeculationChoice
from descant_client.timings import Timings
from descant_client.wire import (
    AdapterSource,
    ClientMessageBase,
    Count,
    RequestId,
    Seconds,
    Seed,
    ServerMessageBase,
    Strict,
    TokenId,
    Wire,
    reason_and_path,
)

JSON_SUBPROTOCOL = "descant.v1.json"
MSGPACK_SUBPROTOCOL = "descant.v1.msgpack"
SUBPROTOCOLS = (MSGPACK_SUBPROTOCOL, JSON_SUBPROTOCOL)
PROTOCOL_VERSION = "1.0"

FinishReason = Literal["stop", "length", "cancelled", "error"]


class SamplingParams(Strict, frozen=True):
    """How to draw a token from the logits: by default from the model's own distribution; greedily at `temperature` 0.

    Processing order: penalties, bias, temperature, top-k, top-p, min-p, typical-p. The repetition penalty counts tokens
    of prompt and output, the presence and frequency penalties tokens of the output only.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    top_k: Count = 0  # 0: off
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    typical_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[TokenId, float], msgspec.Meta(max_length=1024)] = {}


class ChatMessage(Strict, frozen=True):
    """One turn of a conversation. The model's chat template makes the prompt of all turns."""

    role: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    content: str


# ---- client messages ----------------------------------------------------------------------------------------------


class MergedAdapters(Strict, frozen=True):
    """LoRAX's form of a combination, computed as PEFT does. Without weights, all are 1."""

    ids: Annotated[list[str], msgspec.Meta(min_length=1, max_length=64)]
    weights: list[float] = []
    merge_strategy: str | None = None  # "linear" (the default), "ties", "dare_linear" or "dare_ties", in any case
    density: float = 0.0  # required by all but "linear"
    majority_sign_method: str | None = None  # "total" (the default) or "frequency"


class Generate(ClientMessageBase, frozen=True):
    """Start a stream. Exactly one of `prompt`, `token_ids` and `messages` is given.

    At most one of `adapter`, `adapters` (with a `combination`, if not their weighted sum) and `merged_adapters` is
    given. The answer is `accepted`, then `delta`s, then `done`; or one `error`, at any point.
    """

    request_id: RequestId
    prompt: str | None = None
    token_ids: list[TokenId] | None = None
    messages: list[ChatMessage] | None = None
    adapter: str | None = None
    adapters: Members | None = None
    combination: Combination | None = None
    merged_adapters: MergedAdapters | None = None
    adapter_source: AdapterSource | None = None
    sampling: SamplingParams = SamplingParams()
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None  # None: to the end of the context
    n: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    seed: Seed | None = None  # None: the server draws one and reports it
    stop: Annotated[list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(max_length=16)] = []
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=64)] = []
    ignore_eos: bool = False
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None  # alternatives per output token
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None  # likewise per prompt token
    queue_timeout_s: Seconds | None = None  # until first scheduled; None: the server's setting
    timeout_s: Seconds | None = None  # until its end; None: the server's setting
    speculation: SpeculationChoice | None = None  # None: the server's setting
    mark_guessed: bool = False  # fill in `Delta.guessed`


class Cancel(ClientMessageBase, frozen=True):
    """End a stream. The answer is its `done`, with finish reason `cancelled`."""

    request_id: RequestId


class Resume(ClientMessageBase, frozen=True):
    """Continue a stream after a reconnect. `have` maps each choice to the number of its tokens already received."""

    request_id: RequestId
    have: dict[Count, Count] = {}


class Ack(ClientMessageBase, frozen=True):
    """Release a finished stream, which can then no longer be resumed."""

    request_id: RequestId


class ListAdapters(ClientMessageBase, frozen=True, tag="adapter.list"):
    """Ask for the adapters that the caller may use, in order of registration."""

    request_id: RequestId


class OpenAdapter(ClientMessageBase, frozen=True, tag="adapter.open"):
    """Ask for one adapter by name. The list in the answer is empty if there is none."""

    request_id: RequestId
    name: str


class ListModels(ClientMessageBase, frozen=True, tag="models.list"):
    """Ask for the base model."""

    request_id: RequestId


ClientMessage = Generate | Cancel | Resume | Ack | ListAdapters | OpenAdapter | ListModels | AdapterChange

# ---- server messages ----------------------------------------------------------------------------------------------


class ModelInfo(Wire, frozen=True):
    """The base model as clients see it."""

    id: str
    max_context: int  # tokens, prompt and output together
    vocab_size: int
    dtype: str
    device: str


class Limits(Wire, frozen=True):
    """Limits of the server on this connection."""

    max_frame_bytes: int
    max_streams: int  # unfinished streams per session
    max_choices: int  # of `Generate.n`
    resume_window_s: float  # time that a session without a connection is kept


class Hello(ServerMessageBase, frozen=True):
    """The server's first message. Reconnect with `?session=<session>` to resume its streams."""

    protocol: str
    server: str
    session: str
    features: list[str]
    limits: Limits
    model: ModelInfo


class Accepted(ServerMessageBase, frozen=True):
    """The request is valid and queued. `adapter_digest` is the version that it runs with, None for the base.

    Draft heads that the server uses for the base are not reported here.
    """

    request_id: str
    seed: int
    num_prompt_tokens: int
    adapter_digest: str | None = None


class Progress(ServerMessageBase, frozen=True):
    """The stage of a request that takes long.

    It is `preparing_adapter` for a generation before its first token, and `loading`, `merging`, `saving` or `changing`
    for a change to an adapter.
    """

    request_id: str
    stage: str  # not a closed set: a newer server may have more stages


class TopLogprob(Wire, frozen=True):
    """One alternative to a token."""

    token_id: int
    text: str
    logprob: float


class TokenLogprob(Wire, frozen=True):
    """The log-probability of a token, and of alternatives: natural log, of the model's unprocessed distribution."""

    token_id: int
    text: str
    logprob: float
    top: list[TopLogprob] = []


class Delta(ServerMessageBase, frozen=True):
    """New tokens of one choice. `index` is the offset of the first of them in the output of the choice.

    `text` is the text that these tokens complete. It may be empty while a UTF-8 character or a possible stop string is
    incomplete, and it may contain text of earlier tokens. The concatenated texts, with that of `ChoiceEnd`, are the
    whole text of the choice. With `Generate.mark_guessed`, `guessed` are the indices in the output of those tokens that
    were accepted from drafts.
    """

    request_id: str
    choice: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    guessed: list[int] | None = None


class ChoiceEnd(Wire, frozen=True):
    """The end of one choice. `text` is the rest of its text, held back until now."""

    choice: int
    finish_reason: FinishReason
    num_tokens: int
    text: str = ""


class Usage(Wire, frozen=True):
    """Token counts of a request, all choices together; `num_cached_tokens` of the prompt were in the prefix cache."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


class Done(ServerMessageBase, frozen=True):
    """The stream is complete."""

    request_id: str
    seed: int
    choices: list[ChoiceEnd]
    usage: Usage
    timings: Timings
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None for the first token: it has no prediction


class Error(ServerMessageBase, frozen=True):
    """A typed error (`descant_client.errors`). With a `request_id`, it ends that stream or request only."""

    code: str
    message: str
    request_id: str | None = None
    data: dict[str, Any] = {}


class Models(ServerMessageBase, frozen=True):
    """Answer to `models.list`."""

    request_id: str
    models: list[ModelInfo]


ServerMessage = Hello | Accepted | Progress | Delta | Done | Error | Adapters | Models

# ---- encoding -----------------------------------------------------------------------------------------------------

_JSON_CLIENT = msgspec.json.Decoder(ClientMessage)
_MSGPACK_CLIENT = msgspec.msgpack.Decoder(ClientMessage)
_JSON_SERVER = msgspec.json.Decoder(ServerMessage)
_MSGPACK_SERVER = msgspec.msgpack.Decoder(ServerMessage)
_SERVER_TAGS = frozenset(str(kind.__struct_config__.tag) for kind in ServerMessage.__args__)


def encoder_for(subprotocol: str) -> Callable[[ClientMessage | ServerMessage], str | bytes]:
    """Return the function from a message to a frame: str (a text frame) for JSON, bytes for msgpack."""
    if subprotocol == JSON_SUBPROTOCOL:
        return lambda message: msgspec.json.encode(message).decode()
    return msgspec.msgpack.encode


def decode_client(frame: str | bytes) -> ClientMessage:
    """Decode a client's frame, JSON if it is text, msgpack if binary. Raises InvalidRequest, which names the field."""
    try:
        return _JSON_CLIENT.decode(frame) if isinstance(frame, str) else _MSGPACK_CLIENT.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        reason, path = reason_and_path(exc)
        raise InvalidRequest(path or "frame", reason) from exc


def request_id_of(frame: str | bytes) -> str | None:
    """Return the request id of a frame that cannot be decoded, so that its error can name the request.

    Return None if the frame has none, or is not readable at all.
    """
    try:
        return _decode_envelope(frame).request_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decode_server(frame: str | bytes) -> ServerMessage | None:
    """Decode a server's frame. Return None for an unknown type of message. Raises msgspec.DecodeError."""
    try:
        return _JSON_SERVER.decode(frame) if isinstance(frame, str) else _MSGPACK_SERVER.decode(frame)
    except msgspec.ValidationError:
        if _decode_envelope(frame).type not in _SERVER_TAGS:
            return None
        raise


class _Envelope(msgspec.Struct):
    type: str | None = None
    request_id: RequestId | None = None


def _decode_envelope(frame: str | bytes) -> _Envelope:
    if isinstance(frame, str):
        return msgspec.json.decode(frame, type=_Envelope)
    return msgspec.msgpack.decode(frame, type=_Envelope)
