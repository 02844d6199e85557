"""The cost of adapters: tokens per second of a batch by the number and rank of its adapters.

    python benchmarks/lora_tax.py [--shape qwen] [--counts 8 --ranks 16 --registered 10 --repeats 1]

Two servers run, one at a time: one without any adapter, and one with adapters registered and on its device. Every line
is compared with the first server's rate for the same number of requests in the same turn; ratios are medians over the
turns. "idle" is the second server, its adapters on the device, with requests for the base model only. "bytes alone" is
the ratio to expect if the time of a decode step were that of reading weights and adapters. Prompts are short, so that
decoding takes most of the time.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch
from batches import answer, deal, run, served
from random_model import QWEN_05B, checkpoint, num_adapter_parameters, projections, random_prompts, write_adapter
from report import RESULTS, Report, figures, median, paired_ratio, ratio, spread, stage, table

from descant.assembly.system import System
from descant.config import AdapterConfig
from descant.engine.weights import load_weights
from descant.model.arch import LoraModule, from_hf
from descant.sources.demo import DEMO_MODEL
from descant.versions.extent import extent_bytes
from descant_client.client import Client

MIXED = (8, 16, 64)  # dealt in turn
PROMPT_TOKENS = 8
NEW_TOKENS = {"demo": 64, "qwen": 16}


class Base(NamedTuple):
    """The measured model."""

    path: Path | None  # None: the demo model
    dtype: Any
    vocab_size: int
    num_bytes: int  # of the weights
    modules: tuple[LoraModule, ...]

    def adapter_bytes(self, ranks: str, count: int) -> int:
        """Return the bytes of the first `count` adapters."""
        used = itertools.islice(rank_of(ranks), count)
        itemsize = getattr(torch, self.dtype).itemsize
        return sum(num_adapter_parameters(self.modules, rank) * itemsize for rank in used)


@dataclass
class Case:
    """A batch: a number of requests and of adapters. `idle` batches ask the second server for its base model."""

    num_requests: int
    num_adapters: int
    label: str
    rates: list[float] = field(default_factory=list)


def rank_of(ranks: str) -> Iterator[int]:
    """Yield the rank of each adapter of a series."""
    return itertools.cycle(MIXED if ranks == "mixed" else (int(ranks),))


def adapter_name(ranks: str, index: int) -> str:
    """Return the name of an adapter."""
    return f"rank-{ranks}-{index:04}"


def cases_of(counts: list[int], num_requests: int) -> list[Case]:
    """Return the cases of a series: batches of `num_requests`, or of as many requests as there are adapters."""
    cases: list[Case] = []
    for size, group in itertools.groupby(sorted(counts), key=lambda count: max(num_requests, count)):
        cases.append(Case(size, 0, "no LoRA"))
        cases.append(Case(size, 0, "idle"))
        cases.extend(Case(size, count, f"{count} adapter{'s' * (count > 1)}") for count in group)
    return cases


async def main(options: argparse.Namespace) -> None:
    """Measure every series, print and store."""
    report = Report("lora_tax", options)
    print(report.header())
    base = base_of(options)
    threads = f"{options.threads} threads" if options.threads else "the server's choice of threads"
    print(f"{options.shape}, {options.dtype}, {base.num_bytes / 1e6:.1f} MB of weights, {threads}")
    plain = AdapterConfig(num_slots=1, memory_bytes=1 << 20)
    async with (
        served(base.path, options.dtype, options.threads, plain) as (_, without),
        served(base.path, options.dtype, options.threads, arena_for(base, options)) as (system, with_lora),
    ):
        bench = Bench(base, without, with_lora, system, options)
        records = [await bench.series(ranks, num_registered) for ranks, num_registered in series_of(options)]
    print(f"\nstored: {report.save(records, options.results)}")


def series_of(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return ranks and number of registered adapters of each series: the first ranks alone until all are registered."""
    *few, most = sorted(options.registered)
    return [*((options.ranks[0], num) for num in few), *((ranks, most) for ranks in options.ranks)]


def base_of(options: argparse.Namespace) -> Base:
    """Return the model of the shape that was chosen."""
    if options.shape == "qwen":
        path = checkpoint(options.cache, QWEN_05B)
        num_bytes = QWEN_05B.num_parameters * getattr(torch, options.dtype).itemsize
        return Base(path, options.dtype, QWEN_05B.vocab_size, num_bytes, projections(path))
    config = from_hf(DEMO_MODEL)
    weights = load_weights(DEMO_MODEL, config, torch.float32, torch.device("cpu"))
    num_bytes = weights.num_parameters * getattr(torch, options.dtype).itemsize
    return Base(None, options.dtype, config.vocab_size, num_bytes, projections(DEMO_MODEL))


