"""An operation: one change to an adapter, and its answer on the way to one session.

It is a task of the gateway, not of the connection that asked for it. Its answer waits in the session until the client
acknowledges it, so that a client which lost its connection learns what happened without asking for it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from descant.sessions.stream import error_message
from descant_client.errors import DescantError, InvalidRequest
from descant_client.lifecycle import Adapters
from descant_client.protocol import Progress, ServerMessage


class Operation:
    """The answer to one change of an adapter.

    Cancelling does not undo it: once begun it is carried out, and the answer comes all the same. `changed` is called,
    without waiting, whenever there is something to render.
    """

    is_submitted = False  # it dies with the gateway's life
    is_kept: ClassVar[bool] = True
    orphaned: ClassVar[str] = "the gateway crashed meanwhile; list the adapters to see whether it was done."

    def __init__(self, request_id: str, key: str, changed: Callable[[Operation], None]) -> None:
        self.request_id = request_id
        self.key = key
        self.ended_s: float | None = None
        self._changed = changed
        self._notes: list[ServerMessage] = []  # sent once, never again on resume
        self._answer: ServerMessage | None = None
        self._is_end_sent = False

    # ---- what happens to it -----------------------------------------------------------------------

    def cancel(self) -> None:
        """Nothing happens: it is carried out all the same."""

    def note(self, message: Progress) -> None:
        """Tell the client something in passing."""
        self._notes.append(message)
        self._changed(self)

    def finish(self, answer: Adapters) -> None:
        """It is done. Only the first end counts."""
        self._end(answer)

    def fail(self, error: DescantError) -> None:
        """It was refused, or failed. Only the first end counts."""
        self._end(error_message(error, self.request_id))

    def _end(self, answer: ServerMessage) -> None:
        if self._answer is None:
            self._answer = answer
            self._changed(self)

    # ---- what the client gets ---------------------------------------------------------------------

    @property
    def is_ended(self) -> bool:
        """Whether there is an answer."""
        return self._answer is not None

    @property
    def is_end_sent(self) -> bool:
        """Whether the answer has been rendered."""
        return self._is_end_sent

    def render(self) -> list[ServerMessage]:
        """Return what is new since the last call."""
        if self._is_end_sent:
            return []
        messages, self._notes = self._notes, []
        if self._answer is None:
            return messages
        self._is_end_sent = True
        return [*messages, self._answer]

    def resume(self, have: Mapping[int, int]) -> None:
        """Send the answer again, once there is one. Raises InvalidRequest if the client claims to have tokens of it."""
        if any(have.values()):
            raise InvalidRequest("have", f"request {self.request_id!r} is no stream and has no tokens.")
        self._is_end_sent = False
        self.ended_s = None
        self._changed(self)

    def take_unparked(self) -> tuple[int, ...]:
        """It parks nobody."""
        return ()
