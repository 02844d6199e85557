"""The engine, which carries out step plans. It runs on one thread, without asyncio, when its owner calls it.

On a CPU a step is done when `launch` returns. On a GPU it is only queued then, so that the next step can be laid out
while it runs: a row's newest token is *pending*, known to the device alone, until its step is resolved. Steps with
penalties or filters are sampled with the host: they resolve all earlier steps and block. Drafts are verified only where
no step is queued.

All code specific to GPUs is in `graphs`, `uploads` and `memory`. Their docstrings list the parts that have never run
on one.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from descant.contract.engine import EngineInfo, EngineOptions, check_plan
from descant.contract.plan import EngineLimits, LogprobRows, StepPlan, StepResult, unpack_ints
from descant.engine.arena import Arena, StagedVersion
from descant.engine.batch import EngineRow, ForwardBatch, PendingTokens, ScheduledRow
from descant.engine.decoder import Decoder
from descant.engine.draws import Draw, KnownDraw, draw_later
from descant.engine.graphs import MAX_GRAPH_ROWS, Capture, CudaCapture, DecodeGraphs, StaticBatch
from descant.engine.heads import propose
from descant.engine.kv_cache import KVCache, blocks_within
from descant.engine.memory import memory_shares
from descant.engine.rotary import rope_tables
from descant.engine.row_results import concatenated, row_result
from descant.engine.sampling import Sampler
from descant.engine.tree import Accepted, accept
from descant.engine.weights import load_weights
from descant.model.arch import DecoderConfig, from_hf, lora_modules
from descant.model.checkpoint import ProgressCallback
from descant_client.errors import InvalidRequest
from descant_kernels import LoraTables, Segments, probe_invariance

_CPU = torch.device("cpu")
_SMALL_PRODUCT = 1 << 20  # weights of one projection below which one thread is used
_MAX_DRAFT_NODES = 64  # of one row
_MAX_SCORED_ROWS = 256  # prompt positions with logits in memory at once


@dataclass(slots=True, eq=False)
class _StepInFlight:
    """A launched step. `result` is None until it is resolved."""

    plan: StepPlan
    started_s: float
    rows: tuple[ScheduledRow, ...]
    sampled_rows: tuple[ScheduledRow, ...]
    draw: Draw  # of the sampled rows
    prompt_logprobs: dict[int, LogprobRows]
    hidden: Tensor | None = None  # [nodes of the sampled rows, H]; None if no draft heads run
    result: StepResult | None = None


class Engine:
    """An engine for one model: its weights, KV cache, adapter arena and rows."""

    def __init__(
        self,
        model_dir: Path | str,
        options: EngineOptions,
        on_progress: ProgressCallback = lambda fraction: None,
    ) -> None:
        """Load a model. `on_progress` is called with the fraction of its tensors that are read.

        Raises:
            ModelInvalid: the directory holds no model that this engine can serve exactly.
            ConfigInvalid: `num_kv_bytes` does not hold one block, or the device lacks memory for the given sizes.
        """
        self.config: DecoderConfig = from_hf(model_dir)
        torch.set_num_threads(options.num_threads or _default_num_threads(self.config))
        self._options = options
        self._dtype: torch.dtype = getattr(torch, options.dtype or self.config.dtype)
        self._device = torch.device(options.device)
        weights = load_weights(model_dir, self.config, self._dtype, self._device, on_progress)
        shares = memory_shares(options, self.config, weights, self._dtype, self._device)
        self._cache = self._new_cache(shares.num_kv_bytes)
        max_context = min(self.config.max_context, self._cache.num_blocks * options.block_size)
        tables = rope_tables(self.config, max_context, self._device)
        self._decoder = Decoder(self.config, weights, self._cache, tables)
        self._arena = Arena(
            lora_modules(self.config), options.num_adapter_slots, shares.num_adapter_bytes, self._dtype, self._device
        )
        self._sampler = Sampler(self.config.vocab_size, self._device)
        self._rows: dict[int, EngineRow] = {}
        self._epoch = 0
        self._in_flight: deque[_StepInFlight] = deque()
        self._last_end_s = 0.0  # time at which the last resolved step was done
        self._draws_later = self._device.type == "cuda"
        self._pending = PendingTokens(options.pipeline_depth, options.max_num_batched_tokens, self._device)
        self.limits = EngineLimits(
            num_blocks=self._cache.num_blocks,
            block_size=options.block_size,
            max_context=max_context,
            vocab_size=self.config.vocab_size,
            num_adapter_slots=options.num_adapter_slots,
            max_steps_in_flight=options.pipeline_depth,
            max_draft_nodes=_MAX_DRAFT_NODES if options.pipeline_depth == 1 else 0,
        )
        self._graphs = self._new_graphs(CudaCapture(self._device)) if self._device.type == "cuda" else None
        self.info = self._new_info(weights.num_parameters)

    def stage_adapter(self, path: Path | str) -> StagedVersion:
        """Read, verify and lay out the version stored at `path` on the host. Any thread may call this during a step.

        Raises:
            AdapterInvalid: the file is missing, damaged or made for another base.
        """
        return self._arena.stage(path)

    def place_adapter(self, adapter_slot: int, offset: int, staged: StagedVersion) -> None:
        """Copy a staged version into the arena at `offset` bytes and put it in a slot."""
        self._arena.commit(adapter_slot, offset, staged)

    def move_adapter(self, adapter_slot: int, offset: int) -> None:
        """Move the version in a slot to `offset` bytes. Old and new extent may overlap."""
        self._arena.move(adapter_slot, offset)

    def load_adapter(self, adapter_slot: int, offset: int, path: Path | str) -> None:
        """Stage and place a version in one call.

        Raises:
            AdapterInvalid: as `stage_adapter`. The slot is then empty.
        """
        self._arena.load(adapter_slot, offset, path)

    def unload_adapter(self, adapter_slot: int) -> None:
        """Empty a slot. From then on its extent may be overwritten."""
        self._arena.unload(adapter_slot)

    def step(self, plan: StepPlan) -> StepResult:
        """Carry out a plan: `launch` and `collect` in one. No step may be in flight.

        Raises:
            InvalidRequest, UnsupportedRequest: as `launch`.
        """
        assert not self._in_flight, "launched steps are collected first"
        self.launch(plan)
        return self.collect()

    def launch(self, plan: StepPlan) -> None:
        """Start a step; on a CPU, complete it. A failure of one row alone becomes an error in its result.

        Raises:
            InvalidRequest: the plan contradicts itself, the limits, or the rows as earlier launched steps will leave
                them. Nothing of it was carried out.
            UnsupportedRequest: it uses a feature that this engine does not implement. Nothing of it was carried out.
        """
        started_s = time.perf_counter()
        assert len(self._in_flight) < self.limits.max_steps_in_flight, "the oldest step is collected first"
        if plan.epoch != self._epoch:  # a new scheduler, which does not know the existing rows
            self._rows.clear()
            self._epoch = plan.epoch
        check_plan(plan, self.limits, self._rows, self._options.max_num_batched_tokens)
        for row in plan.rows:
            if row.num_candidates and self._arena.heads(row.heads_slot) is None:
                raise InvalidRequest(f"rows[{row.row}]", f"there are no draft heads in slot {row.heads_slot}")
        self._apply_changes(plan)
        self._in_flight.append(self._start(plan, started_s))

    def block_until_done(self) -> None:
        """Block until the oldest launched step, if any, is done. One other thread may call this at any time."""
        for step in tuple(self._in_flight)[:1]:
            step.draw.block_until_known()

    def collect(self) -> StepResult:
        """Return the result of the oldest launched step. Blocks until it is done."""
        step = self._in_flight.popleft()
        return step.result or self._resolve(step)

    def _new_cache(self, num_bytes: int) -> KVCache:
        options = self._options
        num_blocks = options.num_blocks
        if num_blocks is None:
            num_blocks = blocks_within(num_bytes, self.config, options.block_size, self._dtype)
        return KVCache(self.config, num_blocks, options.block_size, self._dtype, self._device)

    def _new_graphs(self, capture: Capture) -> DecodeGraphs:
        max_rows, limits = min(MAX_GRAPH_ROWS, self._options.max_num_batched_tokens), self.limits
        static = StaticBatch(max_rows, -(-limits.max_context // limits.block_size), self._device)
        hidden = torch.zeros(max_rows, self.config.hidden_size, dtype=self._dtype, device=self._device)
        lora, forward = self._arena.tables(), self._decoder.forward
        graphs = DecodeGraphs(forward, static, self._pending, hidden, lora, limits.max_context, capture)
        graphs.capture_short()
        return graphs

    def _new_info(self, num_parameters: int) -> EngineInfo:
        return EngineInfo(
            dtype=self._options.dtype or self.config.dtype,
            device=self._options.device,
            eos_token_ids=self.config.eos_token_ids,
            num_parameters=num_parameters,
            num_adapter_bytes=self._arena.num_bytes,
            num_threads=torch.get_num_threads(),
            is_invariant=self._probe() if self._options.is_invariant is None else self._options.is_invariant,
        )

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
        for admit in plan.admit:
            self._rows[admit.row] = EngineRow(admit)
        for row in plan.rows:
            self._rows[row.row].append_blocks(row.blocks)

    # ---- the forward pass and after ----

    @torch.inference_mode()
    def _start(self, plan: StepPlan, started_s: float) -> _StepInFlight:
        """Compute a step, or queue it on the device, and update its rows to their state after the step."""
        if not plan.rows:
            step = _StepInFlight(plan, started_s, (), (), KnownDraw([]), {})
            self._resolve(step)
            return step
        rows = [(self._rows[row.row], row) for row in plan.rows]
        batch = ForwardBatch.of(rows, self.limits.block_size, _CPU)
        lora, heads_slots = self._arena.tables(), [row.heads_slot for row in plan.rows if row.num_candidates]
        slots = (*batch.segments.host_slots, *heads_slots)
        self._arena.begin_use(slots)
        hidden, segments, prompt_logprobs = self._forward(batch, lora)
        draw: Draw = KnownDraw([])
        if batch.sampled_rows:
            draw = self._draw(self._decoder.logits(hidden, segments, lora), batch.sampled_rows)
        self._arena.end_use(slots)
        step = _StepInFlight(
            plan, started_s, batch.rows, batch.sampled_rows, draw, prompt_logprobs, hidden if heads_slots else None
        )
        for row in batch.rows:
            row.state.num_computed = row.end
        if draw.is_known:
            self._resolve(step)
            return step
        for row, source in zip(batch.sampled_rows, draw.sources, strict=True):
            row.state.append_pending(source)
        return step

    def _forward(self, batch: ForwardBatch, lora: LoraTables) -> tuple[Tensor, Segments, dict[int, LogprobRows]]:
        """Return hidden states of the sampled rows, `[N, H]`, the segments over them, and prompt log-probabilities."""
        if self._graphs is not None and self._graphs.accepts(batch, lora):
            return *self._graphs.forward(batch, lora), {}
        batch = batch.to(self._device)
        if batch.sources is not None:
            batch = replace(batch, input_ids=self._pending.fill_in(batch.input_ids, batch.sources))
        hidden = self._decoder.forward(batch, lora)  # [T, H]
        scores = {row.state.row: self._score_prompt(row, hidden) for row in batch.rows if row.num_scored}
        return hidden[batch.sampled_tokens], batch.sampled_segments, scores

    def _draw(self, logits: Tensor, rows: tuple[ScheduledRow, ...]) -> Draw:
        """Sample `logits`, `[N, V]`: without the host if the device is a GPU and no row needs the host."""
        nodes = [node for row in rows for node in row.sampling_rows()]
        if self._draws_later and not any(node.needs_host for node in nodes):
            return draw_later(logits, nodes, self._pending.put)
        for step in self._in_flight:  # in order, because a row lost in an earlier step stays lost
            if step.result is None:
                self._resolve(step)
        return KnownDraw(self._sampler.sample(logits, nodes))

    def _resolve(self, step: _StepInFlight) -> StepResult:
        """Block until a step is done, store its tokens in its rows, and return its result."""
        rows = step.sampled_rows
        walks = accept([row.tree for row in rows], step.draw.tokens()) if rows else []
        self._move_accepted(rows, walks)
        accepted = {row.state.row: walk for row, walk in zip(rows, walks, strict=True)}
        candidates = {} if step.hidden is None else propose(rows, walks, step.hidden, self._arena, self._logits)
        by_row = {row.state.row: row for row in step.rows}
        results = {
            key: row_result(row, accepted.get(key), step.prompt_logprobs.get(key), candidates.get(key))
            for key, row in by_row.items()
        }
        ended_s = time.perf_counter()
        device_s = ended_s - max(step.started_s, self._last_end_s)  # a queued step begins when the previous one ends
        self._last_end_s = ended_s
        row_results = tuple(results[row.row] for row in step.plan.rows)
        step.result = StepResult(step.plan.epoch, step.plan.step, row_results, device_s)
        return step.result

    def _move_accepted(self, rows: tuple[ScheduledRow, ...], walks: list[Accepted]) -> None:
        """Move the K/V of accepted nodes to the positions that plain decode would have used."""
        block_size, pairs = self.limits.block_size, list[tuple[int, int]]()
        for row, walk in zip(rows, walks, strict=True):
            moves = [
                (row.end - 1 + node, row.end - 1 + depth) for depth, node in enumerate(walk.nodes) if node != depth
            ]
            pairs += [tuple(_slot(row.state, position, block_size) for position in move) for move in moves]
        if pairs:
            self._cache.move_slots(torch.tensor(pairs))

    def _score_prompt(self, row: ScheduledRow, hidden: Tensor) -> LogprobRows:
        """Return log-probabilities of the prompt tokens that follow the row's computed positions."""
        parts = []
        for first in range(0, row.num_scored, _MAX_SCORED_ROWS):
            count = min(_MAX_SCORED_ROWS, row.num_scored - first)
            begin = row.first_token + first
            logits = self._logits(hidden[begin : begin + count], row.adapter_slot)
            targets = row.state.tokens(row.start + first + 1, row.start + first + 1 + count)
            parts.append(self._sampler.logprob_rows(logits, torch.from_numpy(targets), row.planned.num_prompt_logprobs))
        return concatenated(parts)

    def _logits(self, hidden: Tensor, adapter_slot: int) -> Tensor:
        """Return logits, `[N, V]`, of hidden states, `[N, H]`, all with one adapter or none."""
        segments = Segments.of([len(hidden)], [adapter_slot], self._device)
        return self._decoder.logits(hidden, segments, self._arena.tables())


def _slot(state: EngineRow, position: int, block_size: int) -> int:
    return int(state.blocks[position // block_size]) * block_size + position % block_size


def _default_num_threads(config: DecoderConfig) -> int:
    """Return 1 if a step's products are too small to share: waking other threads would cost more than it saves."""
    return 1 if config.hidden_size * config.intermediate_size < _SMALL_PRODUCT else torch.get_num_threads()
