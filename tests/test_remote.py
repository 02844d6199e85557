"""Remote actors in real child processes: replies, failures and restarts."""

import asyncio
import math
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import remote_fixture as fixture
from descant.actor.child_process import StartChild, execute
from descant.actor.endpoint import Program, Remote
from descant.actor.errors import ActorFailed, AskTimeout
from descant.actor.frames import Kind, Start, encode_frame
from descant.actor.inline import Inline
from descant.actor.launcher import Launching
from descant.actor.process import InProcess
from descant.actor.remote import spawn_remote
from descant.actor.remote_child import Uplink
from descant.actor.supervision import RestartPolicy, Supervisor
from descant_client.errors import AdapterTooLarge, InternalError, ModelInvalid

pytestmark = pytest.mark.anyio

LONG = 30.0  # a deadline that is never meant to pass
ECHO = fixture.Echo(b"x")

on_both_loops = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": use_uvloop}) for use_uvloop in (False, True)],
    ids=["asyncio", "uvloop"],
)


@pytest.fixture(autouse=True)
def _child_finds_the_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent), prepend=os.pathsep)


class Owner:
    """Records the arguments of the callbacks. Each callback sets `changed` and replaces it by a new event."""

    def __init__(self) -> None:
        self.lives: list[int] = []
        self.reasons: list[Any] = []
        self.notices: list[str] = []
        self.escalations: list[Exception] = []
        self.changed = anyio.Event()

    def note(self, kept: list[Any], value: Any) -> None:
        kept.append(value)
        self.changed.set()
        self.changed = anyio.Event()

    async def wait_for(self, is_so: Callable[[], bool]) -> None:
        with anyio.fail_after(LONG):
            while not is_so():
                await self.changed.wait()


class Nursery:
    """Spawns the fixture's remote actors."""

    def __init__(self, supervisor: Supervisor, owner: Owner, start_child: StartChild = execute) -> None:
        self.supervisor = supervisor
        self.owner = owner
        self.start_child = start_child

    def spawn(self, factory: str = "make", config: bytes = b"ready", **options: Any) -> Remote[Any]:
        owner = self.owner
        options.setdefault("placement", self.in_process())
        return spawn_remote(
            self.supervisor,
            "child",
            Program(
                factory=f"remote_fixture:{factory}",
                config=config,
                replies=fixture.REPLIES,
                notices=fixture.Noticed,
            ),
            on_up=lambda life: owner.note(owner.lives, life),
            on_down=lambda reason: owner.note(owner.reasons, reason),
            on_notice=lambda notice: owner.note(owner.notices, notice.text),
            **options,
        )

    def in_process(self, **options: Any) -> InProcess:
        return InProcess(start_child=self.start_child, **options)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@asynccontextmanager
async def open_nursery(owner: Owner, kind: str) -> AsyncIterator[Nursery]:
    """Start children from nothing ("executed"), or let a launcher fork them ("forked")."""
    async with Supervisor(on_escalate=lambda _, error: owner.note(owner.escalations, error)) as supervisor:
        if kind == "forked":
            yield Nursery(supervisor, owner, Launching(supervisor, ["remote_fixture"]))
        else:
            yield Nursery(supervisor, owner)


@pytest.fixture(params=["executed", "forked"])
async def nursery(owner: Owner, request: pytest.FixtureRequest) -> AsyncIterator[Nursery]:
    async with open_nursery(owner, request.param) as nursery:
        yield nursery


@pytest.fixture(params=["executed", "forked", "inline"])
async def remote(owner: Owner, request: pytest.FixtureRequest) -> AsyncIterator[Remote[Any]]:
    """A child, or the same handler on this loop."""
    async with open_nursery(owner, request.param) as nursery:
        yield nursery.spawn(placement=Inline() if request.param == "inline" else nursery.in_process())


@pytest.fixture
async def child(nursery: Nursery) -> Remote[Any]:
    """A child process."""
    return nursery.spawn()


@on_both_loops
async def test_a_message_goes_down_and_its_reply_comes_back(remote, owner):
    assert await remote.ref.ask(ECHO, timeout=LONG) == fixture.Echoed(b"x")

    assert (remote.life, remote.is_up, owner.lives) == (1, True, [1])


