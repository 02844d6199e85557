"""Descant through its WebSocket against Transformers and PEFT, on the shape of Qwen2.5-0.5B with random weights.

    python benchmarks/vs_peft.py [--only 8x8 --repeats 1 --skip-peft]

A case "8x2" is 8 requests that share 2 adapters (rank 16, all seven projections), all sent at once; "8x0" has none.
Both sides get the same prompts, threads and dtype. PEFT runs in its own process, with the best of several batch sizes.
The two compute in turns, never at once; ratios are medians over the turns. Before any timing, both answer requests of a
smaller model in float32; if their tokens differ, the benchmark ends. "read allows" is the rate at which each step only
reads the weights once, at the measured read bandwidth.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import torch
from batches import Answers, Request, answer, deal, run, served
from peft_process import Peft, peft_process
from random_model import (
    CHECK,
    QWEN_05B,
    adapters,
    checkpoint,
    floor_tokens_per_s,
    num_adapter_parameters,
    projections,
    random_prompts,
)
from report import RESULTS, Report, figures, median, paired_ratio, spread, stage, table

from descant.config import AdapterConfig
from descant.versions.extent import extent_bytes
from descant_client.client import Client

RANK = 16
CASES = ["8x8", "8x1", "8x0", "32x32", "1x0"]
BATCH_SIZES = (1, 4, 8, 32)  # tried with PEFT
CHECK_TOKENS = 24


@dataclass
class Case:
    """A number of requests with a number of adapters, and the measurements."""

    num_requests: int
    num_adapters: int
    ours: list[Answers] = field(default_factory=list)
    peft: list[Answers] = field(default_factory=list)
    peft_trials: dict[int, float] = field(default_factory=dict)  # batch size: tokens per second of one batch

    def __str__(self) -> str:
        return f"{self.num_requests}x{self.num_adapters}"

    @property
    def names(self) -> list[str | None]:
        """Names of the adapters."""
        return [adapter_name(i) for i in range(self.num_adapters)]

    @property
    def batch_size(self) -> int:
        """Best batch size of PEFT."""
        return max(self.peft_trials, key=self.peft_trials.__getitem__)


def parse_case(text: str) -> Case:
    """Return the case that "8x2" names. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or not int(found[1]) or int(found[2]) > int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not REQUESTSxADAPTERS with at most one adapter per request")
    return Case(int(found[1]), int(found[2]))


def adapter_name(index: int) -> str:
    """Return the name of an adapter on both sides."""
    return f"voice-{index}"


async def main(options: argparse.Namespace) -> None:
    """Check, measure, print and store."""
    report = Report("vs_peft", options)
    print(report.header())
    cases: list[Case] = options.only
    num_adapters = max(case.num_adapters for case in cases)
    model = checkpoint(options.cache, QWEN_05B)
    directories = adapters(options.cache, model, RANK, num_adapters)
    torch.set_num_threads(options.threads)
    read, copy = measure_bandwidth()
    print(f"{options.dtype}, {options.threads} threads, read {read / 1e9:.1f} GB/s, copy {copy / 1e9:.1f} GB/s")
    async with AsyncExitStack() as stack:
        peft = None if options.skip_peft else await stack.enter_async_context(peft_process(options.threads))
        if peft is not None:
            await check_tokens(peft, options.cache, options.threads)
            with stage("PEFT loaded"):
                await peft.load(model, options.dtype, {adapter_name(i): path for i, path in enumerate(directories)})
        config = arena_for(model, num_adapters, options.dtype)
        with stage("Descant loaded"):
            _, client = await stack.enter_async_context(served(model, options.dtype, options.threads, config))
            for index, path in enumerate(directories):
                await client.adapters.load(adapter_name(index), path)
        await warm_up(client, peft, cases, options)
        await measure(client, peft, cases, options)
    show(cases, read, options.dtype)
    results = {"read_bytes_per_s": read, "copy_bytes_per_s": copy, "cases": [record(case) for case in cases]}
    print(f"\nstored: {report.save(results, options.results)}")


