"""What a child handles beside its main thread delays nothing and nobody, and fails as anything else does."""

from __future__ import annotations

import asyncio
import os
import pathlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

import remote_fixture as fixture
from descant.actor.endpoint import Program, Remote
from descant.actor.errors import ActorFailed
from descant.actor.process import InProcess
from descant.actor.remote import spawn_remote
from descant.actor.remote_child import NUM_SIDE_THREADS
from descant.actor.supervision import Supervisor
from descant_client.errors import AdapterTooLarge

pytestmark = pytest.mark.anyio

LONG = 30.0  # a deadline that is never meant to pass
ECHO = fixture.Echo(b"x")


@pytest.fixture(autouse=True)
def _child_finds_the_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent), prepend=os.pathsep)


@asynccontextmanager
async def spawned(placement: InProcess) -> AsyncIterator[Remote[Any]]:
    async with Supervisor() as supervisor:
        program = Program(factory="remote_fixture:make", config=b"", replies=fixture.REPLIES, notices=fixture.Noticed)
        yield spawn_remote(supervisor, "child", program, placement=placement)


@pytest.fixture
async def child() -> AsyncIterator[Remote[Any]]:
    async with spawned(InProcess()) as child:
        yield child


@pytest.fixture
async def impatient_child() -> AsyncIterator[Remote[Any]]:
    """A child that is killed soon after it was told to stop."""
    async with spawned(InProcess(exit_grace_s=0.1)) as child:
        yield child


async def test_the_main_thread_goes_on_and_the_answer_comes_when_it_is_done(child, tmp_path):
    beside = asyncio.create_task(child.ref.ask(fixture.Beside(str(tmp_path / "go")), timeout=LONG))

    assert await child.ref.ask(ECHO, timeout=LONG) == fixture.Echoed(b"x")
    assert not beside.done()
    (tmp_path / "go").touch()
    assert isinstance(await beside, fixture.Done)


async def test_it_begins_and_ends_while_the_main_thread_is_busy(impatient_child, tmp_path):
    child = impatient_child
    (tmp_path / "go").touch()
    busy = asyncio.create_task(child.ref.ask(fixture.Spin(1000), timeout=LONG))

    assert isinstance(await child.ref.ask(fixture.Beside(str(tmp_path / "go")), timeout=LONG), fixture.Done)
    assert not busy.done()
    busy.cancel()


async def test_later_ones_overtake_one_that_waits(child, tmp_path):
    (tmp_path / "now").touch()
    slow = asyncio.create_task(child.ref.ask(fixture.Beside(str(tmp_path / "never")), timeout=LONG))

    for _ in range(3 * NUM_SIDE_THREADS):
        await child.ref.ask(fixture.Beside(str(tmp_path / "now")), timeout=LONG)
    assert not slow.done()
    slow.cancel()


async def test_more_than_there_are_threads_wait_their_turn(child, tmp_path):
    message = fixture.Beside(str(tmp_path / "go"))
    asks = [asyncio.create_task(child.ref.ask(message, timeout=LONG)) for _ in range(3 * NUM_SIDE_THREADS)]
    await child.ref.ask(ECHO, timeout=LONG)

    (tmp_path / "go").touch()
    assert len(await asyncio.gather(*asks)) == 3 * NUM_SIDE_THREADS


async def test_a_typed_error_is_its_answer(child, tmp_path):
    (tmp_path / "go").touch()
    with pytest.raises(AdapterTooLarge):
        await child.ref.ask(fixture.Beside(str(tmp_path / "go"), "refuse"), timeout=LONG)
    assert child.life == 1


async def test_any_other_error_ends_the_process_whatever_the_main_thread_does(child, tmp_path):
    beside = asyncio.create_task(child.ref.ask(fixture.Beside(str(tmp_path / "go"), "fault"), timeout=LONG))
    await child.ref.ask(ECHO, timeout=LONG)
    busy = asyncio.create_task(child.ref.ask(fixture.Spin(1000), timeout=LONG))
    (tmp_path / "go").touch()

    for ask in (busy, beside):
        with pytest.raises(ActorFailed, match="ValueError: a fault"):
            await ask


async def test_a_stop_does_not_wait_for_it(child, tmp_path):
    beside = asyncio.create_task(child.ref.ask(fixture.Beside(str(tmp_path / "never")), timeout=LONG))
    await child.ref.ask(ECHO, timeout=LONG)

    with anyio.fail_after(4):  # less than what a child is given before it is killed
        await child.ref.stop()
    assert isinstance((await asyncio.gather(beside, return_exceptions=True))[0], Exception)
