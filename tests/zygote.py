"""One process per test run that has imported torch. The launcher of every server is forked from it.

    python tests/zygote.py FD

A launcher that is started from nothing, as `descant serve` does, takes seconds of CPU time for its imports. The tests
in test_launcher.py and test_e2e_process.py start launchers from nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from descant.actor import launcher, launcher_child, remote_child
from descant.actor.child_process import ChildProcess, execute_module
from descant.assembly.system import CHILD_MODULES


class Zygote:
    """The test run's end of the socket to the zygote, which is started when it is first needed."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes]

    async def execute_module(self, module: str, args: Sequence[str], fds: Sequence[int]) -> ChildProcess:
        """Start the launcher of a server by a fork, anything else from nothing."""
        if tuple(args[1:]) != CHILD_MODULES:
            return await execute_module(module, args, fds)
        if self._socket is None:
            self._socket = self._start()
        socket.send_fds(self._socket, [json.dumps(dict(os.environ)).encode()], fds)
        pid, pidfds, _, _ = socket.recv_fds(self._socket, 16, 1)
        child = launcher.ForkedChild(int(pid), pidfds[0])
        child.on_status(0)  # the exit status of a launcher means nothing
        return child

    def close(self) -> None:
        """End the process, if it was ever started."""
        if self._socket is not None:
            self._socket.close()
            self._process.wait()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
            command = [sys.executable, __file__, str(theirs.fileno())]
            fds = [theirs.fileno()]
            self._process = subprocess.Popen(command, pass_fds=fds, env=os.environ | {"PYTHONPATH": path})
        return ours


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main(fd: int) -> None:
    """Fork a launcher for each packet, until the test run is gone."""
    launcher_child.preload(list(CHILD_MODULES))
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(fileno=fd) as control:
        while True:
            data, fds, _, _ = socket.recv_fds(control, 1 << 17, 1)
            if not data:
                remote_child.exit_now()
            pid = os.fork()
            if not pid:
                break
            os.close(fds[0])
            pidfd = os.pidfd_open(pid)
            socket.send_fds(control, [str(pid).encode()], [pidfd])
            os.close(pidfd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(json.loads(data))  # that of the test: libraries read some of it late
    launcher_child.serve(socket.socket(fileno=fds[0]))
    remote_child.exit_now()


if __name__ == "__main__":
    main(int(sys.argv[1]))
