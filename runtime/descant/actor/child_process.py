"""`ChildProcess`: the handle on a child, and `execute`, which starts one from nothing."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol


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


# Starts a process that runs a factory (`remote_child.Factory`) on two sockets: for frames and for the heartbeat. The
# caller closes its copies of the descriptors afterwards.
StartChild = Callable[[str, Sequence[int]], Awaitable[ChildProcess]]


class _ExecutedChild:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int | None:
        return await self._process.wait()


async def execute(factory: str, fds: Sequence[int]) -> ChildProcess:
    """Start a new interpreter for a child. It imports all it needs itself."""
    return await execute_module("descant.actor.remote_child", (factory, *map(str, fds)), fds)


async def execute_module(module: str, args: Sequence[str], fds: Sequence[int]) -> ChildProcess:
    """Run `python -m module args…` with these descriptors and no standard input."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *args, stdin=subprocess.DEVNULL, pass_fds=tuple(fds)
    )
    return _ExecutedChild(process)
