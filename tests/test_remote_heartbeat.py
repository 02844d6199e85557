"""A busy child answers heartbeats, and one that answers none is killed, whether it was executed or forked."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

import remote_fixture as fixture
from descant.actor.child_process import execute
from descant.actor.endpoint import Program, Remote
from descant.actor.errors import ActorFailed
from descant.actor.launcher import Launching
from descant.actor.process import Heartbeat, InProcess
from descant.actor.remote import spawn_remote
from descant.actor.supervision import Supervisor

pytestmark = pytest.mark.anyio

LONG = 30.0  # a deadline that is never meant to pass
ECHO = fixture.Echo(b"x")
HEARTBEAT = Heartbeat(interval_s=0.1, allowance_s=1.0)

Spawn = Callable[[str, bytes], list[Remote[Any]]]


@pytest.fixture
async def spawn(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Spawn]:
    """Start the same child from nothing and by a fork, both in one test, because these tests mostly wait."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent), prepend=os.pathsep)
    async with Supervisor() as supervisor:
        starts = {"executed": execute, "forked": Launching(supervisor, ["remote_fixture"])}

        def spawn(factory: str, config: bytes) -> list[Remote[Any]]:
            program = Program(
                factory=f"remote_fixture:{factory}", config=config, replies=fixture.REPLIES, notices=fixture.Noticed
            )
            placements = {name: InProcess(start_child=start, heartbeat=HEARTBEAT) for name, start in starts.items()}
            return [spawn_remote(supervisor, name, program, placement=one) for name, one in placements.items()]

        yield spawn


async def test_a_busy_child_answers_heartbeats_while_it_starts_and_while_it_works(spawn: Spawn) -> None:
    children = spawn("make_slowly", b"1.2")

    await asyncio.gather(*(child.ref.ask(fixture.Spin(1.2), timeout=LONG) for child in children))
    assert [child.life for child in children] == [1, 1]


@pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": use_uvloop}) for use_uvloop in (False, True)],
    ids=["asyncio", "uvloop"],
)
async def test_a_child_that_answers_no_heartbeat_is_killed(spawn: Spawn) -> None:
    children = spawn("make", b"ready")
    await asyncio.gather(*(child.ref.ask(ECHO, timeout=LONG) for child in children))

    for child in children:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
    asks = [child.ref.ask(ECHO, timeout=LONG) for child in children]
    for outcome in await asyncio.gather(*asks, return_exceptions=True):
        assert isinstance(outcome, ActorFailed)
        assert "no heartbeat for 1.0 s" in str(outcome)

    with anyio.fail_after(LONG):
        assert await asyncio.gather(*(child.ref.ask(ECHO, timeout=LONG) for child in children))
    assert [child.life for child in children] == [2, 2]
