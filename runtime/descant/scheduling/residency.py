"""`AdapterResidency`: which version is in which adapter slot, and where in the arena its bytes are."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from descant.scheduling.version import AdapterVersion
from descant_client.errors import AdapterTooLarge, UnsupportedRequest

ALIGNMENT_BYTES = 64


class Placement(NamedTuple):
    """Where a version is on the device, or will be once it is loaded there (`is_new`)."""

    adapter_slot: int
    offset: int  # bytes from the beginning of the arena
    is_new: bool = False


class Extent(NamedTuple):
    """A range of bytes of the arena."""

    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Resident:
    placement: Placement
    extent: Extent
    num_users: int = 1
    is_loading: bool = True


class AdapterResidency:
    """Places versions in slots and bytes. Only what nobody uses and is not being loaded is evicted, oldest first."""

    def __init__(self, num_slots: int, num_bytes: int) -> None:
        self.num_slots = num_slots
        self.num_bytes = num_bytes
        self.reset()

    def reset(self) -> None:
        """Forget everything: the device is new."""
        self._residents: dict[str, _Resident] = {}
        self._unused: OrderedDict[str, None] = OrderedDict()  # evictable, least recently used first
        self._free_slots = list(range(self.num_slots))[::-1]
        self._free = [Extent(0, self.num_bytes)] if self.num_bytes else []

    def check_fits(self, version: AdapterVersion) -> None:
        """Raises AdapterTooLarge if the arena could never hold it, UnsupportedRequest if there are no slots at all."""
        if self.num_slots == 0:
            raise UnsupportedRequest("adapter", "this engine serves the base model only")
        if _aligned(version.num_bytes) > self.num_bytes:
            raise AdapterTooLarge(version.digest, version.num_bytes, self.num_bytes)

    def has_free_slot(self) -> bool:
        """Whether some slot is empty or evictable."""
        return bool(self._free_slots or self._unused)

    def is_loaded(self, digest: str) -> bool:
        """Whether the version can be used in a step now."""
        resident = self._residents.get(digest)
        return resident is not None and not resident.is_loading

    def is_resident(self, digest: str) -> bool:
        """Whether the version has a place, loaded or not."""
        return digest in self._residents

    def acquire(self, version: AdapterVersion) -> Placement | None:
        """Use a version once more; None if there is no room for it now.

        A new one has to be loaded, which ends with `loaded` or `forget`.

        Raises:
            AdapterTooLarge: the arena could never hold it.
        """
        resident = self._residents.get(version.digest)
        if resident is not None:
            resident.num_users += 1
            self._unused.pop(version.digest, None)
            return resident.placement
        self.check_fits(version)
        size = _aligned(version.num_bytes)
        victims = self._victims(size)
        if victims is None:
            return None
        for digest in victims:
            self.forget(digest)
        extent = _first_fit(self._free, size)
        assert extent is not None, "evicting the victims made room"
        _cut(self._free, extent)
        placement = Placement(self._free_slots.pop(), extent.offset)
        self._residents[version.digest] = _Resident(placement, extent)
        return placement._replace(is_new=True)

    def loaded(self, digest: str) -> None:
        """The version is on the device."""
        resident = self._residents[digest]
        resident.is_loading = False
        if resident.num_users == 0:
            self._unused[digest] = None

    def release(self, digest: str) -> None:
        """End one use; the version stays until its place is needed."""
        resident = self._residents[digest]
        assert resident.num_users > 0, f"adapter {digest} was released twice"
        resident.num_users -= 1
        if resident.num_users == 0 and not resident.is_loading:
            self._unused[digest] = None

    def forget(self, digest: str) -> None:
        """Free the place of a version whose load failed, or which nobody uses. Its uses are void."""
        resident = self._residents.pop(digest)
        self._unused.pop(digest, None)
        self._free_slots.append(resident.placement.adapter_slot)
        _put(self._free, resident.extent)

    def check_integrity(self) -> None:
        """Assert that slots and bytes are each given once or free."""
        slots = [resident.placement.adapter_slot for resident in self._residents.values()]
        assert sorted([*slots, *self._free_slots]) == list(range(self.num_slots)), "an adapter slot is lost"
        extents = sorted([*self._free, *(resident.extent for resident in self._residents.values())])
        ends = [0, *(extent.offset + extent.num_bytes for extent in extents)]
        assert ends == [*(extent.offset for extent in extents), self.num_bytes], "the arena has a gap or an overlap"
        idle = {d for d, resident in self._residents.items() if not resident.num_users and not resident.is_loading}
        assert idle == set(self._unused), "an unused version is not evictable"

    def _victims(self, size: int) -> list[str] | None:
        """Return the least recently used versions whose eviction makes room for `size`, None if none would."""
        free, num_free_slots = list(self._free), len(self._free_slots)
        victims: list[str] = []
        for digest in [*self._unused, None]:
            if num_free_slots and _first_fit(free, size):
                return victims
            if digest is not None:
                victims.append(digest)
                num_free_slots += 1
                _put(free, self._residents[digest].extent)
        return None


def _aligned(num_bytes: int) -> int:
    return max(1, -(-num_bytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES


def _first_fit(free: list[Extent], size: int) -> Extent | None:
    return next((Extent(extent.offset, size) for extent in free if extent.num_bytes >= size), None)


def _cut(free: list[Extent], taken: Extent) -> None:
    """Remove the beginning of a free extent."""
    at = next(i for i, extent in enumerate(free) if extent.offset == taken.offset)
    rest = Extent(taken.offset + taken.num_bytes, free[at].num_bytes - taken.num_bytes)
    free[at : at + 1] = [rest] if rest.num_bytes else []


def _put(free: list[Extent], extent: Extent) -> None:
    """Add an extent and join it with its neighbors."""
    insort(free, extent)
    at = free.index(extent)
    joined = free[max(0, at - 1) : at + 2]
    merged: list[Extent] = []
    for part in joined:
        if merged and merged[-1].offset + merged[-1].num_bytes == part.offset:
            merged[-1] = Extent(merged[-1].offset, merged[-1].num_bytes + part.num_bytes)
        else:
            merged.append(part)
    free[max(0, at - 1) : at + 2] = merged
