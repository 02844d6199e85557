"""Decode steps as CUDA graphs: one graph per number of rows and kind, replayed on the current content of its inputs.

A graph reads tensors at fixed addresses, so a step is copied into a *static batch*. It is padded with rows that read
position 0 of block 0 and write nothing. The offset and rank tables of the arena have fixed addresses too, so adapters
are loaded, unloaded and moved without a new capture. There are two kinds, with LoRA and without, so LoRA costs nothing
in a batch without adapters. Kernel launchers run only during a capture, where their host integers are upper bounds. The
bound on the context determines grid sizes, so there are graphs for short contexts, captured at start, and for longer
ones, captured on first use.

`CudaCapture` has run in the benchmark on a GPU. The rest is tested on the CPU, with a capture that replays by running
again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from descant.engine.batch import ForwardBatch, PendingTokens, ScheduledRow
from descant.engine.uploads import pack, unpack
from descant_kernels import AttentionBatch, LoraTables, Segments

MAX_GRAPH_ROWS = 256
"""Maximum rows of a graph. Larger batches take long enough on the device to be launched kernel by kernel."""

MAX_GRAPH_RANK = 64
"""Maximum rank in graphs with LoRA. A batch with a higher rank runs without a graph."""

_ROW_STEP = 8
_SHORT_CONTEXT = 2048
_CONTEXT_STEP = 8  # factor between one bound on the context and the next
_WARM_UPS = 2  # runs before a capture, which compile kernels and allocate workspaces

Run = Callable[[], None]


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Return the numbers of rows to capture, in order: 1, 2, 4, multiples of 8, and `max_rows` itself."""
    sizes = {1, 2, 4, *range(_ROW_STEP, max_rows + 1, _ROW_STEP), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))


def graph_contexts(max_context: int) -> tuple[int, ...]:
    """Return the bounds on the context to capture for, in order. The last is `max_context`."""
    bounds, bound = [], _SHORT_CONTEXT
    while bound < max_context:
        bounds.append(bound)
        bound *= _CONTEXT_STEP
    return (*bounds, max_context)


class Capture(Protocol):
    """A way to record work on static tensors so that it can be repeated."""

    def __call__(self, run: Run) -> Run:
        """Return a function that repeats `run` on the same tensors. Capturing may call `run`."""
        ...


class CudaCapture:
    """A capture as CUDA graphs. They share one memory pool, so only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """See `Capture`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may pin memory for adapters and wait for events during the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class _StepTensors(NamedTuple):
    """The tensors that are copied for every step, each with room for N rows."""

    input_ids: Tensor  # [N] int64
    sources: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    slot_mapping: Tensor  # [N] int64
    context_lens: Tensor  # [N] int32
    indptr: Tensor  # [N + 1] int32
    slots: Tensor  # [N] int32
    tiles: Tensor  # [N, 3] int32

    @classmethod
    def padding(cls, max_rows: int) -> _StepTensors:
        """Return CPU tensors in which every row is padding."""
        return cls(
            input_ids=torch.zeros(max_rows, dtype=torch.int64),
            sources=torch.full((max_rows,), -1, dtype=torch.int64),
            positions=torch.zeros(max_rows, dtype=torch.int64),
            slot_mapping=torch.full((max_rows,), -1, dtype=torch.int64),
            context_lens=torch.ones(max_rows, dtype=torch.int32),
            indptr=torch.zeros(max_rows + 1, dtype=torch.int32),
            slots=torch.full((max_rows,), -1, dtype=torch.int32),
            tiles=torch.zeros(max_rows, 3, dtype=torch.int32),  # zero rows of slot 0, which exists
        )


