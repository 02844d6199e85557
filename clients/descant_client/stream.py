"""One generation as the caller sees it: deltas to iterate, and the result they add up to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec

from descant_client.protocol import Delta, Done, FinishReason, ServerMessage, TokenLogprob, Usage
from descant_client.timings import Timings
from descant_client.transcript import Transcript


class Choice(msgspec.Struct, frozen=True):
    """One of the `n` answers to a request. `logprobs` has one entry per token if they were asked for."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


class Result(msgspec.Struct, frozen=True):
    """A finished generation. `text`, `token_ids`, `finish_reason` and `logprobs` are those of `choices[0]`."""

    choices: list[Choice]
    seed: int  # the given one, or the one the server drew: it makes the same answer again
    usage: Usage
    timings: Timings
    prompt_logprobs: list[TokenLogprob | None] | None = None
    adapter_digest: str | None = None  # the version that answered; None: the base model

    @property
    def text(self) -> str:
        """The whole text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The output tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """The log-probabilities of the first choice's tokens; None if they were not asked for."""
        return self.choices[0].logprobs


class Stream:
    """A running generation: iterate it for deltas, or await `result()` or `text()`.

    It runs from the call of `Client.generate` on, whether it is read or not; a reader that is slow or absent delays
    no other stream. Leaving an `async for` over it before its end (break, exception, cancellation) cancels the request
    at the server, and so does cancelling `result()` or `text()`. Iterating again starts at the first delta.
    """

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript

    @property
    def request_id(self) -> str:
        """The id of this request, unique within its session."""
        return self._transcript.request_id

    @property
    def seed(self) -> int | None:
        """The seed in use; None until the server has accepted a request that gave none."""
        return self._transcript.seed

    @property
    def stage(self) -> str | None:
        """What the request waits for (`protocol.Progress.stage`); None once tokens come."""
        return self._transcript.stage

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete or has failed."""
        return self._transcript.is_finished

    def __aiter__(self) -> AsyncIterator[Delta]:
        """Start a pass over all deltas; it raises what `result()` raises, after the deltas that came before."""
        return _Deltas(self._transcript, asyncio.get_running_loop())

    def listen(self, listener: Callable[[ServerMessage], None]) -> None:
        """Call `listener` with every message for this request as it is read from the socket, for measuring.

        It runs before any reader wakes, must neither wait nor raise, and after a reconnect may hear a message again.
        """
        self._transcript.listener = listener

    async def result(self) -> Result:
        """Wait for the end and return everything.

        Cancelling this call cancels the request at the server.

        Raises:
            DescantError: what the server refused or failed with, or `ConnectionLost`.
        """
        try:
            done = await self._transcript.finish()
        except asyncio.CancelledError:
            self._transcript.cancel()
            raise
        return self._add_up(done)

    async def text(self) -> str:
        """Wait for the end and return the text of the first choice; otherwise as `result()`."""
        return (await self.result()).text

    def cancel(self) -> None:
        """Ask the server to end the request; returns at once and does nothing if it has ended.

        The stream then ends as usual, with finish reason `cancelled` and the tokens so far.
        """
        self._transcript.cancel()

    async def aclose(self) -> None:
        """Cancel the request, for `contextlib.aclosing`; does not wait for the server."""
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
    """One pass over a stream's deltas. Dropped before the end, it cancels the request.

    `async for` alone holds the iterator, so leaving the loop in any way drops it at once.
    """

    def __init__(self, transcript: Transcript, loop: asyncio.AbstractEventLoop) -> None:
        self._transcript = transcript
        self._loop = loop
        self._position = 0

    def __aiter__(self) -> _Deltas:
        return self

    async def __anext__(self) -> Delta:
        """Return the next delta; cancelling the call loses none."""
        delta = await self._transcript.delta_at(self._position)
        if delta is None:
            raise StopAsyncIteration
        self._position += 1
        return delta

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        self._transcript.cancel()

    def __del__(self) -> None:
        # The garbage collector may run in any thread, and after the loop has closed.
        if not self._transcript.is_finished:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._transcript.cancel)
