"""Tokens per second on the demo model, through the whole server: WebSocket client, gateway, scheduler, executor.

    python benchmarks/throughput.py

Ratios of one run, medians of several. The floor of a decode step is one read of the weights and adapters it uses.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time

import anyio

from descant.config import Config, ServerConfig
from descant.system import running
from descant_client.client import Client, connect

REPEATS = 5
NEW_TOKENS = 128
PROMPT = "All voices sing the same line, and none of them waits for another."


async def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as data_dir:
        async with running(Config(data_dir=data_dir, server=ServerConfig(port=0))) as system:
            info = (await system.ready()).info
            print(f"demo model, {info.num_parameters / 1e6:.2f} M parameters, {info.dtype}, {info.device}")
            print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; median of {REPEATS}")
            async with connect(f"ws://127.0.0.1:{system.port}") as client:
                names = [adapter.name for adapter in await client.adapters.list()]
                await measure_all(client, names)


async def measure_all(client: Client, names: list[str]) -> None:
    """Measure each kind of batch in turn, and the whole series several times."""
    cases: dict[str, list[str | None]] = {
        "1 stream, base": [None],
        "1 stream, 1 adapter": [names[0]],
        "8 streams, base": [None] * 8,
        "8 streams, 1 adapter": [names[0]] * 8,
        "8 streams, all voices": [[None, *names][i % (len(names) + 1)] for i in range(8)],
        "32 streams, base": [None] * 32,
        "32 streams, all voices": [[None, *names][i % (len(names) + 1)] for i in range(32)],
        "128 streams, all voices": [[None, *names][i % (len(names) + 1)] for i in range(128)],
    }
    rates: dict[str, list[float]] = {label: [] for label in cases}
    for _ in range(REPEATS + 1):  # the first series warms up
        for label, voices in cases.items():
            rates[label].append(await measure(client, voices))
    base = statistics.median(rates["1 stream, base"][1:])
    print(f"{'batch':<26}{'tokens/s':>10}{'spread':>16}{'of 1 stream':>13}")
    for label, values in rates.items():
        kept = sorted(values[1:])
        median = statistics.median(kept)
        print(f"{label:<26}{median:>10.0f}{f'{kept[0]:.0f}–{kept[-1]:.0f}':>16}{median / base:>12.2f}×")


async def measure(client: Client, voices: list[str | None]) -> float:
    """Return tokens per second of one batch, every stream of the same length."""
    started = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for name in voices:
            stream = client.generate(PROMPT, adapter=name, max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.0)
            tasks.start_soon(stream.result)
    return len(voices) * NEW_TOKENS / (time.perf_counter() - started)


if __name__ == "__main__":
    anyio.run(main)
