"""The launcher actor: one launcher process, and `Launching`, the way of starting children that uses it.

A child that is forked has nothing to import, so it is there in milliseconds. Each life of the actor is one launcher
process. When it dies, the children live on; the next start waits for its successor, or starts from nothing if there is
none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence

import anyio
import msgspec

from descant.actor.actor import Actor, Later
from descant.actor.child_process import ChildProcess, execute, execute_module
from descant.actor.errors import ActorError, ActorFailed, CannotFork
from descant.actor.launcher_child import PACKET_BYTES, Exited, Fork, Forked, LauncherNote, Ready, Refused
from descant.actor.message import Ask
from descant.actor.ref import Ref
from descant.actor.supervision import RestartPolicy, Supervisor

START_TIMEOUT_S = 120.0  # of a launcher's imports and a fork; then the child is started from nothing
STATUS_GRACE_S = 1.0  # between the end of a child and the launcher's report of its exit status
EXIT_GRACE_S = 5.0
RESTARTS = RestartPolicy(max_restarts=30, within_s=60.0)  # of launchers that die during their imports


def can_fork() -> bool:
    """Return whether this platform has what the launcher needs: fork, pidfds, packets with descriptors."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open") and hasattr(socket, "send_fds")


class ForkedChild:
    """A child of the launcher process. Its pidfd says when it ends, the launcher how."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._status: asyncio.Future[int | None] = loop.create_future()
        loop.add_reader(pidfd, self._on_end)

    def kill(self) -> None:
        """Send SIGKILL. Do nothing if the process has ended."""
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> int | None:
        """Wait for the end; return the exit status, None if the launcher died before it told."""
        await asyncio.shield(self._ended)
        with anyio.move_on_after(STATUS_GRACE_S):
            return await asyncio.shield(self._status)
        return None

    def on_status(self, status: int | None) -> None:
        """Record the exit status, None if the launcher is gone and cannot tell."""
        if not self._status.done():
            self._status.set_result(status)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set_result(None)


class Launch(Ask[ForkedChild], frozen=True):
    """Fork a child that runs `factory` on two sockets, whose descriptors the sender keeps open until the reply."""

    factory: str
    fds: tuple[int, ...]


class Launcher(Actor[Launch]):
    """Owns a launcher process that has imported `modules`."""

    keeps_mailbox = False  # a start that was asked of a dead launcher is made from nothing

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        self._process: ChildProcess | None = None
        self._control: socket.socket | None = None
        self._forks: dict[int, asyncio.Future[ForkedChild]] = {}  # not answered yet
        self._num_forks = 0
        self._children: dict[int, ForkedChild] = {}  # whose end has not been reported, by pid
        self._ready = anyio.Event()

    async def on_start(self) -> None:
        """Start the process and wait for its imports.

        Raises:
            CannotFork: it refuses; it is not started again.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            args = (str(theirs.fileno()), *self._modules)
            self._process = await execute_module("descant.actor.launcher_child", args, (theirs.fileno(),))
        self.start_soon(self._read, self._control)
        await self._ready.wait()
        self.is_productive = True

    @property
    def pid(self) -> int | None:
        """Process id, once it runs."""
        return None if self._process is None else self._process.pid

    async def on_receive(self, message: Launch) -> Later:
        """Ask the process for a fork."""
        assert self._control is not None, "a message before on_start"
        self._num_forks += 1
        packet = msgspec.msgpack.encode(Fork(self._num_forks, message.factory))
        try:
            socket.send_fds(self._control, [packet], message.fds)
        except OSError as exc:
            raise ActorFailed(self.ref.name, f"it takes no request: {exc}") from None
        fork = self._forks[self._num_forks] = asyncio.get_running_loop().create_future()
        return self.later(fork)

    async def on_stop(self) -> None:
        """End the process. Its children live on."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            # Before it is ready it has no children and is deep in its imports.
            with anyio.move_on_after(EXIT_GRACE_S if self._ready.is_set() else 0.0):
                await self._process.wait()
            self._process.kill()
            await self._process.wait()
        for child in self._children.values():
            child.on_status(None)

    async def _read(self, control: socket.socket) -> None:
        while True:
            await anyio.wait_readable(control)
            try:
                data, fds, _, _ = socket.recv_fds(control, PACKET_BYTES, 1)
            except OSError:
                data, fds = b"", list[int]()
            if not data:
                break
            self._receive(msgspec.msgpack.decode(data, type=LauncherNote), fds)
        raise ActorFailed(self.ref.name, "the launcher process ended")

    def _receive(self, note: LauncherNote, fds: list[int]) -> None:
        match note:
            case Ready():
                self._ready.set()
            case Refused(reason):
                raise CannotFork(reason)
            case Forked(fork_id, pid):
                child = self._children[pid] = ForkedChild(pid, fds[0])
                fork = self._forks.pop(fork_id)
                if fork.done():
                    child.kill()  # its start was given up
                else:
                    fork.set_result(child)
            case Exited(pid, status):
                self._children.pop(pid).on_status(status)


class Launching:
    """Starts children through a launcher, and from nothing when it cannot. A `StartChild`."""

    def __init__(self, supervisor: Supervisor, modules: Sequence[str], name: str = "launcher") -> None:
        """Spawn the launcher. It imports `modules`, those that children need."""
        self._modules = modules
        self._actor: Launcher | None = None  # of the newest life
        self._launcher: Ref[Launch] = supervisor.spawn(self._new_life, name, restarts=RESTARTS)

    async def __call__(self, factory: str, fds: Sequence[int]) -> ChildProcess:
        """Start a child as `child_process.execute` does."""
        try:
            return await self._launcher.ask(Launch(factory, tuple(fds)), timeout=START_TIMEOUT_S)
        except ActorError:
            return await execute(factory, fds)

    @property
    def pid(self) -> int | None:
        """Process id of the launcher; None between lives."""
        return None if self._actor is None or self._launcher.is_stopped else self._actor.pid

    def _new_life(self) -> Launcher:
        self._actor = Launcher(self._modules)
        return self._actor
