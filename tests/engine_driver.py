"""Runs sequences through an engine by hand-made plans: a scheduler of the simplest kind, that also watches logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from descant.contract.engine import EngineOptions
from descant.contract.plan import (
    NO_ADAPTER,
    NO_LOGPROBS,
    AdapterSpan,
    Admit,
    Row,
    RowResult,
    StepPlan,
    pack_ints,
    unpack_ints,
)
from descant.engine.batch import ForwardBatch
from descant.engine.runner import Engine
from descant_client.protocol import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Voice:
    """One sequence: what is asked for, and what came of it."""

    prompt: list[int]
    max_tokens: int = 16
    adapter_slot: int = NO_ADAPTER
    sampling: SamplingParams = GREEDY
    seed: int = 0
    num_logprobs: int = NO_LOGPROBS
    num_prompt_logprobs: int = NO_LOGPROBS
    chunk: int = 10_000  # most prompt tokens computed in one step
    first_step: int = 0  # joins the batch at this step
    output: list[int] = field(default_factory=list)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # position -> [V]
    results: list[RowResult] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Prompt and output so far."""
        return self.prompt + self.output


class Driver:
    """Steps an engine. Every sequence gets all its blocks on admission, in the order of `block_order`."""

    def __init__(self, engine: Engine, block_order: Callable[[list[int]], list[int]] = lambda blocks: blocks) -> None:
        self.engine = engine
        self.num_steps = 0
        self._free = block_order(list(range(engine.limits.num_blocks)))
        self._voices: dict[int, Voice] = {}
        self._blocks: dict[int, list[int]] = {}
        self._watch()

    def run(self, voices: Sequence[Voice], watched: Voice | None = None) -> Sequence[Voice]:
        """Generate until every voice has its tokens, or until `watched` has them."""
        waiting = list(enumerate(voices))
        computed: dict[int, int] = {}
        start, is_over = self.num_steps, False
        while waiting or computed:
            joining = [pair for pair in waiting if pair[1].first_step <= self.num_steps - start]
            waiting = [pair for pair in waiting if pair not in joining]
            computed |= {row: 0 for row, _ in joining}
            results = self.step([self.admit(row, voice) for row, voice in joining], self._plan_rows(computed))
            for result in results:
                computed[result.row] = result.num_computed
                if result.error or len(self._voices[result.row].output) >= self._voices[result.row].max_tokens:
                    is_over = is_over or self._voices[result.row] is watched
                    del computed[result.row]
                    self.drop(result.row)
            if is_over:
                for row in computed:
                    self.drop(row)
                break
        return voices

    def admit(self, row: int, voice: Voice) -> Admit:
        """The plan's entry that makes a row of a voice, from its prompt and what it has already said."""
        num_blocks = -(-(len(voice.prompt) + voice.max_tokens) // self.engine.limits.block_size)
        self._blocks[row] = [self._free.pop(0) for _ in range(num_blocks)]
        self._voices[row] = voice
        return Admit(
            row=row,
            token_ids=pack_ints(voice.tokens),
            num_prompt_tokens=len(voice.prompt),
            num_cached_tokens=0,
            blocks=pack_ints(self._blocks[row]),
            sampling=voice.sampling,
            seed=voice.seed,
            num_logprobs=voice.num_logprobs,
        )

    def drop(self, row: int) -> None:
        """Give a row's blocks back."""
        self._free = self._blocks.pop(row) + self._free
        del self._voices[row]

    def step(self, admit: Sequence[Admit], rows: Sequence[Row]) -> tuple[RowResult, ...]:
        """One step; outputs and results are noted in the voices."""
        result = self.engine.step(StepPlan(epoch=0, step=self.num_steps, admit=tuple(admit), rows=tuple(rows)))
        self.num_steps += 1
        for row in result.rows:
            self._voices[row.row].results.append(row)
            self._voices[row.row].output += unpack_ints(row.token_ids)
        return result.rows

    def row(self, row: int, num_new_tokens: int) -> Row:
        """The plan's entry that computes more of a row."""
        voice = self._voices[row]
        spans = (AdapterSpan(0, voice.adapter_slot),)
        return Row(row, num_new_tokens, spans, num_prompt_logprobs=voice.num_prompt_logprobs)

    def _plan_rows(self, computed: dict[int, int]) -> list[Row]:
        return [
            self.row(row, min(len(self._voices[row].tokens) - done, self._voices[row].chunk))
            for row, done in computed.items()
        ]

    def _watch(self) -> None:
        """Note the logits of every position that the decoder computes, and of those that are sampled once more."""
        decoder = self.engine._decoder

        def watched(batch: ForwardBatch, lora: object) -> torch.Tensor:
            hidden = type(decoder).forward(decoder, batch, lora)  # type: ignore[arg-type]
            logits = decoder.logits(hidden, batch.segments, lora)  # type: ignore[arg-type]
            for row in batch.rows:
                own = logits[row.first_token : row.first_token + row.end - row.start]
                self._voices[row.state.row].logits |= dict(zip(range(row.start, row.end), own, strict=True))
            return hidden

        decoder.forward = watched  # type: ignore[method-assign]


def engine_for(model_dir: Path, **options: object) -> Engine:
    """An engine with room for tests, on one thread."""
    defaults = {
        "num_blocks": 256,
        "num_adapter_slots": 8,
        "num_adapter_bytes": 2**20,
        "num_threads": 1,
        "is_invariant": False,
    }
    return Engine(model_dir, EngineOptions(**defaults | options))  # type: ignore[arg-type]
