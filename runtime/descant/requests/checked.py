"""`CheckedRequest`: a `generate` message after its checks, with defaults resolved."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from descant.config import Config
from descant.requests.combination import check_combination, from_lorax
from descant.requests.time_limits import TimeLimits
from descant_client.errors import InvalidRequest
from descant_client.lifecycle import Combination
from descant_client.protocol import Generate
from descant_client.speculation import Speculation, SpeculationChoice, named_heads
from descant_client.wire import WeightedAdapter

MAX_STOP_CHARS = 1024  # the end of the text is compared with every beginning of a stop string


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A valid request and everything that follows from it and the configuration alone.

    `message` is the request as it was sent. Fields of it that have a resolved form here must not be read from it.
    """

    message: Generate
    members: tuple[WeightedAdapter, ...]  # adapters it names; empty for the base alone
    combination: Combination  # how the members become one adapter
    named_heads: str | None  # adapter whose draft heads the request names
    speculation: Speculation | None  # None: plain decoding
    takes_default_heads: bool  # whether it uses the draft heads that the configuration names for the base
    seed: int  # drawn here if the request has none
    time_limits: TimeLimits

    @classmethod
    def of(cls, message: Generate, config: Config, received_s: float) -> Self:
        """Check rules that the wire types cannot express, and resolve defaults.

        `received_s` is the time of arrival on the scheduler's clock (`time.monotonic`).

        Raises:
            InvalidRequest: naming the field.
        """
        _check_prompt_source(message)
        members, combination = _members(message)
        _check_limits(message, members, config.server.max_choices)
        check_combination(combination, members)
        speculation = _resolve_speculation(message.speculation, config.scheduling.speculation)
        heads = named_heads(message.speculation)
        return cls(
            message=message,
            members=members,
            combination=combination,
            named_heads=heads,
            speculation=speculation,
            takes_default_heads=not members and heads is None and speculation is not None and bool(speculation.heads),
            seed=secrets.randbits(63) if message.seed is None else message.seed,
            time_limits=TimeLimits.of(message, config.scheduling, received_s),
        )

    def stop_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Return the ids that end an output: the request's own, and the model's unless they are ignored."""
        return frozenset(self.message.stop_token_ids).union(() if self.message.ignore_eos else eos_token_ids)


def check_prompt(prompt_ids: list[int], max_context: int, vocab_size: int) -> None:
    """Check a tokenized prompt against the model. Raises InvalidRequest."""
    if not prompt_ids:
        raise InvalidRequest("prompt", "it has no tokens.")
    if len(prompt_ids) >= max_context:
        reason = f"{len(prompt_ids)} tokens; at most {max_context - 1} leave room for an answer."
        raise InvalidRequest("prompt", reason)
    check_tokens("token_ids", prompt_ids, vocab_size)


def check_tokens(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Check token ids against the vocabulary. Raises InvalidRequest, naming the field."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(field, f"{largest} is outside the vocabulary of {vocab_size}.")


def _check_prompt_source(message: Generate) -> None:
    given = [name for name in ("prompt", "token_ids", "messages") if getattr(message, name) is not None]
    if len(given) != 1:
        raise InvalidRequest("prompt", f"give exactly one of prompt, token_ids and messages, not {given or 'none'}.")


def _members(message: Generate) -> tuple[tuple[WeightedAdapter, ...], Combination]:
    """Return the adapters a request names, none for the base alone, and how they become one. Raises InvalidRequest."""
    given = [name for name in ("adapter", "adapters", "merged_adapters") if getattr(message, name) is not None]
    if len(given) > 1:
        raise InvalidRequest(given[1], f"give at most one of adapter, adapters and merged_adapters, not {given}.")
    if message.combination is not None and message.adapters is None:
        raise InvalidRequest("combination", "it says how `adapters` become one, and there are none.")
    if message.merged_adapters is not None:
        return from_lorax(message.merged_adapters)
    if message.adapter is not None:
        return (WeightedAdapter(message.adapter, 1.0),), Combination()
    return tuple(message.adapters or ()), message.combination or Combination()


def _check_limits(message: Generate, members: Iterable[WeightedAdapter], max_choices: int) -> None:
    if isinstance(message.speculation, Speculation) and (reason := message.speculation.contradiction()):
        raise InvalidRequest("speculation", reason)
    if message.n > max_choices:
        raise InvalidRequest("n", f"at most {max_choices} choices per request.")
    if any(len(stop) > MAX_STOP_CHARS for stop in message.stop):
        raise InvalidRequest("stop", f"at most {MAX_STOP_CHARS} characters each.")
    sampling = message.sampling
    numbers = [sampling.temperature, sampling.top_p, sampling.min_p, sampling.typical_p, sampling.repetition_penalty]
    numbers += [*sampling.logit_bias.values(), *[member.weight for member in members]]
    if not all(math.isfinite(number) for number in numbers):
        raise InvalidRequest("sampling", "every number must be finite.")


def _resolve_speculation(choice: SpeculationChoice | None, default: SpeculationChoice) -> Speculation | None:
    """Return the settings of a request, given the server's default; None: plain decoding."""
    resolved = default if choice is None else choice
    if resolved == "auto":
        resolved = default if isinstance(default, Speculation) else Speculation()
    return resolved if isinstance(resolved, Speculation) else None
