"""`OutgoingOperation`: one change to an adapter, and its answer on the way to one session.

The change runs as a task of the gateway, not of the connection that asked for it. The answer stays in the session until
the client acknowledges it, so a client that lost its connection gets the answer without repeating the change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from descant.sessions.outgoing import Outgoing, error_message
from descant_client.errors import DescantError, InvalidRequest
from descant_client.lifecycle import Adapters
from descant_client.protocol import ServerMessage


class OutgoingOperation(Outgoing):
    """The answer to one change of an adapter.

    Cancelling does not undo the change: once begun it is carried out, and the answer is sent all the same.
    """

    is_kept: ClassVar[bool] = True
    orphaned: ClassVar[str] = "the gateway crashed meanwhile; list the adapters to see whether it was done."

    def __init__(self, request_id: str, key: str, on_change: Callable[[Outgoing], None]) -> None:
        super().__init__(request_id, key, on_change)
        self._answer: ServerMessage | None = None

    @property
    def is_ended(self) -> bool:
        """Whether there is an answer."""
        return self._answer is not None

    def cancel(self) -> None:
        """Do nothing: the change is carried out all the same."""

    def finish(self, answer: Adapters) -> None:
        """End it with its answer. Only the first end counts."""
        self._end(answer)

    def fail(self, error: DescantError) -> None:
        """End it with an error. Only the first end counts."""
        self._end(error_message(error, self.request_id))

    def resume(self, have: Mapping[int, int]) -> None:
        """Send the answer again, once there is one. Raises InvalidRequest if the client claims to have tokens of it."""
        if any(have.values()):
            raise InvalidRequest("have", f"request {self.request_id!r} is no stream and has no tokens.")
        self._rewind()

    def _end(self, answer: ServerMessage) -> None:
        if self._answer is None:
            self._answer = answer
            self._on_change(self)

    def _render_into(self, messages: list[ServerMessage]) -> None:
        if self._answer is not None:
            self._is_end_rendered = True
            messages.append(self._answer)
