"""From a `generate` message to sequences in the scheduler: check, tokenize, resolve the adapter, submit.

Every fault here ends one stream with a typed error and touches nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Iterable

import anyio
import anyio.to_thread

from descant.actor.errors import ActorError, AskTimeout
from descant.contract.plan import NO_LOGPROBS
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.messages import CancelRequest, ResolveAdapters, Submit
from descant.model.tokenizer import StopStrings
from descant.requests.combination import check, from_lorax
from descant.requests.progress import break_silence
from descant.requests.services import Services
from descant.requests.time_limits import TimeLimits
from descant.scheduling.sequence import Sequence, SequenceRequest
from descant.scheduling.speculation.drafting import Drafter
from descant.sessions.outgoing import Outgoing
from descant.sessions.stream import Stream
from descant_client.errors import DeadlineExceeded, DescantError, InternalError, InvalidRequest
from descant_client.lifecycle import Combination
from descant_client.protocol import Accepted, Generate, Progress
from descant_client.speculation import Speculation, SpeculationChoice, named_heads
from descant_client.wire import WeightedAdapter

logger = logging.getLogger(__name__)

LONG_PROMPT_CHARS = 1024  # beyond this tokenizing takes more than a millisecond
SUBMIT_TIMEOUT_S = 60.0
RESOLVE_TIMEOUT_S = 900.0
DEFAULT_HEADS_TIMEOUT_S = 1.0  # then a request for the base goes without them
MAX_STOP_CHARS = 1024  # the end of the text is compared with every beginning of a stop string


async def start_stream(services: Services, request: Generate, stream: Stream, principal: Principal) -> None:
    """Bring one request to the scheduler; whatever goes wrong ends its stream with an error."""
    try:
        time_limits = TimeLimits.of(request, services.config.scheduling, time.monotonic())
        check_request(request, services.config.server.max_choices)
        prompt_ids, adapter = list[int](), None  # if it is cancelled meanwhile
        with time_limits.bounding_the_wait(), stream.preparing():
            prompt_ids, adapter = await _prepare(services, request, stream, principal)
        sequences = _sequences(services, request, stream, principal, prompt_ids, adapter, time_limits)
        accepted = Accepted(
            request_id=request.request_id,
            seed=sequences[0].request.seed,
            num_prompt_tokens=len(prompt_ids),
            adapter_digest=None if adapter is None or sequences[0].request.is_adapter_optional else adapter.digest,
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
        give_up(services, stream, error)
    except Exception as exc:
        logger.exception("request %s failed", stream.key)
        give_up(services, stream, InternalError(type(exc).__name__))


def _end_cancelled(stream: Stream, accepted: Accepted, sequences: Iterable[Sequence]) -> None:
    """End what never reached the scheduler as the scheduler would have."""
    stream.accept(accepted)
    for sequence in sequences:
        sequence.output.finish_reason = "cancelled"
        stream.end(sequence)


def give_up(services: Services, outgoing: Outgoing, error: DescantError) -> None:
    """End what may or may not have reached the scheduler with an error."""
    outgoing.fail(error)
    with contextlib.suppress(ActorError):
        services.scheduler.tell_nowait(CancelRequest(outgoing.key))


def check_request(request: Generate, max_choices: int) -> None:
    """Check what the types on the wire cannot say.

    Raises:
        InvalidRequest: naming the field.
    """
    given = [name for name in ("prompt", "token_ids", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest("prompt", f"give exactly one of prompt, token_ids and messages, not {given or 'none'}.")
    members, combination = _members(request)
    speculation = request.speculation
    if isinstance(speculation, Speculation) and (reason := speculation.contradiction()):
        raise InvalidRequest("speculation", reason)
    if request.n > max_choices:
        raise InvalidRequest("n", f"at most {max_choices} choices per request.")
    if any(len(stop) > MAX_STOP_CHARS for stop in request.stop):
        raise InvalidRequest("stop", f"at most {MAX_STOP_CHARS} characters each.")
    sampling = request.sampling
    numbers = [sampling.temperature, sampling.top_p, sampling.min_p, sampling.typical_p, sampling.repetition_penalty]
    numbers += [*sampling.logit_bias.values(), *[member.weight for member in members]]
    if not all(math.isfinite(number) for number in numbers):
        raise InvalidRequest("sampling", "every number must be finite.")
    check(combination, members)


def check_prompt(prompt_ids: list[int], max_context: int, vocab_size: int) -> None:
    """Check a prompt against the model. Raises InvalidRequest."""
    if not prompt_ids:
        raise InvalidRequest("prompt", "it has no tokens.")
    if len(prompt_ids) >= max_context:
        reason = f"{len(prompt_ids)} tokens; at most {max_context - 1} leave room for an answer."
        raise InvalidRequest("prompt", reason)
    check_tokens("token_ids", prompt_ids, vocab_size)


def check_tokens(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Check ids against the vocabulary. Raises InvalidRequest, naming the field."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(field, f"{largest} is outside the vocabulary of {vocab_size}.")


async def _prepare(
    services: Services, request: Generate, stream: Stream, principal: Principal
) -> tuple[list[int], AdapterVersion | None]:
    model = await services.model.ready()
    prompt_ids = await _prompt_ids(services, request)
    check_prompt(prompt_ids, model.limits.max_context, model.limits.vocab_size)
    check_tokens("logit_bias", request.sampling.logit_bias, model.limits.vocab_size)
    return prompt_ids, await _adapter(services, request, stream, principal)


async def _prompt_ids(services: Services, request: Generate) -> list[int]:
    tokenizer = services.tokenizer
    if request.token_ids is not None:
        return request.token_ids
    if request.messages is not None:  # a template may do anything: never on the loop
        return await anyio.to_thread.run_sync(tokenizer.encode_chat, request.messages)
    assert request.prompt is not None, "check_request has seen to it"
    if len(request.prompt) > LONG_PROMPT_CHARS:
        return await anyio.to_thread.run_sync(tokenizer.encode, request.prompt)
    return tokenizer.encode(request.prompt)


def _members(request: Generate) -> tuple[tuple[WeightedAdapter, ...], Combination]:
    """Return the adapters a request names, none for the base alone, and how they become one. Raises InvalidRequest."""
    given = [name for name in ("adapter", "adapters", "merged_adapters") if getattr(request, name) is not None]
    if len(given) > 1:
        raise InvalidRequest(given[1], f"give at most one of adapter, adapters and merged_adapters, not {given}.")
    if request.combination is not None and request.adapters is None:
        raise InvalidRequest("combination", "it says how `adapters` become one, and there are none.")
    if request.merged_adapters is not None:
        return from_lorax(request.merged_adapters)
    if request.adapter is not None:
        return (WeightedAdapter(request.adapter, 1.0),), Combination()
    return tuple(request.adapters or ()), request.combination or Combination()


def _speculation(request: Generate, default: SpeculationChoice) -> Speculation | None:
    """Return how a request runs ahead of itself; None: not at all."""
    choice = default if request.speculation is None else request.speculation
    if choice == "auto":
        choice = default if isinstance(default, Speculation) else Speculation()
    return choice if isinstance(choice, Speculation) else None


def _takes_default_heads(request: Generate, speculation: Speculation | None) -> bool:
    """Whether a request for the base alone is for whatever draft heads the server has for it."""
    has_adapter = bool(_members(request)[0])
    return (
        speculation is not None
        and bool(speculation.heads)
        and not has_adapter
        and named_heads(request.speculation) is None
    )


async def _adapter(
    services: Services, request: Generate, stream: Stream, principal: Principal
) -> AdapterVersion | None:
    members, combination = _members(request)
    heads = named_heads(request.speculation)
    if members or heads is not None:
        lease = services.leases.lease()
        stream.hold(lease)
        question = ResolveAdapters(members, principal, lease, combination, request.adapter_source, heads)
        return await _resolve(services, stream, question, RESOLVE_TIMEOUT_S)
    speculation = _speculation(request, services.config.scheduling.speculation)
    return await _default_heads(services, stream) if _takes_default_heads(request, speculation) else None


async def _default_heads(services: Services, stream: Stream) -> AdapterVersion | None:
    if not services.default_heads.are_there or not services.model.engine.limits.max_draft_nodes:
        return None
    lease = services.leases.lease()
    stream.hold(lease)
    try:
        return await _resolve(services, stream, services.default_heads.question(lease), DEFAULT_HEADS_TIMEOUT_S)
    except DescantError as error:
        services.default_heads.failed(error)
        return None


async def _resolve(
    services: Services, stream: Stream, question: ResolveAdapters, timeout_s: float
) -> AdapterVersion | None:
    try:
        return await break_silence(
            services.registry.ask(question, timeout=timeout_s),
            lambda: stream.note(Progress(request_id=stream.request_id, stage="preparing_adapter")),
        )
    except AskTimeout as exc:
        raise DeadlineExceeded("preparing the adapter", timeout_s) from exc


def _sequences(
    services: Services,
    request: Generate,
    stream: Stream,
    principal: Principal,
    prompt_ids: list[int],
    adapter: AdapterVersion | None,
    time_limits: TimeLimits,
) -> list[Sequence]:
    seed = secrets.randbits(63) if request.seed is None else request.seed
    stop_token_ids = set(request.stop_token_ids)
    if not request.ignore_eos:
        stop_token_ids |= set(services.model.eos_token_ids)
    speculation = _speculation(request, services.config.scheduling.speculation)
    scope = principal.name if services.config.scheduling.cache_scope == "principal" else ""
    prompt_logprobs = NO_LOGPROBS if request.prompt_logprobs is None else request.prompt_logprobs
    return [
        Sequence(
            services.sequences.next_id(),
            SequenceRequest(
                request_id=stream.key,
                prompt_ids=prompt_ids,
                sampling=request.sampling,
                seed=seed,
                sink=stream,
                choice=choice,
                max_tokens=request.max_tokens,
                stop_token_ids=frozenset(stop_token_ids),
                stop=tuple(request.stop),
                num_logprobs=NO_LOGPROBS if request.logprobs is None else request.logprobs,
                num_prompt_logprobs=NO_LOGPROBS if choice else prompt_logprobs,
                adapter=adapter,
                is_adapter_optional=_takes_default_heads(request, speculation),
                cache_scope=scope,
                principal=principal.name,
                weight=principal.weight,
                max_queued=principal.max_queued,
                marks_guesses=request.mark_guessed,
                received_s=time_limits.received_s,
                queue_deadline_s=time_limits.queue_deadline_s,
                deadline_s=time_limits.deadline_s,
            ),
            stopper=StopStrings(services.tokenizer, request.stop) if request.stop else None,
            drafter=None if speculation is None else Drafter(speculation),
        )
        for choice in range(request.n)
    ]
