"""`AdapterGate`: the queue of sequences whose adapter version is not on the device yet.

A version without a place waits without delaying other versions, but only `MAX_PASSES` sequences may pass it. After
that no sequence that came later gets an adapter until running sequences have made room for the first version. A pinned
version without a place waits in the same queue, without sequences.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from descant.contract.executor import AdapterMove
from descant.contract.plan import BASE_SPANS, NO_ADAPTER, AdapterSpan
from descant.contract.version import AdapterVersion
from descant.scheduling.placement.loads import AdapterLoad, AdapterWork, LoadTurns
from descant.scheduling.placement.residency import AdapterResidency, Placement, aligned
from descant.scheduling.sequence import Sequence, by_arrival
from descant.scheduling.waiting_versions import WaitingVersion, WaitingVersions
from descant_client.errors import AdapterTooLarge, UnsupportedRequest


class AdapterGate:
    """Gives sequences the places of their adapters. `spans` name a sequence's place, which it keeps until it leaves."""

    def __init__(self, num_slots: int, num_bytes: int, epoch: int) -> None:
        self.residency = AdapterResidency(num_slots, num_bytes)
        self.unplaceable_pins: tuple[AdapterVersion, ...] = ()
        """Versions to be pinned that can never have a place beside the pins before them."""
        self.num_sequences = 0
        """Number of sequences that wait here."""
        self._epoch = epoch
        self._waiting = WaitingVersions()
        self._loading: dict[str, list[Sequence]] = {}  # by digest, sequences with a place that is not filled yet
        self._load_turns = LoadTurns()
        self._prefetches: dict[str, AdapterVersion] = {}  # not yet taken
        self._prefetching: set[str] = set()  # digests that are being read for waiting sequences
        self._pins: dict[str, AdapterVersion] = {}
        self._unplaced_pins: dict[str, AdapterVersion] = {}  # pins that are neither pinned yet nor in the queue
        self._num_pins = 0  # pins that were added to the queue so far
        self._latest = 0  # id of the latest sequence that entered
        self._has_changed = True  # since the last `place_waiting`, which may succeed now

    @property
    def loading(self) -> list[Sequence]:
        """Sequences whose version is being read: suspects if the executor dies."""
        groups = [group for digest, group in self._loading.items() if not self._load_turns.is_waiting(digest)]
        groups += [one.sequences for digest in self._prefetching if (one := self._waiting.get(digest)) is not None]
        return [sequence for group in groups for sequence in group]

    # ---- sequences come and go ------------------------------------------------------------------------------------

    def check_fits(self, version: AdapterVersion) -> None:
        """Check that the version can ever have a place beside the pins.

        Raises:
            AdapterTooLarge, UnsupportedRequest: it cannot.
        """
        self.residency.check_fits(version, self._pins.values())

    def enter(self, sequence: Sequence) -> bool:
        """Give the sequence the place of its adapter, or add it to the queue. Return whether it may run now.

        A sequence with output was admitted before, so newer pins do not exclude it.

        Raises:
            AdapterTooLarge, UnsupportedRequest: its adapter will never have a place.
        """
        version = sequence.adapter
        if version is None:
            sequence.device.spans = BASE_SPANS
            return True
        try:
            self.check_fits(version)
        except AdapterTooLarge:
            if not sequence.output_ids:
                raise
            self._withdraw_pins()
            self.residency.check_fits(version, ())
        self._latest = max(self._latest, sequence.id)
        self.num_sequences += 1
        if self._waiting.may_enter(sequence) and (placement := self.residency.acquire(version)) is not None:
            self._waiting.on_passed(1)
            self._has_changed |= version.digest in self._waiting  # other sequences wait for it
            return self._assign(sequence, version, placement)
        insort(self._enqueue(version, (sequence.id, 0)).sequences, sequence, key=by_arrival)
        sequence.is_cold = True
        return False

    def load_if_free(self, version: AdapterVersion) -> bool:
        """Return whether the version is loaded; if not, load it if there is room. Return False while versions wait."""
        if self._waiting:
            return False
        try:
            self.check_fits(version)
        except (AdapterTooLarge, UnsupportedRequest):
            return False
        placement = self.residency.place(version)
        if placement is not None and placement.is_new:
            self._load(version, placement)
        return self.residency.is_loaded(version.digest)

    def leave(self, sequence: Sequence) -> None:
        """Take the sequence out of the queue or off its place on the device, if it has one."""
        version = sequence.adapter
        if version is None:
            return
        digest = version.digest
        if sequence.device.spans is not None:
            if sequence in self._loading.get(digest, ()):
                self._loading[digest].remove(sequence)
                self.num_sequences -= 1
            self.residency.release(digest)
            sequence.device.spans = None
            self._has_changed = True
        elif (waiting := self._waiting.get(digest)) is not None and sequence in waiting.sequences:
            waiting.sequences.remove(sequence)
            self.num_sequences -= 1
            self._update(waiting)
            self._has_changed = True

    def place_waiting(self, first: Iterable[str] = ()) -> list[Sequence]:
        """Give free places to waiting versions and return the sequences that may run now.

        The versions of `first` come before all others, in this order.
        """
        ready: list[Sequence] = []
        if not self._has_changed and not first:
            return ready
        for digest in first:
            if (waiting := self._waiting.get(digest)) is not None:
                self._place(waiting, ready)
        self._has_changed = False
        self._queue_pins()
        too_large = self.residency.num_available + 1 if self.residency.has_free_slot() else 0
        for waiting in [one for one in self._waiting if one.num_bytes < too_large or self._is_resident(one)]:
            is_first = self._waiting.is_first(waiting)
            if not is_first and not self._waiting.is_passable:
                break
            # There was no room for a version of this size or a smaller one: there is none for this one.
            if waiting.num_bytes >= too_large and not self._is_resident(waiting):
                continue
            if self._place(waiting, ready):
                self._waiting.on_passed(0 if is_first else len(waiting.sequences) or 1)
                too_large = too_large if self.residency.has_free_slot() else 0
            else:
                too_large = min(too_large, waiting.num_bytes)
        return ready

    # ---- pins and versions that are no longer wanted --------------------------------------------------------------

    def set_pins(self, versions: Iterable[AdapterVersion]) -> None:
        """Keep these versions, and no others, on the device whatever else needs room.

        Versions that can never fit beside those before them are left out: `unplaceable_pins`.
        """
        pins: dict[str, AdapterVersion] = {}
        unplaceable: list[AdapterVersion] = []
        num_free = self.residency.num_bytes
        for version in {version.digest: version for version in versions}.values():
            if len(pins) < self.residency.num_slots and aligned(version.num_bytes) <= num_free:
                pins[version.digest] = version
                num_free -= aligned(version.num_bytes)
            else:
                unplaceable.append(version)
        for digest in self._pins.keys() - pins.keys():
            self.residency.unpin(digest)
            if (waiting := self._waiting.get(digest)) is not None:
                waiting.is_pin = False
                self._update(waiting)
        self._pins, self.unplaceable_pins = pins, tuple(unplaceable)
        self._unplaced_pins = {digest: version for digest, version in pins.items() if not self._is_taken(digest)}
        self._has_changed = True

    def forget_version(self, digest: str) -> None:
        """Free the version's place as soon as no sequence uses it."""
        if (waiting := self._waiting.get(digest)) is not None:
            waiting.is_doomed = True
        self.residency.doom(digest)
        self._has_changed = True

    # ---- work for the executor -----------------------------------------------------------------------------------

    def take_work(self) -> AdapterWork:
        """Return the moves, loads and prefetches to begin now. Loads wait for their turn: `LoadTurns`."""
        loads = self._load_turns.take(self._principals)
        prefetches, self._prefetches = self._prefetches, {}
        waiting = tuple(version for digest, version in prefetches.items() if digest in self._waiting)
        self._prefetching.update(version.digest for version in waiting)
        moves = tuple(AdapterMove(moved.adapter_slot, moved.offset) for moved in self.residency.take_moves())
        return AdapterWork(moves, loads, waiting)

    def on_prefetch_done(self, digest: str) -> None:
        """Mark the prefetch of `digest` as finished."""
        self._prefetching.discard(digest)

    def on_staged(self, load: AdapterLoad) -> None:
        """Record that the version is in host memory, so that other versions may be read meanwhile."""
        self._load_turns.end(load.version.digest)

    def on_placed(self, load: AdapterLoad) -> list[Sequence]:
        """Record that the version is in its place; return the sequences that waited for it."""
        digest = load.version.digest
        self.residency.on_placed(digest)
        if digest in self._pins and not self.residency.is_pinned(digest):
            self._unplaced_pins[digest] = load.version
        self._has_changed = True
        return self._end_load(digest)

    def on_load_failed(self, load: AdapterLoad) -> list[Sequence]:
        """Free the version's place; return the sequences that waited for it. They lose their place too.

        A pin whose load failed is tried again at the next `set_pins`, or when a sequence gets its version loaded.
        """
        sequences = self._end_load(load.version.digest)
        for sequence in sequences:
            self.leave(sequence)
        self.residency.forget(load.version.digest)
        self._has_changed = True
        return sequences

    def _principals(self, digest: str) -> set[str]:
        return {sequence.request.principal for sequence in self._loading[digest]}

    def _end_load(self, digest: str) -> list[Sequence]:
        self._load_turns.end(digest)
        sequences = self._loading.pop(digest)
        self.num_sequences -= len(sequences)
        return sequences

    # ---- the queue ------------------------------------------------------------------------------------------------

    def _enqueue(self, version: AdapterVersion, turn: tuple[int, int]) -> WaitingVersion:
        """Return the version's entry in the queue, with a turn no later than `turn`; prefetch a new one."""
        if version.digest not in self._waiting:
            self._prefetches[version.digest] = version
        return self._waiting.add(version, turn)

    def _update(self, waiting: WaitingVersion) -> None:
        """Update an entry that a sequence or a pin has left."""
        self._waiting.update(waiting)
        if waiting.version.digest not in self._waiting:
            self._prefetching.discard(waiting.version.digest)

    def _place(self, waiting: WaitingVersion, ready: list[Sequence]) -> bool:
        """Give a version a place and return whether there was one; add its sequences that may run to `ready`."""
        version = waiting.version
        placement = self.residency.place(version)
        if placement is None:
            return False
        self._waiting.remove(waiting)
        if placement.is_new:
            self._load(version, placement)
        if waiting.is_pin:
            self.residency.pin(version.digest)
        for sequence in waiting.sequences:
            acquired = self.residency.acquire(version)
            assert acquired is not None, "a version with a place can always be used once more"
            if self._assign(sequence, version, acquired):
                ready.append(sequence)
        if waiting.is_doomed:
            self.residency.doom(version.digest)
        return True

    def _assign(self, sequence: Sequence, version: AdapterVersion, placement: Placement) -> bool:
        """Give a sequence its place, and return whether the version is loaded."""
        sequence.device.spans = (AdapterSpan(0, placement.adapter_slot),) if version.num_modules else BASE_SPANS
        sequence.device.heads_slot = placement.adapter_slot if version.num_heads else NO_ADAPTER
        if placement.is_new:
            self._load(version, placement)
        if version.digest in self._loading:
            self._loading[version.digest].append(sequence)
            sequence.is_cold = True
            return False
        self.num_sequences -= 1
        return True

    def _load(self, version: AdapterVersion, placement: Placement) -> None:
        self._prefetching.discard(version.digest)
        self._loading[version.digest] = []
        self._load_turns.add(AdapterLoad(self._epoch, version, placement.adapter_slot, placement.offset))

    def _queue_pins(self) -> None:
        """Pin the versions that have a place already, and queue the other pins.

        A pin is not queued while it would leave another version of the queue without a place for good: versions before
        it have passed `check_fits` without the pin, and versions after it are checked with it.
        """
        if not self._unplaced_pins:
            return
        others = [waiting.num_bytes for waiting in self._waiting if not waiting.is_pin]
        for digest, version in list(self._unplaced_pins.items()):
            taken = [aligned(pin.num_bytes) for pin in self._pins.values() if self._is_taken(pin.digest)]
            num_bytes = sum(taken) + aligned(version.num_bytes) + max(others, default=0)
            if num_bytes > self.residency.num_bytes or len(taken) + 1 + bool(others) > self.residency.num_slots:
                continue
            del self._unplaced_pins[digest]
            if self.residency.is_resident(digest):
                self.residency.pin(digest)
            else:
                self._num_pins += 1
                self._enqueue(version, (self._latest, self._num_pins)).is_pin = True

    def _withdraw_pins(self) -> None:
        """Give up all claims of pins, so that an admitted sequence gets its place. They are queued again after it."""
        for digest in self._pins:
            self.residency.unpin(digest)
            if (waiting := self._waiting.get(digest)) is not None and waiting.is_pin:
                waiting.is_pin = False
                self._update(waiting)
        self._unplaced_pins = dict(self._pins)
        self._has_changed = True

    def _is_resident(self, waiting: WaitingVersion) -> bool:
        return self.residency.is_resident(waiting.version.digest)

    def _is_taken(self, digest: str) -> bool:
        """Return whether a pin has its place or is in the queue."""
        waiting = self._waiting.get(digest)
        return self.residency.is_pinned(digest) or (waiting is not None and waiting.is_pin)
