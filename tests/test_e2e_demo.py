"""The embedded demo model through the whole server: every voice, two hundred at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

import descant
from descant.assembly.system import System, running
from descant.config import Config, ModelConfig, ServerConfig
from descant_client import Client, connect
from descant_client.errors import InvalidRequest

pytestmark = pytest.mark.anyio

PROMPT = "loses no stream"
VOICES = {
    None: PROMPT,
    "upper": PROMPT.upper(),
    "reverse": PROMPT[::-1],
    "rot13": "ybfrf ab fgernz",
    "pig-latin": "oseslay onay eamstray",
}


@pytest.fixture(scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A server of the demo model."""
    config = Config(data_dir=str(tmp_path_factory.mktemp("data")), server=ServerConfig(port=0))
    async with running(config) as system:
        await system.ready()
        yield system


async def sing(client: Client, number: int, said: dict[int, tuple[str | None, str]]) -> None:
    """Have one voice say the prompt."""
    voice = list(VOICES)[number % len(VOICES)]
    said[number] = (voice, await client.generate(PROMPT, adapter=voice, temperature=0.0).text())


async def test_two_hundred_voices_over_one_connection_are_all_right(system: System) -> None:
    said: dict[int, tuple[str | None, str]] = {}

    async with connect(f"ws://127.0.0.1:{system.port}") as client, anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(sing, client, number, said)

    assert len(said) == 200
    assert all(text == VOICES[voice] for voice, text in said.values())


async def test_two_hundred_voices_over_as_many_connections_are_all_right(system: System) -> None:
    said: dict[int, tuple[str | None, str]] = {}

    async def sing_alone(number: int) -> None:
        async with connect(f"ws://127.0.0.1:{system.port}") as client:
            await sing(client, number, said)

    async with anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(sing_alone, number)

    assert len(said) == 200
    assert all(text == VOICES[voice] for voice, text in said.values())


async def test_every_voice_goes_on_when_the_executor_is_killed(system: System) -> None:
    said: dict[int, tuple[str | None, str]] = {}

    async with connect(f"ws://127.0.0.1:{system.port}") as client, anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(sing, client, number, said)
        lives = system.services.model.num_lives
        while not len(system.services.sequences):
            await anyio.lowlevel.checkpoint()
        system.kill_executor()

    assert system.services.model.num_lives == lives + 1
    assert all(text == VOICES[voice] for voice, text in said.values())


async def test_a_chat_message_is_answered_like_a_prompt(system: System) -> None:
    async with connect(f"ws://127.0.0.1:{system.port}") as client:
        chat = [{"role": "user", "content": "first"}, {"role": "user", "content": PROMPT}]

        assert await client.generate(chat, adapter="upper", temperature=0.0).text() == PROMPT.upper()


async def test_a_program_can_serve_itself() -> None:
    async with descant.local() as client:
        assert await client.generate(PROMPT, adapter="reverse", temperature=0.0).text() == PROMPT[::-1]


async def test_a_prompt_beyond_the_kv_cache_is_refused_and_a_shorter_one_answered(tmp_path: Path) -> None:
    config = Config(data_dir=str(tmp_path), server=ServerConfig(port=0), model=ModelConfig(kv_bytes=64 * 1024))
    async with running(config) as system, connect(f"ws://127.0.0.1:{system.port}") as client:
        with pytest.raises(InvalidRequest):
            await client.generate("too long " * 20).result()

        assert await client.generate("short", temperature=0.0).text() == "short"
