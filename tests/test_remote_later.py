"""A child whose answer takes its time handles what comes next meanwhile, and answers in order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import later_fixture as fixture
from descant.actor.endpoint import Program, Remote
from descant.actor.errors import ActorFailed
from descant.actor.remote import spawn_remote
from descant.actor.supervision import Supervisor
from descant_client.errors import AdapterTooLarge

pytestmark = pytest.mark.anyio

LONG = 60.0  # a deadline that is never meant to pass
ECHO = fixture.Echo()


@pytest.fixture
async def child(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Remote[Any]]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    async with Supervisor() as supervisor:
        yield spawn_remote(supervisor, "child", Program(factory="later_fixture:make", replies=fixture.Answer))


def ask(child: Remote[Any], path: Path, then: str = "") -> asyncio.Task[Any]:
    return asyncio.create_task(child.ref.ask(fixture.Slow(str(path), then), timeout=LONG))


async def test_what_comes_next_is_handled_while_an_answer_takes_its_time(child: Remote[Any], tmp_path: Path) -> None:
    slow = ask(child, tmp_path / "go")
    for _ in range(3):
        await child.ref.ask(ECHO, timeout=LONG)
    assert not slow.done()

    (tmp_path / "go").touch()

    assert await slow == fixture.Answer(str(tmp_path / "go"))


async def test_answers_come_in_order_and_only_the_oldest_is_waited_for(child: Remote[Any], tmp_path: Path) -> None:
    first, second = ask(child, tmp_path / "first"), ask(child, tmp_path / "second")
    (tmp_path / "second").touch()

    answers = [await child.ref.ask(ECHO, timeout=LONG) for _ in range(50)]
    assert answers[-1] == fixture.Answer("1 waits")
    assert not second.done()
    (tmp_path / "first").touch()

    assert [(await one).text for one in (first, second)] == [str(tmp_path / "first"), str(tmp_path / "second")]
    answers = [await child.ref.ask(ECHO, timeout=LONG) for _ in range(50)]
    assert answers[-1] == fixture.Answer("2 waits")


async def test_a_typed_error_is_the_answer_and_the_next_one_follows(child: Remote[Any], tmp_path: Path) -> None:
    refused, fine = ask(child, tmp_path / "go", "refuse"), ask(child, tmp_path / "go")
    (tmp_path / "go").touch()

    with pytest.raises(AdapterTooLarge):
        await refused
    assert isinstance(await fine, fixture.Answer)
    assert child.life == 1


async def test_an_error_while_waiting_ends_the_process(child: Remote[Any], tmp_path: Path) -> None:
    asks = ask(child, tmp_path / "go", "fault"), ask(child, tmp_path / "go")
    (tmp_path / "go").touch()

    for one in asks:
        with pytest.raises(ActorFailed, match="ValueError: a fault"):
            await one


async def test_a_stop_lets_what_is_owed_be_answered(child: Remote[Any], tmp_path: Path) -> None:
    asks = [ask(child, tmp_path / "go") for _ in range(2)]
    await child.ref.ask(ECHO, timeout=LONG)
    stop = asyncio.create_task(child.ref.stop())
    await asyncio.sleep(0)
    (tmp_path / "go").touch()
    await stop

    assert [(await one).text for one in asks] == [str(tmp_path / "go")] * 2
