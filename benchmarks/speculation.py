"""The gain of speculation: tokens per second and steps per token with and without it, on three kinds of text.

    python benchmarks/speculation.py [--shape demo qwen] [--batches 1 4 16] [--repeats 5]

*Copying* text repeats its prompt, *repeating* text repeats a few words, *free* text does neither. The demo model copies
with its base and writes freely with `rot13`, both with their draft heads. The Qwen shape has random weights and zero
outputs of attention: each token then determines the next, so that its texts can be planned, at the cost of the real
model.

A step gives every stream one token, and the accepted tokens of its draft. A stream without drafts so takes one step per
token. Every answer is checked to be the same in all modes. Modes take turns, in an order drawn anew for each turn.
Ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import platformdirs
from batches import run, served
from random_model import QWEN_05B, markov_checkpoint
from report import RESULTS, Report, figures, median, paired_ratio, stage, table

from descant.sources.demo import DEMO_HEADS
from descant_client.client import Client
from descant_client.speculation import Speculation, SpeculationChoice
from descant_client.stream import Result

MODES: dict[str, SpeculationChoice] = {
    "off": "off",
    "auto": "auto",
    "text": Speculation(heads=False, always=True),
    "heads, chain": Speculation(ngram=False, max_width=1, always=True),
    "heads, tree": Speculation(ngram=False, max_width=3, max_nodes=12, always=True),
}
WORDS = (
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "jade",
    "knoll",
    "lagoon",
    "maple",
    "ochre",
    "pearl",
    "quartz",
    "reef",
)
NEW_TOKENS = 48  # of the random model; the demo model ends by itself
FEW = {"logit_bias": dict.fromkeys((11, 222, 3333), 1000.0)}  # a text of three words


@dataclass
class Text:
    """A kind of text: its prompts, adapter and sampling options."""

    name: str
    prompts: Sequence[str | list[int]]
    adapter: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Cell:
    """The measurements of one mode for a batch of one text."""

    text: str
    batch: int
    mode: str
    rates: list[float] = field(default_factory=list)  # tokens per second
    num_tokens: int = 0
    num_accepted: int = 0

    @property
    def steps_per_token(self) -> float:
        """Decode steps of a stream, divided by its output tokens."""
        return 1.0 - self.num_accepted / self.num_tokens


def sentences(count: int, seed: int) -> list[str]:
    """Return texts of words, each in an order of its own."""
    dice = random.Random(seed)
    return [" ".join(dice.sample(WORDS, 12))[:72] for _ in range(count)]


def demo_texts(count: int) -> list[Text]:
    """Return the texts of the embedded model."""
    return [
        Text("copying", sentences(count, 1), DEMO_HEADS),
        Text("repeating", [f"{word} " * (72 // (len(word) + 1)) for word in (WORDS * count)[:count]], DEMO_HEADS),
        Text("free", sentences(count, 2), "rot13"),
    ]


async def qwen_texts(client: Client, count: int, new_tokens: int) -> list[Text]:
    """Return texts for the random model, made of its own greedy answers."""
    dice = random.Random(3)
    starts = [[dice.randrange(QWEN_05B.vocab_size)] for _ in range(count)]
    options = {"max_tokens": new_tokens, "ignore_eos": True}
    found = [client.generate(start, temperature=0.0, speculation="off", **options) for start in starts]
    said = [[*start, *(await stream.result()).token_ids] for start, stream in zip(starts, found, strict=True)]
    return [
        Text("copying", [[*one, one[0]] for one in said], options=options),
        Text("repeating", [one[:64] for one in said], options=options | FEW),
        Text("free", [[*reversed(one[:63]), one[0]] for one in said], options=options),
    ]


async def measure(client: Client, text: Text, batch: int, mode: str) -> tuple[list[Result], float]:
    """Return the answers to a batch, and the tokens per second of all together."""
    started_s = perf_counter()
    streams = [
        client.generate(prompt, adapter=text.adapter, temperature=0.0, speculation=MODES[mode], **text.options)
        for prompt in text.prompts[:batch]
    ]
    results = [await stream.result() for stream in streams]
    return results, sum(len(result.token_ids) for result in results) / (perf_counter() - started_s)


async def compare(client: Client, text: Text, batch: int, modes: Sequence[str], repeats: int) -> list[Cell]:
    """Measure all modes in turns. The first turn is a warm-up."""
    cells = {mode: Cell(text.name, batch, mode) for mode in modes}
    dice, expected = random.Random(batch), None
    for turn in range(repeats + 1):
        for mode in dice.sample(modes, len(modes)):
            results, rate = await measure(client, text, batch, mode)
            said = [result.token_ids for result in results]
            expected = expected or said
            assert said == expected, f"{mode} says something else"
            if turn:
                cell = cells[mode]
                cell.rates.append(rate)
                cell.num_tokens += sum(map(len, said))
                cell.num_accepted += sum(result.timings.num_accepted for result in results)
    return list(cells.values())


@asynccontextmanager
async def started(shape: str, cache: Path, threads: int | None) -> AsyncIterator[Client]:
    """Run a server of one of the shapes."""
    model = None if shape == "demo" else markov_checkpoint(cache, QWEN_05B)
    async with served(model, None if shape == "demo" else "bfloat16", threads) as (_, client):
        yield client


async def main(options: argparse.Namespace) -> None:
    """Print a table for each shape."""
    report = Report("speculation", options)
    print(report.header())
    found: dict[str, list[dict[str, Any]]] = {}
    for shape in options.shape:
        modes = [mode for mode in MODES if shape == "demo" or not mode.startswith("heads")]
        cells: list[Cell] = []
        with stage(shape):
            async with started(shape, options.cache, options.threads) as client:
                count = max(options.batches)
                is_demo = shape == "demo"
                texts = demo_texts(count) if is_demo else await qwen_texts(client, count, NEW_TOKENS)
                for text in texts:
                    for batch in options.batches:
                        cells += await compare(client, text, batch, modes, options.repeats)
        show(cells, modes)
        found[shape] = [asdict(cell) | {"steps_per_token": cell.steps_per_token} for cell in cells]
    print(f"stored: {report.save(found, options.results)}")


def show(cells: list[Cell], modes: Sequence[str]) -> None:
    """Print a line for each text and batch."""
    rows: list[list[str]] = []
    for at in range(0, len(cells), len(modes)):
        off, *others = cells[at : at + len(modes)]
        columns = [f"{paired_ratio(cell.rates, off.rates)} {cell.steps_per_token:.2f}" for cell in others]
        rows.append([f"{off.text}, {off.batch}", figures(median(off.rates)), *columns])
    print(table(["text, batch", "off, tokens/s", *(f"{mode}: of off, steps" for mode in modes[1:])], rows), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=["demo", "qwen"], default=["demo", "qwen"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: what the server takes")
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("descant") / "benchmarks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON file goes")
    run(main, parser.parse_args())