class StaticBatch:
    """A decode batch at fixed addresses, with room for `max_rows` rows of `max_blocks` blocks."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self._device = device
        padding = _StepTensors.padding(max_rows)
        packed, starts = pack(padding)
        self._packed = packed.to(device)  # the step's tensors in one, so that one transfer fills all of them
        self._own = _StepTensors(*unpack(self._packed, starts, padding))
        self._resolved_ids = torch.zeros_like(self._own.input_ids)
        self._cu_seqlens_q = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)

    def fill(self, batch: ForwardBatch, num_rows: int) -> ForwardBatch:
        """Copy in a decode batch from the CPU, ordered with the steps. Return the batch of the first `num_rows` rows.

        Its host integers are exact, for rows and padding.
        """
        count = len(batch.rows)
        assert batch.is_decode, "graphs are for decode batches"
        assert count <= num_rows <= self.max_rows, "the batch fits"
        segments = batch.segments
        is_pinned = self._packed.is_cuda
        self._packed.copy_(pack(self._padded(batch), pin=is_pinned)[0], non_blocking=True)
        tables = batch.attention.block_tables
        tables = tables.pin_memory() if is_pinned else tables
        self._block_tables[:count, : tables.shape[1]] = tables.to(self._device, non_blocking=True)
        padded_lens = (*batch.attention.host_context_lens, *[1] * (num_rows - count))
        padding = num_rows - len(segments.host_slots)
        host_indptr = (*segments.host_indptr, *[segments.host_indptr[-1]] * padding)
        padded = self._view(num_rows, padded_lens, host_indptr, (*segments.host_slots, *[-1] * padding))
        return replace(padded, rows=batch.rows) if segments.has_adapter else _without_tiles(padded, batch.rows)

    def bounds(self, num_rows: int, max_context: int, has_adapter: bool) -> ForwardBatch:
        """Return the batch to capture a graph with: its host integers are the upper bounds."""
        slots = (0,) * num_rows
        bounds = self._view(num_rows, (max_context,) * num_rows, tuple(range(num_rows + 1)), slots)
        return bounds if has_adapter else _without_tiles(bounds, ())

    def resolve_ids(self, pending: PendingTokens) -> None:
        """Fill the pending tokens into the input ids. Runs on the device, as part of every graph."""
        self._resolved_ids.copy_(pending.fill_in(self._own.input_ids, self._own.sources))

    def _padded(self, batch: ForwardBatch) -> _StepTensors:
        """Return a decode batch's tensors on the CPU, padded to `max_rows` rows."""
        values, count, segments = _StepTensors.padding(self.max_rows), len(batch.rows), batch.segments
        values.input_ids[:count] = batch.input_ids
        values.positions[:count] = batch.positions
        values.slot_mapping[:count] = batch.slot_mapping
        values.context_lens[:count] = batch.attention.context_lens
        if batch.sources is not None:
            values.sources[:count] = batch.sources
        values.indptr[: len(segments.indptr)] = segments.indptr
        values.indptr[len(segments.indptr) :] = segments.host_indptr[-1]
        values.slots[: len(segments.slots)] = segments.slots
        values.tiles[: len(segments.tiles)] = segments.tiles
        return values

    def _view(
        self, num_rows: int, context_lens: tuple[int, ...], indptr: tuple[int, ...], slots: tuple[int, ...]
    ) -> ForwardBatch:
        segments = Segments(
            indptr=self._own.indptr[: num_rows + 1],
            slots=self._own.slots[:num_rows],
            tiles=self._own.tiles[:num_rows],  # enough: every tile has at least one row
            host_indptr=indptr,
            host_slots=slots,
        )
        return ForwardBatch(
            rows=(),
            input_ids=self._resolved_ids[:num_rows],
            sources=None,
            positions=self._own.positions[:num_rows],
            slot_mapping=self._own.slot_mapping[:num_rows],
            attention=AttentionBatch(
                cu_seqlens_q=self._cu_seqlens_q[: num_rows + 1],
                context_lens=self._own.context_lens[:num_rows],
                block_tables=self._block_tables[:num_rows],
                host_cu_seqlens_q=tuple(range(num_rows + 1)),
                host_context_lens=context_lens,
            ),
            segments=segments,
            sampled_rows=(),
            sampled_tokens=self._cu_seqlens_q[:num_rows],
            sampled_segments=segments,
        )


def _without_tiles(batch: ForwardBatch, rows: tuple[ScheduledRow, ...]) -> ForwardBatch:
    segments = replace(batch.segments, tiles=batch.segments.tiles[:0])
    return replace(batch, rows=rows, segments=segments, sampled_segments=segments)


class GraphKey(NamedTuple):
    """The kind of decode batch that one graph computes."""

    num_rows: int
    max_context: int
    has_adapter: bool


class DecodeGraphs:
    """The forward pass of decode steps, by CUDA graphs."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch, LoraTables], Tensor],
        static: StaticBatch,
        pending: PendingTokens,
        hidden: Tensor,
        lora: LoraTables,
        max_context: int,
        capture: Capture,
    ) -> None:
        """Store the arguments. Captures nothing yet.

        Args:
          forward: returns hidden states `[T, H]` and allocates through torch only. hidden: `[max_rows, H]`, the output
          of the graphs. lora: the arena's tables; graphs read their device tensors, which may change.
        """
        self._forward = forward
        self._static = static
        self._pending = pending
        self._hidden = hidden
        self._capture = capture
        self._sizes = graph_sizes(static.max_rows)
        self._contexts = graph_contexts(max_context)
        self._graphs: dict[GraphKey, Run] = {}
        self._batch: ForwardBatch | None = None
        ranks = [[MAX_GRAPH_RANK] * len(slot) for slot in lora.host_ranks]
        self._lora = self._bounds = replace(lora, host_ranks=ranks)  # kept: graphs read tensors in its memo

    def capture_short(self) -> None:
        """Capture all graphs for short contexts, the largest first, so that smaller ones reuse its memory pool."""
        for has_adapter in (False, True):
            for num_rows in reversed(self._sizes):
                self._captured(GraphKey(num_rows, self._contexts[0], has_adapter))

    def accepts(self, batch: ForwardBatch, lora: LoraTables) -> bool:
        """Return whether a graph can compute the batch."""
        if not batch.is_decode or len(batch.rows) > self._static.max_rows:
            return False
        return all(max(lora.host_ranks[slot], default=0) <= MAX_GRAPH_RANK for slot in batch.segments.host_slots)

    def forward(self, batch: ForwardBatch, lora: LoraTables) -> tuple[Tensor, Segments]:
        """Compute a batch from the CPU for which `accepts` is true.

        Return the normed hidden states of its rows, `[N, H]`, valid until the next call, and the segments over them.
        """
        count, longest = len(batch.rows), max(batch.attention.host_context_lens)
        num_rows = self._sizes[bisect_left(self._sizes, count)]
        max_context = self._contexts[bisect_left(self._contexts, longest)]
        padded = self._static.fill(batch, num_rows)
        replay = self._captured(GraphKey(num_rows, max_context, batch.segments.has_adapter))
        self._batch, self._lora = padded, lora
        replay()
        return self._hidden[:count], padded.segments

    @torch.inference_mode()
    def _captured(self, key: GraphKey) -> Run:
        if key not in self._graphs:
            self._batch, self._lora = self._static.bounds(*key), self._bounds
            self._graphs[key] = self._capture(self._run)
        return self._graphs[key]

    def _run(self) -> None:
        """Compute the current batch. This is captured; its host code reruns only if the capture replays by running."""
        assert self._batch is not None, "the batch is set before it is computed"
        self._static.resolve_ids(self._pending)
        hidden = self._forward(self._batch, self._lora)
        self._hidden[: len(hidden)].copy_(hidden)
