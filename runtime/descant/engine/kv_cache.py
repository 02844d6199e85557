"""The paged key and value cache: storage only. The scheduler assigns blocks to sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from descant.model.arch import DecoderConfig
from descant_client.errors import ConfigInvalid
from descant_kernels import move_kv


def block_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block: keys and values of all layers."""
    return 2 * config.num_layers * config.kv_size * block_size * dtype.itemsize


def blocks_within(num_bytes: int, config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the number of blocks that fit in a budget.

    Raises:
        ConfigInvalid: the budget does not hold one block.
    """
    size = block_bytes(config, block_size, dtype)
    if num_bytes < size:
        raise ConfigInvalid("model.kv_bytes", f"{num_bytes} bytes hold no block; one takes {size} bytes.")
    return num_bytes // size


class KVCache:
    """The keys and values of all layers. Block b of layer l is `keys[l][b]`, `[Hkv, block_size, D]`."""

    def __init__(
        self, config: DecoderConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers))
        self.values = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers))

    def move_slots(self, pairs: Tensor) -> None:
        """Move single positions in every layer, with all reads before all writes.

        Args:
          pairs: `[M, 2]` int64, source and destination slots (block * block_size + offset); no destination twice.
        """
        src_slots, dst_slots = pairs.unbind(1)
        for keys, values in zip(self.keys, self.values, strict=True):
            move_kv(keys, values, src_slots, dst_slots)
