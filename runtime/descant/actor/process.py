"""`ProcessEndpoint`: one life of a remote actor as a child process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
from typing import Any

import anyio
import msgspec

from descant.actor.child_process import ChildProcess, StartChild, execute
from descant.actor.endpoint import Endpoint, Remote, Watchers
from descant.actor.frames import HEADER, Frame, Kind, Refusal, Start, decode_frame, encode_frame
from descant_client.errors import DescantError, InternalError, from_wire

READ_LIMIT = 1 << 20  # bytes that the reader buffers before the child has to wait


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """The process is killed when it answers no beat for `allowance_s` seconds.

    Missed beats are counted, not time, so a stall of the parent counts as one.
    """

    interval_s: float = 1.0
    allowance_s: float = 30.0

    @property
    def max_missed(self) -> int:
        return max(math.ceil(self.allowance_s / self.interval_s), 1)


class InProcess(msgspec.Struct, frozen=True, kw_only=True):
    """Placement: each life of the remote actor is a child process.

    At a stop, the current message and `Handler.close` have `exit_grace_s` seconds before SIGKILL.
    """

    start_child: StartChild = execute
    heartbeat: Heartbeat = Heartbeat()
    exit_grace_s: float = 5.0

    def endpoint(self, remote: Remote[Any], watchers: Watchers) -> Endpoint:
        """Return the endpoint of the next life."""
        return ProcessEndpoint(remote, watchers, self)


class ProcessEndpoint(Endpoint):
    """One process, its two sockets, and the asks it has not answered."""

    def __init__(self, remote: Remote[Any], watchers: Watchers, placement: InProcess) -> None:
        super().__init__(remote, watchers)
        self.stop_grace_s = placement.exit_grace_s + 5.0
        self._start_child = placement.start_child
        self._heartbeat = placement.heartbeat
        self._exit_grace_s = placement.exit_grace_s
        self._started = anyio.Event()
        self._reported_cause: str | None = None  # the cause of death, if the child or the heartbeat reported one
        self._asks: dict[int, asyncio.Future[Any]] = {}
        self._num_asks = 0
        self._decode_reply = msgspec.msgpack.Decoder(remote.program.replies).decode
        self._decode_notice = msgspec.msgpack.Decoder(remote.program.notices).decode
        self._sockets = contextlib.ExitStack()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._process: ChildProcess | None = None

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
        except (TypeError, ValueError, OverflowError) as exc:  # only this message fails
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
            self._process.kill()

    async def _launch(self) -> None:
        self._process, line = await self._start_child(self._remote.program.factory)
        self._sockets.callback(line.close)
        self.pid = self._process.pid
        self._pulse = line.pulse
        self._pulse.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=line.frames, limit=READ_LIMIT)

    async def _send(self, frame: bytearray) -> None:
        assert self._writer is not None, "a message before on_start"
        self._writer.write(frame)
        try:
            await self._writer.drain()
        except ConnectionError:
            raise await self._cause_of_death() from None

    async def _read(self) -> None:
        while (frame := await self._next_frame()) is not None:
            self._receive(frame)
        if not self.is_stopping:
            raise await self._cause_of_death()

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
                self._reported_cause = msgspec.msgpack.decode(frame.payload, type=str)
            case _:
                raise ValueError(f"unexpected frame {frame.kind!r}")

    async def _watch(self) -> None:
        """Send a beat every interval. Kill the process when it misses too many in a row."""
        loop = asyncio.get_running_loop()
        missed = 0
        while missed < self._heartbeat.max_missed:
            missed += 1
            with anyio.move_on_after(self._heartbeat.interval_s):
                try:
                    await loop.sock_sendall(self._pulse, b".")
                    if not await loop.sock_recv(self._pulse, 64):
                        return  # it has ended: the reader reports
                except ConnectionError:
                    return
                missed = 0
                await anyio.sleep_forever()
        self._reported_cause = f"no heartbeat for {self._heartbeat.allowance_s} s"
        self.kill()
        raise await self._cause_of_death()

    async def _cause_of_death(self) -> DescantError:
        """Wait for the end of the process and return its cause."""
        status = await self._wait_for_exit(self._exit_grace_s)
        if self._death is None:
            killed_by = signal.Signals(-status).name if status is not None and status < 0 else None
            known = f"killed by {killed_by}" if killed_by else f"exit status {status}"
            reason = self._reported_cause or ("exit status unknown" if status is None else known)
            self._death = self._failure(reason, exit_status=None if killed_by else status, killed_by=killed_by)
        return self._death

    async def _wait_for_exit(self, grace_s: float) -> int | None:
        """Return the exit status, after SIGKILL if it takes longer; None if it cannot be known."""
        if self._process is None:
            return None
        with anyio.move_on_after(grace_s):
            return await self._process.wait()
        self.kill()
        return await self._process.wait()
