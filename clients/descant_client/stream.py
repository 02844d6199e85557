"""One generation as the caller sees it: a stream of deltas, and the result made of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec

from descant_client.protocol import Delta, Done, FinishReason, ServerMessage, TokenLogprob, Usage
from descant_client.timings import Timings
from descant_client.transcript import Transcript


class Choice(msgspec.Struct, frozen=True):
    """One of the `n` answers to a request. `logprobs` has one entry per token; None if they were not requested."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


class Result(msgspec.Struct, frozen=True):
    """A finished generation. `text`, `token_ids`, `finish_reason` and `logprobs` are those of `choices[0]`."""

    choices: list[Choice]
    seed: int  # the given one, or the one drawn by the server; the same request with it gives the same answer
    usage: Usage
    timings: Timings
    prompt_logprobs: list[TokenLogprob | None] | None = None
    adapter_digest: str | None = None  # the version that answered; None: the base model

    @property
    def text(self) -> str:
        """Whole text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """Output tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Reason for the end of the first choice."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Log-probabilities of the first choice's tokens; None if they were not requested."""
        return self.choices[0].logprobs


class Stream:
    """A running generation: iterate it for deltas, or await `result()` or `text()`.

    It runs from the call of `Client.generate` on, whether it is read or not. A slow or absent reader delays no other
    stream. Leaving an `async for` over it before its end (break, exception, cancellation) cancels the request at the
    server, and so does cancelling `result()` or `text()`. Iterating again starts at the first delta.
    """

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript

    @property
    def request_id(self) -> str:
        """Id of this request, unique within its session."""
        return self._transcript.request_id

    @property
    def seed(self) -> int | None:
        """Seed in use; None for a request without one until the server has accepted it."""
        return self._transcript.seed

    @property
    def stage(self) -> str | None:
        """Stage of the request before its first token (`protocol.Progress.stage`); None once tokens arrive."""
        return self._transcript.stage

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete or has failed."""
        return self._transcript.is_finished

    def __aiter__(self) -> AsyncIterator[Delta]:
        """Start a pass over all deltas. It yields the deltas received before a failure, then raises as `result()`."""
        return _Deltas(self._transcript, asyncio.get_running_loop())

    def listen(self, listener: Callable[[ServerMessage], None]) -> None:
        """Call `listener` with every message for this request as it is read from the socket, for measurements.

        The listener runs before any reader of the stream. It must neither wait nor raise. After a reconnect it may get
        a message again.
        """
        self._transcript.listener = listener

    async def result(self) -> Result:
        """Wait for the end and return the result.

        Cancelling this call cancels the request at the server.

        Raises:
            DescantError: the server's refusal or failure, or `ConnectionLost`.
        """
        try:
            done = await self._transcript.finish()
        except asyncio.CancelledError:
            self._transcript.cancel()
            raise
        return self._add_up(done)

    async def text(self) -> str:
        """Wait for the end and return the text of the first choice. Cancelling and errors are as for `result()`."""
        return (await self.result()).text

    def cancel(self) -> None:
        """Ask the server to end the request, without waiting. Do nothing if it has ended.

        The stream then ends with finish reason `cancelled` and the tokens so far.
        """
        self._transcript.cancel()

    async def aclose(self) -> None:
        """Cancel the request as `cancel` does, for `contextlib.aclosing`. Does not wait for the server."""
        self._transcript.cancel()

    def _add_up(self, done: Done) -> Result:
        wants_logprobs = self._transcript.request.logprobs is not None
        choices = []
        for end in sorted(done.choices, key=lambda end: end.choice):
            deltas = [delta for delta in self._transcript.deltas if delta.choice == end.choice]
            choices.append(
                Choice(
                    text="".join(delta.text for delta in deltas),
                    token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
                    finish_reason=end.finish_reason,
                    logprobs=[one for delta in deltas for one in delta.logprobs or []] if wants_logprobs else None,
                )
            )
        accepted = self._transcript.accepted
        digest = accepted.adapter_digest if accepted else None
        return Result(choices, done.seed, done.usage, done.timings, done.prompt_logprobs, digest)


class _Deltas:
    """One pass over a stream's deltas. Deleting it before the end cancels the request.

    Only the `async for` refers to the iterator, so leaving the loop in any way deletes it at once.
    """

    def __init__(self, transcript: Transcript, loop: asyncio.AbstractEventLoop) -> None:
        self._transcript = transcript
        self._loop = loop
        self._position = 0

    def __aiter__(self) -> _Deltas:
        return self

    async def __anext__(self) -> Delta:
        """Return the next delta. Cancelling the call loses no delta."""
        delta = await self._transcript.delta_at(self._position)
        if delta is None:
            raise StopAsyncIteration
        self._position += 1
        return delta

    async def aclose(self) -> None:
        """Cancel the request if it has not ended."""
        self._transcript.cancel()

    def __del__(self) -> None:
        # The garbage collector may run in any thread, and after the loop has closed.
        if not self._transcript.is_finished:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._transcript.cancel)
