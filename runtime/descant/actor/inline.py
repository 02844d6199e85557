"""`InlineEndpoint`: one life of a remote actor on this event loop, for tests. Messages still go through msgpack."""

from __future__ import annotations

from typing import Any

import msgspec

from descant.actor.endpoint import Endpoint, Remote, Watchers
from descant.actor.remote_child import find_factory
from descant_client.errors import DescantError


class Inline(msgspec.Struct, frozen=True):
    """Placement: the handler runs on this event loop, for tests. Messages still go through msgpack."""

    def endpoint(self, remote: Remote[Any], watchers: Watchers) -> Endpoint:
        """Return the endpoint of the next life."""
        return InlineEndpoint(remote, watchers)


class InlineEndpoint(Endpoint):
    """The handler on this loop."""

    async def on_start(self) -> None:
        program = self._remote.program
        self._handler = find_factory(program.factory)(program.config, self._notify)
        self._begin_life()

    async def on_receive(self, message: Any) -> Any:
        message = _copy(message, self._handler.messages)
        return _copy(self._handler.handle(message), self._remote.program.replies)

    async def on_stop(self) -> None:
        if self.is_up and self.is_stopping:
            self._handler.close()
        self._end_life()

    def kill(self) -> None:
        self._death = self._failure("killed by SIGKILL", killed_by="SIGKILL")
        self.start_soon(self._die, self._death)

    async def _die(self, death: DescantError) -> None:
        raise death

    def _notify(self, notice: Any) -> None:
        self._watchers.on_notice(_copy(notice, self._remote.program.notices))


def _copy(value: Any, kind: Any) -> Any:
    """Return what the other side of a socket would get."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=kind)
