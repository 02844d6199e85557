"""A small remote actor with delayed replies, run in a child process by test_remote_later."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from descant.actor.remote_child import Later, Notify
from descant_client.errors import AdapterTooLarge


class Echo(msgspec.Struct, frozen=True, tag=True):
    """Answered with the number of waits begun so far."""


class Slow(msgspec.Struct, frozen=True, tag=True):
    """Answered once the file exists. `then` may name an error to raise in place of a reply: "refuse" or "fault"."""

    path: str
    then: str = ""


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Reply to both messages."""

    text: str


class Handler:
    """Handler that waits for files."""

    messages = Echo | Slow

    def __init__(self) -> None:
        self._num_waits = 0

    def handle(self, message: Echo | Slow) -> Answer | Later:
        if isinstance(message, Echo):
            return Answer(f"{self._num_waits} waits")
        return Later(lambda: self._wait(message), lambda: self._reply(message))

    def _wait(self, message: Slow) -> None:
        self._num_waits += 1
        while not Path(message.path).exists():
            time.sleep(0.001)
        if message.then == "fault":
            raise ValueError("a fault")

    def _reply(self, message: Slow) -> Answer:
        if message.then == "refuse":
            raise AdapterTooLarge("x", 2, 1)
        return Answer(message.path)

    def close(self) -> None:
        pass


def make(config: bytes, notify: Notify) -> Handler:
    return Handler()
