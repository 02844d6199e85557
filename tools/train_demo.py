"""Train the embedded demo model: a byte-level base that repeats its prompt, and one adapter for each voice.

    python tools/train_demo.py [--only-measure | --only-heads]

The base is trained on all tasks at once, each selected by a tag of its own at the end of the prompt. The tag of
*repeat* is the plain `<|answer|>` of users' prompts. An adapter then need not learn its task, only to select it without
its tag, for which a low rank is enough. Then the base and each adapter get draft heads (`demo_heads.py`). One run takes
about half an hour on two CPU cores. The written files are then measured on texts kept out of training: voices by greedy
generation, where the run fails below `REQUIRED`; heads on the right answers, where the accuracy is only reported.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_checkpoint import END, IGNORED, PAD, adapter_config, base_config, prompt_ids, save_adapter, save_base
from demo_descent import descend
from demo_heads import NUM_HEADS, Batch, load_heads, measure_heads, save_heads, train_heads
from demo_tasks import MAX_TEXT_BYTES, TASKS, VOICES, answer, sample_text
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

DEMO = Path(__file__).parents[1] / "runtime" / "descant" / "demo"
SEED = 20
BASE_STEPS = 4000
ADAPTER_STEPS = {"upper": 200, "reverse": 700, "rot13": 250, "pig-latin": 700}
TOKENS_PER_BATCH = 4000
MIXTURE = ("repeat", "repeat", "upper", "rot13", *["reverse"] * 3, *["pig-latin"] * 4)  # the hard ones more often
REQUIRED = 0.97
HELD_OUT = 400  # texts per voice
HEADS_BATCHES = 250  # for the heads of one voice, about 400,000 positions
JUDGED = {"base": "repeat", **{voice: voice for voice in VOICES}}  # the task of each voice
PROMISED_BYTES = 64  # longer texts are trained and measured as well, without a required accuracy
BUCKETS = ((0, 0), (1, 16), (17, 32), (33, 64), (65, MAX_TEXT_BYTES))  # bytes of text
SHOWN = (
    "",
    "hello",
    "Descant loses no stream",
    "Hi! How are you today?",
    "The quick brown fox jumps over the lazy dog while the choir keeps singing",
)


def held_out_texts(task: str) -> list[str]:
    """Return the texts that `task` is measured on: the demo's sentences first, then random ones of every length."""
    rng = random.Random(f"{SEED} held out {task}")
    return [*SHOWN, *(sample_text(rng, task, 0, MAX_TEXT_BYTES) for _ in range(HELD_OUT - len(SHOWN)))]


class Teacher:
    """Makes training batches, without held-out texts, except texts so short that all of their length are needed."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)
        self._held_out = {text for task in TASKS for text in held_out_texts(task) if len(text) > 3}

    def batch(self, tasks: Sequence[str], longest: int, *, tagged: bool) -> Batch:
        """Return examples of one length class up to `longest` bytes: prompt, answer, `<|end|>`, padding."""
        top = math.ceil(longest * self._rng.random() ** 0.7)
        rows: list[tuple[list[int], list[int]]] = []
        widest = 0
        while (len(rows) + 1) * widest < TOKENS_PER_BATCH and len(rows) < 160:
            task = self._rng.choice(tasks)
            text = sample_text(self._rng, task, max(0, top - 12), top) if self._rng.random() > 0.02 else ""
            if text in self._held_out:
                continue
            rows.append(_example(task, text, tag=task if tagged else "repeat"))
            widest = max(widest, len(rows[-1][0]) + len(rows[-1][1]))
        return _padded(rows, widest)


def _example(task: str, text: str, tag: str = "repeat") -> tuple[list[int], list[int]]:
    return prompt_ids(text, tag), [*answer(task, text).encode(), END]


def _padded(rows: list[tuple[list[int], list[int]]], width: int) -> Batch:
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (prompt, reply) in enumerate(rows):
        ids[i, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        labels[i, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
    return ids, labels


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy over the answers' ids. The head runs on those positions only."""
    ids, labels = batch
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # [B, T - 1, hidden]
    asked = labels[:, 1:] != IGNORED
    return F.cross_entropy(model.lm_head(hidden[asked]).float(), labels[:, 1:][asked])


