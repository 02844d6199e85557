"""A stream: one request's output on its way to one session.

It is the sink of the request's sequences. There is no buffer of events: what a client has yet to get is the part of
each sequence's own tokens behind a cursor, so a slow reader gets larger deltas, and resuming only moves the cursor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import anyio

from descant.actor.errors import ActorError
from descant.model.tokenizer import Detokenizer, Tokenizer
from descant.scheduling.sequence import Sequence as TokenSequence
from descant.scheduling.sequence import TokenLogprobs
from descant.sessions.leases import Lease
from descant_client.errors import DescantError, InternalError, InvalidRequest
from descant_client.protocol import (
    Accepted,
    ChoiceEnd,
    Delta,
    Done,
    Error,
    Progress,
    ServerMessage,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from descant_client.timings import Timings

BYTES_PER_TOKEN = 16  # what an unsent token is counted as
MAX_DELTA_TOKENS = 512  # so that one stream's backlog does not hold up the others of its connection


class Stream:
    """The sink of a request's sequences, and the maker of its messages.

    `changed` is called, without waiting, whenever there may be something new to render.
    """

    is_kept: ClassVar[bool] = False  # once sent, only for a while
    orphaned: ClassVar[str] = "the gateway crashed while the request was being prepared; send it again."

    def __init__(self, request_id: str, key: str, buffer_bytes: int, changed: Callable[[Stream], None]) -> None:
        self.request_id = request_id
        self.key = key  # unique in the server: what the scheduler cancels by
        self.is_cancelled = False  # asked for
        self.is_submitted = False  # the scheduler has it: it ends by itself
        self.ended_s: float | None = None  # when the last message was sent
        self._max_unsent = buffer_bytes // BYTES_PER_TOKEN
        self._changed = changed
        self._accepted: Accepted | None = None
        self._choices: list[_Choice] = []
        self._notes: list[ServerMessage] = []  # sent once, never again on resume
        self._error: DescantError | None = None
        self._over_budget: list[int] = []  # sequences parked because of us
        self._lease: Lease | None = None
        self._preparation: anyio.CancelScope | None = None
        self._is_accepted_sent = False
        self._is_end_sent = False

    # ---- what happens to it -----------------------------------------------------------------------

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
        """The client wants no more of it. What the scheduler has by now is the scheduler's to cancel."""
        self.is_cancelled = True
        if self._preparation is not None:
            self._preparation.cancel()

    def expect(self, sequences: Sequence[TokenSequence], tokenizer: Tokenizer) -> None:
        """These are its choices, if the scheduler takes them: they may come to their sink before `accept`."""
        self._choices = [_Choice(sequence, tokenizer, self.request_id) for sequence in sequences]

    def accept(self, accepted: Accepted) -> None:
        """The request is taken, with the choices it expected."""
        self._accepted = accepted
        self._changed(self)

    def hold(self, lease: Lease) -> None:
        """Keep the versions of this lease until nothing more is generated."""
        self._lease = lease
        self._release_if_ended()

    def note(self, message: Progress) -> None:
        """Tell the client something in passing."""
        self._notes.append(message)
        self._changed(self)

    def fail(self, error: DescantError) -> None:
        """End the stream with an error. What was not sent yet is not sent any more."""
        self._error = self._error or error
        self._release_if_ended()
        self._changed(self)

    def put(self, sequence: TokenSequence, num_new: int) -> bool:
        """Hear of new tokens; answers False over the budget, upon which the scheduler parks the sequence."""
        self._changed(self)
        if self._num_unsent() <= self._max_unsent:
            return True
        self._over_budget.append(sequence.id)
        return False

    def end(self, sequence: TokenSequence) -> None:
        """Hear that a sequence has finished."""
        if sequence.finish_reason == "error":
            self.fail(sequence.error or InternalError("a sequence ended without saying why."))
        self._release_if_ended()
        self._changed(self)

    def _release_if_ended(self) -> None:
        if self._lease is not None and self.is_ended:
            self._lease.release()

    # ---- what the client gets ---------------------------------------------------------------------

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will be generated for it."""
        return self._error is not None or (bool(self._choices) and all(c.is_finished for c in self._choices))

    @property
    def is_end_sent(self) -> bool:
        """Whether its last message has been rendered."""
        return self._is_end_sent

    def render(self) -> list[ServerMessage]:
        """Return what is new since the last call, at most `MAX_DELTA_TOKENS` tokens of each choice."""
        if self._is_end_sent:
            return []
        messages, self._notes = self._notes, []
        if self._error is not None:
            self._is_end_sent = True
            return [*messages, error_message(self._error, self.request_id)]
        if self._accepted is None:
            return messages
        if not self._is_accepted_sent:
            self._is_accepted_sent = True
            messages.append(self._accepted)
        messages += [delta for choice in self._choices if (delta := choice.render()) is not None]
        if self._num_unsent():
            self._changed(self)
        elif all(choice.is_finished for choice in self._choices):
            self._is_end_sent = True
            messages.append(self._done())
        return messages

    def take_unparked(self) -> tuple[int, ...]:
        """Return the sequences that were parked for this stream and may go on now."""
        if not self._over_budget or self._num_unsent() > self._max_unsent // 2:
            return ()
        unparked, self._over_budget = tuple(self._over_budget), []
        return unparked

    def resume(self, have: Mapping[int, int]) -> None:
        """Go on behind the tokens the client already has.

        Raises:
            InvalidRequest: it claims more than there is.
        """
        for index, num_tokens in have.items():
            available = self._choices[index].num_tokens if 0 <= index < len(self._choices) else 0
            if num_tokens > available:  # having nothing of a choice is always true, also before it is accepted
                raise InvalidRequest("have", f"choice {index} has no {num_tokens} tokens.")
        for index, choice in enumerate(self._choices):
            choice.rewind(have.get(index, 0))
        self._is_accepted_sent = self._is_end_sent = False
        self.ended_s = None
        self._changed(self)

    def _num_unsent(self) -> int:
        num_unsent = 0
        for choice in self._choices:  # a plain loop: this is asked three times for every token
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
            end -= 1  # that token is no part of the text
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


def error_message(error: DescantError, request_id: str | None = None) -> Error:
    """Return an error as it goes over the wire; what passes between actors only is a fault of ours."""
    if isinstance(error, ActorError):
        error = InternalError(str(error))
    return Error(code=error.code, message=str(error), request_id=request_id, data=error.data())


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
