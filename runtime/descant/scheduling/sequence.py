"""`Sequence`: the state of one choice of one request; `SequenceTable`: all live sequences.

A sequence's tokens are authoritative: its blocks, adapter slot and row in the engine can be lost and made again from
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from descant.contract.plan import NO_ADAPTER, NO_LOGPROBS, AdapterSpan, LogprobRows, Row, unpack_floats, unpack_ints
from descant.contract.version import AdapterVersion
from descant.scheduling.speculation.drafting import Drafter
from descant_client.errors import DescantError
from descant_client.protocol import FinishReason, SamplingParams

Status = Literal["waiting", "running", "parked", "finished"]


class Stopper(Protocol):
    """Watches a sequence's text for its stop strings."""

    def push(self, token_ids: list[int]) -> int | None:
        """Take the next output tokens; return how many the whole output keeps once a stop string is complete."""
        ...


class Sink(Protocol):
    """The receiver of a sequence's tokens. Neither method waits, and neither calls back into the policy."""

    def put(self, sequence: Sequence, num_new: int) -> bool:
        """Buffer the last `num_new` output tokens. Return False if over budget; the policy then parks the sequence."""
        ...

    def end(self, sequence: Sequence) -> None:
        """Take the end of the sequence. `finish_reason` is set, and `error` if the reason is `error`. Called once."""
        ...


class TokenLogprobs(NamedTuple):
    """The log-probability of a token, and the likeliest tokens of its position with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def unpack_logprobs(rows: LogprobRows, token_ids: list[int]) -> list[TokenLogprobs]:
    """Return one entry per token of `rows`, which are about `token_ids`. Raises ValueError if the sizes differ."""
    ids, values, k = unpack_ints(rows.top_ids), unpack_floats(rows.top), rows.num_top
    pairs = list(zip(ids, values, strict=True))
    if len(pairs) != rows.num_tokens * k:
        raise ValueError(f"{len(pairs)} alternatives for {rows.num_tokens} tokens with {k} each")
    entries = zip(token_ids, unpack_floats(rows.chosen), range(rows.num_tokens), strict=True)
    return [TokenLogprobs(token_id, value, tuple(pairs[i * k : (i + 1) * k])) for token_id, value, i in entries]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRequest:
    """The request of a sequence: one choice of one client request. Written once, before the sequence is submitted."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int
    sink: Sink
    choice: int = 0
    max_tokens: int | None = None  # of the output; None: as many as the context holds
    stop_token_ids: frozenset[int] = frozenset()  # with the model's end-of-text ids, unless they are ignored
    stop: tuple[str, ...] = ()  # stop strings, for rendering the text; the sequence's `stopper` finds them
    num_logprobs: int = NO_LOGPROBS
    num_prompt_logprobs: int = NO_LOGPROBS
    adapter: AdapterVersion | None = None
    is_adapter_optional: bool = False  # the adapter is for speed alone: go without it rather than wait for it
    cache_scope: str = ""  # sequences of another scope share no blocks with this one
    principal: str = ""  # name of the principal that is charged
    weight: float = 1.0  # of the principal: its share of the device against others'
    max_queued: int | None = None  # of the principal: sequences that may wait; None: the server's limit
    marks_guesses: bool = False  # `Output.guessed` is wanted
    received_s: float = 0.0  # on the policy's clock: when the request came to the server
    queue_deadline_s: float | None = None  # by then some choice of the request must have run
    deadline_s: float | None = None  # by then the sequence must have ended


