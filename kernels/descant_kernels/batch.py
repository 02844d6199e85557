"""The batch arguments of the ops: immutable, built once per step and shared by every layer.

Each class holds device tensors for kernels and host copies of the same integers for CPU paths and launchers, so that
no op reads a scalar back from the device. In a `memo` field an op keeps data derived from the batch (gather indices,
masks) for the next layer. A memo belongs to one object: `dataclasses.replace` makes a new, empty one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

TILE_ROWS = 16
"""Maximum rows of one segment that one Triton program handles (the smallest `tl.dot`)."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A weight in the layout that its device multiplies fastest. Made by `pack_linear`; opaque to callers."""

    product: Callable[[Tensor], Tensor]  # [n, in] -> [n, out], bias included
    padded_rows: Callable[[int], int]  # row count -> row count to pad to, at least as large
    dtype: torch.dtype  # of the rows that `linear` takes and returns
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Runs of packed rows that use one adapter slot each.

    Rows `indptr[g]:indptr[g + 1]` use `slots[g]`; -1 = no adapter. `indptr[0] == 0`, never decreasing; rows from
    `indptr[G]` on use no adapter. `tiles` cuts the segments that have an adapter into runs of at most `TILE_ROWS`
    rows, each `(first row, number of rows, slot)`, for one Triton program each. Pad `tiles` to a fixed number with
    `(0, 0, 0)`, which is skipped.
    """

    indptr: Tensor  # [G + 1] int32
    slots: Tensor  # [G] int32
    tiles: Tensor  # [num_tiles, 3] int32
    host_indptr: tuple[int, ...]
    host_slots: tuple[int, ...]
    memo: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int], slots: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """Return segments of `lengths[g]` rows each, in packed order."""
        assert len(lengths) == len(slots), "one slot per segment"
        indptr = (0, *accumulate(lengths))
        tiles = [
            (row, min(TILE_ROWS, end - row), slot)
            for (start, end), slot in zip(pairwise(indptr), slots, strict=True)
            if slot >= 0
            for row in range(start, end, TILE_ROWS)
        ]
        return cls(
            indptr=torch.tensor(indptr, dtype=torch.int32).to(device),
            slots=torch.tensor(tuple(slots), dtype=torch.int32).to(device),
            tiles=torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3).to(device),
            host_indptr=indptr,
            host_slots=tuple(slots),
        )

    @property
    def has_adapter(self) -> bool:
        """Whether any row uses an adapter. If not, LoRA may be skipped altogether."""
        return self.tiles.shape[0] > 0


@dataclass(frozen=True, slots=True, eq=False)
class LoraTables:
    """The places of all resident adapters' matrices in the arena.

    Module `m` of slot `s` has rank `ranks[s, m]` (0 = untouched) and its A and B (scaling folded in) at element
    `offsets[s, m]` of `arena`, a multiple of 64, in the layout of `pair.PairLayout`: both transposed. A module with
    `row_scales[s, m] >= 0` has its row scale `[out]` at that element. Make a new object when a slot changes, because
    CPU paths keep derived data in `memo`.
    """

    arena: Tensor  # [N] dtype of the model
    offsets: Tensor  # [num_slots, num_modules] int64
    ranks: Tensor  # [num_slots, num_modules] int32
    row_scales: Tensor  # [num_slots, num_modules] int64, -1 = none
    host_offsets: list[list[int]]
    host_ranks: list[list[int]]
    host_row_scales: list[list[int]]
    memo: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        arena: Tensor,
        offsets: list[list[int]],
        ranks: list[list[int]],
        row_scales: list[list[int]] | None = None,
    ) -> "LoraTables":
        """Return tables on the arena's device from host lists `[num_slots][num_modules]`; by default no row scales."""
        row_scales = row_scales or [[-1] * len(slot) for slot in ranks]
        return cls(
            arena=arena,
            offsets=torch.tensor(offsets, dtype=torch.int64).to(arena.device),
            ranks=torch.tensor(ranks, dtype=torch.int32).to(arena.device),
            row_scales=torch.tensor(row_scales, dtype=torch.int64).to(arena.device),
            host_offsets=offsets,
            host_ranks=ranks,
            host_row_scales=row_scales,
        )


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """The cached positions that each packed query row sees.

    Sequence `s` owns rows `cu_seqlens_q[s]:cu_seqlens_q[s + 1]` and `context_lens[s]` cached positions (new tokens
    included); position `p` lies in block `block_tables[s, p // block_size]`. Entries past the context are ignored.

    Tree verify: sequence `s` with `prefix_lens[s] >= 0` is a tree: its node rows see positions
    `[0, prefix_lens[s])` and then the cache positions in their row of `ancestors`, in depth order, the node itself
    last, padded with -1. `prefix_lens[s] == -1` means plain causal; its rows of `ancestors` are ignored.
    """

    cu_seqlens_q: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32
    block_tables: Tensor  # [S, max_blocks] int32
    host_cu_seqlens_q: tuple[int, ...]
    host_context_lens: tuple[int, ...]
    ancestors: Tensor | None = None  # [T, max_depth] int32
    prefix_lens: Tensor | None = None  # [S] int32
    host_prefix_lens: tuple[int, ...] | None = None
    memo: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        ancestors: Tensor | None = None,
        prefix_lens: Sequence[int] | None = None,
    ) -> "AttentionBatch":
        """Return a batch from host integers; ragged block tables are padded with block 0."""
        assert len(query_lens) == len(context_lens) == len(block_tables), "one entry per sequence"
        assert (ancestors is None) == (prefix_lens is None), "a tree needs both ancestors and prefix_lens"
        width = max((len(blocks) for blocks in block_tables), default=0)
        tables = [list(blocks) + [0] * (width - len(blocks)) for blocks in block_tables]
        cu_seqlens_q = (0, *accumulate(query_lens))
        return cls(
            cu_seqlens_q=torch.tensor(cu_seqlens_q, dtype=torch.int32).to(device),
            context_lens=torch.tensor(tuple(context_lens), dtype=torch.int32).to(device),
            block_tables=torch.tensor(tables, dtype=torch.int32).reshape(len(tables), width).to(device),
            host_cu_seqlens_q=cu_seqlens_q,
            host_context_lens=tuple(context_lens),
            ancestors=None if ancestors is None else ancestors.to(device=device, dtype=torch.int32),
            prefix_lens=None if prefix_lens is None else torch.tensor(prefix_lens, dtype=torch.int32).to(device),
            host_prefix_lens=None if prefix_lens is None else tuple(prefix_lens),
        )


