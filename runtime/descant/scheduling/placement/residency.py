"""`AdapterResidency`: the adapter slot and the arena extent of each version on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from descant.contract.version import AdapterVersion
from descant.scheduling.placement.room import Piece, find_room
from descant_client.errors import AdapterTooLarge, UnsupportedRequest

ALIGNMENT_BYTES = 64


class Placement(NamedTuple):
    """The place of a version on the device. `is_new`: it has yet to be loaded there."""

    adapter_slot: int
    offset: int  # bytes from the beginning of the arena
    is_new: bool = False


@dataclass(slots=True)
class _Resident:
    adapter_slot: int
    offset: int
    num_bytes: int  # aligned
    num_users: int = 0
    is_loading: bool = True
    is_pinned: bool = False
    is_doomed: bool = False  # to be removed as soon as it is idle

    @property
    def is_idle(self) -> bool:
        return not (self.num_users or self.is_loading or self.is_pinned)


class AdapterResidency:
    """Places versions in slots and bytes.

    Versions that are unused, not pinned and not being loaded may be evicted, the least recently used first. Loaded
    versions may be moved: `take_moves` returns the new offsets, and a later load may take an extent that a move frees.
    """

    def __init__(self, num_slots: int, num_bytes: int) -> None:
        self.num_slots = num_slots
        self.num_bytes = num_bytes
        self._residents: dict[str, _Resident] = {}
        self._unused: OrderedDict[str, None] = OrderedDict()  # evictable, least recently used first
        self._free_slots = list(range(num_slots))[::-1]
        self.num_available = num_bytes
        """Number of bytes that are free or evictable."""
        self._moves: list[Placement] = []  # not yet taken

    def check_fits(self, version: AdapterVersion, pins: Iterable[AdapterVersion] | None = None) -> None:
        """Check that the version can ever have a place beside `pins`; None: beside the versions that are pinned now.

        Raises:
            AdapterTooLarge: it cannot; the error gives the number of bytes there are for it.
            UnsupportedRequest: there are no slots at all.
        """
        if self.num_slots == 0:
            raise UnsupportedRequest("adapter", "this engine serves the base model only")
        if pins is None:
            pinned = {digest: one.num_bytes for digest, one in self._residents.items() if one.is_pinned}
        else:
            pinned = {pin.digest: aligned(pin.num_bytes) for pin in pins}
        pinned.pop(version.digest, None)
        num_bytes = self.num_bytes - sum(pinned.values()) if len(pinned) < self.num_slots else 0
        if aligned(version.num_bytes) > num_bytes:
            raise AdapterTooLarge(version.digest, version.num_bytes, num_bytes)

    def has_free_slot(self) -> bool:
        """Return whether some slot is empty or evictable."""
        return bool(self._free_slots or self._unused)

    def is_loaded(self, digest: str) -> bool:
        """Return whether the version can be used in a step now."""
        resident = self._residents.get(digest)
        return resident is not None and not resident.is_loading

    def is_resident(self, digest: str) -> bool:
        """Return whether the version has a place, loaded or not."""
        return digest in self._residents

    def is_pinned(self, digest: str) -> bool:
        """Return whether the version has a place that it never loses."""
        resident = self._residents.get(digest)
        return resident is not None and resident.is_pinned

    def offset_of(self, digest: str) -> int:
        """Return the arena offset of a resident version once all moves are done."""
        return self._residents[digest].offset

    def place(self, version: AdapterVersion) -> Placement | None:
        """Return the version's place, giving it one if it has none; None if there is no room for it now.

        A new one has to be loaded, which ends with `on_placed` or `forget`.

        Raises:
            AdapterTooLarge: there is never room beside the pinned versions.
        """
        resident = self._residents.get(version.digest)
        if resident is not None:
            return Placement(resident.adapter_slot, resident.offset)
        self.check_fits(version)
        num_bytes = aligned(version.num_bytes)
        if num_bytes > self.num_available or not self.has_free_slot():
            return None
        room = find_room(self._pieces(), list(self._unused), num_bytes, needs_victim=not self._free_slots)
        if room is None:
            return None
        for digest in room.victims:
            self.forget(digest)
        for digest, offset in room.moves:
            moved = self._residents[digest]
            moved.offset = offset
            self._moves.append(Placement(moved.adapter_slot, offset))
        resident = self._residents[version.digest] = _Resident(self._free_slots.pop(), room.offset, num_bytes)
        self.num_available -= num_bytes
        return Placement(resident.adapter_slot, room.offset, is_new=True)

    def acquire(self, version: AdapterVersion) -> Placement | None:
        """Add a use of a version, placing it as `place` does."""
        placement = self.place(version)
        if placement is not None:
            self._residents[version.digest].num_users += 1
            self._settle(version.digest)
        return placement

    def take_moves(self) -> list[Placement]:
        """Return the moves decided since the last call, in an order in which none overwrites another version."""
        moves, self._moves = self._moves, []
        return moves

    def on_placed(self, digest: str) -> None:
        """Record that the version is loaded."""
        self._residents[digest].is_loading = False
        self._settle(digest)

    def release(self, digest: str) -> None:
        """End one use. The version stays until its place is needed."""
        resident = self._residents[digest]
        assert resident.num_users > 0, f"adapter {digest} was released twice"
        resident.num_users -= 1
        self._settle(digest)

    def pin(self, digest: str) -> None:
        """Keep a version that has a place from being evicted."""
        self._residents[digest].is_pinned = True
        self._settle(digest)

    def unpin(self, digest: str) -> None:
        """Let a version be evicted again. It may have no place."""
        if digest in self._residents:
            self._residents[digest].is_pinned = False
            self._settle(digest)

    def doom(self, digest: str) -> None:
        """Free the place of a version, if it has one, as soon as it is idle."""
        if digest in self._residents:
            self._residents[digest].is_doomed = True
            self._settle(digest)

    def forget(self, digest: str) -> None:
        """Free the place of an unused version or of one whose load failed. Its uses are void."""
        resident = self._residents.pop(digest)
        if digest in self._unused:
            del self._unused[digest]
        else:
            self.num_available += resident.num_bytes
        self._free_slots.append(resident.adapter_slot)

    def check_integrity(self) -> None:
        """Assert that slots and bytes are each given once or free."""
        slots = [resident.adapter_slot for resident in self._residents.values()]
        assert sorted([*slots, *self._free_slots]) == list(range(self.num_slots)), "an adapter slot is lost"
        pieces = self._pieces()
        ends = [(piece.offset + piece.num_bytes, after.offset) for piece, after in pairwise(pieces)]
        assert all(end == begin for end, begin in ends), "two extents overlap"
        assert sum(piece.num_bytes for piece in pieces) == self.num_bytes, "an extent is outside the arena"
        idle = {digest for digest, resident in self._residents.items() if resident.is_idle}
        assert idle == set(self._unused), "an unused version is not evictable"
        kept = sum(resident.num_bytes for digest, resident in self._residents.items() if digest not in idle)
        assert self.num_available == self.num_bytes - kept, "the count of available bytes is wrong"
        assert not any(self._residents[digest].is_doomed for digest in idle), "a version outlived its last use"

    def _settle(self, digest: str) -> None:
        """Update whether the version can be evicted, after a change; remove it if it is idle and doomed."""
        resident = self._residents[digest]
        if resident.is_idle and digest not in self._unused:
            self._unused[digest] = None
            self.num_available += resident.num_bytes
        elif not resident.is_idle and digest in self._unused:
            del self._unused[digest]
            self.num_available -= resident.num_bytes
        if resident.is_idle and resident.is_doomed:
            self.forget(digest)

    def _pieces(self) -> list[Piece]:
        """Return the pieces of the arena, from its beginning to its end."""
        pieces: list[Piece] = []
        end = 0
        by_offset = sorted((resident.offset, digest) for digest, resident in self._residents.items())
        for offset, digest in [*by_offset, (self.num_bytes, None)]:
            if offset > end:
                pieces.append(Piece(end, offset - end))
            if digest is not None:
                resident = self._residents[digest]
                pieces.append(Piece(offset, resident.num_bytes, digest, resident.is_loading))
                end = offset + resident.num_bytes
        return pieces


def aligned(num_bytes: int) -> int:
    """Return the aligned size of an extent in the arena."""
    return max(1, -(-num_bytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
