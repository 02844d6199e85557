"""The measurements of one request, and the running totals of a test."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import msgspec

from descant_client.loadtest.workload import PlannedRequest
from descant_client.protocol import Accepted, Delta, Done, ServerMessage

SHORT = "short"  # the code of an answer with fewer tokens than planned


class Record(msgspec.Struct, kw_only=True):
    """The measurements of one request. Times are in seconds since the start of the test, taken at the client.

    `delivered_s` are the times of the deliveries of tokens, `delivered_tokens` the number of tokens in each.
    `finish_reason` is set if the answer ended, `error_code` if the request failed; with neither, the test ended first.
    """

    index: int
    arrived_s: float  # the scheduled time; in the closed loop, the time of sending
    sent_s: float
    adapter: str | None = None
    key: int = 0
    is_warmup: bool = False
    is_first_use: bool = False  # the first request of this test that asks for its adapter
    accepted_s: float | None = None
    ended_s: float | None = None
    delivered_s: list[float] = []
    delivered_tokens: list[int] = []
    num_planned_tokens: int = 0  # of the answer
    num_prompt_tokens: int | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_s: float | None = None  # as the server measured it
    finish_reason: str | None = None
    error_code: str | None = None
    error: str | None = None

    @property
    def is_completed(self) -> bool:
        """Whether the whole answer was received."""
        return self.finish_reason is not None and self.failure is None

    @property
    def failure(self) -> tuple[str, str] | None:
        """Code and sentence of an error, or of an answer that was cut off; None if there is no failure so far."""
        if self.error_code is not None:
            return self.error_code, self.error or ""
        if self.finish_reason not in (None, "length", "stop"):
            return self.finish_reason, f"The answer ended with finish reason {self.finish_reason}."
        if self.finish_reason is not None and self.num_output_tokens < self.num_planned_tokens:
            sentence = f"The answer has {self.num_output_tokens} of {self.num_planned_tokens} tokens: "
            return SHORT, sentence + "the model's context was full."
        return None

    @property
    def lateness_s(self) -> float:
        """Time from the scheduled arrival to sending: the delay of the generator itself."""
        return self.sent_s - self.arrived_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from the scheduled arrival; None before the first token."""
        return self.delivered_s[0] - self.arrived_s if self.delivered_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for fewer than two tokens."""
        if self.num_output_tokens < 2:
            return None
        return (self.delivered_s[-1] - self.delivered_s[0]) / (self.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """Time from the scheduled arrival to the end; None before the end."""
        return None if self.ended_s is None else self.ended_s - self.arrived_s

    def gaps_s(self) -> list[float]:
        """Return the gaps between successive deliveries of tokens: the inter-token latencies (ITL)."""
        return [later - earlier for earlier, later in zip(self.delivered_s, self.delivered_s[1:], strict=False)]


class Tally:
    """The running totals of a test, for display. `ttfts_s` has one entry per request with a token."""

    def __init__(self) -> None:
        self.num_planned = 0
        self.num_sent = 0
        self.num_completed = 0
        self.num_failed = 0
        self.num_tokens = 0
        self.ttfts_s: list[float] = []

    @property
    def num_in_flight(self) -> int:
        """Number of requests sent and not ended."""
        return self.num_sent - self.num_completed - self.num_failed


class Recorder:
    """Records the arrival times of the messages of one request. The cost per message is one reading of the clock."""

    def __init__(
        self, request: PlannedRequest, arrived_s: float, is_first_use: bool, tally: Tally, now_s: Callable[[], float]
    ) -> None:
        """Start a record. `now_s` returns the time since the start of the test, in seconds."""
        self._request = request
        self._arrived_s = arrived_s
        self._is_first_use = is_first_use
        self._tally = tally
        self._now_s = now_s
        self._sent_s = arrived_s
        self._accepted: Accepted | None = None
        self._accepted_s: float | None = None
        self._done: Done | None = None
        self._ended_s: float | None = None
        self._times = array("d")  # of deliveries, as are the counts
        self._counts = array("I")
        self._num_tokens = 0
        self._error: tuple[str, str] | None = None

    def on_sent(self) -> None:
        """Record that the request was handed to the connection."""
        self._sent_s = self._now_s()
        self._tally.num_sent += 1

    def on_message(self, message: ServerMessage) -> None:
        """Record one message. Tokens repeated after a reconnect are left out."""
        now_s = self._now_s()
        if type(message) is Delta:
            if message.index == self._num_tokens and message.token_ids:
                self._on_tokens(now_s, len(message.token_ids))
        elif type(message) is Accepted and self._accepted is None:
            self._accepted, self._accepted_s = message, now_s
        elif type(message) is Done:
            self._done, self._ended_s = message, now_s

    def on_answered(self) -> None:
        """Record that the answer has ended."""
        self._count()

    def on_failed(self, code: str, sentence: str) -> None:
        """Record that the request failed, even if its `done` was recorded before."""
        self._ended_s = self._now_s()
        self._done, self._error = None, (code, sentence)
        self._count()

    def _count(self) -> None:
        if self.record(is_warmup=False).is_completed:
            self._tally.num_completed += 1
        else:
            self._tally.num_failed += 1

    def record(self, is_warmup: bool) -> Record:
        """Return the record so far."""
        done, accepted = self._done, self._accepted
        code, sentence = self._error or (None, None)
        return Record(
            index=self._request.index,
            arrived_s=self._arrived_s,
            sent_s=self._sent_s,
            adapter=self._request.adapter,
            key=self._request.key,
            is_warmup=is_warmup,
            is_first_use=self._is_first_use,
            accepted_s=self._accepted_s,
            ended_s=self._ended_s,
            delivered_s=self._times.tolist(),
            delivered_tokens=self._counts.tolist(),
            num_planned_tokens=self._request.num_output_tokens,
            num_prompt_tokens=accepted.num_prompt_tokens if accepted else None,
            num_output_tokens=self._num_tokens,
            num_cached_tokens=done.usage.num_cached_tokens if done else 0,
            num_preemptions=done.timings.num_preemptions if done else 0,
            queue_s=done.timings.queue_s if done else None,
            finish_reason=done.choices[0].finish_reason if done else None,
            error_code=code,
            error=sentence,
        )

    def _on_tokens(self, now_s: float, num_tokens: int) -> None:
        if not self._num_tokens:
            self._tally.ttfts_s.append(now_s - self._arrived_s)
        self._times.append(now_s)
        self._counts.append(num_tokens)
        self._num_tokens += num_tokens
        self._tally.num_tokens += num_tokens
