"""A thousand adapters on a device with room for sixty-four: the whole server, with the demo model.

    python benchmarks/adapters.py

Every answer is compared with the answer of the same request alone. Ratios are taken within one run; the table shows
medians of several. The least cost of a cold adapter is one read of its file, one SHA-256 over it and one copy to the
device.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import torch
from batches import run, served
from random_model import projections, write_adapter
from report import Report, figures, median, ratio, table

from descant.assembly.system import System
from descant.config import AdapterConfig
from descant.sources.demo import DEMO_MODEL
from descant.versions.extent import extent_bytes
from descant_client.client import Client
from descant_client.loadtest.percentiles import percentile, spread_of
from descant_client.loadtest.popularity import PowerLaw
from descant_client.stream import Result

NUM_ADAPTERS = 1000
NUM_RESIDENT = 64
RANKS = (4, 8, 16, 32, 64)
NUM_REQUESTS = 500  # of each popularity
CONCURRENCY = 32
NEW_TOKENS = 16
REPEATS = 5
NUM_BASE_STREAMS = 8
BASE_TOKENS = 400
PROMPT = "All voices sing the same line."


@dataclass
class Series:
    """The measurements of a series of requests."""

    seconds: float = 0.0
    num_loads: int = 0
    num_wrong: int = 0
    cold_ttft_s: list[float] = field(default_factory=list)  # of requests that waited for their adapter
    warm_ttft_s: list[float] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        """Number of answered requests."""
        return len(self.cold_ttft_s) + len(self.warm_ttft_s)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of all requests together."""
        return self.num_requests * NEW_TOKENS / self.seconds


async def main() -> None:
    """Print the tables."""
    print(Report("adapters", Namespace()).header())
    print(f"{NUM_ADAPTERS} adapters of ranks {RANKS}, room for {NUM_RESIDENT}; {CONCURRENCY} requests at a time")
    mean_bytes = statistics.mean(_extent_bytes(rank) for rank in RANKS)
    adapters = AdapterConfig(num_slots=NUM_RESIDENT, memory_bytes=int(NUM_RESIDENT * mean_bytes))
    async with served(None, adapters=adapters) as (system, client):
        bench = Bench(system, client)
        await bench.register()
        await bench.ask_alone()
        await show_popularities(bench)
        await show_fitting_set(bench)
        await show_base_latency(bench)


async def show_popularities(bench: Bench) -> None:
    """Draw adapters by S-LoRA's power law."""
    print(f"\n{'popularity':<12}{'wrong':>7}{'hit rate':>10}{'loads/s':>9}{'tokens/s':>10}", end="")
    print(f"{'TTFT warm p50, p99':>22}{'cold p50, p99':>18}")
    for alpha in (0.3, 1.0):
        names = [_name(index) for index in range(NUM_ADAPTERS)]
        random.Random(1).shuffle(names)  # so that popularity does not depend on rank
        drawn = PowerLaw(alpha).choices(NUM_ADAPTERS, random.Random(2))
        series = await bench.run([names[index] for index in itertools.islice(drawn, NUM_REQUESTS)])
        hit_rate = len(series.warm_ttft_s) / series.num_requests
        print(f"{f'alpha {alpha}':<12}{series.num_wrong:>7}{hit_rate:>10.1%}", end="")
        print(f"{series.num_loads / series.seconds:>9.0f}{series.tokens_per_s:>10.0f}", end="")
        print(f"{_milliseconds(series.warm_ttft_s):>22}{_milliseconds(series.cold_ttft_s):>18}")


