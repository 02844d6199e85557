"""A change to an adapter, made at most once in a session, also through reconnects."""

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

# Repeated, these would find their own result in the way, or destroy or replace a later change of another client.
# Repeating any other change has the same effect as making it once.
_NOT_TWICE = (CreateAdapter, ForkAdapter, MergeAdapters, MergeAndSave, DestroyAdapter)


class Operation(Question[Adapters]):
    """One change, made at most once in a session.

    After a reconnect to the same session, its answer is requested; the change itself is sent again only if the server
    has not received it. After a restart of the server, a change that may have been made is sent again only if repeating
    it has the same effect; otherwise it fails with `ConnectionLost`.
    """

    def __init__(self, change: AdapterChange) -> None:
        super().__init__(change, Adapters)
        self._change = change
        self._is_known = False  # the server has answered with progress
        self._is_abandoned = False
        self._is_resuming = False

    @property
    def is_answered(self) -> bool:
        return self._is_known or self.is_finished

    def reopen(self, *, is_same_session: bool, was_sent: bool) -> None:
        """Continue after a reconnect. `was_sent`: the change may have reached the server on an earlier connection."""
        if was_sent and is_same_session:
            self._is_resuming = True
            self.connection.send(Resume(self.request_id))
        elif self._is_abandoned:
            self.fail(self._uncertain())  # no task waits for the error
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

    def abandon(self) -> None:
        """Ignore the answer, but acknowledge it when it comes. Called when the wait for it was cancelled."""
        self._is_abandoned = True

    def _on_unknown(self) -> None:
        self._is_resuming = False
        if self._is_known or self._is_abandoned:
            self.fail(self._uncertain())
        else:  # it was lost with the connection
            self.open()

    def _uncertain(self) -> DescantError:
        reason = (
            f"the server has lost its session, and may or may not have done what was asked of adapter "
            f"{self._change.name!r}. See with `adapters.open` or `adapters.list`."
        )
        return ConnectionLost(self.connection.uri, reason)
