"""`OutgoingStream`: the output of one request on its way to one session.

It is the sink of the request's sequences and has no buffer of its own. Unsent output is the part of each sequence's
tokens from a cursor on. So a slow reader gets larger deltas, and resuming only moves the cursor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import anyio

from descant.model.tokenizer import Detokenizer, Tokenizer
from descant.scheduling.sequence import Sequence as TokenSequence
from descant.scheduling.sequence import TokenLogprobs
from descant.sessions.leases import Lease
from descant.sessions.outgoing import Outgoing, error_message
from descant_client.errors import DescantError, InternalError, InvalidRequest
from descant_client.protocol import (
    Accepted,
    ChoiceEnd,
    Delta,
    Done,
    ServerMessage,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from descant_client.timings import Timings

BYTES_PER_TOKEN = 16  # assumed size of an unsent token
MAX_DELTA_TOKENS = 512  # bounds the time for which one stream's backlog delays the others of its connection


class OutgoingStream(Outgoing):
    """The sink of a request's sequences. It renders their tokens as messages."""

    is_kept: ClassVar[bool] = False  # forgotten some time after it was sent
    orphaned: ClassVar[str] = "the gateway crashed while the request was being prepared; send it again."

    def __init__(self, request_id: str, key: str, buffer_bytes: int, on_change: Callable[[Outgoing], None]) -> None:
        super().__init__(request_id, key, on_change)
        self.is_cancelled = False  # the client has asked for it
        self._max_unsent = buffer_bytes // BYTES_PER_TOKEN
        self._accepted: Accepted | None = None
        self._choices: list[_Choice] = []
        self._error: DescantError | None = None
        self._over_budget: list[int] = []  # ids of the sequences parked for this stream
        self._lease: Lease | None = None
        self._preparation: anyio.CancelScope | None = None
        self._is_accepted_sent = False

    # ---- state of the request ---------------------------------------------------------------------

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will be generated for it."""
        return self._error is not None or (bool(self._choices) and all(c.is_finished for c in self._choices))

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Let `cancel` end this block, before or while it runs."""
        with anyio.CancelScope() as scope:
            self._preparation = scope
            if self.is_cancelled:
                scope.cancel()
            yield
        self._preparation = None

    def cancel(self) -> None:
        """Cancel the preparation. Sequences that the scheduler has already are cancelled there."""
        self.is_cancelled = True
        if self._preparation is not None:
            self._preparation.cancel()

    def expect(self, sequences: Sequence[TokenSequence], tokenizer: Tokenizer) -> None:
        """Set the choices that are about to be submitted: their tokens may arrive before `accept` is called."""
        self._choices = [_Choice(sequence, tokenizer, self.request_id) for sequence in sequences]

    def accept(self, accepted: Accepted) -> None:
        """Record that the scheduler has taken the expected choices. Messages are rendered from now on."""
        self._accepted = accepted
        self._on_change(self)

    def keep_until_ended(self, lease: Lease) -> None:
        """Release `lease` when nothing more is generated."""
        self._lease = lease
        self._release_if_ended()

    def fail(self, error: DescantError) -> None:
        """End the stream with an error. Tokens that were not sent yet are dropped."""
        self._error = self._error or error
        self._release_if_ended()
        self._on_change(self)

    def put(self, sequence: TokenSequence, num_new: int) -> bool:
        """Record that a sequence has `num_new` more tokens, without waiting.

        Return False when the unsent output exceeds the buffer budget; the scheduler then parks the sequence.
        """
        self._on_change(self)
        if self._num_unsent() <= self._max_unsent:
            return True
        self._over_budget.append(sequence.id)
        return False

    def end(self, sequence: TokenSequence) -> None:
        """Record that a sequence has finished."""
        if sequence.finish_reason == "error":
            self.fail(sequence.error or InternalError("a sequence ended without saying why."))
        self._release_if_ended()
        self._on_change(self)

    def _release_if_ended(self) -> None:
        if self._lease is not None and self.is_ended:
            self._lease.release()

    # ---- messages for the client ------------------------------------------------------------------

    def _render_into(self, messages: list[ServerMessage]) -> None:
        """Append at most `MAX_DELTA_TOKENS` new tokens of each choice, and the end once all were rendered."""
        if self._error is not None:
            self._is_end_rendered = True
            messages.append(error_message(self._error, self.request_id))
            return
        if self._accepted is None:
            return
        if not self._is_accepted_sent:
            self._is_accepted_sent = True
            messages.append(self._accepted)
        messages += [delta for choice in self._choices if (delta := choice.render()) is not None]
        if self._num_unsent():
            self._on_change(self)
        elif all(choice.is_finished for choice in self._choices):
            self._is_end_rendered = True
            messages.append(self._done())

    def take_unparked(self) -> tuple[int, ...]:
        """Return the ids of sequences that were parked for this stream and may run again."""
        if not self._over_budget or self._num_unsent() > self._max_unsent // 2:
            return ()
        unparked, self._over_budget = tuple(self._over_budget), []
        return unparked

    def resume(self, have: Mapping[int, int]) -> None:
        """Move each choice's cursor to the first token that the client does not have.

        Raises:
            InvalidRequest: the client claims more tokens than there are.
        """
        for index, num_tokens in have.items():
            available = self._choices[index].num_tokens if 0 <= index < len(self._choices) else 0
            if num_tokens > available:  # zero tokens are always valid, also before the choices are known
                raise InvalidRequest("have", f"choice {index} has no {num_tokens} tokens.")
        for index, choice in enumerate(self._choices):
            choice.rewind(have.get(index, 0))
        self._is_accepted_sent = False
        self._rewind()

    def _num_unsent(self) -> int:
        num_unsent = 0
        for choice in self._choices:  # a plain loop: called twice for every token
            num_unsent += choice.num_unsent
        return num_unsent

    def _done(self) -> Done:
        assert self._accepted is not None, "a stream is done only after it was accepted"
        first = self._choices[0]
        sequences = [choice.sequence for choice in self._choices]
        return Done(
            request_id=self.request_id,
            seed=self._accepted.seed,
            choices=[choice.finish() for choice in self._choices],
            usage=Usage(
                num_prompt_tokens=self._accepted.num_prompt_tokens,
                num_output_tokens=sum(len(sequence.output_ids) for sequence in sequences),
                num_cached_tokens=max(sequence.num_cached_tokens for sequence in sequences),
            ),
            timings=_timings(sequences),
            prompt_logprobs=first.prompt_logprobs(),
        )


