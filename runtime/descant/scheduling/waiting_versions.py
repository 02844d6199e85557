"""`WaitingVersions`: the queue of the adapter gate."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from descant.contract.version import AdapterVersion
from descant.scheduling.placement.residency import aligned
from descant.scheduling.sequence import Sequence

MAX_PASSES = 64  # sequences that may get an adapter while an earlier one waits for a place for its own


@dataclass(slots=True, eq=False)
class WaitingVersion:
    """A version that waits for a place, and the sequences that wait for it."""

    version: AdapterVersion
    turn: tuple[int, int]  # of the first sequence or pin: its id, and the number of the pin
    num_bytes: int  # aligned size in the arena
    sequences: list[Sequence] = field(default_factory=list[Sequence])  # in order of arrival
    is_pin: bool = False
    is_doomed: bool = False  # to be forgotten once no sequence uses it


def by_turn(waiting: WaitingVersion) -> tuple[int, int]:
    """Sort key: order of turns."""
    return waiting.turn


class WaitingVersions:
    """Versions without a place, in order of their turns. `MAX_PASSES` sequences may pass the first one."""

    def __init__(self) -> None:
        self._by_digest: dict[str, WaitingVersion] = {}
        self._order: list[WaitingVersion] = []  # the same, in order of turns
        self._num_passes = 0  # sequences that passed the first version

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[WaitingVersion]:
        return iter(self._order)

    def __contains__(self, digest: str) -> bool:
        return digest in self._by_digest

    def get(self, digest: str) -> WaitingVersion | None:
        """Return the entry of a version; None if it does not wait."""
        return self._by_digest.get(digest)

    def is_first(self, waiting: WaitingVersion) -> bool:
        """Return whether the entry is the first of the queue."""
        return self._order[0] is waiting

    @property
    def is_passable(self) -> bool:
        """Whether further sequences may pass the first version."""
        return self._num_passes < MAX_PASSES

    def may_enter(self, sequence: Sequence) -> bool:
        """Return whether a sequence may get a place now, because it passes no version or may pass the first one."""
        return not self._order or self.is_passable or (sequence.id, 0) < self._order[0].turn

    def on_passed(self, num_sequences: int) -> None:
        """Count sequences that got a place before the first version, if any waits."""
        if self._order:
            self._num_passes += num_sequences

    def add(self, version: AdapterVersion, turn: tuple[int, int]) -> WaitingVersion:
        """Return the version's entry, made or moved forward so that its turn is no later than `turn`."""
        waiting = self._by_digest.get(version.digest)
        if waiting is None:
            waiting = self._by_digest[version.digest] = WaitingVersion(version, turn, aligned(version.num_bytes))
            insort(self._order, waiting, key=by_turn)
        elif turn < waiting.turn:
            self._unqueue(waiting)
            waiting.turn = turn
            insort(self._order, waiting, key=by_turn)
        return waiting

    def update(self, waiting: WaitingVersion) -> None:
        """Update the turn of an entry that a sequence or a pin has left; remove it if nothing waits for it any more."""
        if not waiting.sequences and not waiting.is_pin:
            self.remove(waiting)
        elif not waiting.is_pin:
            self._unqueue(waiting)
            waiting.turn = (waiting.sequences[0].id, 0)
            insort(self._order, waiting, key=by_turn)

    def remove(self, waiting: WaitingVersion) -> None:
        """Remove an entry. If it is the first, the next first has not been passed yet."""
        if self.is_first(waiting):
            self._num_passes = 0
        self._unqueue(waiting)
        del self._by_digest[waiting.version.digest]

    def _unqueue(self, waiting: WaitingVersion) -> None:
        del self._order[bisect_left(self._order, waiting.turn, key=by_turn)]
