"""The adapter arena: one device tensor that holds every resident adapter version, and the tables that kernels read.

A version occupies one contiguous extent, draft heads included. The scheduler decides where extents lie; this module
only fills them.

Uploads of versions may overlap steps (see `uploads`). A step that uses an adapter slot runs after the upload into that
slot. An extent is overwritten only after the steps launched with its previous content. Tables change in step order.
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

_MAX_PIECE_BYTES = 16 << 20  # of a move: bounds its temporary copy


@dataclass(frozen=True, slots=True, eq=False)
class StagedVersion:
    """A version that was read, verified and laid out on the host, ready for the copy to the device."""

    data: Tensor  # [extent elements] dtype of the arena, on the CPU
    ranks: list[int]  # per module
    offsets: list[int]  # per module, in elements from the start of the extent
    heads: HeadsShape | None = None

    @property
    def num_bytes(self) -> int:
        """Size in host memory, and in the arena."""
        return self.data.nbytes


class Arena:
    """The resident adapter versions. `load` = `stage` (slow, any thread) + `commit` (one copy, device thread only)."""

    def __init__(
        self,
        modules: tuple[LoraModule, ...],
        num_adapter_slots: int,
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        uploader: Uploader | None = None,
    ) -> None:
        """Allocate the arena and its tables. `uploader` defaults to that of the device; tests pass their own."""
        self._modules = modules
        self._uploader = uploader or uploader_for(torch.device(device))
        self._itemsize = dtype.itemsize
        self._data = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._offsets = torch.zeros(num_adapter_slots, len(modules), dtype=torch.int64, device=device)
        self._ranks = torch.zeros(num_adapter_slots, len(modules), dtype=torch.int32, device=device)
        self._row_scales = torch.full_like(self._offsets, -1)  # -1 = none; no version has row scales yet
        empty = [0] * len(modules)
        self._host_offsets = [empty] * num_adapter_slots
        self._host_ranks = [empty] * num_adapter_slots
        self._host_row_scales = [[-1] * len(modules)] * num_adapter_slots
        self._starts = [0] * num_adapter_slots  # first element of each slot's extent
        self._sizes = [0] * num_adapter_slots  # in elements
        self._heads: list[DraftHeads | None] = [None] * num_adapter_slots
        # Per slot: the end of its upload, until a step has been ordered after it.
        self._arrivals: list[Mark] = [None] * num_adapter_slots
        self._last_arrival: Mark = None
        self._busy: list[tuple[int, int, Mark]] = []  # start and end element that queued steps or moves may touch
        self._tables = self._new_tables()

    @property
    def num_bytes(self) -> int:
        """Size of the arena in bytes."""
        return self._data.numel() * self._itemsize

    def load(self, adapter_slot: int, offset_bytes: int, path: str | Path) -> None:
        """Read the version stored at `path` into the extent at `offset_bytes` and put it in the slot.

        Raises:
            AdapterInvalid: the file is missing, damaged or made for another base. The slot is then empty.
        """
        self.unload(adapter_slot)
        self.commit(adapter_slot, offset_bytes, self.stage(path))

    def stage(self, path: str | Path) -> StagedVersion:
        """Read and verify a version and lay it out in the arena's dtype. Changes no state of the arena.

        Raises:
            AdapterInvalid: as `load`.
        """
        extent = read_extent(Path(path), self._modules)
        apply_scalings(extent, self._modules)
        data = self._uploader.stage(extent.data, self._data.dtype)
        return StagedVersion(data, extent.ranks, extent_offsets(extent.ranks, self._modules)[:-1], extent.heads)

    def commit(self, adapter_slot: int, offset_bytes: int, staged: StagedVersion) -> None:
        """Copy a staged version into the extent at `offset_bytes` and put it in the slot.

        Steps launched so far still read the extent's previous content: the copy begins when they are done with it.
        """
        start, end = self._place(offset_bytes, staged.data.numel())
        after = [mark for first, last, mark in self._busy if first < end and start < last]
        arrival = self._uploader.copy(self._data[start:end], staged.data, after)
        self._arrivals[adapter_slot] = self._last_arrival = arrival
        self._starts[adapter_slot], self._sizes[adapter_slot] = start, end - start
        self._set_row(adapter_slot, [start + offset for offset in staged.offsets], staged.ranks)
        self._view_heads(adapter_slot, staged.heads)

    def move(self, adapter_slot: int, offset_bytes: int) -> None:
        """Move the version in the slot to the extent at `offset_bytes`. Old and new extent may overlap."""
        source, size, heads = self._starts[adapter_slot], self._sizes[adapter_slot], self._heads[adapter_slot]
        self._uploader.order_after(self._last_arrival)  # uploads end in order, so this covers all that have begun
        self._arrivals[adapter_slot] = None
        start, _ = self._place(offset_bytes, size)
        max_piece = _MAX_PIECE_BYTES // self._itemsize
        pieces = [(at, min(at + max_piece, size)) for at in range(0, size, max_piece)]
        # Start at the end in the direction of the move, so that no piece is overwritten before it was copied. Clone,
        # because a piece may overlap its own target.
        for begin, end in pieces if start < source else reversed(pieces):
            self._data[start + begin : start + end].copy_(self._data[source + begin : source + end].clone())
        self._occupy([(source, source + size), (start, start + size)])
        self._starts[adapter_slot] = start
        offsets = [offset + start - source for offset in self._host_offsets[adapter_slot]]
        self._set_row(adapter_slot, offsets, self._host_ranks[adapter_slot])
        self._view_heads(adapter_slot, heads and heads.shape)

    def unload(self, adapter_slot: int) -> None:
        """Empty a slot. From then on its extent may be overwritten."""
        if self._sizes[adapter_slot]:
            self._set_row(adapter_slot, [0] * len(self._modules), [0] * len(self._modules))
        self._starts[adapter_slot] = self._sizes[adapter_slot] = 0
        self._heads[adapter_slot] = None

    def begin_use(self, adapter_slots: Iterable[int]) -> None:
        """Order the next launched step after the uploads into its slots. Call before the launch."""
        for adapter_slot in adapter_slots:
            self._uploader.order_after(self._arrivals[adapter_slot])
            self._arrivals[adapter_slot] = None

    def end_use(self, adapter_slots: Iterable[int]) -> None:
        """Protect the extents that the last launched step reads until it is done. Call after the launch."""
        extents = [(self._starts[adapter_slot], self._sizes[adapter_slot]) for adapter_slot in adapter_slots]
        self._occupy([(start, start + size) for start, size in extents if size])

    def tables(self) -> LoraTables:
        """Return the tables of the resident versions: always the same device tensors, a new object after a change."""
        return self._tables

    def heads(self, adapter_slot: int) -> DraftHeads | None:
        """Return the draft heads of the version in a slot; None if it has none, or if the slot is empty.

        They are views of the arena, in its dtype, and valid until the slot is loaded, moved or emptied. A step reads
        them between `begin_use` and `end_use` of the slot.
        """
        return self._heads[adapter_slot]

    def _view_heads(self, adapter_slot: int, shape: HeadsShape | None) -> None:
        self._heads[adapter_slot] = None
        if shape is not None:
            start = self._starts[adapter_slot] + extent_offsets(self._host_ranks[adapter_slot], self._modules)[-1]
            self._heads[adapter_slot] = heads_layout(shape, self._modules).views(self._data, start)

    def _occupy(self, extents: list[tuple[int, int]]) -> None:
        """Record extents that the work queued so far may touch, and drop those with finished work."""
        mark = self._uploader.mark() if extents else None
        if mark is not None:
            self._busy = [entry for entry in self._busy if entry[2] and not entry[2].query()]
            self._busy += [(start, end, mark) for start, end in extents]

    def _place(self, offset_bytes: int, num_elements: int) -> tuple[int, int]:
        """Return the first element of an extent, and the one after its last."""
        start, end = offset_bytes // self._itemsize, offset_bytes // self._itemsize + num_elements
        assert start % ALIGNMENT == 0, "extents consist of whole pairs, so they begin at a pair's alignment"
        assert 0 <= start <= end <= self._data.numel(), "the extent must lie in the arena"
        return start, end

    def _set_row(self, adapter_slot: int, offsets: list[int], ranks: list[int]) -> None:
        rows = [torch.tensor(offsets, dtype=torch.int64), torch.tensor(ranks, dtype=torch.int32)]
        for table, row in zip((self._offsets, self._ranks), upload(rows, self._data.device), strict=True):
            table[adapter_slot].copy_(row)
        self._host_offsets[adapter_slot] = offsets
        self._host_ranks[adapter_slot] = ranks
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
