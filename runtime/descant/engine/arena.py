"""The adapter arena: one tensor on the device that holds every resident adapter version, and the tables kernels read.

A version is one contiguous extent. Where extents lie is the scheduler's decision; this module only fills them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from descant.adapters.store import read_version
from descant.engine.arch import LoraModule
from descant_kernels import LoraTables

ALIGNMENT_BYTES = 64
"""Every module's pair begins at a multiple of this: a cache line, and enough for any vector load."""


def extent_bytes(ranks: Sequence[int], modules: Sequence[LoraModule], itemsize: int) -> int:
    """Return how many bytes a version takes in an arena whose elements have `itemsize` bytes.

    Args:
      ranks: one per module, 0 = untouched.
    """
    return _layout(ranks, modules, itemsize)[-1]


def _layout(ranks: Sequence[int], modules: Sequence[LoraModule], itemsize: int) -> list[int]:
    """Byte offset of each module's pair within the extent, and the extent's size at the end."""
    sizes = (
        -(-rank * (module.in_features + module.out_features) * itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        for rank, module in zip(ranks, modules, strict=True)
    )
    return [0, *accumulate(sizes)]


@dataclass(frozen=True, slots=True, eq=False)
class StagedVersion:
    """A version read, verified and laid out on the host, ready to be copied to the device."""

    data: Tensor  # [extent elements] dtype of the arena, on the CPU
    ranks: list[int]  # per module
    offsets: list[int]  # per module, in elements from the beginning of the extent


class Arena:
    """Resident adapter versions. `load` = `stage` (slow, any thread) + `commit` (one copy, the device's thread)."""

    def __init__(
        self,
        modules: tuple[LoraModule, ...],
        num_slots: int,
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._modules = modules
        self._itemsize = dtype.itemsize
        self._data = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._offsets = torch.zeros(num_slots, len(modules), dtype=torch.int64, device=device)
        self._ranks = torch.zeros(num_slots, len(modules), dtype=torch.int32, device=device)
        empty = [0] * len(modules)
        self._host_offsets = [empty] * num_slots
        self._host_ranks = [empty] * num_slots
        self._tables = self._new_tables()

    @property
    def num_bytes(self) -> int:
        """Size of the arena."""
        return self._data.numel() * self._itemsize

    def load(self, slot: int, offset_bytes: int, path: str | Path) -> None:
        """Read the version stored at `path` into the extent at `offset_bytes` and put it in the slot.

        Raises:
            AdapterInvalid: the file is missing, damaged or made for another base; the slot is empty then.
        """
        self.unload(slot)
        self.commit(slot, offset_bytes, self.stage(path))

    def stage(self, path: str | Path) -> StagedVersion:
        """Read and verify a version and lay it out in the arena's dtype. Touches no state of the arena.

        Raises:
            AdapterInvalid: as `load`.
        """
        factors = read_version(Path(path), self._modules)
        ranks = [factors[index].rank if index in factors else 0 for index in range(len(self._modules))]
        offsets = [offset // self._itemsize for offset in _layout(ranks, self._modules, self._itemsize)]
        data = torch.zeros(offsets.pop(), dtype=self._data.dtype, pin_memory=self._data.is_cuda)
        for index, pair in factors.items():
            middle = offsets[index] + pair.a.numel()
            data[offsets[index] : middle].copy_(pair.a.view(-1))
            data[middle : middle + pair.b.numel()].copy_(pair.b.view(-1))
        return StagedVersion(data, ranks, offsets)

    def commit(self, slot: int, offset_bytes: int, staged: StagedVersion) -> None:
        """Copy a staged version into the extent at `offset_bytes` and put it in the slot."""
        start, end = offset_bytes // self._itemsize, offset_bytes // self._itemsize + staged.data.numel()
        assert offset_bytes % ALIGNMENT_BYTES == 0, "extents begin at aligned offsets"
        assert 0 <= start <= end <= self._data.numel(), "the extent must lie in the arena"
        self._data[start:end].copy_(staged.data, non_blocking=True)
        self._set_row(slot, [start + offset for offset in staged.offsets], staged.ranks)

    def unload(self, slot: int) -> None:
        """Empty a slot. Its extent may be overwritten from now on."""
        if any(self._host_ranks[slot]):
            self._set_row(slot, [0] * len(self._modules), [0] * len(self._modules))

    def tables(self) -> LoraTables:
        """Return the tables of what is resident now: the same device tensors always, a new object after a change."""
        return self._tables

    def _set_row(self, slot: int, offsets: list[int], ranks: list[int]) -> None:
        self._offsets[slot].copy_(torch.tensor(offsets, dtype=torch.int64))
        self._ranks[slot].copy_(torch.tensor(ranks, dtype=torch.int32))
        self._host_offsets[slot] = offsets
        self._host_ranks[slot] = ranks
        self._tables = self._new_tables()

    def _new_tables(self) -> LoraTables:
        host_offsets, host_ranks = list(self._host_offsets), list(self._host_ranks)
        return LoraTables(self._data, self._offsets, self._ranks, host_offsets, host_ranks)
