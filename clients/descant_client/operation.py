"""A change to an adapter: asked for once, whatever happens to the connection."""

from __future__ import annotations

from descant_client.errors import ConnectionLost, DescantError, StreamNotFound
from descant_client.lifecycle import (
    AdapterChange,
    Adapters,
    CreateAdapter,
    DestroyAdapter,
    ForkAdapter,
    MergeAdapters,
    MergeAndSave,
)
from descant_client.protocol import Ack, Error, Progress, Resume, ServerMessage
from descant_client.question import Question

# Done again these find what they made, or take what another has made since; the others come to the same.
_NOT_TWICE = (CreateAdapter, ForkAdapter, MergeAdapters, MergeAndSave, DestroyAdapter)


class Operation(Question[Adapters]):
    """One change, done at most once in a session.

    After a reconnect to the same session its answer is asked for, and the change itself only if the server has never
    seen it. After a restart of the server, what may have been done already is done again only if that is the same.
    """

    def __init__(self, change: AdapterChange) -> None:
        super().__init__(change, Adapters)
        self._change = change
        self._is_known = False  # the server has shown that it has it
        self._is_forgotten = False
        self._is_resuming = False

    @property
    def is_answered(self) -> bool:
        return self._is_known or self.is_finished

    def reopen(self, *, is_same_session: bool, was_sent: bool) -> None:
        """Go on after a reconnect. `was_sent`: it may have reached the server on an earlier connection."""
        if was_sent and is_same_session:
            self._is_resuming = True
            self.connection.send(Resume(self.request_id))
        elif self._is_forgotten:
            self.fail(self._uncertain())  # nobody hears it
        elif was_sent and isinstance(self._change, _NOT_TWICE):
            self.fail(self._uncertain())
        else:
            self._is_known = self._is_resuming = False
            self.open()

    def receive(self, message: ServerMessage) -> None:
        if isinstance(message, Progress):
            self._is_known = True
            self._is_resuming = False
        elif self._is_resuming and isinstance(message, Error) and message.code == StreamNotFound.code:
            self._on_unknown()
        else:
            super().receive(message)
            self.connection.send(Ack(self.request_id))

    def forget(self) -> None:
        """Nobody waits any more; its answer, when it comes, is acknowledged."""
        self._is_forgotten = True

    def _on_unknown(self) -> None:
        self._is_resuming = False
        if self._is_known or self._is_forgotten:
            self.fail(self._uncertain())
        else:  # the drop swallowed it
            self.open()

    def _uncertain(self) -> DescantError:
        reason = (
            f"the server has lost its session, and may or may not have done what was asked of adapter "
            f"{self._change.name!r}. See with `adapters.open` or `adapters.list`."
        )
        return ConnectionLost(self.connection.uri, reason)
