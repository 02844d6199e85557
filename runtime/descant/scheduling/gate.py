"""`AdapterGate`: where sequences wait until their adapter version is on the device.

A version without a place waits without holding up the others, but only so many may pass it: then nobody who came
later gets an adapter until the running ones have made room for it.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from descant.scheduling.plan import NO_ADAPTER, AdapterSpan
from descant.scheduling.residency import AdapterResidency, Placement
from descant.scheduling.sequence import Sequence, by_arrival
from descant.scheduling.version import AdapterVersion

MAX_PASSES = 64  # sequences that may get an adapter while an earlier one waits for a place for its own
BASE_SPANS = (AdapterSpan(0, NO_ADAPTER),)


class AdapterLoad(NamedTuple):
    """A version to be put on the device. `epoch` tells a late answer from one about the present executor."""

    epoch: int
    version: AdapterVersion
    adapter_slot: int
    offset: int


class AdapterGate:
    """A sequence that went through holds its adapter's place, and its `spans` say so, until it leaves."""

    def __init__(self, num_slots: int, num_bytes: int, epoch: int) -> None:
        self.residency = AdapterResidency(num_slots, num_bytes)
        self._epoch = epoch
        self._queue: dict[str, list[Sequence]] = {}  # by digest, those without a place, in order of arrival
        self._loading: dict[str, list[Sequence]] = {}  # by digest, those with a place where nothing is yet
        self._loads: list[AdapterLoad] = []  # not yet taken
        self._num_passes = 0  # since the first in the queue has been first

    @property
    def num_sequences(self) -> int:
        """Sequences that wait here."""
        return sum(len(group) for groups in (self._queue, self._loading) for group in groups.values())

    @property
    def loading(self) -> list[Sequence]:
        """Sequences that wait for a load."""
        return [sequence for group in self._loading.values() for sequence in group]

    def enter(self, sequence: Sequence) -> bool:
        """Return whether the sequence may run now; otherwise it waits here.

        Raises:
            AdapterTooLarge, UnsupportedRequest: its adapter will never have a place.
        """
        version = sequence.adapter
        if version is None:
            sequence.spans = BASE_SPANS
            return True
        self.residency.check_fits(version)
        if self._may_pass(sequence) and (placement := self.residency.acquire(version)) is not None:
            self._num_passes += bool(self._queue)
            return self._hold(sequence, version, placement)
        insort(self._queue.setdefault(version.digest, []), sequence, key=by_arrival)
        return False

    def leave(self, sequence: Sequence) -> None:
        """Give up the sequence's place here or on the device; it may have none."""
        version = sequence.adapter
        if version is None:
            return
        groups = self._queue if sequence.spans is None else self._loading
        if sequence in groups.get(version.digest, ()):
            groups[version.digest].remove(sequence)
        if sequence.spans is not None:
            self.residency.release(version.digest)
            sequence.spans = None
        elif self._queue.get(version.digest) == []:
            del self._queue[version.digest]

    def open(self) -> list[Sequence]:
        """Give places that have become free to those who wait; return the sequences that may run now."""
        if not self._queue or not self.residency.has_free_slot():
            return []
        ready: list[Sequence] = []
        is_first, num_passed = True, 0
        for digest, group in sorted(self._queue.items(), key=lambda item: item[1][0].id):
            placement = self._place(group)
            if placement is None:
                is_first = False
                if self._num_passes + num_passed >= MAX_PASSES or not self.residency.has_free_slot():
                    break
                continue
            ready += self._let_in(digest, group, placement)
            num_passed = 0 if is_first else num_passed + len(group)
            self._num_passes = 0 if is_first else self._num_passes
        self._num_passes += num_passed
        return ready

    def take_loads(self) -> list[AdapterLoad]:
        """Return the loads decided since the last call."""
        loads, self._loads = self._loads, []
        return loads

    def loaded(self, load: AdapterLoad) -> list[Sequence]:
        """The version is in its place; return the sequences that waited for it."""
        self.residency.loaded(load.version.digest)
        return self._loading.pop(load.version.digest)

    def load_failed(self, load: AdapterLoad) -> list[Sequence]:
        """The version is not in its place; return the sequences that waited for it. They no longer hold it."""
        sequences = self._loading.pop(load.version.digest)
        for sequence in sequences:
            self.leave(sequence)
        self.residency.forget(load.version.digest)
        return sequences

    def _may_pass(self, sequence: Sequence) -> bool:
        if not self._queue or self._num_passes < MAX_PASSES:
            return True
        return sequence.id < min(group[0].id for group in self._queue.values())

    def _place(self, group: list[Sequence]) -> Placement | None:
        assert group[0].adapter is not None, "only sequences with an adapter wait in the queue"
        return self.residency.acquire(group[0].adapter)

    def _let_in(self, digest: str, group: list[Sequence], placement: Placement) -> list[Sequence]:
        del self._queue[digest]
        ready: list[Sequence] = []
        for sequence in group:
            version = sequence.adapter
            assert version is not None, "only sequences with an adapter wait in the queue"
            held = placement if sequence is group[0] else self.residency.acquire(version)
            assert held is not None, "a version with a place can always be used once more"
            if self._hold(sequence, version, held):
                ready.append(sequence)
        return ready

    def _hold(self, sequence: Sequence, version: AdapterVersion, placement: Placement) -> bool:
        sequence.spans = (AdapterSpan(0, placement.adapter_slot),)
        if placement.is_new:
            self._loading[version.digest] = []
            self._loads.append(AdapterLoad(self._epoch, version, placement.adapter_slot, placement.offset))
        if version.digest in self._loading:
            self._loading[version.digest].append(sequence)
            return False
        return True