class _Choice:
    """A cursor into one sequence's output."""

    def __init__(self, sequence: TokenSequence, tokenizer: Tokenizer, request_id: str) -> None:
        self.sequence = sequence
        self._tokenizer = tokenizer
        self._request_id = request_id
        self._sent = 0
        self._detokenizer = Detokenizer(tokenizer, sequence.request.stop)

    @property
    def num_tokens(self) -> int:
        return len(self.sequence.output.token_ids)

    @property
    def num_unsent(self) -> int:
        return len(self.sequence.output.token_ids) - self._sent

    @property
    def is_finished(self) -> bool:
        return self.sequence.finish_reason is not None

    def render(self) -> Delta | None:
        start, end = self._sent, min(len(self.sequence.output_ids), self._sent + MAX_DELTA_TOKENS)
        if start == end:
            return None
        self._sent = end
        return Delta(
            request_id=self._request_id,
            choice=self.sequence.request.choice,
            index=start,
            text=self._text(start, end),
            token_ids=self.sequence.output_ids[start:end],
            logprobs=self._logprobs(start, end),
            guessed=self._guessed(start, end),
        )

    def _guessed(self, start: int, end: int) -> list[int] | None:
        guessed = self.sequence.output.guessed
        if guessed is None:
            return None
        return guessed[bisect_left(guessed, start) : bisect_left(guessed, end)]

    def rewind(self, num_tokens: int) -> None:
        self._sent = num_tokens
        self._detokenizer = Detokenizer(self._tokenizer, self.sequence.request.stop)
        self._text(0, num_tokens)

    def finish(self) -> ChoiceEnd:
        sequence = self.sequence
        assert sequence.finish_reason is not None, "only a finished choice is reported"
        return ChoiceEnd(
            choice=sequence.request.choice,
            finish_reason=sequence.finish_reason,
            num_tokens=self.num_tokens,
            text=self._detokenizer.flush(),
        )

    def _text(self, start: int, end: int) -> str:
        token_ids = self.sequence.output_ids
        if end == len(token_ids) and self.sequence.is_ended_by_token:
            end -= 1  # the stop token is no part of the text
        return self._detokenizer.push(token_ids[start:end])

    def _logprobs(self, start: int, end: int) -> list[TokenLogprob] | None:
        if self.sequence.request.num_logprobs < 0:
            return None
        return [self._token_logprob(entry) for entry in self.sequence.output.logprobs[start:end]]

    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        if self.sequence.request.num_prompt_logprobs < 0:
            return None
        return [None, *[self._token_logprob(entry) for entry in self.sequence.output.prompt_logprobs]]

    def _token_logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        text = self._tokenizer.token_text
        return TokenLogprob(
            token_id=entry.token_id,
            text=text(entry.token_id),
            logprob=entry.logprob,
            top=[TopLogprob(token_id=other, text=text(other), logprob=value) for other, value in entry.top],
        )


def _timings(sequences: Sequence[TokenSequence]) -> Timings:
    arrival_s = sequences[0].arrival_s
    end_s = max(sequence.finished_s or arrival_s for sequence in sequences)
    scheduled = [sequence.first_scheduled_s for sequence in sequences if sequence.first_scheduled_s is not None]
    first = [sequence.first_token_s for sequence in sequences if sequence.first_token_s is not None]
    drafters = [sequence.drafter for sequence in sequences if sequence.drafter is not None]
    return Timings(
        queue_s=min(scheduled, default=end_s) - arrival_s,
        ttft_s=min(first, default=end_s) - arrival_s,
        e2e_s=end_s - arrival_s,
        num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
        is_cold=any(sequence.is_cold for sequence in sequences),
        num_drafts=sum(drafter.num_drafts for drafter in drafters),
        num_drafted=sum(drafter.num_drafted for drafter in drafters),
        num_accepted=sum(drafter.num_accepted for drafter in drafters),
    )
