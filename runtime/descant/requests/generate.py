"""From a `generate` message to sequences in the scheduler: check, tokenize, resolve the adapter, submit.

Every error here ends one stream with a typed error and touches nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable

import anyio.to_thread

from descant.actor.errors import ActorError, AskTimeout
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.messages import CancelRequest, ResolveAdapters, Submit
from descant.requests.checked import CheckedRequest, check_prompt, check_tokens
from descant.requests.progress import report_if_slow
from descant.requests.sequences import sequences_of
from descant.requests.services import Services
from descant.scheduling.sequence import Sequence
from descant.sessions.outgoing import Outgoing
from descant.sessions.stream import OutgoingStream
from descant_client.errors import DeadlineExceeded, DescantError, InternalError
from descant_client.protocol import Accepted, Generate, Progress

logger = logging.getLogger(__name__)

LONG_PROMPT_CHARS = 1024  # a longer prompt takes more than a millisecond to tokenize, so a thread does it
SUBMIT_TIMEOUT_S = 60.0
RESOLVE_TIMEOUT_S = 900.0
DEFAULT_HEADS_TIMEOUT_S = 1.0  # after it a request for the base runs without draft heads


async def start_stream(services: Services, message: Generate, stream: OutgoingStream, principal: Principal) -> None:
    """Check a request and submit its sequences to the scheduler. Any error ends the stream and is not raised."""
    try:
        request = CheckedRequest.of(message, services.config, time.monotonic())
        prompt_ids, adapter = list[int](), None  # if it is cancelled meanwhile
        with request.time_limits.bounding_preparation(), stream.preparing():
            prompt_ids, adapter = await _prepare(services, request, stream, principal)
        sequences = sequences_of(services, request, stream, principal, prompt_ids, adapter)
        accepted = Accepted(
            request_id=stream.request_id,
            seed=request.seed,
            num_prompt_tokens=len(prompt_ids),
            adapter_digest=None if adapter is None or request.takes_default_heads else adapter.digest,
        )
        stream.expect(sequences, services.tokenizer)
        if stream.is_cancelled:
            _end_cancelled(stream, accepted, sequences)
            return
        await services.scheduler.ask(Submit(tuple(sequences)), timeout=SUBMIT_TIMEOUT_S)
        stream.is_submitted = True
        stream.accept(accepted)
        if stream.is_cancelled:  # while it was being submitted
            await services.scheduler.tell(CancelRequest(stream.key))
    except DescantError as error:
        fail_request(services, stream, error)
    except Exception as exc:
        logger.exception("request %s failed", stream.key)
        fail_request(services, stream, InternalError(type(exc).__name__))


def _end_cancelled(stream: OutgoingStream, accepted: Accepted, sequences: Iterable[Sequence]) -> None:
    """End sequences that never reached the scheduler as the scheduler would have."""
    stream.accept(accepted)
    for sequence in sequences:
        sequence.output.finish_reason = "cancelled"
        stream.end(sequence)


def fail_request(services: Services, outgoing: Outgoing, error: DescantError) -> None:
    """End a request with an error, and cancel its sequences in case the scheduler has them."""
    outgoing.fail(error)
    with contextlib.suppress(ActorError):
        services.scheduler.tell_nowait(CancelRequest(outgoing.key))


async def _prepare(
    services: Services, request: CheckedRequest, stream: OutgoingStream, principal: Principal
) -> tuple[list[int], AdapterVersion | None]:
    """Return the prompt's ids and the adapter's version, both checked against the model."""
    engine = await services.model.ready()
    prompt_ids = await _prompt_ids(services, request.message)
    check_prompt(prompt_ids, engine.limits.max_context, engine.limits.vocab_size)
    check_tokens("logit_bias", request.message.sampling.logit_bias, engine.limits.vocab_size)
    return prompt_ids, await _adapter(services, request, stream, principal)


async def _prompt_ids(services: Services, message: Generate) -> list[int]:
    tokenizer = services.tokenizer
    if message.token_ids is not None:
        return message.token_ids
    if message.messages is not None:  # a template may take any time, so never on the loop
        return await anyio.to_thread.run_sync(tokenizer.encode_chat, message.messages)
    assert message.prompt is not None, "CheckedRequest has checked it"
    if len(message.prompt) > LONG_PROMPT_CHARS:
        return await anyio.to_thread.run_sync(tokenizer.encode, message.prompt)
    return tokenizer.encode(message.prompt)


async def _adapter(
    services: Services, request: CheckedRequest, stream: OutgoingStream, principal: Principal
) -> AdapterVersion | None:
    if request.members or request.named_heads is not None:
        lease = services.leases.lease()
        stream.keep_until_ended(lease)
        source = request.message.adapter_source
        question = ResolveAdapters(request.members, principal, lease, request.combination, source, request.named_heads)
        return await _resolve(services, stream, question, RESOLVE_TIMEOUT_S)
    return await _default_heads(services, stream) if request.takes_default_heads else None


async def _default_heads(services: Services, stream: OutgoingStream) -> AdapterVersion | None:
    if not services.default_heads.is_available or not services.model.engine.limits.max_draft_nodes:
        return None
    lease = services.leases.lease()
    stream.keep_until_ended(lease)
    try:
        return await _resolve(services, stream, services.default_heads.question(lease), DEFAULT_HEADS_TIMEOUT_S)
    except DescantError as error:
        services.default_heads.on_failed(error)
        return None


async def _resolve(
    services: Services, stream: OutgoingStream, question: ResolveAdapters, timeout_s: float
) -> AdapterVersion | None:
    try:
        return await report_if_slow(
            services.registry.ask(question, timeout=timeout_s),
            lambda: stream.note(Progress(request_id=stream.request_id, stage="preparing_adapter")),
        )
    except AskTimeout as exc:
        raise DeadlineExceeded("preparing the adapter", timeout_s) from exc
