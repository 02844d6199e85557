"""The reading end of `streaming.py`: raw sockets. Frames are counted, not decoded, so that it never limits the rate.

Servers do not mask frames, so a frame is a header of 2 to 10 bytes and its payload (RFC 6455, section 5.2).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 18
TEXT, BINARY, CLOSE = 1, 2, 8
TOKEN_IDS = b"token_ids"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass
class Tally:
    """Counts of the data received so far. `num_bytes` is the total size of payloads."""

    num_frames: int = 0
    num_bytes: int = 0
    num_tokens: int = 0
    num_accepted: int = 0
    num_ended: int = 0  # streams that are done or failed, connections that were closed: none should be


@dataclass(frozen=True)
class Span:
    """A period of time, and the counts of its events."""

    seconds: float
    server_cpu_s: float
    reader_cpu_s: float
    num_frames: int
    num_bytes: int
    num_tokens: int


def scan(data: bytes, tally: Tally) -> int:
    """Count the whole frames at the beginning of `data` and return where the first that is not whole begins."""
    at, size = 0, len(data)
    find = data.find
    while at + 2 <= size:
        length, start = data[at + 1], at + 2
        if length == 126:
            start = at + 4
            length = int.from_bytes(data[at + 2 : start], "big")
        elif length == 127:
            start = at + 10
            length = int.from_bytes(data[at + 2 : start], "big")
        end = start + length
        if start > size or end > size:
            break
        opcode = data[at] & 0x0F
        if opcode == CLOSE:
            tally.num_ended += 1
        elif opcode < CLOSE:
            tally.num_frames += 1
            tally.num_bytes += length
            ids = find(TOKEN_IDS, start, end)
            if ids >= 0:
                tally.num_tokens += count_items(data, ids + len(TOKEN_IDS), end)
            else:
                _count_event(data[start : min(end, start + 24)], tally)
        at = end
    return at


def count_items(data: bytes, at: int, end: int) -> int:
    """Return the length of the array of integers that follows its key: JSON with the key's quote first, or msgpack."""
    head = data[at]
    if head == ord('"'):
        close = data.index(b"]", at, end)
        return 0 if data[close - 1] == ord("[") else data.count(b",", at, close) + 1
    if head == 0xDC:
        return int.from_bytes(data[at + 1 : at + 3], "big")
    return head & 0x0F


def _count_event(head: bytes, tally: Tally) -> None:
    if b"accepted" in head:
        tally.num_accepted += 1
    elif b"done" in head or b"error" in head:
        tally.num_ended += 1


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a client's frame. Clients mask their payloads; this mask is all zeros, which changes nothing."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + struct.pack(">H", size)
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


class Reader:
    """Connections to one server, read by one thread."""

    def __init__(self, port: int, pid: int) -> None:
        self.tally = Tally()
        self._port = port
        self._pid = pid
        self._selector = selectors.DefaultSelector()
        self._rest: dict[socket.socket, bytes] = {}  # the beginnings of frames

    def connect(self, count: int, path: str, subprotocol: str) -> None:
        """Open connections, one after the other. Return when the server has accepted each."""
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {subprotocol}\r\n\r\n"
        ).encode()
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", self._port), timeout=TIMEOUT_S)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.sendall(request)
            answer = b""
            while b"\r\n\r\n" not in answer:
                received = one.recv(CHUNK_BYTES)
                if not received:
                    raise ConnectionError(f"the server hung up: {answer!r}")
                answer += received
            status, _, rest = answer.partition(b"\r\n\r\n")
            if b" 101 " not in status[:16]:
                raise ConnectionError(f"no WebSocket: {status!r}")
            self._rest[one] = rest[scan(rest, self.tally) :]
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)

    def send(self, opcode: int, payloads: Sequence[bytes]) -> None:
        """Send messages, through the connections in turn."""
        sockets = list(self._rest)
        for index, one in enumerate(sockets):
            one.setblocking(True)
            one.sendall(b"".join(frame(opcode, payload) for payload in payloads[index :: len(sockets)]))
            one.setblocking(False)

    def read_for(self, seconds: float) -> None:
        """Read frames for this number of seconds."""
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            self._read(left)

    def read_until_running(self, num_streams: int) -> None:
        """Read until all streams are accepted and have had some frames. Raises TimeoutError, ConnectionError."""
        until = time.perf_counter() + TIMEOUT_S
        enough = None
        while enough is None or self.tally.num_frames < enough:
            self._read(1.0)
            self._complain()
            if enough is None and self.tally.num_accepted >= num_streams:
                enough = self.tally.num_frames + 3 * num_streams
            if time.perf_counter() > until:
                raise TimeoutError(f"{self.tally.num_accepted} of {num_streams} streams are running: {self.tally}")

    def measure(self, seconds: float) -> Span:
        """Read for this number of seconds and return the counts. Raises ConnectionError if a stream ended meanwhile."""
        before = replace(self.tally)
        begin = self._clocks()
        self.read_for(seconds)
        took = [after - at for after, at in zip(self._clocks(), begin, strict=True)]
        self._complain()
        return Span(
            *took,
            num_frames=self.tally.num_frames - before.num_frames,
            num_bytes=self.tally.num_bytes - before.num_bytes,
            num_tokens=self.tally.num_tokens - before.num_tokens,
        )

    def _clocks(self) -> tuple[float, float, float]:
        return time.perf_counter(), cpu_seconds(self._pid), time.process_time()

    def _complain(self) -> None:
        if self.tally.num_ended:
            raise ConnectionError(f"streams or connections ended early: {self.tally}")

    def _read(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            one = key.fileobj
            assert isinstance(one, socket.socket), "only sockets are registered"
            data = one.recv(CHUNK_BYTES)
            if not data:
                self._forget([one])
                self.tally.num_ended += 1
                continue
            rest = self._rest[one]
            data = rest + data if rest else data
            at = scan(data, self.tally)
            self._rest[one] = data[at:] if at < len(data) else b""

    def _forget(self, sockets: Iterable[socket.socket]) -> None:
        for one in sockets:
            self._selector.unregister(one)
            del self._rest[one]
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Close each connection as a client that will not reconnect, and wait until the server has closed it too."""
        goodbye = frame(CLOSE, (1000).to_bytes(2, "big"))
        for one in self._rest:
            with contextlib.suppress(OSError):
                one.sendall(goodbye)
        until = time.perf_counter() + 10.0
        while self._rest and time.perf_counter() < until:
            with contextlib.suppress(OSError):
                self._read(0.5)
        self._forget(list(self._rest))
        self._selector.close()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, in user and system mode (proc(5)), without its children's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