async def test_a_typed_error_arrives_as_it_was_raised(remote):
    with pytest.raises(AdapterTooLarge) as refusal:
        await remote.ref.ask(fixture.Refuse(), timeout=LONG)

    assert refusal.value.data() == {"adapter": "wide", "num_bytes": 20, "max_bytes": 10}
    assert remote.life == 1


async def test_notices_go_up_in_order_and_before_the_reply(remote, owner):
    await remote.ref.tell(fixture.Report(["a", "b"]))
    await remote.ref.ask(fixture.Report(["c"]), timeout=LONG)

    assert owner.notices == ["ready", "a", "b", "c"]


async def test_a_stop_is_orderly(remote, owner):
    await remote.ref.ask(ECHO, timeout=LONG)

    await remote.ref.stop()
    assert (owner.notices[-1], owner.reasons, remote.is_up) == ("closed", [], False)


async def test_a_fault_ends_the_life_and_the_asker_learns_why(remote, owner):
    with pytest.raises(ActorFailed, match="child crashed: ValueError: a fault"):
        await remote.ref.ask(fixture.Fault(), timeout=LONG)

    await remote.ref.ask(ECHO, timeout=LONG)
    assert owner.lives == [1, 2]
    assert [reason.data()["actor"] for reason in owner.reasons] == ["child"]


@on_both_loops
async def test_a_killed_life_is_followed_by_another(remote, owner):
    await remote.ref.ask(ECHO, timeout=LONG)

    remote.kill()
    await owner.wait_for(lambda: owner.lives == [1, 2])
    assert owner.reasons[0].data()["signal"] == "SIGKILL"
    assert await remote.ref.ask(ECHO, timeout=LONG) == fixture.Echoed(b"x")


async def test_the_child_is_another_process_that_ignores_interrupts(child):
    done = await child.ref.ask(fixture.Report([]), timeout=LONG)

    assert done.pid == child.pid != os.getpid()
    assert done.ignored == ["SIGINT", "SIGTERM"]


