"""The adapter arena: one tensor on the device that holds every resident adapter version, and the tables kernels read.

A version is one contiguous extent, its draft heads included. Where extents lie is the scheduler's decision; this module
only fills them.

Versions may arrive beside the steps (`uploads`): a step that uses a slot waits for what was put there, and an extent is
overwritten only after the steps that were launched with what was in it. Tables change in the order of the steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from descant.engine.uploads import Mark, Uploader, upload, uploader_for
from descant.model.arch import LoraModule
from descant.versions.draft_heads import DraftHeads, HeadsShape
from descant.versions.extent import apply_scalings, extent_offsets, heads_layout
from descant.versions.store import read_extent
from descant_kernels import LoraTables
from descant_kernels.pair import ALIGNMENT

_MOVED_AT_ONCE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class StagedVersion:
    """A version read, verified and laid out on the host, ready to be copied to the device."""

    data: Tensor  # [extent elements] dtype of the arena, on the CPU
    ranks: list[int]  # per module
    offsets: list[int]  # per module, in elements from the beginning of the extent
    heads: HeadsShape | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes in host memory, and in the arena."""
        return self.data.nbytes


class Arena:
    """Resident adapter versions. `load` = `stage` (slow, any thread) + `commit` (one copy, the device's thread)."""

    def __init__(
        self,
        modules: tuple[LoraModule, ...],
        num_slots: int,
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        uploader: Uploader | None = None,
    ) -> None:
        """`uploader` is the device's own unless a test brings one."""
        self._modules = modules
        self._uploader = uploader or uploader_for(torch.device(device))
        self._itemsize = dtype.itemsize
        self._data = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._offsets = torch.zeros(num_slots, len(modules), dtype=torch.int64, device=device)
        self._ranks = torch.zeros(num_slots, len(modules), dtype=torch.int32, device=device)
        self._row_scales = torch.full_like(self._offsets, -1)  # no version has any yet
        empty = [0] * len(modules)
        self._host_offsets = [empty] * num_slots
        self._host_ranks = [empty] * num_slots
        self._host_row_scales = [[-1] * len(modules)] * num_slots
        self._starts = [0] * num_slots  # of each slot's extent, in elements
        self._sizes = [0] * num_slots
        self._heads: list[DraftHeads | None] = [None] * num_slots
        self._arrivals: list[Mark] = [None] * num_slots  # when each slot's version is there, unless a step has waited
        self._last_arrival: Mark = None
        self._busy: list[tuple[int, int, Mark]] = []  # elements that work in the order of the steps may still touch
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
        extent = read_extent(Path(path), self._modules)
        apply_scalings(extent, self._modules)
        data = self._uploader.stage(extent.data, self._data.dtype)
        return StagedVersion(data, extent.ranks, extent_offsets(extent.ranks, self._modules)[:-1], extent.heads)

    def commit(self, slot: int, offset_bytes: int, staged: StagedVersion) -> None:
        """Copy a staged version into the extent at `offset_bytes` and put it in the slot.

        Steps launched so far still find what was in the extent; the copy begins when they are done with it.
        """
        start, end = self._place(offset_bytes, staged.data.numel())
        after = [mark for first, last, mark in self._busy if first < end and start < last]
        arrival = self._uploader.copy(self._data[start:end], staged.data, after)
        self._arrivals[slot] = self._last_arrival = arrival
        self._starts[slot], self._sizes[slot] = start, end - start
        self._set_row(slot, [start + offset for offset in staged.offsets], staged.ranks)
        self._view_heads(slot, staged.heads)

    def move(self, slot: int, offset_bytes: int) -> None:
        """Move the version in the slot to the extent at `offset_bytes`, which may overlap the one it is in."""
        source, size, heads = self._starts[slot], self._sizes[slot], self._heads[slot]
        self._uploader.order_after(self._last_arrival)  # copies arrive in order: now all are there that were begun
        self._arrivals[slot] = None
        start, _ = self._place(offset_bytes, size)
        at_once = _MOVED_AT_ONCE_BYTES // self._itemsize
        pieces = [(at, min(at + at_once, size)) for at in range(0, size, at_once)]
        # From the end it moves towards, so that no piece is overwritten before its turn; a piece may overlap itself.
        for begin, end in pieces if start < source else reversed(pieces):
            self._data[start + begin : start + end].copy_(self._data[source + begin : source + end].clone())
        self._occupy([(source, source + size), (start, start + size)])
        self._starts[slot] = start
        offsets = [offset + start - source for offset in self._host_offsets[slot]]
        self._set_row(slot, offsets, self._host_ranks[slot])
        self._view_heads(slot, heads and heads.shape)

    def unload(self, slot: int) -> None:
        """Empty a slot. Its extent may be overwritten from now on."""
        if self._sizes[slot]:
            self._set_row(slot, [0] * len(self._modules), [0] * len(self._modules))
        self._starts[slot] = self._sizes[slot] = 0
        self._heads[slot] = None

    def begin_use(self, slots: Iterable[int]) -> None:
        """Let the step that is launched next wait for the versions in its slots. Call before it is launched."""
        for slot in slots:
            self._uploader.order_after(self._arrivals[slot])
            self._arrivals[slot] = None

    def end_use(self, slots: Iterable[int]) -> None:
        """Keep what the step launched last reads until it is done. Call after it was launched."""
        extents = [(self._starts[slot], self._sizes[slot]) for slot in slots if self._sizes[slot]]
        self._occupy([(start, start + size) for start, size in extents])

    def tables(self) -> LoraTables:
        """Return the tables of what is resident now: the same device tensors always, a new object after a change."""
        return self._tables

    def heads(self, slot: int) -> DraftHeads | None:
        """Return the draft heads of the version in a slot; None if it has none, or the slot is empty.

        They are views of the arena, in its dtype, as good until the slot is loaded, moved or emptied; a step reads them
        between `begin_use` and `end_use` of the slot.
        """
        return self._heads[slot]

    def _view_heads(self, slot: int, shape: HeadsShape | None) -> None:
        self._heads[slot] = None
        if shape is not None:
            start = self._starts[slot] + extent_offsets(self._host_ranks[slot], self._modules)[-1]
            self._heads[slot] = heads_layout(shape, self._modules).views(self._data, start)

    def _occupy(self, extents: list[tuple[int, int]]) -> None:
        """Note extents that the work queued so far may touch, and forget those that nothing touches any more."""
        mark = self._uploader.mark() if extents else None
        if mark is not None:
            self._busy = [entry for entry in self._busy if entry[2] and not entry[2].query()]
            self._busy += [(start, end, mark) for start, end in extents]

    def _place(self, offset_bytes: int, num_elements: int) -> tuple[int, int]:
        """First element of an extent, and the one after its last."""
        start, end = offset_bytes // self._itemsize, offset_bytes // self._itemsize + num_elements
        assert start % ALIGNMENT == 0, "extents are whole pairs one after the other, and so begin where a pair may"
        assert 0 <= start <= end <= self._data.numel(), "the extent must lie in the arena"
        return start, end

    def _set_row(self, slot: int, offsets: list[int], ranks: list[int]) -> None:
        rows = [torch.tensor(offsets, dtype=torch.int64), torch.tensor(ranks, dtype=torch.int32)]
        for table, row in zip((self._offsets, self._ranks), upload(rows, self._data.device), strict=True):
            table[slot].copy_(row)
        self._host_offsets[slot] = offsets
        self._host_ranks[slot] = ranks
        self._tables = self._new_tables()

    def _new_tables(self) -> LoraTables:
        return LoraTables(
            arena=self._data,
            offsets=self._offsets,
            ranks=self._ranks,
            row_scales=self._row_scales,
            host_offsets=list(self._host_offsets),
            host_ranks=list(self._host_ranks),
            host_row_scales=self._host_row_scales,
        )
