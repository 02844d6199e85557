"""The engine: it carries out step plans. One thread, no asyncio; whoever owns it decides when."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from descant.engine.arch import DecoderConfig, from_hf, lora_modules
from descant.engine.arena import Arena, StagedVersion
from descant.engine.batch import EngineRow, ForwardBatch, ScheduledRow
from descant.engine.checkpoint import ProgressCallback
from descant.engine.decoder import Decoder
from descant.engine.interface import EngineInfo, EngineOptions, check_plan
from descant.engine.kv_cache import KVCache, blocks_within
from descant.engine.rotary import rope_tables
from descant.engine.sampling import NOT_FINITE, SampledToken, Sampler
from descant.engine.weights import load_weights
from descant.scheduling.plan import (
    EngineLimits,
    LogprobRows,
    Row,
    RowResult,
    StepPlan,
    StepResult,
    pack_ints,
    unpack_ints,
)
from descant_kernels import Segments, probe_invariance

_SMALL_PRODUCT = 1 << 20  # weights of one projection
_SCORED_AT_ONCE = 256  # prompt positions whose logits are in memory together


class Engine:
    """A model, its cache, its adapters and its rows."""

    def __init__(
        self,
        model_dir: Path | str,
        options: EngineOptions,
        on_progress: ProgressCallback = lambda fraction: None,
    ) -> None:
        """Load a model. `on_progress` hears the fraction of its tensors that are read.

        Raises:
            ModelInvalid: the directory holds no model this engine can serve exactly.
            ConfigInvalid: `num_kv_bytes` does not hold one block.
        """
        self.config: DecoderConfig = from_hf(model_dir)
        torch.set_num_threads(options.num_threads or _default_num_threads(self.config))
        self._options = options
        self._dtype: torch.dtype = getattr(torch, options.dtype or self.config.dtype)
        self._device = torch.device(options.device)
        weights = load_weights(model_dir, self.config, self._dtype, self._device, on_progress)
        self._cache = self._new_cache()
        max_context = min(self.config.max_context, self._cache.num_blocks * options.block_size)
        tables = rope_tables(self.config, max_context, self._device)
        self._decoder = Decoder(self.config, weights, self._cache, tables)
        self._arena = Arena(
            lora_modules(self.config), options.num_adapter_slots, options.num_adapter_bytes, self._dtype, self._device
        )
        self._sampler = Sampler(self.config.vocab_size, self._device)
        self._rows: dict[int, EngineRow] = {}
        self._epoch = 0
        self.limits = EngineLimits(
            num_blocks=self._cache.num_blocks,
            block_size=options.block_size,
            max_context=max_context,
            vocab_size=self.config.vocab_size,
            num_adapter_slots=options.num_adapter_slots,
        )
        self.info = EngineInfo(
            dtype=options.dtype or self.config.dtype,
            device=options.device,
            eos_token_ids=self.config.eos_token_ids,
            num_parameters=weights.num_parameters,
            num_adapter_bytes=self._arena.num_bytes,
            is_invariant=options.probe and self._probe(),
        )

    def stage_adapter(self, path: Path | str) -> StagedVersion:
        """Read, verify and lay out the version stored at `path` on the host; any thread may, beside a step.

        Raises:
            AdapterInvalid: the file is missing, damaged or made for another base.
        """
        return self._arena.stage(path)

    def place_adapter(self, adapter_slot: int, offset: int, staged: StagedVersion) -> None:
        """Copy a staged version into the arena at `offset` bytes and put it in a slot."""
        self._arena.commit(adapter_slot, offset, staged)

    def move_adapter(self, adapter_slot: int, offset: int) -> None:
        """Move the version in a slot to `offset` bytes; the two extents may overlap."""
        self._arena.move(adapter_slot, offset)

    def load_adapter(self, adapter_slot: int, offset: int, path: Path | str) -> None:
        """Stage and place a version in one call.

        Raises:
            AdapterInvalid: as `stage_adapter`; the slot is empty then.
        """
        self._arena.load(adapter_slot, offset, path)

    def unload_adapter(self, adapter_slot: int) -> None:
        """Empty a slot; its extent may be overwritten from now on."""
        self._arena.unload(adapter_slot)

    def step(self, plan: StepPlan) -> StepResult:
        """Carry out a plan. What goes wrong with one row alone is an error in its result.

        Raises:
            InvalidRequest: the plan contradicts itself, the limits or the rows; nothing of it was carried out.
            UnsupportedRequest: it uses what this engine does not do yet; likewise.
        """
        started = time.perf_counter()
        if plan.epoch != self._epoch:  # another scheduler, which knows nothing of the rows before
            self._rows.clear()
            self._epoch = plan.epoch
        check_plan(plan, self.limits, self._rows, self._options.max_num_batched_tokens)
        self._apply_changes(plan)
        results = self._compute([(self._rows[row.row], row) for row in plan.rows]) if plan.rows else {}
        device_s = time.perf_counter() - started
        return StepResult(plan.epoch, plan.step, tuple(results[row.row] for row in plan.rows), device_s)

    def _new_cache(self) -> KVCache:
        options = self._options
        num_blocks = options.num_blocks
        if num_blocks is None:
            num_blocks = blocks_within(options.num_kv_bytes, self.config, options.block_size, self._dtype)
        return KVCache(self.config, num_blocks, options.block_size, self._dtype, self._device)

    def _probe(self) -> bool:
        if self._device.type != "cpu":
            return False
        config = self.config
        shapes = (
            (config.hidden_size, config.q_size + 2 * config.kv_size),
            (config.q_size, config.hidden_size),
            (config.hidden_size, 2 * config.intermediate_size),
            (config.intermediate_size, config.hidden_size),
        )
        return probe_invariance(self._dtype, shapes).ok

    # ---- before the forward pass ----

    def _apply_changes(self, plan: StepPlan) -> None:
        for row in unpack_ints(plan.drop):
            self._rows.pop(row, None)
        if plan.copy_blocks:
            pairs = torch.tensor(unpack_ints(plan.copy_blocks), dtype=torch.int64).reshape(-1, 2)
            self._cache.copy_blocks(pairs.to(self._device))
        for admit in plan.admit:
            self._rows[admit.row] = EngineRow(admit)
        for row in plan.rows:
            self._rows[row.row].append_blocks(row.blocks)

    # ---- the forward pass and after ----

    @torch.inference_mode()
    def _compute(self, rows: list[tuple[EngineRow, Row]]) -> dict[int, RowResult]:
        lora = self._arena.tables()
        batch = ForwardBatch.of(rows, self.limits.block_size, self._device)
        hidden = self._decoder.forward(batch, lora)  # [T, H]
        scores = {row.state.row: self._score_prompt(row, hidden) for row in batch.rows if row.num_scored}
        sampled: dict[int, SampledToken] = {}
        if batch.sampled_rows:
            logits = self._decoder.logits(hidden[batch.sampled_tokens], batch.sampled_segments, lora)  # [N, V]
            drawn = self._sampler.sample(logits, [row.state.sampling_row() for row in batch.sampled_rows])
            sampled = {row.state.row: token for row, token in zip(batch.sampled_rows, drawn, strict=True)}
        return {
            row.state.row: _finish(row, sampled.get(row.state.row), scores.get(row.state.row)) for row in batch.rows
        }

    def _score_prompt(self, row: ScheduledRow, hidden: Tensor) -> LogprobRows:
        """Log-probabilities of the prompt tokens that follow the row's computed positions."""
        parts = []
        for first in range(0, row.num_scored, _SCORED_AT_ONCE):
            count = min(_SCORED_AT_ONCE, row.num_scored - first)
            begin = row.first_token + first
            segments = Segments.of([count], [row.adapter_slot], self._device)
            logits = self._decoder.logits(hidden[begin : begin + count], segments, self._arena.tables())
            targets = row.state.tokens(row.start + first + 1, row.start + first + 1 + count)
            parts.append(self._sampler.logprob_rows(logits, torch.from_numpy(targets), row.planned.num_prompt_logprobs))
        return _concatenated(parts)