async def check_tokens(peft: Peft, cache: Path, num_threads: int) -> None:
    """Let both answer the same requests in float32. Raises SystemExit at the first token that differs."""
    model = checkpoint(cache, CHECK)
    names: list[str | None] = [None, *map(adapter_name, range(4))]
    directories = {adapter_name(i): path for i, path in enumerate(adapters(cache, model, RANK, 4))}
    prompts = random_prompts(8, 64, CHECK.vocab_size, seed=1)
    requests = deal([prompt[: 64 - 5 * i] for i, prompt in enumerate(prompts)], names)
    await peft.load(model, "float32", directories)
    async with served(model, "float32", num_threads) as (_, client):
        for name, path in directories.items():
            await client.adapters.load(name, path)
        ours = await answer(client, requests, CHECK_TOKENS)
        base = await answer(client, [Request(request.prompt) for request in requests], CHECK_TOKENS)
    for batch_size in (1, 8):
        theirs = await peft.answer(requests, CHECK_TOKENS, batch_size)
        complain(first_difference(ours.token_ids, theirs.token_ids), batch_size)
    changed = sum(a != b for a, b in zip(ours.token_ids, base.token_ids, strict=True))
    if changed != sum(request.adapter is not None for request in requests):
        raise SystemExit("refused: an adapter changes nothing, so that equal tokens prove nothing")
    print(f"tokens equal in float32: {len(requests)} requests of {CHECK_TOKENS} tokens, {changed} with adapters")


def first_difference(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> tuple[int, int] | None:
    """Return request and position of the first token that differs, None if all are equal."""
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            return row, next(
                (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b))
            )
    return None


def complain(difference: tuple[int, int] | None, batch_size: int) -> None:
    """Raise SystemExit with the place where two answers differ."""
    if difference is not None:
        row, at = difference
        raise SystemExit(f"refused: token {at} of request {row} differs from PEFT's (its batch size: {batch_size})")


def arena_for(model: Path, num_adapters: int, dtype: str) -> AdapterConfig:
    """Return memory for all adapters at once."""
    modules = projections(model)
    itemsize = getattr(torch, dtype).itemsize
    num_bytes = extent_bytes([RANK] * len(modules), modules, itemsize) * (num_adapters + 1)
    return AdapterConfig(num_slots=num_adapters + 1, memory_bytes=num_bytes, host_bytes=2 * num_bytes)


async def warm_up(client: Client, peft: Peft | None, cases: list[Case], options: argparse.Namespace) -> None:
    """Answer each case once. With PEFT, answer one batch of each size, to find the best size."""
    if peft is not None:  # warm-up, so that no trial includes first-time costs
        with stage("PEFT warm"):
            for case in cases:
                requests = draw(case, options, repeat=0)
                await peft.answer([Request(one.prompt[:8], one.adapter) for one in requests], 2, len(requests))
    for case in cases:
        requests = draw(case, options, repeat=0)
        await answer(client, requests, min(options.new_tokens, 8))
        if peft is None:
            continue
        for size in sorted({min(size, case.num_requests) for size in BATCH_SIZES}):
            trial = await peft.answer(requests[:size], options.new_tokens, size)
            case.peft_trials[size] = trial.tokens_per_s
        print(f"{case}: best batch of PEFT {case.batch_size}, of {trials(case)}", flush=True)


async def measure(client: Client, peft: Peft | None, cases: list[Case], options: argparse.Namespace) -> None:
    """Answer every case with both sides in turn, for each repeat with new prompts."""
    for repeat in range(1, options.repeats + 1):
        with stage(f"turn {repeat} of {options.repeats}"):
            for case in cases:
                requests = draw(case, options, repeat)
                case.ours.append(await answer(client, requests, options.new_tokens))
                if peft is not None:
                    case.peft.append(await peft.answer(requests, options.new_tokens, case.batch_size))


