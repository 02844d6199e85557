"""`Launching` starts children by a fork of a launcher process, which the `Launcher` actor owns.

A forked child finds its imports done (but for Triton, on a GPU), so it starts in milliseconds. Each life of the actor
is one launcher process. When the process dies, its children continue. The next child waits for the next launcher, or
starts from nothing if there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence

import anyio
import msgspec

from descant.actor.actor import Actor, Later
from descant.actor.child_process import Child, ChildProcess, execute, execute_module, new_line
from descant.actor.errors import ActorError, ActorFailed, AskTimeout, CannotFork
from descant.actor.launcher_child import PACKET_BYTES, Exited, Fork, Forked, LauncherNote, Ready, Refused
from descant.actor.message import Ask
from descant.actor.ref import Ref
from descant.actor.supervision import RestartPolicy, Supervisor

FORK_TIMEOUT_S = 10.0  # of a launcher that is ready; then it is killed and the child starts from nothing
START_TIMEOUT_S = 120.0  # of a launcher's imports and a fork; likewise
STATUS_GRACE_S = 1.0  # between the end of a child and the launcher's report of its exit status
RESTARTS = RestartPolicy(max_restarts=20, within_s=math.inf)  # of launchers in a row that die during their imports


def can_fork() -> bool:
    """Return whether the launcher can work here. It needs Linux and pidfds, which a sandbox may forbid."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class ForkedChild:
    """A child of the launcher process. Its pidfd signals its end, the launcher reports its exit status."""

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
        """Wait for the end; return the exit status, None if the launcher does not report it in time."""
        await asyncio.shield(self._ended)
        with anyio.move_on_after(STATUS_GRACE_S):
            return await asyncio.shield(self._status)
        self.on_status(None)  # no other wait takes as long
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

    keeps_mailbox = False  # when a launcher dies, the children asked of it start from nothing

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        self._process: ChildProcess | None = None
        self._control: socket.socket | None = None
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # of this life, as an exception
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
        asyncio.get_running_loop().add_reader(self._control, self._on_packet)
        self.start_soon(self._wait_for_end)
        await self._ready.wait()
        self.is_productive = True

    @property
    def pid(self) -> int | None:
        """Process id, once it runs."""
        return None if self._process is None else self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._end.done()

    def kill(self) -> None:
        """End the process as a crash would."""
        if self._process is not None:
            self._process.kill()

    async def on_receive(self, message: Launch) -> Later:
        """Ask the process for a fork."""
        assert self._control is not None, "a message before on_start"
        if self.is_abandoned:  # the descriptors may have been closed, and their numbers used again
            raise ActorFailed(self.ref.name, "the start was given up")
        self._num_forks += 1
        packet = msgspec.msgpack.encode(Fork(self._num_forks, message.factory))
        try:
            socket.send_fds(self._control, [packet], message.fds)
        except OSError as exc:
            raise ActorFailed(self.ref.name, f"it takes no request: {exc}") from None
        fork = self._forks[self._num_forks] = asyncio.get_running_loop().create_future()
        return self.later(fork)

    async def on_stop(self) -> None:
        """Kill the process, which has no state. Its children live on."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
        for child in self._children.values():
            child.on_status(None)

    async def _wait_for_end(self) -> None:
        await self._end

    def _on_packet(self) -> None:
        assert self._control is not None, "it is read"
        try:
            data, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 1)
            for fd in fds:
                os.set_inheritable(fd, False)
            if not data:
                raise ActorFailed(self.ref.name, "the launcher process ended")
            self._receive(msgspec.msgpack.decode(data, type=LauncherNote), fds)
        except BlockingIOError:
            return
        except Exception as exc:  # noqa: BLE001 - it ends this life, whatever it is
            asyncio.get_running_loop().remove_reader(self._control)
            if not self._end.done():
                self._end.set_exception(exc)

    def _receive(self, note: LauncherNote, fds: list[int]) -> None:
        match note:
            case Ready():
                self._ready.set()
            case Refused(reason):
                raise CannotFork(reason)
            case Forked(fork_id, pid):
                child = self._children[pid] = ForkedChild(pid, fds[0])
                self._forks.pop(fork_id).set_result(child)  # if its start was given up, it finds the end of file
            case Exited(pid, status):
                self._children.pop(pid).on_status(status)


class Launching:
    """Starts children through a launcher, and from nothing when it cannot. A `StartChild`."""

    def __init__(self, supervisor: Supervisor, modules: Sequence[str], name: str = "launcher") -> None:
        """Spawn the launcher. It imports `modules`, those that children need."""
        self._modules = modules
        self._actor: Launcher | None = None  # of the newest life
        self._launcher: Ref[Launch] = supervisor.spawn(self._new_life, name, restarts=RESTARTS)

    async def __call__(self, factory: str) -> Child:
        """Start a child as `child_process.execute` does. A launcher that does not answer in time is killed."""
        try:
            with new_line() as (line, fds):
                process = await self._launcher.ask(
                    Launch(factory, fds), timeout=FORK_TIMEOUT_S if self.is_ready else START_TIMEOUT_S
                )
                return Child(process, line)
        except AskTimeout:
            if self._actor is not None:
                self._actor.kill()
        except ActorError:
            pass
        # On new sockets: a child that was forked all the same must find the end of file on the old ones.
        return await execute(factory)

    @property
    def is_ready(self) -> bool:
        """Whether the launcher has done its imports and not ended."""
        return self._actor is not None and self._actor.is_productive and not self._actor.has_ended

    @property
    def pid(self) -> int | None:
        """Process id of the launcher; None between lives."""
        return None if self._actor is None or self._actor.has_ended else self._actor.pid

    def _new_life(self) -> Launcher:
        self._actor = Launcher(self._modules)
        return self._actor
