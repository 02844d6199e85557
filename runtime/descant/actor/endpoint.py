"""`Remote` and `Endpoint`: the parent's side of a remote actor, whatever its placement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from descant.actor.actor import Actor
from descant.actor.errors import ActorFailed
from descant.actor.ref import Ref
from descant_client.errors import DescantError

MessageT = TypeVar("MessageT")


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """The program of a remote actor: its factory and the types of its answers."""

    factory: str  # "module:function" of type remote_child.Factory
    config: bytes = b""  # argument of the factory
    replies: Any  # the closed union of its replies
    notices: Any = None  # the closed union of its notices: messages to the parent that answer no ask


class Remote(Generic[MessageT]):
    """The owner's handle on a remote actor over all its lives. Other actors get its `ref` only.

    Setting `program` takes effect in the next life.
    """

    def __init__(self, name: str, program: Program) -> None:
        self.name = name
        self.program = program
        self.ref: Ref[MessageT]  # set by spawn_remote
        self.life = 0  # number of the newest life, from 1
        self.endpoint: Endpoint | None = None

    @property
    def is_up(self) -> bool:
        """Whether the newest life has started and not ended."""
        return self.endpoint is not None and self.endpoint.is_up

    @property
    def pid(self) -> int | None:
        """Process id of the newest life; None between lives, before its process starts, and for an inline one."""
        return None if self.endpoint is None else self.endpoint.pid

    def mark_productive(self) -> None:
        """Clear the record of crashes, and do not count the end of this life. Do nothing between lives."""
        if self.endpoint is not None:
            self.endpoint.is_productive = True

    def kill(self) -> None:
        """End this life at once, as a crash would (SIGKILL). Do nothing between lives."""
        if self.endpoint is not None:
            self.endpoint.kill()


class Watchers(msgspec.Struct, frozen=True):
    """Callbacks of the owner of a remote actor; see `remote.spawn_remote`."""

    on_up: Callable[[int], None]
    on_down: Callable[[DescantError], None]
    on_notice: Callable[[Any], None]


class Endpoint(Actor[Any]):
    """Base of the endpoints of both placements. Reports the start of a life, and its end unless it is stopped."""

    keeps_mailbox = False  # messages to a life that ended are not for the next one

    def __init__(self, remote: Remote[Any], watchers: Watchers) -> None:
        self.is_up = False
        self.pid: int | None = None
        self._remote = remote
        self._watchers = watchers
        self._death: DescantError | None = None
        remote.endpoint = self

    def kill(self) -> None:
        raise NotImplementedError

    def _begin_life(self) -> None:
        self.is_up = True
        self._watchers.on_up(self._remote.life)

    def _end_life(self) -> None:
        self.is_up = False
        self._remote.endpoint = None
        if not self.is_stopping:
            self._watchers.on_down(self._death or self._failure("the endpoint failed; the log has the trace"))

    def _failure(self, reason: str, *, exit_status: int | None = None, killed_by: str | None = None) -> ActorFailed:
        return ActorFailed(self._remote.name, reason, exit_status=exit_status, signal=killed_by)


class Placement(Protocol):
    """The place where a remote actor runs: a child process, or this event loop."""

    def endpoint(self, remote: Remote[Any], watchers: Watchers) -> Endpoint:
        """Return the endpoint of the next life."""
        ...
