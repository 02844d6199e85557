"""`InlineEndpoint`: one life of a remote actor on this event loop, for tests. Messages still go through msgpack."""

from __future__ import annotations

import importlib
from typing import Any

import msgspec

from descant.actor.endpoint import Endpoint
from descant_client.errors import DescantError


class InlineEndpoint(Endpoint):
    """The handler on this loop."""

    async def on_start(self) -> None:
        program = self._remote.program
        module, _, name = program.factory.partition(":")
        self._handler = getattr(importlib.import_module(module), name)(program.config, self._notify)
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
