"""Inputs of kernel tests: named adapter workloads, caches, and tolerances."""

import os
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from descant_kernels import AttentionBatch, LoraTables, PairLayout, Segments

DEVICE = os.environ.get("DESCANT_TEST_DEVICE", "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
POPULARITIES = ["distinct", "uniform", "zipf", "identical", "skewed", "none"]
SIZES = [1, 2, 3, 7, 10, 33]
RANKS = [1, 3, 8, 16, 33, 64]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same bytes."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Assert equality within the tolerance of the dtype, relative to the largest value."""
    tolerance = TOLERANCE[actual.dtype] * max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)


def popular_slots(popularity: str, num_requests: int, num_slots: int) -> list[int]:
    """Return the adapter slot of each request; -1 = none. Adjacent requests may share a slot."""
    chance = random.Random(num_requests)
    match popularity:
        case "distinct":
            return [request % num_slots for request in range(num_requests)]
        case "uniform":
            return [chance.randrange(-1, num_slots) for _ in range(num_requests)]
        case "zipf":
            weights = [1 / (slot + 1) ** 1.5 for slot in range(num_slots)]
            return sorted(chance.choices(range(num_slots), weights, k=num_requests))
        case "identical":
            return [1] * num_requests
        case "skewed":
            return [0] * (num_requests - 1) + [1]
        case _:
            return [-1] * num_requests


def runs(slots: list[int]) -> tuple[list[int], list[int]]:
    """Return lengths and slots of the segments of one-row requests."""
    lengths: list[int] = []
    kept: list[int] = []
    for slot in slots:
        if kept and kept[-1] == slot:
            lengths[-1] += 1
        else:
            lengths.append(1)
            kept.append(slot)
    return lengths, kept


@dataclass(frozen=True)
class LoraCase:
    """A group of projections with several adapters resident."""

    in_size: int
    out_sizes: tuple[int, ...]
    first_module: int
    tables: LoraTables

    @property
    def out_size(self) -> int:
        """Width of y."""
        return sum(self.out_sizes)


def lora_case(ranks: list[list[int]], in_size: int, out_sizes: tuple[int, ...], dtype: torch.dtype) -> LoraCase:
    """Return adapters with random matrices; `ranks[slot][slice]`. Module 0 belongs to another projection."""
    offsets, position = [], 64
    for slot_ranks in ranks:
        row = [0]
        for rank, out_size in zip(slot_ranks, out_sizes, strict=True):
            row.append(position)
            position += PairLayout.of(rank, in_size, out_size).size
        offsets.append(row)
    arena = (normal(position, seed=1) * 0.2).to(dtype)
    return LoraCase(in_size, out_sizes, 1, LoraTables.of(arena, offsets, [[0, *row] for row in ranks]))


def segments_of(slots: list[int]) -> Segments:
    """Return the segments of one-row requests."""
    return Segments.of(*runs(slots), device=DEVICE)


@dataclass(frozen=True)
class Cache:
    """A paged cache filled with random keys and values, the first `len` positions of `stream` in order."""

    k: Tensor
    v: Tensor
    blocks: list[int]


def filled_cache(
    num_positions: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, seed: int = 0
) -> Cache:
    """Return one sequence's cache in shuffled blocks. All other blocks hold NaN, which must not reach a result."""
    num_used = -(-num_positions // block_size)
    order = random.Random(seed).sample(range(num_used + 3), num_used)
    k = torch.full((num_used + 3, kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    v = k.clone()
    keys = normal(num_positions, kv_heads, head_dim, dtype=dtype, seed=seed + 1)
    values = normal(num_positions, kv_heads, head_dim, dtype=dtype, seed=seed + 2)
    positions = torch.arange(num_positions)
    blocks = torch.tensor(order)[positions // block_size]
    k[blocks, :, positions % block_size] = keys
    v[blocks, :, positions % block_size] = values
    return Cache(k, v, order)


def one_sequence(cache: Cache, num_new: int, context_len: int) -> AttentionBatch:
    """Return a batch of one sequence over the cache."""
    return AttentionBatch.of([num_new], [context_len], [cache.blocks])
