"""The child's side of a remote actor. The frames are in `frames`.

    python -m descant.actor.remote_child MODULE:FACTORY FD PULSE_FD

FD is one end of a stream socket for frames. PULSE_FD is one end of a second socket: a thread sends every byte back
while the main thread works. At its end of file the parent is gone, and the process exits at once.

The factory is `FACTORY(config, notify) -> Handler` and may take long (imports, weights). The factory and
`Handler.handle` run on the main thread; messages are handled in order of arrival. Messages of the types in
`Handler.beside` are handled on side threads, several at a time. A message that is answered with a `Later` is answered
once that is ready, in order; meanwhile the main thread handles the next messages.

A DescantError of the factory is the refusal to start, one of the handler is the reply. Any other exception, on any
thread, ends the process.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol

import msgspec

from descant.actor.frames import HEADER, Frame, Kind, Refusal, Start, decode_frame, encode_frame
from descant_client.errors import DescantError

logger = logging.getLogger(__name__)

NUM_SIDE_THREADS = 12  # messages handled beside the main thread at once; more wait their turn


class Later(NamedTuple):
    """A delayed reply. `wait` blocks another thread until it is ready, then `reply` returns it on the main thread.

    Only the oldest delayed reply is waited for.
    """

    wait: Callable[[], None]
    reply: Callable[[], Any]


class Handler(Protocol):
    """A synchronous message handler, made by the factory of a child process."""

    # The closed union of its messages. A handler may also have `beside: tuple[type, ...]`, the message types that
    # `handle` accepts on any thread, several at a time.
    messages: Any

    def handle(self, message: Any) -> Any:
        """Return the reply, a Struct of the reply union (or None), or a `Later`."""
        ...

    def close(self) -> None:
        """Release all resources. Called at an orderly stop."""
        ...


# Sends a Struct of the notice union to the parent. Any thread may call it.
Notify = Callable[[Any], None]
Factory = Callable[[bytes, Notify], Handler]


class Uplink:
    """The socket to the parent. One thread receives frames; any thread sends them."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._stream = sock.makefile("rb", buffering=1 << 16)
        self._lock = threading.Lock()

    def receive(self) -> Frame | None:
        """Return the next frame, None at end of file."""
        try:
            header = self._stream.read(HEADER.size)
            if len(header) < HEADER.size:
                return None
            (length,) = HEADER.unpack(header)
            body = self._stream.read(length)
        except ConnectionError:
            return None
        return decode_frame(body) if len(body) == length else None

    def send(self, kind: Kind, ask_id: int, payload: Any) -> None:
        frame = encode_frame(kind, ask_id, payload)
        try:
            with self._lock:
                self._socket.sendall(frame)
        except ConnectionError:
            raise SystemExit(0) from None  # the parent is gone

    def notify(self, notice: Any) -> None:
        self.send(Kind.NOTICE, 0, notice)

    def refuse(self, ask_id: int, error: DescantError) -> None:
        self.send(Kind.ERROR, ask_id, Refusal(error.code, str(error), error.data()))


def serve(uplink: Uplink, factory: Factory) -> None:
    """Make the handler and pass it messages until STOP or end of file."""
    start = _receive_start(uplink)
    _name_process(start.name)
    logging.basicConfig(level=start.log_level, format=f"%(asctime)s {start.name} %(levelname)s %(name)s: %(message)s")
    try:
        try:
            handler = factory(start.config, uplink.notify)
        except DescantError as error:
            uplink.refuse(0, error)
            return
        uplink.send(Kind.UP, 0, None)
        _handle_messages(uplink, handler)
        handler.close()
    except Exception as exc:
        uplink.send(Kind.FATAL, 0, f"{type(exc).__name__}: {exc}")
        raise


def _receive_start(uplink: Uplink) -> Start:
    frame = uplink.receive()
    if frame is None:
        raise SystemExit(0)
    return msgspec.msgpack.decode(frame.payload, type=Start)


