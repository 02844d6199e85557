"""Whole steps of a model with random weights, run on a GPU as by the engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_timing import DTYPE, Bench, Line
from torch import Tensor

from descant.contract.plan import NO_ADAPTER, AdapterSpan, Admit, Row, pack_ints
from descant.engine.batch import EngineRow, ForwardBatch, PendingTokens
from descant.engine.decoder import Decoder
from descant.engine.draws import draw_later
from descant.engine.graphs import DecodeGraphs, StaticBatch
from descant.engine.kv_cache import KVCache
from descant.engine.rotary import rope_tables
from descant.engine.weights import DecoderWeights, LayerWeights
from descant.model.arch import lora_modules
from descant.versions.extent import extent_offsets
from descant_client.protocol import SamplingParams
from descant_kernels import LoraTables, Segments, pack_linear

BLOCK_SIZE, RANK = 16, 16


class Model:
    """A model with random weights, its cache, and adapters of rank `RANK` in every module."""

    def __init__(self, bench: Bench, num_blocks: int, num_adapters: int, max_rows: int) -> None:
        config = self.config = bench.config
        device = self.device = bench.device
        self._weights = random_weights(bench)
        cache = KVCache(config, num_blocks, BLOCK_SIZE, DTYPE, device)
        max_context = config.max_context
        self._decoder = Decoder(config, self._weights, cache, rope_tables(config, max_context, device))
        modules = lora_modules(config)
        ranks = [RANK] * (len(modules) - 1) + [0]  # no adapter for the head
        starts = extent_offsets(ranks, modules)
        self.adapter_bytes = starts[-1] * DTYPE.itemsize
        arena = bench.randn(num_adapters * starts[-1], std=0.01)
        offsets = [[slot * starts[-1] + start for start in starts[:-1]] for slot in range(num_adapters)]
        self._lora = LoraTables.of(arena, offsets, [ranks] * num_adapters)
        self._pending = PendingTokens(2, max_rows, device)
        static = StaticBatch(max_rows, -(-max_context // BLOCK_SIZE), device)
        hidden = torch.zeros(max_rows, config.hidden_size, dtype=DTYPE, device=device)
        forward, lora = self._decoder.forward, self._lora
        self._graphs = DecodeGraphs(forward, static, self._pending, hidden, lora, max_context, bench.capture)

    def batch(self, num_new: int, context: int, slots: list[int]) -> ForwardBatch:
        """Return a step of one row per adapter slot, of `context` tokens each, the last `num_new` of them new."""
        num_blocks = -(-context // BLOCK_SIZE)
        rows: list[tuple[EngineRow, Row]] = []
        for row, slot in enumerate(slots):
            blocks = pack_ints(range(row * num_blocks, (row + 1) * num_blocks))
            ids = pack_ints([(7 * row + position) % self.config.vocab_size for position in range(context)])
            admit = Admit(row, ids, context, context - num_new, blocks, SamplingParams(), seed=row)
            rows.append((EngineRow(admit), Row(row, num_new, (AdapterSpan(0, slot),))))
        return ForwardBatch.of(rows, BLOCK_SIZE, torch.device("cpu"))

    def replayed(self, batch: ForwardBatch) -> None:
        """Run a decode step by graph, with sampling."""
        self._sample(batch, *self._graphs.forward(batch, self._lora))

    def launched(self, batch: ForwardBatch) -> None:
        """Run any step kernel by kernel, with sampling."""
        on_device = batch.to(self.device)
        hidden = self._decoder.forward(on_device, self._lora)
        self._sample(batch, hidden[on_device.sampled_tokens], on_device.sampled_segments)

    def floor(self, bench: Bench, batch: ForwardBatch) -> float:
        """Return the least seconds of a step: weights, visible keys and values, and used adapters are read once."""
        config, num_tokens = self.config, len(batch.input_ids)
        num_weights = self._weights.num_parameters - config.vocab_size * config.hidden_size  # read by rows
        seen = sum(batch.attention.host_context_lens)
        num_bytes = DTYPE.itemsize * (num_weights + 2 * seen * config.num_layers * config.kv_size)
        num_adapter_bytes = len(batch.segments.host_slots) * self.adapter_bytes
        num_layer_weights = num_weights - config.vocab_size * config.hidden_size
        num_flops = 2.0 * (num_tokens * num_layer_weights + len(batch.rows) * config.vocab_size * config.hidden_size)
        num_flops += sum(4.0 * config.num_layers * config.q_size * pairs_seen(row.start, row.end) for row in batch.rows)
        return bench.floor(num_bytes + num_adapter_bytes, num_flops)

    def _sample(self, batch: ForwardBatch, hidden: Tensor, segments: Segments) -> None:
        logits = self._decoder.logits(hidden, segments, self._lora)
        draw_later(logits, [row.state.sampling_row() for row in batch.sampled_rows], self._pending.put)


def pairs_seen(start: int, end: int) -> float:
    """Return the number of pairs of a query and a visible key, for queries at positions `start` to `end`."""
    return (end - start) * (start + end + 1) / 2


def random_weights(bench: Bench) -> DecoderWeights:
    """Return random weights, made on the device."""
    config, hidden, inner = bench.config, bench.config.hidden_size, bench.config.intermediate_size
    shapes = (
        (config.q_size + 2 * config.kv_size, hidden),
        (hidden, config.q_size),
        (2 * inner, hidden),
        (hidden, inner),
    )
    ones = torch.ones(hidden, device=bench.device, dtype=DTYPE)
    layers = []
    for _ in range(config.num_layers):
        qkv, o, gate_up, down = (pack_linear(bench.randn(*shape, std=0.02)) for shape in shapes)
        layers.append(LayerWeights(ones, qkv, None, None, o, ones, gate_up, down))
    embedding, head = (bench.randn(config.vocab_size, hidden, std=0.02) for _ in "eh")
    num_parameters = config.num_layers * sum(out * size for out, size in shapes) + 2 * head.numel()
    return DecoderWeights(embedding, tuple(layers), ones, pack_linear(head), num_parameters)


def steps(bench: Bench, max_rows: int = 32, context: int = 512, num_prompt: int = 2048) -> Iterator[Line]:
    """Measure decode steps at batch 1 and `max_rows`, and a prefill, with and without adapters."""
    num_blocks = max(max_rows * -(-context // BLOCK_SIZE), -(-num_prompt // BLOCK_SIZE))
    model = Model(bench, num_blocks, max_rows, max_rows)
    base_s = 0.0
    for num_rows in (1, max_rows):
        kinds = {"base": [NO_ADAPTER] * num_rows, "1 adapter": [0] * num_rows}
        if num_rows > 1:
            kinds[f"{num_rows} adapters"] = list(range(num_rows))
        for kind, slots in kinds.items():
            batch = model.batch(1, context, slots)
            seconds, floor_s = bench.time_steps(lambda: model.replayed(batch)), model.floor(bench, batch)  # noqa: B023
            base_s = seconds if kind == "base" else base_s
            aim, reached = "≥ 80 % of floor", f"{floor_s / seconds:.0%}"
            if kind != "base":
                aim, reached = f"≤ {1.05 if kind == '1 adapter' else 1.25}× base", f"{seconds / base_s:.2f}×"
            plain_s = {"no graph": bench.time_steps(lambda: model.launched(batch))}  # noqa: B023 — called at once
            yield Line(f"decode, batch {num_rows}, {kind}, context {context}", seconds, floor_s, plain_s, aim, reached)
    for kind, slot in (("base", NO_ADAPTER), ("1 adapter", 0)):
        batch = model.batch(num_prompt, num_prompt, [slot])
        seconds, floor_s = bench.time_steps(lambda: model.launched(batch)), model.floor(bench, batch)  # noqa: B023
        aim, reached = ("", "") if kind == "base" else ("≤ 1.08× base", f"{seconds / base_s:.2f}×")
        base_s = seconds if kind == "base" else base_s
        yield Line(f"prefill, {num_prompt} tokens, {kind}", seconds, floor_s, {}, aim, reached)


# ---- clocks: CUDA events, so none of this runs without a device ---------------------------------------------------
