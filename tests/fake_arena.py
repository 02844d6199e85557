"""The arena of the fake engine: it knows of every 64 bytes whose they are, and holds loads and moves to that."""

from __future__ import annotations

from descant.contract.executor import AdapterMove
from descant.scheduling.placement.loads import AdapterLoad
from descant.scheduling.placement.residency import ALIGNMENT_BYTES, aligned

Content = list[tuple[str, int] | None]  # which unit of which version; None: nothing yet


class FakeArena:
    """Loads and moves overwrite whatever is there; only who asks for a version finds out."""

    def __init__(self) -> None:
        self._slots: dict[int, AdapterLoad] = {}
        self._units: dict[int, tuple[str, int]] = {}

    def load(self, load: AdapterLoad) -> None:
        """Put a version into its slot."""
        self._slots[load.adapter_slot] = load
        self._write(load, self._content(load))

    def move(self, move: AdapterMove) -> None:
        """Move what is in a slot."""
        load = self._slots[move.adapter_slot]
        there = self._read(load)
        self._slots[move.adapter_slot] = moved = load._replace(offset=move.offset)
        self._write(moved, there)

    def digest_in(self, slot: int) -> str:
        """Return which version is in a slot, having checked that all its bytes are there."""
        load = self._slots[slot]
        assert self._read(load) == self._content(load), f"{load.version.digest} is damaged"
        return load.version.digest

    def _content(self, load: AdapterLoad) -> Content:
        return [(load.version.digest, index) for index in range(aligned(load.version.num_bytes) // ALIGNMENT_BYTES)]

    def _read(self, load: AdapterLoad) -> Content:
        first = load.offset // ALIGNMENT_BYTES
        return [self._units.get(first + index) for index in range(len(self._content(load)))]

    def _write(self, load: AdapterLoad, content: Content) -> None:
        assert load.offset % ALIGNMENT_BYTES == 0, "extents are aligned"
        first = load.offset // ALIGNMENT_BYTES
        self._units.update({first + index: unit for index, unit in enumerate(content) if unit is not None})
