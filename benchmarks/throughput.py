"""Tokens per second on the demo model, through the whole server: WebSocket client, gateway, scheduler, executor.

    python benchmarks/throughput.py

Ratios are taken within one run; the table shows medians of several. The floor of a decode step is one read of the
weights and adapters that it uses.
"""

from __future__ import annotations

import statistics
from argparse import Namespace

from batches import answer, deal, run, served
from report import Report, figures, ratio, spread, table

from descant_client.client import Client

REPEATS = 5
NEW_TOKENS = 128
PROMPT = "All voices sing the same line, and none of them waits for another."


async def main() -> None:
    """Print the table."""
    print(Report("throughput", Namespace()).header())
    async with served(None) as (system, client):
        info = (await system.ready()).info
        print(f"demo model, {info.num_parameters / 1e6:.2f} M parameters, {info.dtype}, {info.device}")
        names = [adapter.name for adapter in await client.adapters.list()]
        await measure_all(client, names)


async def measure_all(client: Client, names: list[str]) -> None:
    """Measure each kind of batch in turn, and the whole series several times."""
    cases: dict[str, tuple[int, list[str | None]]] = {
        "1 stream, base": (1, []),
        "1 stream, 1 adapter": (1, [names[0]]),
        "8 streams, base": (8, []),
        "8 streams, 1 adapter": (8, [names[0]]),
        "8 streams, all voices": (8, [None, *names]),
        "32 streams, base": (32, []),
        "32 streams, all voices": (32, [None, *names]),
        "128 streams, all voices": (128, [None, *names]),
    }
    rates: dict[str, list[float]] = {label: [] for label in cases}
    for _ in range(REPEATS + 1):  # the first series warms up
        for label, (num_streams, voices) in cases.items():
            answers = await answer(client, deal([PROMPT] * num_streams, voices), NEW_TOKENS)
            rates[label].append(answers.tokens_per_s)
    base = statistics.median(rates["1 stream, base"][1:])
    rows = []
    for label, (_, *values) in rates.items():
        median = statistics.median(values)
        rows.append([label, figures(median), spread(values), ratio(median, base)])
    print(f"\nmedians of {REPEATS}\n{table(['batch', 'tokens/s', 'spread', 'of 1 stream'], rows)}")


if __name__ == "__main__":
    run(main)