@dataclass(slots=True, eq=False)
class Output:
    """The results of a sequence. They survive preemption."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])  # one per token, or none
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])  # of positions 1, 2, …
    guessed: list[int] | None = None  # indices of tokens that were accepted from drafts; None: not asked for
    finish_reason: FinishReason | None = None
    error: DescantError | None = None  # set if the finish reason is `error`


@dataclass(slots=True, eq=False)
class DeviceState:
    """The state of a sequence on one executor. Preemption replaces it by a new one."""

    block_table: list[int] = field(default_factory=list[int])
    num_computed: int = 0  # positions whose K/V is in the cache
    num_planned: int = 0  # the same once the steps in flight are done
    num_pending: int = 0  # tokens that are being sampled in the steps in flight
    num_registered: int = 0  # blocks offered to the prefix cache
    last_step: int = 0  # number of the last step with the sequence; steps count from 1
    token_limit: int = 0  # of prompt and output together, set at admission
    spans: tuple[AdapterSpan, ...] | None = None  # None: the adapter has no place
    heads_slot: int = NO_ADAPTER  # slot of the adapter, if it has draft heads
    decode_row: Row | None = None  # the sequence's part in a step that needs no new block, made once

    @property
    def is_row(self) -> bool:
        """Whether the engine has a row for the sequence."""
        return self.last_step > 0


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request. `id` is also its row in the engine. Ids grow in order of arrival."""

    id: int
    request: SequenceRequest
    stopper: Stopper | None = None
    drafter: Drafter | None = None  # guesses the next tokens; None: the sequence decodes plainly
    status: Status = "waiting"
    adapter: AdapterVersion | None = field(init=False)  # the request's; None once an optional one is given up
    num_prompt_tokens: int = field(init=False)  # kept beside the prompt, as it is read for every row of every step
    output: Output = field(init=False)
    device: DeviceState = field(default_factory=DeviceState)
    block_hashes: list[bytes] = field(default_factory=list[bytes])  # of full blocks; kept, as tokens do not change

    # Counters and timestamps, seconds on the policy's clock
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when it first ran
    num_charged: int = 0  # prompt tokens up to here count as service to its principal
    num_preemptions: int = 0
    is_cold: bool = False  # it had to wait for its adapter
    has_started: bool = False  # some choice of its request has been scheduled
    arrival_s: float = 0.0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    def __post_init__(self) -> None:
        self.adapter = self.request.adapter
        self.num_prompt_tokens = len(self.request.prompt_ids)
        self.output = Output(guessed=[] if self.request.marks_guesses else None)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_ids(self) -> list[int]:
        return self.request.prompt_ids

    @property
    def output_ids(self) -> list[int]:
        return self.output.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.output.finish_reason

    @property
    def error(self) -> DescantError | None:
        return self.output.error

    @property
    def num_output_tokens(self) -> int:
        return len(self.output.token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output.token_ids)

    @property
    def is_finished(self) -> bool:
        return self.output.finish_reason is not None

    @property
    def always_verifies(self) -> bool:
        """Whether its drafts are verified at any cost."""
        return self.drafter is not None and self.drafter.settings.always

    @property
    def is_ended_by_token(self) -> bool:
        """Whether the last output token is a stop token, which is no part of the text."""
        output = self.output
        is_stopped = output.finish_reason == "stop" and bool(output.token_ids)
        return is_stopped and output.token_ids[-1] in self.request.stop_token_ids

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities were asked for and some are still missing."""
        request = self.request
        return request.num_prompt_logprobs >= 0 and len(self.output.prompt_logprobs) + 1 < len(request.prompt_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the ids of positions `start` to `stop` of prompt and output."""
        prompt_ids, output_ids = self.request.prompt_ids, self.output.token_ids
        num_prompt = len(prompt_ids)
        if stop <= num_prompt:
            return prompt_ids[start:stop]
        if start >= num_prompt:
            return output_ids[start - num_prompt : stop - num_prompt]
        return prompt_ids[start:] + output_ids[: stop - num_prompt]

    def append(self, token_ids: Iterable[int], logprobs: Iterable[TokenLogprobs] = ()) -> int:
        """Append sampled tokens up to the first that ends the sequence; return the number appended.

        A stop token is kept in the output, and so are all tokens of a stop string. Sets `finish_reason`.
        """
        request, output = self.request, self.output
        output_ids, num_prompt_tokens = output.token_ids, self.num_prompt_tokens
        start = len(output_ids)
        for token_id in token_ids:
            output_ids.append(token_id)
            if token_id in request.stop_token_ids:
                output.finish_reason = "stop"
                break
            if num_prompt_tokens + len(output_ids) >= self.device.token_limit:
                output.finish_reason = "length"
                break
        if self.stopper is not None and (kept := self.stopper.push(output_ids[start:])) is not None:
            del output_ids[kept:]
            output.finish_reason = "stop"
        num_new = len(output_ids) - start
        if request.num_logprobs >= 0:
            output.logprobs.extend(list(logprobs)[:num_new])
        return num_new

    def forget_device_state(self) -> None:
        """Give up everything that lives with an executor; the tokens stay."""
        self.device = DeviceState()


def by_arrival(sequence: Sequence) -> int:
    """Sort key: order of arrival."""
    return sequence.id


class DraftCounts(NamedTuple):
    """Number of drafts verified, of tokens on the longest paths through them, and of tokens accepted."""

    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def plus(self, drafter: Drafter | None) -> DraftCounts:
        """Return the counts with those of one drafter added."""
        if drafter is None:
            return self
        return DraftCounts(
            self.num_drafts + drafter.num_drafts,
            self.num_drafted + drafter.num_drafted,
            self.num_accepted + drafter.num_accepted,
        )


class SequenceTable:
    """All live sequences, and the numbers that must never repeat.

    It belongs to the system and outlives the scheduler actor: the next policy continues its sequences.
    """

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}
        self._by_request: dict[str, dict[int, Sequence]] = {}
        self._last_id = 0
        self._last_epoch = 0
        self._drafts_before = DraftCounts()  # of finished sequences

    def next_id(self) -> int:
        """Return an id for a new `Sequence`."""
        self._last_id += 1
        return self._last_id

    def next_epoch(self) -> int:
        """Return the number of a new life of the executor's rows."""
        self._last_epoch += 1
        return self._last_epoch

    def add(self, sequence: Sequence) -> None:
        """Make a sequence live."""
        self._sequences[sequence.id] = sequence
        self._by_request.setdefault(sequence.request_id, {})[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished sequence; its stream may keep it."""
        del self._sequences[sequence.id]
        self._drafts_before = self._drafts_before.plus(sequence.drafter)
        choices = self._by_request[sequence.request_id]
        del choices[sequence.id]
        if not choices:
            del self._by_request[sequence.request_id]

    def get(self, sequence_id: int) -> Sequence | None:
        """Return a live sequence."""
        return self._sequences.get(sequence_id)

    def of_request(self, request_id: str) -> list[Sequence]:
        """Return the live choices of a request."""
        return list(self._by_request.get(request_id, {}).values())

    def first_of_request(self, request_id: str) -> Sequence:
        """Return the first live choice of a request that has one."""
        return next(iter(self._by_request[request_id].values()))

    def draft_counts(self) -> DraftCounts:
        """Return the counts of all sequences, live and finished."""
        counts = self._drafts_before
        for sequence in self:
            counts = counts.plus(sequence.drafter)
        return counts

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __len__(self) -> int:
        return len(self._sequences)