def draw(case: Case, options: argparse.Namespace, repeat: int) -> list[Request]:
    """Return the requests of a case."""
    seed = 1000 * repeat + 10 * case.num_requests + case.num_adapters
    return deal(random_prompts(case.num_requests, options.prompt_tokens, QWEN_05B.vocab_size, seed), case.names)


def measure_bandwidth() -> tuple[float, float]:
    """Return bytes per second of a matrix-vector product's reads, and of a copy's reads and writes together."""
    matrix, vector = torch.ones(1 << 15, 1 << 12), torch.ones(1 << 12)
    target = torch.empty_like(matrix)
    read = matrix.nbytes / _fastest(lambda: torch.mv(matrix, vector))
    return read, 2 * matrix.nbytes / _fastest(lambda: target.copy_(matrix))


def _fastest(function: Callable[[], object], turns: int = 7) -> float:
    seconds: list[float] = []
    for _ in range(turns):
        started_s = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def show(cases: list[Case], bandwidth: float, dtype: str) -> None:
    """Print the tables: of the whole time with prefill, and of the time in which all requests decode."""
    base = {case.num_requests: [one.tokens_per_s for one in case.ours] for case in cases if not case.names}
    rows = []
    for case in cases:
        ours, peft = ([one.tokens_per_s for one in side] for side in (case.ours, case.peft))
        rows.append(
            [
                f"{case.num_requests} requests, {case.num_adapters} adapters",
                *(figures(median(ours)), spread(ours)),
                paired_ratio(ours, base.get(case.num_requests, [])),
                *((figures(median(peft)), spread(peft), str(case.batch_size)) if peft else ("–", "–", "–")),
                paired_ratio(ours, peft),
            ]
        )
    heads = ["tokens/s, prompts included", "Descant", "spread", "of base", "PEFT", "spread", "batch", "of PEFT"]
    print(f"\n{table(heads, rows)}\n")
    heads = ["tokens/s, decode alone", "Descant", "PEFT", "read allows", "Descant of it", "with adapters"]
    print(table(heads, [decode_row(case, bandwidth, dtype) for case in cases]))


def decode_row(case: Case, bandwidth: float, dtype: str) -> list[str]:
    """Return a line of the second table."""
    ours, peft = (median([one.decode_tokens_per_s for one in side]) for side in (case.ours, case.peft))
    weights, with_adapters = step_bytes(case.num_adapters, dtype)
    floor = floor_tokens_per_s(case.num_requests, weights, bandwidth)
    label = f"{case.num_requests} requests, {case.num_adapters} adapters"
    both = floor_tokens_per_s(case.num_requests, with_adapters, bandwidth)
    return [label, figures(ours), figures(peft), figures(floor), f"{ours / floor:.0%}", figures(both)]


def step_bytes(num_adapters: int, dtype: str) -> tuple[int, int]:
    """Return the bytes that a decode step reads: of the weights, and of weights and adapters."""
    itemsize = getattr(torch, dtype).itemsize
    weights = QWEN_05B.num_parameters * itemsize
    return weights, weights + num_adapters * num_adapter_parameters(QWEN_05B.modules, RANK) * itemsize


def record(case: Case) -> dict[str, Any]:
    """Return the stored record of a case."""
    sides = {"descant": case.ours, "peft": case.peft}
    return {
        "case": str(case),
        "peft_batch_size": case.batch_size if case.peft else None,
        "peft_trials": case.peft_trials,
        **{
            name: {
                "tokens_per_s": [round(one.tokens_per_s, 2) for one in side],
                "decode_tokens_per_s": [round(one.decode_tokens_per_s, 2) for one in side],
            }
            for name, side in sides.items()
        },
    }


def trials(case: Case) -> str:
    """Return PEFT's tokens per second by batch size."""
    return ", ".join(f"{size}: {figures(rate)} tokens/s" for size, rate in case.peft_trials.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=parse_case, default=list(map(parse_case, CASES)), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-peft", action="store_true", help="measure Descant alone, unchecked")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("descant") / "benchmarks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON file goes")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    run(main, parser.parse_args())
