"""An actor in a child process behind an ordinary `Ref`.

The parent's side: an actor (the endpoint) that owns the process. Each of its lives is one process; crash,
restart and escalation are those of any actor under a `Supervisor`. The frames are in `remote_child`.

    starting    from spawn, or from the death of the process before, until the factory returned: messages queue
    up          messages go out at once, in order; the process handles them in order
    dead        every ask the process had not answered, sent or queued, gets ActorFailed with `exit_status` or
                `signal`; tells it had not handled are lost. The next life is `starting` right away
    given up    too many unproductive lives in a row, or a refusal to start: every ask gets ActorFailed

A death is noticed by the end of file of its socket, at once; a hang by its missing heartbeats, and killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import anyio
import msgspec

from descant.actor import Actor, ActorFailed, Ref
from descant.remote_child import HEADER, Frame, Kind, Refusal, Start, decode_frame, encode_frame
from descant.supervision import RestartPolicy, Supervisor
from descant_client.errors import DescantError, InternalError, from_wire

MessageT = TypeVar("MessageT")

READ_LIMIT = 1 << 20  # bytes that the reader buffers before it lets the child wait


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """The process is killed when it answers no beat for `allowance_s` seconds.

    Missed beats are counted, not time: a stall of this side counts as one.
    """

    interval_s: float = 1.0
    allowance_s: float = 30.0

    @property
    def max_missed(self) -> int:
        return max(math.ceil(self.allowance_s / self.interval_s), 1)


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, and what comes back from it."""

    factory: str  # "module:function" of type remote_child.Factory
    config: bytes = b""  # handed to the factory
    replies: Any  # the closed union of its replies
    notices: Any = None  # the closed union of what it sends up unasked


class Remote(Generic[MessageT]):
    """The owner's handle on a remote actor, over all its lives. Others get its `ref` only."""

    def __init__(self, name: str, program: Program) -> None:
        self.name = name
        self.program = program
        self.ref: Ref[MessageT]  # set by spawn_remote
        self.life = 0  # number of the newest life, from 1
        self.endpoint: _Endpoint | None = None

    @property
    def is_up(self) -> bool:
        """Whether the newest life has started and not ended."""
        return self.endpoint is not None and self.endpoint.is_up

    @property
    def pid(self) -> int | None:
        """Process id of the newest life; None between lives, and for an inline one."""
        return None if self.endpoint is None else self.endpoint.pid

    def mark_productive(self) -> None:
        """Clear the record of crashes, and do not count the end of this life."""
        if self.endpoint is not None:
            self.endpoint.is_productive = True

    def kill(self) -> None:
        """End this life at once, as a crash would (SIGKILL)."""
        if self.endpoint is not None:
            self.endpoint.kill()


def spawn_remote(
    supervisor: Supervisor,
    name: str,
    program: Program,
    *,
    on_up: Callable[[int], None] = lambda life: None,
    on_down: Callable[[DescantError], None] = lambda reason: None,
    on_notice: Callable[[Any], None] = lambda notice: None,
    placement: Literal["process", "inline"] = "process",
    heartbeat: Heartbeat = Heartbeat(),  # noqa: B008 - frozen
    exit_grace_s: float = 5.0,
    restarts: RestartPolicy = RestartPolicy(max_restarts=5, within_s=math.inf),  # noqa: B008 - frozen
    mailbox_size: int = 1024,
) -> Remote[Any]:
    """Start a remote actor and return its handle at once; messages wait until it is up.

    The callbacks run on the loop and may not wait (`tell_nowait`, set an event); one that raises ends the life.

    Args:
        on_up: called with the number of the life (from 1) when its factory has returned.
        on_down: called with the reason when a life ended other than by a stop, up or not.
        on_notice: called with each notice the process sends up, from the start of its factory on.
        placement: `inline` runs the handler on this loop, for tests; messages still go through msgpack.
        exit_grace_s: time for the message in hand and `Handler.close` at a stop, before SIGKILL.
        restarts: by default only lives in a row that nobody marked productive count.
    """
    remote: Remote[Any] = Remote(name, program)

    def make_endpoint() -> _Endpoint:
        remote.life += 1
        watchers = _Watchers(on_up, on_down, on_notice)
        if placement == "inline":
            return _InlineEndpoint(remote, watchers)
        return _ProcessEndpoint(remote, watchers, heartbeat, exit_grace_s)

    remote.ref = supervisor.spawn(make_endpoint, name, mailbox_size=mailbox_size, restarts=restarts)
    return remote


class _Watchers(msgspec.Struct, frozen=True):
    on_up: Callable[[int], None]
    on_down: Callable[[DescantError], None]
    on_notice: Callable[[Any], None]


class _Endpoint(Actor[Any]):
    """What both placements share: who is told of a life's beginning and end."""

    keeps_mailbox = False  # what was sent to a life that ended is not for the next one

    def __init__(self, remote: Remote[Any], watchers: _Watchers) -> None:
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


