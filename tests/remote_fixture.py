"""A small remote actor with one action per message, run in a child process by test_remote."""

import ctypes
import os
import signal
import threading
import time
from typing import Any

import msgspec

from descant.actor.remote_child import Notify
from descant_client.errors import AdapterTooLarge, ModelInvalid


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of the handler's messages."""


class Echo(Message, frozen=True):
    """Answered with the same data."""

    data: bytes


class Spin(Message, frozen=True):
    """Keeps the main thread busy for a time, without releasing the interpreter's lock."""

    seconds: float


class Refuse(Message, frozen=True):
    """Raises a typed error."""


class Fault(Message, frozen=True):
    """Raises an error that is not typed."""


class Exit(Message, frozen=True):
    """Ends the process at once."""

    status: int


class Report(Message, frozen=True):
    """Sends a notice for each text, then replies."""

    texts: list[str]


class Beside(Message, frozen=True):
    """Handled beside other messages: waits for the file, then acts on the name of `then`."""

    path: str
    then: str = "reply"


class Echoed(msgspec.Struct, frozen=True, tag=True):
    """Reply to Echo."""

    data: bytes


class Done(msgspec.Struct, frozen=True, tag=True):
    """Reply to all other messages. `ignored` are the signals that the process ignores."""

    pid: int
    ignored: list[str]


class Noticed(msgspec.Struct, frozen=True, tag=True):
    """The only kind of notice."""

    text: str


MESSAGES = Echo | Spin | Refuse | Fault | Exit | Report | Beside
REPLIES = Echoed | Done


class FixtureHandler:
    """Handler with one action per message."""

    messages = MESSAGES
    beside = (Beside,)

    def __init__(self, notify: Notify) -> None:
        self._notify = notify

    def handle(self, message: Any) -> Any:
        """Carry out the action of a message."""
        match message:
            case Echo(data):
                return Echoed(data)
            case Spin(seconds):
                spin(seconds)
            case Refuse():
                raise AdapterTooLarge("wide", 20, 10)
            case Fault():
                raise ValueError("a fault")
            case Exit(status):
                os._exit(status)
            case Beside(path, then):
                self._notify(Noticed(threading.current_thread().name))
                while not os.path.exists(path):
                    time.sleep(0.001)
                if then != "reply":
                    return self.handle({"refuse": Refuse(), "fault": Fault()}[then])
            case Report(texts):
                for text in texts:
                    self._notify(Noticed(text))
        ignored = (signal.SIGINT, signal.SIGTERM)
        return Done(os.getpid(), [s.name for s in ignored if signal.getsignal(s) is signal.SIG_IGN])

    def close(self) -> None:
        """Send a notice of the orderly stop."""
        self._notify(Noticed("closed"))


def spin(seconds: float) -> None:
    """Hold the interpreter's lock as a computation does, without using the CPU: `PyDLL` does not release it."""
    sleep_us = ctypes.PyDLL(None).usleep
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sleep_us(1000)


def make(config: bytes, notify: Notify) -> FixtureHandler:
    """Report the configuration and start."""
    notify(Noticed(config.decode()))
    return FixtureHandler(notify)


def make_slowly(config: bytes, notify: Notify) -> FixtureHandler:
    """Take longer to start than the heartbeat allows in the tests."""
    spin(float(config))
    return FixtureHandler(notify)


def make_never(config: bytes, notify: Notify) -> FixtureHandler:
    """Refuse to start."""
    raise ModelInvalid(config.decode(), "no weights")


def make_and_die(config: bytes, notify: Notify) -> FixtureHandler:
    """End the process before it is up."""
    os._exit(3)