def _finish(row: ScheduledRow, sampled: SampledToken | None, prompt_logprobs: LogprobRows | None) -> RowResult:
    """Note in the row's state what was computed, and report it."""
    row.state.num_computed = row.end
    if prompt_logprobs is not None and not _is_finite(prompt_logprobs):
        return RowResult(row.state.row, row.end, error=NOT_FINITE)
    if sampled is None:
        return RowResult(row.state.row, row.end, prompt_logprobs=prompt_logprobs)
    if sampled.error is not None:
        return RowResult(row.state.row, row.end, prompt_logprobs=prompt_logprobs, error=sampled.error)
    row.state.append_token(sampled.token_id)
    token_ids = pack_ints([sampled.token_id])
    return RowResult(row.state.row, row.end, token_ids, sampled.logprobs, prompt_logprobs)


def _is_finite(logprobs: LogprobRows) -> bool:
    return all(
        bool(np.isfinite(np.frombuffer(packed, dtype="<f4")).all()) for packed in (logprobs.chosen, logprobs.top)
    )


def _concatenated(parts: list[LogprobRows]) -> LogprobRows:
    return LogprobRows(
        num_tokens=sum(part.num_tokens for part in parts),
        num_top=parts[0].num_top,
        chosen=b"".join(part.chosen for part in parts),
        top_ids=b"".join(part.top_ids for part in parts),
        top=b"".join(part.top for part in parts),
    )


def _default_num_threads(config: DecoderConfig) -> int:
    """One thread where a step's products are too small to share: waking the others would cost more than it saves."""
    return 1 if config.hidden_size * config.intermediate_size < _SMALL_PRODUCT else torch.get_num_threads()
