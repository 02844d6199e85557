"""The cost of bitwise row invariance on this CPU: each op's serving path against the plain torch path.

A ratio of 1.20 means that the invariant path takes 20 % longer; below 1 it is faster. The two take turns and the
fastest turn of each counts, so that other load on the machine has little effect.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from descant_kernels import (
    AttentionBatch,
    LoraTables,
    Segments,
    add_lora,
    linear,
    pack_linear,
    paged_attention,
    probe_invariance,
)

BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64
RANK = 16
Case = tuple[str, Callable[[], object], Callable[[], object]]


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--turns", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    print(probe_invariance(dtype))
    print(f"{'case':<44}{'plain us':>12}{'invariant us':>14}{'ratio':>8}")
    for cases in (linear_cases(dtype), lora_cases(dtype), attention_cases(dtype)):
        for name, plain, invariant in cases:
            times = fastest((plain, invariant), arguments.turns)
            print(f"{name:<44}{times[0] * 1e6:>12.1f}{times[1] * 1e6:>14.1f}{times[1] / times[0]:>8.2f}")


def fastest(functions: tuple[Callable[[], object], ...], turns: int) -> list[float]:
    """Return the seconds of the fastest call of each."""
    best = [float("inf")] * len(functions)
    for _ in range(turns):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Return cases with weights of a toy model and of a 0.5 B model, at decode and prefill sizes."""
    for out_size, in_size in ((384, 128), (4864, 896), (896, 4864)):
        weight = torch.randn(out_size, in_size).to(dtype)
        packed = pack_linear(weight)
        for rows in (1, 2, 16, 256):
            x = torch.randn(rows, in_size).to(dtype)
            yield (
                f"linear {in_size} -> {out_size}, {rows} rows",
                lambda x=x, weight=weight: F.linear(x, weight),
                lambda x=x, packed=packed: linear(x, packed),
            )


def lora_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Return cases of adapters on the query, key and value projections. Plain is two matmuls per segment and slice."""
    for in_size in (128, 896):
        out_sizes = (in_size, in_size // 4, in_size // 4)
        sizes = [RANK * (in_size + out_size) for out_size in out_sizes]
        offsets = [[slot * sum(sizes) + sum(sizes[:j]) for j in range(3)] for slot in range(16)]
        arena = torch.randn(16 * sum(sizes)).to(dtype)
        for name, lengths, slots in (
            ("16 rows, 16 adapters", [1] * 16, list(range(16))),
            ("16 rows, 1 adapter", [16], [0]),
            ("256 rows, 1 adapter", [256], [0]),
        ):
            tables = LoraTables.of(arena, offsets, [[RANK] * 3] * 16)
            segments = Segments.of(lengths, slots)
            x, y = torch.randn(sum(lengths), in_size).to(dtype), torch.zeros(sum(lengths), sum(out_sizes)).to(dtype)
            yield (
                f"add_lora {in_size}, rank {RANK}, {name}",
                lambda a=(y, x, tables, segments, out_sizes): plain_lora(*a),
                lambda a=(y, x, tables, segments, 0, out_sizes): add_lora(*a),
            )


def plain_lora(y: Tensor, x: Tensor, tables: LoraTables, segments: Segments, out_sizes: tuple[int, ...]) -> None:
    """Add LoRA in a loop that is correct but neither batched nor invariant."""
    in_size = x.shape[1]
    for g, slot in enumerate(segments.host_slots):
        rows = slice(segments.host_indptr[g], segments.host_indptr[g + 1])
        column = 0
        for module, out_size in enumerate(out_sizes):
            rank, offset = tables.host_ranks[slot][module], tables.host_offsets[slot][module]
            middle = offset + rank * in_size
            a = tables.arena[offset:middle].view(rank, in_size)
            b = tables.arena[middle : middle + out_size * rank].view(out_size, rank)
            y[rows, column : column + out_size] += (x[rows] @ a.T) @ b.T
            column += out_size


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Return cases of attention. Plain is torch's own attention per sequence, over keys gathered from the blocks."""
    for name, num_sequences, num_new, context in (
        ("decode of 16 at 100", 16, 1, 100),
        ("decode of 16 at 1000", 16, 1, 1000),
        ("decode of 1 at 4000", 1, 1, 4000),
        ("prefill of 64", 1, 64, 64),
        ("prefill of 512", 1, 512, 512),
        ("prefill of 256 at 2000", 1, 256, 2000),
    ):
        per_sequence = -(-context // BLOCK_SIZE)
        tables = [list(range(s * per_sequence, (s + 1) * per_sequence)) for s in range(num_sequences)]
        shape = (num_sequences * per_sequence, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        k_cache, v_cache = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        batch = AttentionBatch.of([num_new] * num_sequences, [context] * num_sequences, tables)
        q = torch.randn(num_sequences * num_new, HEADS, HEAD_DIM).to(dtype)
        yield (
            f"attention, {name}",
            lambda a=(q, k_cache, v_cache, batch): plain_attention(*a),
            lambda a=(q, k_cache, v_cache, batch, HEAD_DIM**-0.5): paged_attention(*a),
        )


def plain_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> Tensor:
    """Compute `scaled_dot_product_attention` for one sequence at a time."""
    outs = []
    for s, context in enumerate(batch.host_context_lens):
        rows = q[batch.host_cu_seqlens_q[s] : batch.host_cu_seqlens_q[s + 1]].transpose(0, 1)
        blocks = batch.block_tables[s]
        keys, values = (
            cache.index_select(0, blocks).transpose(0, 1).reshape(KV_HEADS, -1, HEAD_DIM)[:, :context]
            for cache in (k_cache, v_cache)
        )
        num_new = rows.shape[1]
        mask = torch.ones(num_new, context, dtype=torch.bool).tril(context - num_new) if num_new > 1 else None
        out = F.scaled_dot_product_attention(
            rows[None], keys[None], values[None], mask, scale=HEAD_DIM**-0.5, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


if __name__ == "__main__":
    main()
