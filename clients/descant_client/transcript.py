"""The protocol of one generation on the client's side.

Counts tokens so that none is repeated or missing, resumes, cancels and acknowledges. Owns no socket and no task: the
connection passes messages in, and the transcript passes messages out through `send`, which never waits.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import anyio
import msgspec

from descant_client.errors import DescantError, InternalError, StreamNotFound, from_wire
from descant_client.protocol import (
    Accepted,
    Ack,
    Cancel,
    ClientMessage,
    Delta,
    Done,
    Error,
    Generate,
    Progress,
    Resume,
    ServerMessage,
)

_MAX_RESYNCS = 3  # in a row, without a fitting delta between them


class Transcript:
    """The receiver of one generation's messages: its deltas so far, and its end."""

    def __init__(self, request: Generate, send: Callable[[ClientMessage], None]) -> None:
        self.request = request
        self.deltas: list[Delta] = []
        self.accepted: Accepted | None = None
        self.stage: str | None = None
        self.done: Done | None = None
        self.is_answered = False  # the server has shown that it knows this request
        self.listener: Callable[[ServerMessage], None] | None = None
        self._send = send
        self._error: DescantError | None = None
        self._num_tokens: defaultdict[int, int] = defaultdict(int)  # by choice
        self._changed: anyio.Event | None = None
        self._is_cancelled = False
        self._is_resuming = False
        self._num_resyncs = 0

    # ---- for the stream -------------------------------------------------------------------------------------------

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_finished(self) -> bool:
        return self.done is not None or self._error is not None

    @property
    def seed(self) -> int | None:
        return self.request.seed if self.accepted is None else self.accepted.seed

    async def delta_at(self, position: int) -> Delta | None:
        """Wait for delta number `position`. Return None if the stream ends before. Cancelling the wait changes nothing.

        Raises:
            DescantError: the stream failed before that delta.
        """
        while position >= len(self.deltas):
            if self.is_finished:
                self._raise_error()
                return None
            await self._wait()
        return self.deltas[position]

    async def finish(self) -> Done:
        """Wait for the end and return its message. Cancelling the wait changes nothing.

        Raises:
            DescantError: the stream failed.
        """
        while self.done is None:
            self._raise_error()
            await self._wait()
        return self.done

    def cancel(self) -> None:
        if not (self._is_cancelled or self.is_finished):
            self._is_cancelled = True
            self._send(Cancel(self.request_id))

    # ---- for the connection ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """Send the request for the first time."""
        self._send(self.request)

    def reopen(self, *, is_same_session: bool, was_sent: bool) -> None:
        """Continue after a reconnect. `was_sent`: the request may have reached the server on an earlier connection."""
        if not was_sent:
            self._send(self.request)
        elif is_same_session:
            self._resume()
        elif self.deltas:
            self.fail(StreamNotFound(self.request_id))
            return
        else:  # no token was received: start again, with the seed that the server has reported, if any
            self.is_answered = False
            self._send(msgspec.structs.replace(self.request, seed=self.seed))
        if self._is_cancelled:
            self._send(Cancel(self.request_id))

    def receive(self, message: ServerMessage) -> None:
        """Apply one message for this request."""
        if self.is_finished:
            return
        if self.listener is not None:
            self.listener(message)
        match message:
            case Accepted():
                self.accepted = message
                self._is_resuming = False  # the next delta begins at the position that `resume` gave
            case Progress():
                self.stage = message.stage
            case Delta():
                self._on_delta(message)
            case Done():
                self._on_done(message)
            case Error():
                self._on_error(message)
            case _:
                return
        self.is_answered = self.is_answered or not isinstance(message, Error)
        self._notify()

    def fail(self, error: DescantError) -> None:
        """End the stream with `error`."""
        if not self.is_finished:
            self._error = error
            self._notify()

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _on_delta(self, delta: Delta) -> None:
        have = self._num_tokens[delta.choice]
        if delta.index < have and delta.index + len(delta.token_ids) <= have:
            return  # these tokens were received before
        if delta.index != have:
            self._resync(f"Choice {delta.choice} has {have} tokens, its next delta starts at {delta.index}.")
            return
        self._is_resuming = False
        self._num_resyncs = 0
        self.stage = None
        self._num_tokens[delta.choice] = have + len(delta.token_ids)
        self.deltas.append(delta)

    def _on_done(self, done: Done) -> None:
        self._is_resuming = False
        for end in done.choices:
            have = self._num_tokens[end.choice]
            if have != end.num_tokens:
                self._resync(f"Choice {end.choice} ends with {end.num_tokens} tokens, {have} came.")
                return
        for end in done.choices:
            if end.text:
                self.deltas.append(Delta(self.request_id, end.choice, end.num_tokens, end.text, []))
        self.stage = None
        self.done = done
        self._send(Ack(self.request_id))

    def _on_error(self, message: Error) -> None:
        was_lost = message.code == StreamNotFound.code and self._is_resuming and not self.is_answered
        if was_lost and not self._is_cancelled:  # the request itself was lost with the connection
            self._is_resuming = False
            self._send(self.request)
        else:
            self.fail(from_wire(message.code, message.message, message.data))
            self._send(Ack(self.request_id))

    def _resync(self, reason: str) -> None:
        # Messages sent before the answer to a `resume` do not fit either.
        if self._is_resuming:
            return
        if self._num_resyncs == _MAX_RESYNCS:
            self.fail(InternalError(reason))
            return
        self._num_resyncs += 1
        self._resume()

    def _resume(self) -> None:
        self._is_resuming = True
        have = {choice: count for choice, count in self._num_tokens.items() if count}
        self._send(Resume(self.request_id, have))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise copy.copy(self._error)  # several tasks may raise it, each with a traceback of its own

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _wait(self) -> None:
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()
