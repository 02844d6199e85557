"""From a checked request to the sequences that the scheduler runs, one for each choice."""

from __future__ import annotations

from descant.contract.plan import NO_LOGPROBS
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.model.tokenizer import StopStrings
from descant.requests.checked import CheckedRequest
from descant.requests.services import Services
from descant.scheduling.sequence import Sequence, SequenceRequest
from descant.scheduling.speculation.drafting import Drafter
from descant.sessions.stream import OutgoingStream


def sequences_of(
    services: Services,
    request: CheckedRequest,
    stream: OutgoingStream,
    principal: Principal,
    prompt_ids: list[int],
    adapter: AdapterVersion | None,
) -> list[Sequence]:
    """Return a new sequence for each choice of a request, with `stream` as its sink."""
    message, limits = request.message, request.time_limits
    stop_token_ids = request.stop_token_ids(services.model.eos_token_ids)
    scope = principal.name if services.config.scheduling.cache_scope == "principal" else ""
    prompt_logprobs = NO_LOGPROBS if message.prompt_logprobs is None else message.prompt_logprobs
    return [
        Sequence(
            services.sequences.next_id(),
            SequenceRequest(
                request_id=stream.key,
                prompt_ids=prompt_ids,
                sampling=message.sampling,
                seed=request.seed,
                sink=stream,
                choice=choice,
                max_tokens=message.max_tokens,
                stop_token_ids=stop_token_ids,
                stop=tuple(message.stop),
                num_logprobs=NO_LOGPROBS if message.logprobs is None else message.logprobs,
                num_prompt_logprobs=NO_LOGPROBS if choice else prompt_logprobs,
                adapter=adapter,
                is_adapter_optional=request.takes_default_heads,
                cache_scope=scope,
                principal=principal.name,
                weight=principal.weight,
                max_queued=principal.max_queued,
                marks_guesses=message.mark_guessed,
                received_s=limits.received_s,
                queue_deadline_s=limits.queue_deadline_s,
                deadline_s=limits.deadline_s,
            ),
            stopper=StopStrings(services.tokenizer, message.stop) if message.stop else None,
            drafter=None if request.speculation is None else Drafter(request.speculation),
        )
        for choice in range(message.n)
    ]