@dataclass(frozen=True, slots=True, eq=False)
class NodeNoise:
    """The inputs of the noise of each row of logits. A row is one node: a position to sample at."""

    seeds: Tensor  # [N] int64, the 64 bits of the request's seed
    choices: Tensor  # [N] int64
    output_indices: Tensor  # [N] int64, counted from the first generated token
    sampled: Tensor  # [N] bool; False = greedy, no noise
    any_sampled: bool  # host copy of sampled.any()

    @classmethod
    def of(
        cls,
        seeds: Sequence[int],
        choices: Sequence[int],
        output_indices: Sequence[int],
        sampled: Sequence[bool],
        device: torch.device | str = "cpu",
    ) -> "NodeNoise":
        """Return the noise inputs from host integers; a seed is any integer, taken modulo 2**64."""
        signed = [(seed + 2**63) % 2**64 - 2**63 for seed in seeds]
        return cls(
            seeds=torch.tensor(signed, dtype=torch.int64).to(device),
            choices=torch.tensor(tuple(choices), dtype=torch.int64).to(device),
            output_indices=torch.tensor(tuple(output_indices), dtype=torch.int64).to(device),
            sampled=torch.tensor(tuple(sampled), dtype=torch.bool).to(device),
            any_sampled=any(sampled),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """The accepted path of each sequence's draft tree.

    The first `counts[s]` entries of row `s` are valid, the rest -1. `nodes` are indices into the sequence's own
    nodes, root first: their KV is kept. `tokens` are those that the target sampled at these nodes: the tokens to emit,
    of which the last is not in the cache yet.
    """

    counts: Tensor  # [S] int64, at least 1; 0 for a sequence without nodes, which only the CUDA path accepts
    nodes: Tensor  # [S, max_nodes] int64
    tokens: Tensor  # [S, max_nodes] int64