def arena_for(base: Base, options: argparse.Namespace) -> AdapterConfig:
    """Return an arena size with room for all adapters of the largest series at once."""
    itemsize = getattr(torch, options.dtype).itemsize
    count = max(options.counts)
    sizes = [
        sum(
            extent_bytes([rank] * len(base.modules), base.modules, itemsize)
            for rank in itertools.islice(rank_of(ranks), count)
        )
        for ranks in options.ranks
    ]
    num_bytes = max(sizes) + (1 << 20)
    return AdapterConfig(num_slots=count + 1, memory_bytes=num_bytes, host_bytes=2 * num_bytes)


class Bench:
    """The two servers, and the adapters registered at the second."""

    def __init__(
        self, base: Base, without: Client, with_lora: Client, system: System, options: argparse.Namespace
    ) -> None:
        self._base = base
        self._without = without
        self._with_lora = with_lora
        self._model = system.services.model
        self._options = options
        self._names: set[str] = set()
        self._seeds = itertools.count()

    async def series(self, ranks: str, num_registered: int) -> dict[str, Any]:
        """Measure every batch with adapters of these ranks; print and return it."""
        counts = [count for count in self._options.counts if count <= num_registered]
        with stage(f"\nregistered for rank {ranks}"):
            await self._register(ranks, max(counts, default=0), num_registered)
        cases = cases_of(counts, self._options.requests)
        for case in cases:  # warm-up, which also puts every adapter on the device before "idle" is measured
            await self._run(case, ranks)
        num_loads = self._model.num_adapter_loads
        for _ in range(self._options.repeats):
            for case in cases:
                case.rates.append(await self._run(case, ranks))
        assert self._model.num_adapter_loads == num_loads, "adapters were to stay on the device"
        self._show(cases, ranks)
        return {
            "ranks": ranks,
            "num_registered": len(self._names),
            "cases": [
                {
                    "requests": case.num_requests,
                    "adapters": case.num_adapters,
                    "label": case.label,
                    "tokens_per_s": [round(rate, 2) for rate in case.rates],
                }
                for case in cases
            ],
        }

    async def _register(self, ranks: str, num_used: int, num_registered: int) -> None:
        """Load random adapters for use, and register small unused ones beside them."""
        with tempfile.TemporaryDirectory() as directory:
            for index, rank in enumerate(itertools.islice(rank_of(ranks), num_used)):
                name = adapter_name(ranks, index)
                if name not in self._names:
                    write_adapter(Path(directory), self._base.modules, rank, len(self._names), torch.bfloat16)
                    await self._with_lora.adapters.load(name, Path(directory))
                    self._names.add(name)
        while len(self._names) < num_registered:
            name = f"unused-{len(self._names):04}"
            await self._with_lora.adapters.create(name, rank=1)
            self._names.add(name)

    async def _run(self, case: Case, ranks: str) -> float:
        prompts = random_prompts(case.num_requests, PROMPT_TOKENS, self._base.vocab_size, next(self._seeds))
        client = self._without if case.label == "no LoRA" else self._with_lora
        requests = deal(prompts, [adapter_name(ranks, index) for index in range(case.num_adapters)])
        return (await answer(client, requests, self._options.new_tokens)).tokens_per_s

    def _show(self, cases: list[Case], ranks: str) -> None:
        base = {case.num_requests: case.rates for case in cases if case.label == "no LoRA"}
        print(f"rank {ranks}, {len(self._names)} adapters registered")
        rows = [
            [
                f"{case.num_requests} requests, {case.label}",
                *(figures(median(case.rates)), spread(case.rates)),
                paired_ratio(case.rates, base[case.num_requests]),
                ratio(self._base.num_bytes, self._base.num_bytes + self._base.adapter_bytes(ranks, case.num_adapters)),
            ]
            for case in cases
        ]
        heads = ["batch", "tokens/s", "spread", "of no LoRA", "bytes alone"]
        print(table(heads, rows), flush=True)


def rank_argument(text: str) -> str:
    """Return the rank that a text names: the number itself, or "mixed". Raises ArgumentTypeError."""
    if text != "mixed" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a rank nor 'mixed'")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", "qwen"], default="demo")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default: bfloat16; of the demo its own, float32"
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", help="adapters in the batch; default: 1 8 32 200, qwen: 1 8 32"
    )
    parser.add_argument("--ranks", type=rank_argument, nargs="+", help="default: 16 8 64 mixed; of qwen: 16")
    parser.add_argument("--registered", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--requests", type=int, default=32, help="in a batch, unless it has more adapters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, help="default: 64, of qwen 16")
    parser.add_argument("--threads", type=int, help="default: what the server takes")
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("descant") / "benchmarks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON file goes")
    options = parser.parse_args()
    is_demo = options.shape == "demo"
    options.dtype = options.dtype or ("float32" if is_demo else "bfloat16")
    options.counts = options.counts or [1, 8, 32, *([200] if is_demo else [])]
    options.ranks = options.ranks or (["16", "8", "64", "mixed"] if is_demo else ["16"])
    options.new_tokens = options.new_tokens or NEW_TOKENS[options.shape]
    run(main, options)
