"""The division of device memory: weights and the largest step come first; KV cache and adapter arena share the rest.

The memory of a step is measured: the largest step is computed once, before the cache and the arena exist, and the
allocator reports its peak. The division itself is arithmetic.

Never run on a GPU yet: `free_bytes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from descant.contract.engine import EngineOptions
from descant.engine.batch import ForwardBatch
from descant.engine.decoder import Decoder
from descant.engine.kv_cache import KVCache, block_bytes
from descant.engine.rotary import rope_tables
from descant.engine.uploads import upload
from descant.engine.weights import DecoderWeights
from descant.model.arch import DecoderConfig
from descant_client.errors import ConfigInvalid
from descant_kernels import AttentionBatch, LoraTables, Segments

ADAPTER_SHARE = 0.1
"""Default share of the arena in the memory of cache and arena together."""

DEFAULT_CPU_BYTES = 256 * 1024 * 1024
"""Default size of the cache, and of the arena, on a CPU."""

_MAX_SAMPLED_ROWS = 256  # rows of float32 logits in the measured step, counted twice because sampling copies them
_ARENA_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class MemoryShares:
    """The sizes of the KV cache and of the adapter arena, in bytes."""

    num_kv_bytes: int
    num_adapter_bytes: int


def divide_memory(
    num_free_bytes: int, one_block: int, num_kv_bytes: int | None, num_adapter_bytes: int | None
) -> MemoryShares:
    """Divide the free memory between cache and arena. A given size is kept; None takes a share of the rest.

    Args:
      num_free_bytes: free memory after weights and largest step; may be negative. one_block: bytes of a cache block.

    Raises:
        ConfigInvalid: the given sizes, with the minimum of the others, do not fit.
    """
    if num_adapter_bytes is None:
        share = int(max(0, num_free_bytes) * ADAPTER_SHARE)
        left = num_free_bytes - (num_kv_bytes or one_block)
        share = max(0, min(share, left))
        num_adapter_bytes = share - share % _ARENA_ALIGNMENT_BYTES
    if num_kv_bytes is None:
        num_kv_bytes = num_free_bytes - num_adapter_bytes
        if num_kv_bytes < one_block:
            raise ConfigInvalid(
                "model.memory_fraction",
                f"{_mib(num_free_bytes)} are left for cache and adapters, of which adapters take "
                f"{_mib(num_adapter_bytes)}; one block of the cache takes {_mib(one_block)}. "
                "Raise the fraction, or lower scheduling.max_num_batched_tokens or adapters.memory_bytes.",
            )
    needed = num_kv_bytes + num_adapter_bytes
    if needed > num_free_bytes:
        raise ConfigInvalid(
            "model.kv_bytes",
            f"cache and adapters need {_mib(needed)}, and {_mib(num_free_bytes)} are left for them. Lower kv_bytes "
            "or adapters.memory_bytes, leave one of them out so that it is sized by itself, or raise "
            "model.memory_fraction.",
        )
    return MemoryShares(num_kv_bytes, num_adapter_bytes)


def memory_shares(
    options: EngineOptions, config: DecoderConfig, weights: DecoderWeights, dtype: torch.dtype, device: torch.device
) -> MemoryShares:
    """Return the sizes of an engine's cache and arena. Sizes in the options are kept; on CUDA, None is measured.

    Raises:
        ConfigInvalid: as `divide_memory` and `usable_bytes`.
    """
    one_block = block_bytes(config, options.block_size, dtype)
    num_kv_bytes = options.num_kv_bytes if options.num_blocks is None else options.num_blocks * one_block
    num_adapter_bytes = options.num_adapter_bytes
    if device.type != "cuda":
        sizes = (DEFAULT_CPU_BYTES if size is None else size for size in (num_kv_bytes, num_adapter_bytes))
        return MemoryShares(*sizes)
    if num_kv_bytes is not None and num_adapter_bytes is not None:
        return MemoryShares(num_kv_bytes, num_adapter_bytes)
    step = functools.partial(
        run_largest_step, config, weights, options.max_num_batched_tokens, options.block_size, dtype, device
    )
    num_free_bytes = free_bytes(step, device, options.memory_fraction)
    return divide_memory(num_free_bytes, one_block, num_kv_bytes, num_adapter_bytes)


def usable_bytes(num_total_bytes: int, num_foreign_bytes: int, num_peak_bytes: int, fraction: float) -> int:
    """Return the memory left for cache and arena; negative if the step alone is too large.

    Args:
      num_total_bytes: of the device. num_foreign_bytes: in use outside torch, the CUDA context included.
      num_peak_bytes: peak of torch during the largest step, weights included. fraction: share of the total to use.

    Raises:
        ConfigInvalid: the fraction is not above 0 and at most 1.
    """
    if not 0.0 < fraction <= 1.0:
        raise ConfigInvalid("model.memory_fraction", f"{fraction} is not above 0 and at most 1")
    return int(num_total_bytes * fraction) - num_foreign_bytes - num_peak_bytes


def free_bytes(run_largest_step: Callable[[], object], device: torch.device, fraction: float) -> int:
    """Measure the memory that a CUDA device has left for cache and arena beside weights and largest step.

    Raises:
        ConfigInvalid: as `usable_bytes`.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    torch.cuda.synchronize(device)
    num_peak_bytes = torch.cuda.max_memory_allocated(device)
    num_free_bytes, num_total_bytes = torch.cuda.mem_get_info(device)
    num_foreign_bytes = num_total_bytes - num_free_bytes - torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    return usable_bytes(num_total_bytes, num_foreign_bytes, num_peak_bytes, fraction)


@torch.inference_mode()
def run_largest_step(
    config: DecoderConfig,
    weights: DecoderWeights,
    max_num_batched_tokens: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Compute a prefill of the maximum tokens of a step, over a cache of one block, and its sampled logits.

    Nothing is written to the cache, and the content read from it is arbitrary. Returns probabilities, `[N, V]`.
    """
    cache = KVCache(config, 1, block_size, dtype, device)
    decoder = Decoder(
        config, weights, cache, rope_tables(config, min(config.max_context, max_num_batched_tokens), device)
    )
    batch = _largest_batch(config.max_context, max_num_batched_tokens, block_size, device)
    lora = LoraTables.of(torch.zeros(0, dtype=dtype, device=device), [[]], [[]])
    hidden = decoder.forward(batch, lora)
    logits = decoder.logits(hidden[:_MAX_SAMPLED_ROWS], batch.segments, lora)
    return logits.softmax(-1)  # sampling needs a second tensor of the size of the logits


def _largest_batch(max_context: int, num_tokens: int, block_size: int, device: torch.device) -> ForwardBatch:
    """Return prompts as long as the context allows, all in block 0."""
    lengths = [max_context] * (num_tokens // max_context) + [num_tokens % max_context] * (num_tokens % max_context > 0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids, positions, slots, last = upload(
        [torch.zeros(num_tokens, dtype=torch.int64), positions, torch.full((num_tokens,), -1), torch.tensor([0])],
        device,
    )
    tables = [[0] * -(-length // block_size) for length in lengths]
    segments = Segments.of([], [], device)
    attention = AttentionBatch.of(lengths, lengths, tables, device)
    return ForwardBatch((), ids, None, positions, slots, attention, segments, (), last, segments)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