def make_optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the decoder's matrices, and AdamW for embeddings, norms and the thin matrices of LoRA."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and ".layers." in name and "lora_" not in name]
    others = [p for _, p in trained if not any(p is m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=3 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def train(
    label: str,
    model: LlamaForCausalLM,
    trained: torch.nn.Module,
    batch_at: Callable[[float], Batch],
    steps: int,
    rate: float,
) -> None:
    """Train in place: a short linear warm-up, then half a cosine to zero. `batch_at` gets the progress, 0 to 1."""
    optimizers = make_optimizers(trained, rate)

    def factor(step: int) -> float:
        return min((step + 1) / (0.04 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]

    def loss_at(step: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return answer_loss(model, batch_at(step / steps))

    descend(label, optimizers, schedules, loss_at, steps=steps, report_every=100, clipped=trained.parameters())


def train_base(folder: Path) -> None:
    """Train the base on the tagged mixture. Texts grow to `MAX_TEXT_BYTES` over the first two fifths of the steps."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(base_config())
    teacher = Teacher(f"{SEED} base")

    def batch_at(progress: float) -> Batch:
        longest = min(MAX_TEXT_BYTES, 12 + round(210 * progress))
        return teacher.batch(MIXTURE, longest, tagged=True)

    train("base", model, model, batch_at, BASE_STEPS, rate=2e-3)
    save_base(model, folder)


def train_adapter(voice: str, base: Path, folder: Path) -> None:
    """Train a rank-8 LoRA on untagged prompts. The base stays as saved."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, adapter_config())
    teacher = Teacher(f"{SEED} {voice}")
    train(
        voice,
        model,
        adapted,
        lambda _: teacher.batch([voice], MAX_TEXT_BYTES, tagged=False),
        ADAPTER_STEPS[voice],
        rate=4e-3,
    )
    save_adapter(adapted, folder)


def load_voice(demo: Path, voice: str) -> tuple[LlamaForCausalLM, torch.nn.Module]:
    """Return the base with the voice's adapter inside, if it has one, and PEFT's model of both."""
    base = LlamaForCausalLM.from_pretrained(demo / "base")
    return base, base if voice == "base" else PeftModel.from_pretrained(base, demo / "adapters" / voice)


def heads_folder(demo: Path, voice: str) -> Path:
    """Return the folder of the draft heads of a voice. Those of an adapter are beside its LoRA."""
    return demo / "heads" if voice == "base" else demo / "adapters" / voice


def train_all_heads(demo: Path) -> dict[str, object]:
    """Train and write the heads of every voice in `demo`. Return their part of the report."""
    started = time.monotonic()
    for voice, task in JUDGED.items():
        teacher = Teacher(f"{SEED} {voice} heads")
        batches = (teacher.batch([task], MAX_TEXT_BYTES, tagged=False) for _ in range(HEADS_BATCHES))
        heads = train_heads(voice, load_voice(demo, voice)[0], batches, SEED)
        save_heads(heads, heads_folder(demo, voice))
    paths = [path for part in ("base", "adapters", "heads") for path in (demo / part).rglob("*") if path.is_file()]
    seconds = round(time.monotonic() - started)
    return {"heads_train_seconds": seconds, "bytes": sum(path.stat().st_size for path in paths)}


def held_out_batches(task: str) -> Iterator[Batch]:
    """Return batches of the held-out texts with their right answers, with the prompts of users."""
    rows = sorted((_example(task, text) for text in held_out_texts(task)), key=lambda row: len(row[0]))
    for chunk in (rows[i : i + 50] for i in range(0, len(rows), 50)):
        yield _padded(chunk, max(len(prompt) + len(reply) for prompt, reply in chunk))


@torch.inference_mode()
def generate(model: torch.nn.Module, texts: Sequence[str]) -> list[str]:
    """Return greedy answers to raw texts, in order, by Transformers' own generation on left-padded batches."""
    answers = dict[int, str]()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].encode()))
    for chunk in (order[i : i + 50] for i in range(0, len(order), 50)):
        prompts = [prompt_ids(texts[i]) for i in chunk]
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        output = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=2 * width + 24)
        for i, row in zip(chunk, output[:, width:].tolist(), strict=True):
            said = row[: row.index(END)] if END in row else row
            answers[i] = bytes(b for b in said if b < 256).decode(errors="replace")
    return [answers[i] for i in range(len(texts))]


