"""`Child`: a process that runs a remote actor and the sockets to it, and `execute`, which starts one from nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol


class ChildProcess(Protocol):
    """A process that runs a remote actor."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    def kill(self) -> None:
        """Send SIGKILL. Do nothing if the process has ended."""
        ...

    async def wait(self) -> int | None:
        """Wait for the end; return the exit status, negative for a signal, None if it cannot be known.

        Cancelling is safe: the process is not affected, and several tasks may wait.
        """
        ...


class Line(NamedTuple):
    """The parent's ends of the two sockets to a child."""

    frames: socket.socket
    pulse: socket.socket  # heartbeats

    def close(self) -> None:
        """Close both."""
        self.frames.close()
        self.pulse.close()


class Child(NamedTuple):
    """A started child process and the line to it, which the owner closes."""

    process: ChildProcess
    line: Line


# Starts a process that runs a factory, given as "module:function" (`remote_child.Factory`).
StartChild = Callable[[str], Awaitable[Child]]


def _socket_pair(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    own, other = socket.socketpair()
    return ours.enter_context(own), theirs.enter_context(other)


@contextmanager
def new_line() -> Generator[tuple[Line, tuple[int, int]]]:
    """Yield a new line and the descriptors of the child's ends, which are closed at the end of the block.

    After an exception in the block the line is closed as well.
    """
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        own, other = zip(*(_socket_pair(ours, theirs) for _ in range(2)), strict=True)
        yield Line(*own), (other[0].fileno(), other[1].fileno())
        ours.pop_all()


class _ExecutedChild:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int | None:
        return await self._process.wait()


async def execute(factory: str) -> Child:
    """Start a new interpreter for a child. It imports all it needs itself."""
    with new_line() as (line, fds):
        process = await execute_module("descant.actor.remote_child", (factory, *map(str, fds)), fds)
        return Child(process, line)


async def execute_module(module: str, args: Sequence[str], fds: Sequence[int]) -> ChildProcess:
    """Run `python -m module args…` with these descriptors and no standard input."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *args, stdin=subprocess.DEVNULL, pass_fds=tuple(fds)
    )
    return _ExecutedChild(process)
