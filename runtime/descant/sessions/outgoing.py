"""`Outgoing`: the answer to one request on its way to the session of its client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from descant.actor.errors import ActorError
from descant_client.errors import DescantError, InternalError
from descant_client.protocol import Error, Progress, ServerMessage


class Outgoing(ABC):
    """Base of `OutgoingStream` and `OutgoingOperation`: messages for a client until they are released.

    `on_change` is called, without waiting, whenever there may be something new to render.
    """

    is_kept: ClassVar[bool]  # stays with its session until it is released, as its request cannot be repeated
    orphaned: ClassVar[str]  # reason for the client if the gateway crashes before the request is submitted
    is_submitted = False  # whether the scheduler has its sequences; it then ends even if the gateway crashes

    def __init__(self, request_id: str, key: str, on_change: Callable[[Outgoing], None]) -> None:
        self.request_id = request_id
        self.key = key  # unique in the server; the scheduler cancels by it
        self.end_sent_s: float | None = None  # time at which the last message was sent
        self._on_change = on_change
        self._notes: list[ServerMessage] = []  # sent once and never again on resume
        self._is_end_rendered = False

    @property
    @abstractmethod
    def is_ended(self) -> bool:
        """Whether nothing more will be produced for it."""

    @property
    def is_end_rendered(self) -> bool:
        """Whether its last message has been rendered."""
        return self._is_end_rendered

    def note(self, message: Progress) -> None:
        """Add a message that does not end the answer."""
        self._notes.append(message)
        self._on_change(self)

    def render(self) -> list[ServerMessage]:
        """Return the messages that are new since the last call."""
        if self._is_end_rendered:
            return []
        messages, self._notes = self._notes, []
        self._render_into(messages)
        return messages

    def on_end_sent(self, now_s: float) -> None:
        """Record that the last message has been written to a connection."""
        self.end_sent_s = now_s

    @abstractmethod
    def resume(self, have: Mapping[int, int]) -> None:
        """Send again the part that the client has not received. `have` counts its tokens by choice.

        Raises:
            InvalidRequest: the client claims more than there is.
        """

    def take_unparked(self) -> tuple[int, ...]:
        """Return the ids of sequences that were parked for it and may run again."""
        return ()

    @abstractmethod
    def cancel(self) -> None:
        """Give up work that has not reached the scheduler."""

    @abstractmethod
    def fail(self, error: DescantError) -> None:
        """End it with an error. Only the first end counts."""

    @abstractmethod
    def _render_into(self, messages: list[ServerMessage]) -> None:
        """Append the messages that are new since the last call. Sets `_is_end_rendered` with the last one."""

    def _rewind(self) -> None:
        """Allow its end to be rendered and sent again."""
        self._is_end_rendered = False
        self.end_sent_s = None
        self._on_change(self)


def error_message(error: DescantError, request_id: str | None = None) -> Error:
    """Return an error as it goes over the wire. Errors of actors, which have no wire code, become InternalError."""
    if isinstance(error, ActorError):
        error = InternalError(str(error))
    return Error(code=error.code, message=str(error), request_id=request_id, data=error.data())
