"""`descant demo`: one prompt through every demo voice at once, with the executor killed in the middle."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence

import anyio
from rich.console import Console

from descant.assembly.system import System, running
from descant.cli.serve import StartUp, banner
from descant.config import Config, ServerConfig
from descant.sources.demo import DEMO_HEADS
from descant_client.client import Client, connect
from descant_client.errors import DescantError
from descant_client.stream import Result
from descant_client.terminal import StatusLine, chat, side_by_side

PROMPT = "The quick brown fox jumps over the lazy dog while the choir keeps singing"
KILL_AFTER_TOKENS = 24  # of the voice with the fewest tokens
MAX_TOKENS = 256  # of each voice
POLL_S = 0.002


async def show(console: Console, prompt: str | None) -> bool:
    """Run the demo, then chat if standard input is a terminal. Return whether every voice ended without an error."""
    with tempfile.TemporaryDirectory(prefix="descant-") as data_dir, StartUp(Console(stderr=True)) as start_up:
        config = Config(data_dir=data_dir, server=ServerConfig(port=0))
        async with running(config, start_up.show) as system:
            engine = await system.ready()
            start_up.stop()
            console.print(banner(system, engine), highlight=False, markup=False)
            async with connect(f"ws://127.0.0.1:{system.port}") as client:
                is_well = await _stream_all_voices(system, client, console, prompt or PROMPT)
                if sys.stdin.isatty() and console.is_terminal:
                    await chat(client, console=console, temperature=0.0)
    return is_well


async def _stream_all_voices(system: System, client: Client, console: Console, prompt: str) -> bool:
    names = [adapter.name for adapter in await client.adapters.list()]
    adapters = [None, *[name for name in names if name != DEMO_HEADS]]
    await _load_adapters(client, adapters)
    # Without speculation, so that all voices are in the middle when the executor is killed.
    options = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "speculation": "off"}
    voices = [(name or "base", client.generate(prompt, adapter=name, **options)) for name in adapters]
    status = StatusLine()
    endings: list[Result | DescantError] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_kill_in_the_middle, system, len(voices), status)
        endings += await side_by_side(voices, console, status=status)
        tasks.cancel_scope.cancel()
    return not any(isinstance(ending, DescantError) for ending in endings)


async def _load_adapters(client: Client, adapters: Sequence[str | None]) -> None:
    """Load every adapter, so that the voices start together."""
    for name in adapters:
        await client.generate("hi", adapter=name, temperature=0.0).result()


async def _kill_in_the_middle(system: System, num_voices: int, status: StatusLine) -> None:
    sequences, model = system.services.sequences, system.services.model
    while len(sequences) < num_voices or min(len(s.output_ids) for s in sequences) < KILL_AFTER_TOKENS:  # noqa: ASYNC110
        await anyio.sleep(POLL_S)
    pid, lives, killed_s = system.executor.pid, model.num_lives, time.monotonic()
    system.kill_executor()
    status.add(f"executor killed (kill -9 {pid}) after {KILL_AFTER_TOKENS} tokens of every voice")
    while model.num_lives == lives:  # noqa: ASYNC110 - a demo may poll
        await anyio.sleep(POLL_S)
    lengths = {sequence.id: len(sequence.output_ids) for sequence in sequences}
    while any(lengths.get(one.id) == len(one.output_ids) for one in sequences):  # noqa: ASYNC110 - as above
        await anyio.sleep(POLL_S)
    seconds = time.monotonic() - killed_s
    status.add(f"a new executor (pid {system.executor.pid}) took over; every voice went on after {seconds:.2f} s")
