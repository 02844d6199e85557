"""What a session holds for a client: the answer to one request, however it comes about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from descant_client.errors import DescantError
from descant_client.protocol import ServerMessage


class Outgoing(Protocol):
    """A `Stream` or an `Operation`: something that has messages for its client until it is released."""

    request_id: str
    key: str  # unique in the server
    is_submitted: bool  # it ends by itself, whatever becomes of the gateway
    ended_s: float | None  # when the last message was sent
    is_kept: ClassVar[bool]  # it stays with its session until it is released: doing it again would not be the same
    orphaned: ClassVar[str]  # what to tell the client if the gateway crashes before it is submitted

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come of it."""
        ...

    @property
    def is_end_sent(self) -> bool:
        """Whether its last message has been rendered."""
        ...

    def render(self) -> list[ServerMessage]:
        """Return what is new since the last call."""
        ...

    def resume(self, have: Mapping[int, int]) -> None:
        """Say again what the client has not got. Raises InvalidRequest if it claims more than there is."""
        ...

    def take_unparked(self) -> tuple[int, ...]:
        """Return the sequences that were parked for it and may go on now."""
        ...

    def cancel(self) -> None:
        """Give up what has not reached the scheduler."""
        ...

    def fail(self, error: DescantError) -> None:
        """End it with an error."""
        ...