def _name_process(name: str) -> None:
    """Set the name of this process that `ps` and `top` show. Linux keeps 15 bytes of it."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write(f"descant-{name}")


class _Ready(NamedTuple):
    """The oldest delayed reply is ready."""


_Item = tuple[Frame, Any] | _Ready | Exception | None  # None: no message will follow


def _handle_messages(uplink: Uplink, handler: Handler) -> None:
    inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    owed = _Owed(uplink, inbox)
    threading.Thread(target=_read, args=(uplink, handler, inbox), name="uplink", daemon=True).start()
    is_open = True
    while is_open or owed:
        match inbox.get():
            case None:
                is_open = False
            case Exception() as error:
                raise error
            case _Ready():
                owed.answer()
            case frame, message:
                later = _answer(uplink, frame, message, lambda message=message: handler.handle(message))
                if later is not None:
                    owed.add(frame, message, later)


def _read(uplink: Uplink, handler: Handler, inbox: queue.SimpleQueue[_Item]) -> None:
    """Pass each message to the side threads or to the main thread."""
    decode = msgspec.msgpack.Decoder(handler.messages).decode
    side = _SideThreads(uplink, handler)
    beside: tuple[type, ...] = getattr(handler, "beside", ())
    try:
        while (frame := uplink.receive()) is not None and frame.kind is not Kind.STOP:
            message = decode(frame.payload)
            if isinstance(message, beside):
                side.handle(frame, message)
            else:
                inbox.put((frame, message))
        inbox.put(None)
    except Exception as exc:  # noqa: BLE001 - the main thread raises it
        inbox.put(exc)


def _answer(uplink: Uplink, frame: Frame, message: Any, make_reply: Callable[[], Any]) -> Later | None:
    """Answer a message with the result or the refusal of `make_reply`. Return a `Later` in place of answering."""
    try:
        reply = make_reply()
    except DescantError as error:
        if frame.kind is Kind.ASK:
            uplink.refuse(frame.ask_id, error)
        else:
            logger.warning("%s refused: %s", type(message).__name__, error)
        return None
    if isinstance(reply, Later):
        return reply
    if frame.kind is Kind.ASK:
        uplink.send(Kind.REPLY, frame.ask_id, reply)
    return None


class _Owed:
    """The delayed replies, and the thread that waits for the oldest."""

    def __init__(self, uplink: Uplink, inbox: queue.SimpleQueue[_Item]) -> None:
        self._uplink = uplink
        self._inbox = inbox
        self._replies: deque[tuple[Frame, Any, Later]] = deque()
        self._waits: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._replies)

    def add(self, frame: Frame, message: Any, later: Later) -> None:
        """Register the delayed reply to a message."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="later", daemon=True)
            self._thread.start()
        self._replies.append((frame, message, later))
        if len(self._replies) == 1:
            self._waits.put(later.wait)

    def answer(self) -> None:
        """Answer the oldest message and begin to wait for the next."""
        frame, message, later = self._replies.popleft()
        _answer(self._uplink, frame, message, later.reply)
        if self._replies:
            self._waits.put(self._replies[0][2].wait)

    def _wait(self) -> None:
        try:
            while True:
                self._waits.get()()
                self._inbox.put(_Ready())
        except Exception as exc:  # noqa: BLE001 - the main thread raises it
            self._inbox.put(exc)


class _SideThreads:
    """Daemon threads, started on demand. The process ends without waiting for them."""

    def __init__(self, uplink: Uplink, handler: Handler) -> None:
        self._uplink = uplink
        self._handler = handler
        self._work: queue.SimpleQueue[tuple[Frame, Any]] = queue.SimpleQueue()
        self._num_idle = threading.Semaphore(0)
        self._num_threads = 0

    def handle(self, frame: Frame, message: Any) -> None:
        """Pass a message to a side thread. Called by one thread only."""
        self._work.put((frame, message))
        if not self._num_idle.acquire(blocking=False) and self._num_threads < NUM_SIDE_THREADS:
            self._num_threads += 1
            threading.Thread(target=self._run, name=f"side {self._num_threads}", daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                frame, message = self._work.get()
                _answer(self._uplink, frame, message, lambda message=message: self._handler.handle(message))
                self._num_idle.release()
        except SystemExit:
            os._exit(0)  # the parent is gone
        except BaseException as exc:
            logger.exception("%s failed", threading.current_thread().name)
            self._uplink.send(Kind.FATAL, 0, f"{type(exc).__name__}: {exc}")
            os._exit(1)  # the main thread may be deep in a kernel


def _beat(pulse: socket.socket) -> None:
    try:
        while beat := pulse.recv(64):
            pulse.sendall(beat)
    except ConnectionError:
        pass
    os._exit(0)  # the parent is gone; the main thread may be deep in a kernel


def find_factory(path: str) -> Factory:
    """Import the factory at `path`, "module:function"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM: the parent decides when to stop."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)


def run(path: str, fd: int, pulse_fd: int) -> NoReturn:
    """Run the factory at `path` on the two sockets until the parent stops the child or is gone, then exit."""
    ignore_signals()
    for own in (fd, pulse_fd):
        os.set_inheritable(own, False)  # a process that this one starts must not hide its end of file
    pulse = socket.socket(fileno=pulse_fd)
    threading.Thread(target=_beat, args=(pulse,), name="pulse", daemon=True).start()
    with socket.socket(fileno=fd) as sock:
        serve(Uplink(sock), lambda config, notify: find_factory(path)(config, notify))
    exit_now()


def exit_now() -> NoReturn:
    """End the process with status 0, without finalizing the interpreter: with torch that takes 0.2 s of CPU time."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(argv: list[str]) -> None:
    """Run the child."""
    path, fd, pulse_fd = argv
    run(path, int(fd), int(pulse_fd))


if __name__ == "__main__":
    from descant.actor import remote_child

    remote_child.main(sys.argv[1:])