def measure(voice: str, task: str, model: torch.nn.Module) -> dict[str, object]:
    """Return the exact match on held-out texts of up to `PROMISED_BYTES`, and by length. Print the first answers."""
    texts = held_out_texts(task)
    said = generate(model.eval(), texts)
    right = [reply == answer(task, text) for text, reply in zip(texts, said, strict=True)]
    for reply, ok in list(zip(said, right, strict=True))[: len(SHOWN)]:
        print(f"  {voice:<10} {'right' if ok else 'WRONG'}  {reply}")
    by_length = {}
    for shortest, longest in BUCKETS:
        hits = [ok for text, ok in zip(texts, right, strict=True) if shortest <= len(text.encode()) <= longest]
        by_length[f"{shortest}-{longest}"] = {"texts": len(hits), "exact_match": round(sum(hits) / len(hits), 4)}
    promised = [ok for text, ok in zip(texts, right, strict=True) if len(text.encode()) <= PROMISED_BYTES]
    return {
        "exact_match": round(sum(promised) / len(promised), 4),
        "texts": len(promised),
        "shown_right": all(right[: len(SHOWN)]),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if voice == "base" or "lora_" in name),
        "by_length": by_length,
    }


def measure_all(demo: Path, known: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Measure the files in `demo`, the base first. For the voices already `known`, measure only the heads."""
    results = {}
    for voice, task in JUDGED.items():
        base, model = load_voice(demo, voice)
        results[voice] = known[voice] if voice in known else measure(voice, task, model)
        heads = load_heads(heads_folder(demo, voice))
        results[voice]["heads"] = measure_heads(base, heads, held_out_batches(task))
    return results


def print_table(results: dict[str, dict[str, object]]) -> None:
    """Print a line per voice: exact match in all and by bytes of text, and the accuracy of first candidates by head."""
    columns = [f"{low}-{high}" for low, high in BUCKETS] + [f"head {i}" for i in range(NUM_HEADS)]
    print(f"{'voice':<10} {'exact':>7}  " + " ".join(column.rjust(7) for column in columns))
    for voice, result in results.items():
        cells = [cell["exact_match"] for cell in result["by_length"].values()]
        cells += [head["top_1"] for head in result["heads"]]
        print(f"{voice:<10} {result['exact_match']:7.2%}  " + " ".join(f"{cell:7.1%}" for cell in cells))


def main() -> int:
    """Train, write and measure. Return 1 if a voice is below `REQUIRED` or a sentence of the demo is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write (default: the package's own)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-measure", action="store_true", help="measure the files that are there")
    only.add_argument("--only-heads", action="store_true", help="train and measure draft heads for the files there")
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.set_num_threads(2)
    transformers_logging.disable_progress_bar()
    is_kept = arguments.only_measure or arguments.only_heads
    report = json.loads((out / "report.json").read_text()) if is_kept else train_all(out)
    if arguments.only_heads:
        report |= train_all_heads(out)
    started = time.monotonic()
    results = measure_all(out, report["voices"] if arguments.only_heads else {})
    print_table(results)
    if not arguments.only_heads:
        report |= {
            "measure_seconds": round(time.monotonic() - started),
            "promised_text_bytes": [0, PROMISED_BYTES],
            "measured_text_bytes": [0, MAX_TEXT_BYTES],
        }
    report["voices"] = results
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    seconds = f"{report['train_seconds']} s and {report['heads_train_seconds']} s for heads"
    print(f"trained in {seconds}, {report['bytes']:,} bytes")
    good = all(r["exact_match"] >= REQUIRED and r["shown_right"] for r in results.values())
    return 0 if good else 1


def train_all(out: Path) -> dict[str, object]:
    """Train and write the base, each adapter on it, and the heads of all. Return their part of the report."""
    started = time.monotonic()
    for part in ("base", "adapters", "heads"):
        shutil.rmtree(out / part, ignore_errors=True)
    train_base(out / "base")
    for voice in VOICES:
        train_adapter(voice, out / "base", out / "adapters" / voice)
    times = {"train_seconds": round(time.monotonic() - started), "cpu_seconds": round(time.process_time())}
    return times | {"seed": SEED} | train_all_heads(out)


if __name__ == "__main__":
    sys.exit(main())