async def show_fitting_set(bench: Bench) -> None:
    """Compare a working set that fits with one adapter of the same rank, and with none."""
    sixteen = [_name(index) for index in range(NUM_ADAPTERS) if RANKS[index % len(RANKS)] == 16]
    fitting = sixteen[: NUM_RESIDENT // 2]
    cases: dict[str, list[str | None]] = {
        "no adapter": [None],
        "1 adapter, rank 16": [sixteen[0]],
        "8 adapters, rank 16": [*fitting[:8]],
        f"{len(fitting)} adapters, rank 16": [*fitting],
    }
    rates: dict[str, list[float]] = {label: [] for label in cases}
    for _ in range(REPEATS + 1):  # the first series warms up
        for label, names in cases.items():
            series = await bench.run(list(itertools.islice(itertools.cycle(names), 4 * CONCURRENCY)))
            assert series.num_wrong == 0, "a benchmark of wrong answers is worth nothing"
            rates[label].append(series.tokens_per_s)
    medians = {label: median(values[1:]) for label, values in rates.items()}
    one = medians["1 adapter, rank 16"]
    rows = [[label, figures(value), ratio(value, one)] for label, value in medians.items()]
    print(f"\nmedians of {REPEATS}\n{table(['working set that fits', 'tokens/s', 'of 1 adapter'], rows)}")


async def show_base_latency(bench: Bench) -> None:
    """Compare the gaps between base tokens beside requests for cold adapters and beside the same requests once warm."""
    gaps: dict[str, list[float]] = {"alone": [], "warm": [], "cold": []}
    loads = 0
    cold = itertools.cycle(_name(index) for index in range(NUM_ADAPTERS))
    for _ in range(REPEATS):
        gaps["alone"].append(await bench.base_gap_p99(None))
        await bench.run([_name(0)])
        gaps["warm"].append(await bench.base_gap_p99(itertools.repeat(_name(0))))
        before = bench.num_loads
        gaps["cold"].append(await bench.base_gap_p99(cold))
        loads += bench.num_loads - before
    warm = median(gaps["warm"])
    print(f"\np99 gap between tokens of {NUM_BASE_STREAMS} base streams, median of {REPEATS}; {loads} loads while cold")
    for label, values in gaps.items():
        gap = median(values)
        print(f"beside {label:<8}{1e3 * gap:>8.2f} ms{ratio(gap, warm):>9}  (×: of the same requests, warm)")


class Bench:
    """A running server, its thousand names, and the answer of each when its request runs alone."""

    def __init__(self, system: System, client: Client) -> None:
        self._system = system
        self._client = client
        self._expected: dict[str | None, list[int]] = {}

    @property
    def num_loads(self) -> int:
        """Number of loads onto the device so far."""
        return self._system.services.model.num_adapter_loads

    async def register(self) -> None:
        """Make the adapters and load each under its name."""
        started_s = time.perf_counter()
        modules = projections(DEMO_MODEL)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            for index in range(NUM_ADAPTERS):
                write_adapter(path, modules, RANKS[index % len(RANKS)], index, torch.float32)
                await self._client.adapters.load(_name(index), path)
        print(f"made and loaded one after the other in {time.perf_counter() - started_s:.0f} s")

    async def ask_alone(self) -> None:
        """Run every request by itself."""
        for name in (None, *map(_name, range(NUM_ADAPTERS))):
            self._expected[name] = (await self._ask(name)).token_ids

    async def run(self, names: Sequence[str | None]) -> Series:
        """Run one request per name, `CONCURRENCY` at a time."""
        series, pending, loads = Series(), list(reversed(names)), self.num_loads

        async def work() -> None:
            while pending:
                name = pending.pop()
                result = await self._ask(name)
                series.num_wrong += result.token_ids != self._expected[name]
                timings = result.timings
                (series.cold_ttft_s if timings.is_cold else series.warm_ttft_s).append(timings.ttft_s)

        started_s = time.perf_counter()
        await _together([work] * CONCURRENCY)
        series.seconds = time.perf_counter() - started_s
        series.num_loads = self.num_loads - loads
        return series

    async def base_gap_p99(self, others: Iterable[str] | None) -> float:
        """Run base streams beside a sequence of single requests; return the p99 of the base streams' token gaps."""
        gaps: list[float] = []
        is_over = anyio.Event()

        async def sing() -> None:
            last = None
            stream = self._client.generate(PROMPT, temperature=0.0, max_tokens=BASE_TOKENS, ignore_eos=True)
            async for _ in stream:
                now = time.perf_counter()
                gaps.extend([] if last is None else [now - last])
                last = now

        async def disturb() -> None:
            for name in others or ():
                if is_over.is_set():
                    break
                await self._client.generate([1], adapter=name, max_tokens=1, ignore_eos=True).result()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(disturb)
            await _together([sing] * NUM_BASE_STREAMS)
            is_over.set()
        return percentile(sorted(gaps), 99)

    async def _ask(self, name: str | None) -> Result:
        stream = self._client.generate(PROMPT, adapter=name, temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        return await stream.result()


def _name(index: int) -> str:
    return f"voice-{index:04}"


def _extent_bytes(rank: int) -> int:
    modules = projections(DEMO_MODEL)
    return extent_bytes([rank] * len(modules), modules, itemsize=4)


def _milliseconds(seconds: list[float]) -> str:
    spread = spread_of(seconds)
    return "–" if spread is None else f"{1e3 * spread.p50:.0f}, {1e3 * spread.p99:.0f} ms"


async def _together(work: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    async with anyio.create_task_group() as tasks:
        for each in work:
            tasks.start_soon(each)


if __name__ == "__main__":
    run(main)
