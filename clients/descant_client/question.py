"""A request with a single answer."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import anyio

from descant_client.connection import Connection
from descant_client.errors import DescantError, InternalError, from_wire
from descant_client.lifecycle import AdapterChange
from descant_client.protocol import Error, ListAdapters, ListModels, OpenAdapter, Progress, ServerMessage

Answer = TypeVar("Answer")


class Question(Generic[Answer]):
    """A request with one answer, sent again after a reconnect. It must change nothing; for changes use `Operation`."""

    def __init__(self, question: ListAdapters | OpenAdapter | ListModels | AdapterChange, kind: type[Answer]) -> None:
        self._question = question
        self._kind = kind
        self._answer: Answer | None = None
        self._error: DescantError | None = None
        self._finished = anyio.Event()
        self._connection: Connection | None = None

    async def ask(self, connection: Connection) -> Answer:
        """Send the request and return the answer. Cancelling the wait abandons the question.

        Raises:
            DescantError: the server's refusal, or `ConnectionLost`.
        """
        self._connection = connection
        connection.add(self)
        try:
            await self._finished.wait()
        except BaseException:
            self.abandon()
            raise
        if self._error is not None:
            raise copy.copy(self._error)  # without the frames of the task that made it
        assert self._answer is not None, "finished without an answer"
        return self._answer

    @property
    def request_id(self) -> str:
        return self._question.request_id

    @property
    def is_answered(self) -> bool:
        return self.is_finished

    @property
    def is_finished(self) -> bool:
        return self._finished.is_set()

    @property
    def connection(self) -> Connection:
        """Connection that carries the question."""
        assert self._connection is not None, "ask() comes first"
        return self._connection

    def open(self) -> None:
        self.connection.send(self._question)

    def reopen(self, *, is_same_session: bool, was_sent: bool) -> None:
        self.open()

    def receive(self, message: ServerMessage) -> None:
        if isinstance(message, Progress):
            return
        if isinstance(message, self._kind):
            self._answer = message
        elif isinstance(message, Error):
            self._error = from_wire(message.code, message.message, message.data)
        else:
            self._error = InternalError(f"{type(message).__name__} is no answer to {type(self._question).__name__}.")
        self._finished.set()

    def fail(self, error: DescantError) -> None:
        self._error = error
        self._finished.set()

    def cancel(self) -> None:
        """Do nothing: the server runs nothing for a question that could be stopped."""

    def abandon(self) -> None:
        """Ignore the answer. Called when the wait for it was cancelled."""
        self.connection.drop(self)
