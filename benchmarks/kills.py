"""Measures the time from `kill -9` of the executor to the next token of every stream.

    python benchmarks/kills.py [--shape demo|qwen] [--kills 50] [--streams 8]

`demo` is the demo model with its adapters, `qwen` a random bfloat16 checkpoint of Qwen2.5-0.5B's shape.

Three series: the executor killed, the executor and the launcher killed together, the launcher killed alone. Every
answer is compared with the one of an undisturbed run. Times are also given as multiples of `import torch` in a new
process, which a new executor would need without the launcher.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import platformdirs
from batches import run, served
from random_model import QWEN_05B, checkpoint
from report import Report, table

from descant.assembly.system import System
from descant_client.client import Client
from descant_client.protocol import Delta, ServerMessage
from descant_client.stream import Stream

PROMPT = "All voices sing the same line, and none of them waits for another."
NEW_TOKENS = 96
TOKENS_BEFORE_KILL = 8  # of every stream, since the kill before
NUM_LAUNCHER_KILLS = 20


class Choir:
    """One stream per voice (an adapter's name; None: the base model), requested again whenever it ends."""

    def __init__(self, client: Client, voices: list[str | None]) -> None:
        self._client = client
        self._voices = voices
        self.num_tokens = [0] * len(voices)
        self.expected: list[list[int]] = []
        self.num_wrong = 0
        self.num_lost = 0
        self.num_answers = 0

    async def rehearse(self) -> None:
        """Record the answers of an undisturbed run."""
        streams = [self._start(index) for index in range(len(self._voices))]
        self.expected = [(await stream.result()).token_ids for stream in streams]

    async def sing(self, index: int) -> None:
        """Request the answer of one voice repeatedly, and count the answers that are wrong or lost."""
        while True:
            try:
                answer = (await self._start(index).result()).token_ids
            except Exception:  # noqa: BLE001 - whatever it is, the stream is lost
                self.num_lost += 1
                continue
            self.num_answers += 1
            self.num_wrong += answer != self.expected[index]

    async def until_all_have(self, counts: list[int]) -> None:
        """Wait until every voice has more tokens than `counts`."""
        while any(now <= before for now, before in zip(self.num_tokens, counts, strict=True)):  # noqa: ASYNC110
            await anyio.sleep(0.001)

    def _start(self, index: int) -> Stream:
        stream = self._client.generate(
            PROMPT, adapter=self._voices[index], max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True,
            speculation="off",
        )  # fmt: skip

        def listen(message: ServerMessage) -> None:
            if isinstance(message, Delta):
                self.num_tokens[index] += len(message.token_ids)

        stream.listen(listen)
        return stream


async def main(options: argparse.Namespace) -> None:
    """Print the table."""
    report = Report("kills", options)
    print(report.header())
    import_s = import_seconds()
    rows, cells = [], {}
    model = None if options.shape == "demo" else checkpoint(options.cache, QWEN_05B)
    async with served(model) as (system, client):
        voices: list[str | None] = [None, *[a.name for a in await client.adapters.list() if a.name != "base-heads"]]
        choir = Choir(client, [voices[index % len(voices)] for index in range(options.streams)])
        await choir.rehearse()
        async with anyio.create_task_group() as tasks:
            for index in range(options.streams):
                tasks.start_soon(choir.sing, index)
            series: list[tuple[str, int, Callable[[System], None]]] = [
                ("executor", options.kills, System.kill_executor),
                ("executor and launcher", options.kills, kill_both),
                ("launcher alone", NUM_LAUNCHER_KILLS, kill_launcher),
            ]
            for label, num_kills, kill in series:
                gaps = [await measure(choir, system, kill) for _ in range(num_kills)]
                cells[label] = gaps
                rows.append(row(label, gaps, import_s))
            tasks.cancel_scope.cancel()
    print(f"import torch in a new process: {import_s:.2f} s; {options.streams} streams\n")
    print(table(["killed", "kills", "median s", "p90 s", "p99 s", "max s", "of import torch"], rows))
    print(
        f"\n{choir.num_answers} answers of {NEW_TOKENS} tokens, {choir.num_wrong} wrong, {choir.num_lost} streams lost"
    )
    report.save({"gaps_s": cells, "import_torch_s": import_s, "wrong": choir.num_wrong, "lost": choir.num_lost})


async def measure(choir: Choir, system: System, kill: Callable[[System], None]) -> float:
    """Return the seconds from a kill until every voice has a token that was computed after it."""
    await choir.until_all_have([num + TOKENS_BEFORE_KILL for num in choir.num_tokens])
    while system.launcher is not None and not system.launcher.is_ready:  # noqa: ASYNC110 - killed once it can serve
        await anyio.sleep(0.001)
    model, killed_s = system.services.model, time.perf_counter()
    lives, is_killed = model.num_lives, kill is not kill_launcher
    kill(system)
    while is_killed and model.num_lives == lives:  # noqa: ASYNC110 - tokens until then are of the killed life
        await anyio.sleep(0.001)
    await choir.until_all_have(list(choir.num_tokens))
    return time.perf_counter() - killed_s


def kill_both(system: System) -> None:
    """Kill the launcher and the executor."""
    kill_launcher(system)
    system.kill_executor()


def kill_launcher(system: System) -> None:
    """Kill the launcher."""
    assert system.launcher is not None, "this platform has no launcher"
    pid = system.launcher.pid
    assert pid is not None, "`measure` waits for it"
    os.kill(pid, signal.SIGKILL)


def import_seconds() -> float:
    """Return the median time of a new interpreter that imports torch and ends."""
    command = [sys.executable, "-c", "import torch"]
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(command, check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def row(label: str, gaps: list[float], import_s: float) -> list[str]:
    """Return the line of a series."""
    ordered = sorted(gaps)
    percentiles = [ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.9, 0.99)]
    figures = [f"{value:.3f}" for value in (*percentiles, ordered[-1])]
    return [label, str(len(gaps)), *figures, f"{percentiles[0] / import_s:.2f}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["demo", "qwen"], default="demo")
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("descant") / "benchmarks")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=8)
    run(main, parser.parse_args())