@on_both_loops
async def test_an_exit_fails_every_pending_ask_at_once_with_its_status(child):
    asks = [child.ref.ask(message, timeout=LONG) for message in (fixture.Exit(7), ECHO, ECHO)]
    outcomes = await asyncio.gather(*asks, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [ActorFailed] * 3
    assert [outcome.data()["exit_status"] for outcome in outcomes] == [7] * 3


async def test_asks_during_the_start_wait_for_it(nursery):
    child = nursery.spawn("make_slowly", b"0.1")

    assert await child.ref.ask(ECHO, timeout=LONG) == fixture.Echoed(b"x")


async def test_asks_queued_during_a_start_that_fails_are_not_for_the_next_life(nursery):
    child = nursery.spawn("make_slowly", b"1000")
    asked = asyncio.create_task(child.ref.ask(ECHO, timeout=LONG))
    while child.pid is None:
        await anyio.lowlevel.checkpoint()

    child.kill()
    with pytest.raises(ActorFailed, match="killed by SIGKILL"):
        await asked


@on_both_loops
async def test_large_frames_pass_in_both_directions_at_once(child):
    blobs = [os.urandom(1 << 20) for _ in range(8)]
    replies = await asyncio.gather(*(child.ref.ask(fixture.Echo(blob), timeout=LONG) for blob in blobs))

    assert [reply.data for reply in replies] == blobs


async def test_an_ask_past_its_deadline_does_not_disturb_the_next(child):
    await child.ref.ask(ECHO, timeout=LONG)
    with pytest.raises(AskTimeout):
        await child.ref.ask(fixture.Spin(0.2), timeout=0.01)

    assert await child.ref.ask(ECHO, timeout=LONG) == fixture.Echoed(b"x")
    assert child.life == 1


async def test_only_lives_that_nobody_marked_productive_count(nursery, owner):
    child = nursery.spawn(restarts=RestartPolicy(max_restarts=1, within_s=math.inf))
    for life, is_productive in enumerate([False, True, False, True, False, False], 1):
        await owner.wait_for(lambda life=life: owner.lives[-1:] == [life])
        if is_productive:
            child.mark_productive()
        child.kill()

    await owner.wait_for(lambda: len(owner.escalations) == 1)
    assert owner.lives == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("seconds", [2**70, object(), "\udcff"], ids=["too large", "no form", "no text"])
async def test_what_cannot_be_sent_fails_its_own_ask_and_no_other(nursery, owner, seconds):
    child = nursery.spawn()
    await child.ref.ask(ECHO, timeout=LONG)

    with pytest.raises(InternalError, match="Spin cannot be sent to the child"):
        await child.ref.ask(fixture.Spin(seconds), timeout=LONG)

    assert (await child.ref.ask(ECHO, timeout=LONG)).data == b"x"
    assert owner.lives == [1]


async def test_a_child_that_dies_before_it_is_up_counts_as_a_crash(nursery, owner):
    child = nursery.spawn("make_and_die", restarts=RestartPolicy(max_restarts=1))

    with pytest.raises(ActorFailed, match="exit status 3"):
        await child.ref.ask(ECHO, timeout=LONG)
    await owner.wait_for(lambda: len(owner.escalations) == 1)
    assert (owner.lives, len(owner.reasons)) == ([], 2)


@on_both_loops
async def test_a_refusal_to_start_escalates_at_once_as_it_was_raised(nursery, owner):
    child = nursery.spawn("make_never", b"tiny")

    with pytest.raises(ActorFailed, match="ModelInvalid: Model 'tiny' cannot be served: no weights"):
        await child.ref.ask(ECHO, timeout=LONG)
    assert [type(error) for error in owner.escalations] == [ModelInvalid]
    assert child.life == 1


async def test_a_child_that_is_still_starting_stops_at_once(nursery):
    child = nursery.spawn("make_slowly", b"1000")
    while child.pid is None:
        await anyio.lowlevel.checkpoint()

    with anyio.fail_after(LONG):
        await child.ref.stop()
    assert child.pid is None


@on_both_loops
async def test_nothing_is_left_of_a_child(owner):
    fds, tasks = open_fds(), asyncio.all_tasks()
    async with Supervisor() as supervisor:
        child = Nursery(supervisor, owner).spawn()
        await owner.wait_for(lambda: owner.lives == [1])
        pids = [child.pid]
        child.kill()
        await owner.wait_for(lambda: owner.lives == [1, 2])
        pids.append(child.pid)

    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert asyncio.all_tasks() == tasks
    assert open_fds() == fds


def open_fds() -> list[str]:
    """Return the sockets and pipes of this process (a loop may keep a device of its own open)."""
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    links = [os.readlink(path) for path in paths if os.path.lexists(path)]
    return sorted(link for link in links if not link.startswith("/"))


def start_by_hand(*messages: Any) -> tuple[subprocess.Popen[bytes], socket.socket, socket.socket]:
    """Start a child without a supervisor and wait for its first reply. Return it and our ends of its two sockets.

    It handles `messages` after that.
    """
    ours, theirs = socket.socketpair()
    pulse, their_pulse = socket.socketpair()
    with theirs, their_pulse:
        fds = (theirs.fileno(), their_pulse.fileno())
        command = [sys.executable, "-m", "descant.actor.remote_child", "remote_fixture:make", *map(str, fds)]
        process = subprocess.Popen(command, pass_fds=fds)
    ours.sendall(encode_frame(Kind.START, 0, Start("child", b"ready", 20)))
    for message in (ECHO, *messages):
        ours.sendall(encode_frame(Kind.ASK, 1, message))
    parent = Uplink(ours)
    while (frame := parent.receive()) is not None and frame.kind is not Kind.REPLY:
        pass
    return process, ours, pulse


@pytest.mark.parametrize("messages", [[], [fixture.Spin(1000)]], ids=["idle", "busy"])
def test_a_child_exits_when_its_parent_is_gone(messages):
    process, ours, pulse = start_by_hand(*messages)

    with ours, pulse:
        ours.shutdown(socket.SHUT_RDWR)
        pulse.shutdown(socket.SHUT_RDWR)
        try:
            assert process.wait(LONG) == 0
        finally:
            process.kill()
