"""A process with torch imported, one per test process. The launchers of its servers are forked from it.

    python tests/zygote.py FD

A launcher that is started from nothing, as `descant serve` does, takes seconds of CPU time for its imports. The tests
in test_launcher.py and test_e2e_process.py start launchers from nothing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from descant.actor import launcher, launcher_child, remote_child
from descant.actor.child_process import ChildProcess, execute_module
from descant.actor.launcher_child import PACKET_BYTES, Fork, Forked, Forker, LauncherNote
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
        request = Fork(0, json.dumps(dict(os.environ)))
        socket.send_fds(self._socket, [msgspec.msgpack.encode(request)], fds)
        while True:
            data, pidfds, _, _ = socket.recv_fds(self._socket, PACKET_BYTES, 1)
            note = msgspec.msgpack.decode(data, type=LauncherNote)
            if isinstance(note, Forked):
                break
        child = launcher.ForkedChild(note.pid, pidfds[0])
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


def main(fd: int) -> None:
    """Fork a launcher on each `Fork` until the test process has closed its socket.

    The field `factory` of a `Fork` carries the launcher's environment, as JSON.
    """
    launcher_child.preload(list(CHILD_MODULES))
    forked = Forker(socket.socket(fileno=fd)).serve()
    if forked is not None:
        environment, (launcher_fd,) = forked
        os.environ.clear()
        os.environ.update(json.loads(environment))  # libraries read some of it late
        launcher_child.serve(socket.socket(fileno=launcher_fd))
    remote_child.exit_now()


if __name__ == "__main__":
    main(int(sys.argv[1]))
