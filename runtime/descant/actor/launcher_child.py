"""The launcher process: imports what children need, once, and forks a child on each request.

    python -m descant.actor.launcher_child FD MODULE…

FD is a Unix socket that keeps packets apart (SOCK_SEQPACKET). Packets are msgpack:

    parent to launcher    Fork, with the two descriptors for the child
    launcher to parent    Ready or Refused, once · Forked, with a pidfd of the child · Exited

A fork is safe only in a process with one thread and no device: this one starts no thread, and imports nothing that
does. It ends at the end of file of its socket; its children live on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys

import msgspec

from descant.actor import remote_child

PACKET_BYTES = 1 << 16
NUM_CHILD_FDS = 2


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Fork a child that runs `factory` on the two sockets that come with this packet."""

    fork_id: int
    factory: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The imports are done."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Forking would not be safe, or an import failed. The launcher ends."""

    reason: str


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The answer to a Fork."""

    fork_id: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A child has ended; `status` is negative for a signal."""

    pid: int
    status: int


LauncherNote = Ready | Refused | Forked | Exited


class Forker:
    """Forks children and reports how they end."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pids: dict[int, int] = {}  # of living children, by pidfd
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> tuple[str, list[int]] | None:
        """Serve until the parent is gone. Return None then, and in a forked child its factory and descriptors."""
        self._send(Ready())
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._pids:
                    self._report(fd)
                    continue
                data, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES, NUM_CHILD_FDS)
                if not data:
                    return None
                request = msgspec.msgpack.decode(data, type=Fork)
                if self._fork(request, fds):
                    return request.factory, fds

    def _fork(self, request: Fork, fds: list[int]) -> bool:
        """Return True in the child, which keeps no descriptor of the launcher."""
        pid = os.fork()
        if not pid:
            self._control.close()
            for fd in self._pids:
                os.close(fd)
            return True
        for fd in fds:
            os.close(fd)
        try:
            pidfd = os.pidfd_open(pid)
            socket.send_fds(self._control, [msgspec.msgpack.encode(Forked(request.fork_id, pid))], [pidfd])
        except OSError:  # nobody will own it
            os.kill(pid, signal.SIGKILL)
            raise
        self._pids[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        return False

    def _report(self, pidfd: int) -> None:
        pid = self._pids.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._send(Exited(pid, os.waitstatus_to_exitcode(status)))

    def _send(self, note: LauncherNote) -> None:
        self._control.send(msgspec.msgpack.encode(note))


def preload(modules: list[str]) -> None:
    """Import modules and keep their memory shared with the children.

    Raises:
        RuntimeError: an import started a thread, so forking is not safe.
    """
    remote_child.ignore_signals()
    num_threads = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's OpenBLAS starts its threads when it is loaded
    for module in modules:
        importlib.import_module(module)
    del os.environ["OPENBLAS_NUM_THREADS"]
    if num_threads is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = num_threads
    if (num_left := len(os.listdir("/proc/self/task")) - 1) > 0:
        raise RuntimeError(f"an import of {modules} left {num_left} threads behind")
    gc.collect()
    gc.freeze()  # or the children's collections would copy every page


def serve(control: socket.socket) -> None:
    """Serve until the parent is gone. A forked child runs its factory and exits."""
    forked = None
    with contextlib.suppress(ConnectionError):  # the parent is gone
        forked = Forker(control).serve()
    if forked is not None:
        factory, (fd, pulse_fd) = forked
        remote_child.run(factory, fd, pulse_fd)


def main(argv: list[str]) -> None:
    """Run the launcher."""
    fd, *modules = argv
    with socket.socket(fileno=int(fd)) as control:
        try:
            preload(modules)
        except Exception as exc:  # noqa: BLE001 - an import may fail in any way
            with contextlib.suppress(ConnectionError):  # the parent is gone
                control.send(msgspec.msgpack.encode(Refused(f"{type(exc).__name__}: {exc}")))
            return
        serve(control)
    remote_child.exit_now()


if __name__ == "__main__":
    main(sys.argv[1:])