class _ProcessEndpoint(_Endpoint):
    """One process, its two sockets, and the asks it has not answered."""

    def __init__(self, remote: Remote[Any], watchers: _Watchers, heartbeat: Heartbeat, exit_grace_s: float) -> None:
        super().__init__(remote, watchers)
        self.stop_grace_s = exit_grace_s + 5.0
        self._heartbeat = heartbeat
        self._exit_grace_s = exit_grace_s
        self._started = anyio.Event()
        self._last_words: str | None = None  # why it dies, if anybody said so
        self._asks: dict[int, asyncio.Future[Any]] = {}
        self._num_asks = 0
        self._decode_reply = msgspec.msgpack.Decoder(remote.program.replies).decode
        self._decode_notice = msgspec.msgpack.Decoder(remote.program.notices).decode
        self._sockets = contextlib.ExitStack()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def on_start(self) -> None:
        await self._launch()
        self.start_soon(self._read)
        self.start_soon(self._watch)
        start = Start(self._remote.name, self._remote.program.config, logging.getLogger().getEffectiveLevel())
        await self._send(encode_frame(Kind.START, 0, start))
        await self._started.wait()
        self._begin_life()

    async def on_receive(self, message: Any) -> Any:
        if not self.is_asked:
            return await self._send(encode_frame(Kind.TELL, 0, message))
        self._num_asks += 1
        try:
            frame = encode_frame(Kind.ASK, self._num_asks, message)
        except (TypeError, ValueError, OverflowError) as exc:  # this message is at fault, and nobody else's
            raise InternalError(f"{type(message).__name__} cannot be sent to the {self._remote.name}: {exc}") from exc
        reply = self._asks[self._num_asks] = asyncio.get_running_loop().create_future()
        await self._send(frame)
        return self.later(reply)

    async def on_stop(self) -> None:
        if self._writer is not None and self.is_up and self._death is None:
            self._writer.write(encode_frame(Kind.STOP, 0, None))
            await self._wait_for_exit(self._exit_grace_s)
        await self._wait_for_exit(0)
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        self._sockets.close()
        self._end_life()

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        self._pulse, their_pulse = socket.socketpair()
        self._sockets.enter_context(self._pulse)
        self._pulse.setblocking(False)
        with theirs, their_pulse:
            self._reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=READ_LIMIT)
            fds = (theirs.fileno(), their_pulse.fileno())
            command = (sys.executable, "-m", "descant.remote_child", self._remote.program.factory, *map(str, fds))
            self._process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, pass_fds=fds)
        self.pid = self._process.pid

    async def _send(self, frame: bytearray) -> None:
        assert self._writer is not None, "a message before on_start"
        self._writer.write(frame)
        try:
            await self._writer.drain()
        except ConnectionError:
            raise await self._obituary() from None

    async def _read(self) -> None:
        while (frame := await self._next_frame()) is not None:
            self._receive(frame)
        if not self.is_stopping:
            raise await self._obituary()

    async def _next_frame(self) -> Frame | None:
        try:
            (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            return decode_frame(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def _receive(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.REPLY:
                self._asks.pop(frame.ask_id).set_result(self._decode_reply(frame.payload))
            case Kind.ERROR:
                refusal = msgspec.msgpack.decode(frame.payload, type=Refusal)
                error = from_wire(refusal.code, refusal.message, refusal.data)
                if frame.ask_id in self._asks:
                    self._asks.pop(frame.ask_id).set_exception(error)
                else:
                    self._death = error
            case Kind.NOTICE:
                self._watchers.on_notice(self._decode_notice(frame.payload))
            case Kind.UP:
                self._started.set()
            case Kind.FATAL:
                self._last_words = msgspec.msgpack.decode(frame.payload, type=str)
            case _:
                raise ValueError(f"unexpected frame {frame.kind!r}")

    async def _watch(self) -> None:
        """Send a beat every interval; kill the process when it misses too many in a row."""
        loop = asyncio.get_running_loop()
        missed = 0
        while missed < self._heartbeat.max_missed:
            missed += 1
            with anyio.move_on_after(self._heartbeat.interval_s):
                try:
                    await loop.sock_sendall(self._pulse, b".")
                    if not await loop.sock_recv(self._pulse, 64):
                        return  # it is dead: the reader reports
                except ConnectionError:
                    return
                missed = 0
                await anyio.sleep_forever()
        self._last_words = f"no heartbeat for {self._heartbeat.allowance_s} s"
        self.kill()
        raise await self._obituary()

    async def _obituary(self) -> DescantError:
        """Reap the process and return what it died of."""
        status = await self._wait_for_exit(self._exit_grace_s)
        if self._death is None:
            killed_by = signal.Signals(-status).name if status < 0 else None
            reason = self._last_words or (f"killed by {killed_by}" if killed_by else f"exit status {status}")
            self._death = self._failure(reason, exit_status=None if killed_by else status, killed_by=killed_by)
        return self._death

    async def _wait_for_exit(self, grace_s: float) -> int:
        """Return the status, after SIGKILL if it takes longer; 0 if there never was a process."""
        if self._process is None:
            return 0
        with anyio.move_on_after(grace_s):
            return await self._process.wait()
        self.kill()
        return await self._process.wait()


class _InlineEndpoint(_Endpoint):
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
