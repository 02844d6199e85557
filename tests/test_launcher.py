"""The launcher: children that are forked, children that outlive it, and starts without it."""

import os
import pathlib
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

import remote_fixture as fixture
from descant.actor.endpoint import Program, Remote
from descant.actor.errors import ActorFailed
from descant.actor.launcher import Launching
from descant.actor.process import InProcess
from descant.actor.remote import spawn_remote
from descant.actor.supervision import Supervisor

pytestmark = pytest.mark.anyio

LONG = 30.0  # a deadline that is never meant to pass
ECHO = fixture.Echo(b"x")
PROGRAM = Program(factory="remote_fixture:make", replies=fixture.REPLIES, notices=fixture.Noticed)


@pytest.fixture(autouse=True)
def _child_finds_the_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent), prepend=os.pathsep)


class House:
    """A launcher with these modules, and children started through it."""

    def __init__(self, supervisor: Supervisor, modules: list[str]) -> None:
        self.supervisor = supervisor
        self.launching = Launching(supervisor, modules)

    def spawn(self, name: str = "child") -> Remote[Any]:
        return spawn_remote(self.supervisor, name, PROGRAM, placement=InProcess(start_child=self.launching))

    async def kill_launcher(self) -> None:
        """Kill it, and wait until its successor has done its imports."""
        killed = self.launching.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        with anyio.fail_after(LONG):
            while self.launching.pid in (killed, None) or not self.launching._actor.is_productive:  # noqa: ASYNC110
                await anyio.sleep(0.001)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with Supervisor(on_escalate=lambda name, error: None) as supervisor:
        yield House(supervisor, ["remote_fixture"])


async def ask(child: Remote[Any]) -> bytes:
    return (await child.ref.ask(ECHO, timeout=LONG)).data


def parent_of(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def links_of(pid: int | None) -> list[str]:
    return [os.readlink(fd) for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir()]


def sockets_of(pid: int | None) -> set[str]:
    return {link for link in links_of(pid) if link.startswith("socket:")}


def children_of(pid: int) -> list[str]:
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def socket_flags_of(pid: int | None) -> list[int]:
    directory = pathlib.Path(f"/proc/{pid}")
    numbers = [fd.name for fd in (directory / "fd").iterdir() if os.readlink(fd).startswith("socket:")]
    infos = [(directory / "fdinfo" / number).read_text().splitlines() for number in numbers]
    return [int(line.split()[1], 8) for lines in infos for line in lines if line.startswith("flags:")]


async def test_a_child_is_forked_by_the_launcher(house: House) -> None:
    child = house.spawn()
    await ask(child)

    assert child.pid is not None
    assert parent_of(child.pid) == house.launching.pid


async def test_a_forked_child_holds_no_descriptor_of_the_launcher_or_of_its_siblings(house: House) -> None:
    children = [house.spawn(f"child {number}") for number in range(3)]
    sockets = []
    for child in children:
        await ask(child)
        sockets.append(sockets_of(child.pid))
        assert "anon_inode:[pidfd]" not in links_of(child.pid)

    assert [len(own) for own in sockets] == [2, 2, 2]
    assert len(set.union(*sockets)) == 6


async def test_a_process_that_a_child_starts_inherits_neither_of_its_sockets(house: House) -> None:
    child = house.spawn()
    await ask(child)

    flags = socket_flags_of(child.pid)
    assert len(flags) == 2
    assert all(value & os.O_CLOEXEC for value in flags)


async def test_children_outlive_the_launcher_and_the_next_is_forked_by_its_successor(house: House) -> None:
    first = house.spawn("first")
    await ask(first)

    await house.kill_launcher()
    second = house.spawn("second")

    assert (await ask(first), await ask(second)) == (b"x", b"x")
    assert first.life == 1
    assert second.pid is not None
    assert parent_of(second.pid) == house.launching.pid


async def test_a_launcher_may_die_many_times(house: House) -> None:
    child = house.spawn()
    await ask(child)
    for _ in range(5):
        await house.kill_launcher()

    assert await ask(child) == b"x"


async def test_a_child_whose_launcher_is_gone_ends_with_a_status_that_nobody_knows(house: House) -> None:
    child = house.spawn()
    await ask(child)
    await house.kill_launcher()

    with pytest.raises(ActorFailed) as failure:
        await child.ref.ask(fixture.Exit(7), timeout=LONG)

    assert failure.value.data()["exit_status"] is None
    assert await ask(child) == b"x"


async def test_a_launcher_that_hangs_is_replaced_and_delays_no_child_for_long(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(house.spawn("first"))
    hanging = house.launching.pid
    assert hanging is not None
    monkeypatch.setattr("descant.actor.launcher.FORK_TIMEOUT_S", 0.2)

    os.kill(hanging, signal.SIGSTOP)
    child = house.spawn("second")

    assert await ask(child) == b"x"
    assert child.pid is not None
    assert parent_of(child.pid) == os.getpid()
    with anyio.fail_after(LONG):
        while house.launching.pid in (hanging, None):  # noqa: ASYNC110
            await anyio.sleep(0.001)


async def test_a_start_that_is_given_up_sends_no_descriptor_to_the_launcher(house: House) -> None:
    with anyio.move_on_after(0):  # the launcher still imports: the message waits
        await house.launching("remote_fixture:make")
    reused = [socket.socketpair() for _ in range(4)]  # the numbers of the descriptors in that message

    assert await ask(house.spawn()) == b"x"
    assert house.launching.pid is not None
    assert len(children_of(house.launching.pid)) == 1
    for pair in reused:
        for one in pair:
            one.close()


async def test_without_a_launcher_children_start_from_nothing() -> None:
    async with Supervisor(on_escalate=lambda name, error: None) as supervisor:
        house = House(supervisor, ["there_is_no_such_module"])
        child = house.spawn()

        assert await ask(child) == b"x"
        assert child.pid is not None
        assert parent_of(child.pid) == os.getpid()


async def test_a_module_that_starts_a_thread_is_not_forked_from() -> None:
    refusals: list[Exception] = []
    async with Supervisor(on_escalate=lambda name, error: refusals.append(error)) as supervisor:
        house = House(supervisor, ["thread_fixture"])
        child = house.spawn()

        assert await ask(child) == b"x"
        assert child.pid is not None
        assert parent_of(child.pid) == os.getpid()
    assert "left 1 threads behind" in str(refusals[0])


async def test_nothing_is_left_of_launcher_and_children() -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with Supervisor() as supervisor:
        house = House(supervisor, ["remote_fixture"])
        child = house.spawn()
        await ask(child)
        pids = [child.pid, house.launching.pid]

    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert set(os.listdir("/proc/self/fd")) == before
