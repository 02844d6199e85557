"""Loads of versions that have a place: what the executor is to do, and `LoadTurns`, the order of the reads.

At most `MAX_READS` reads are under way, which the executor carries out at once. No read is begun for a principal that
has as many under way as are left for all others. So one cold adapter never waits for all earlier loads of another
principal, and a principal that is alone gets half of the reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from descant.contract.executor import AdapterMove
from descant.contract.version import AdapterVersion

MAX_READS = 8  # under way at once

# The principals that wait for a digest; none if it is only to be pinned.
Claimants = Callable[[str], Iterable[str]]


class AdapterLoad(NamedTuple):
    """A version to be put on the device of the executor with this `epoch`; outcomes for earlier ones are ignored."""

    epoch: int
    version: AdapterVersion
    adapter_slot: int
    offset: int


class AdapterWork(NamedTuple):
    """Work for the executor, in this order: moves, then loads. `prefetches` are read into host memory only."""

    moves: tuple[AdapterMove, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()
    prefetches: tuple[AdapterVersion, ...] = ()


class LoadTurns:
    """Chooses the next load: one of the principal with fewest reads under way; among equals, of the one whose turn is
    longest ago. The loads of one principal keep their order."""

    def __init__(self) -> None:
        self._waiting: dict[str, AdapterLoad] = {}  # by digest
        self._readers: dict[str, str] = {}  # by digest being read: the principal it was chosen for
        self._last_turns: dict[str, int] = {}  # by principal, while loads wait
        self._num_turns = 0

    def add(self, load: AdapterLoad) -> None:
        """Add a load behind the others of its principals."""
        self._waiting[load.version.digest] = load

    def is_waiting(self, digest: str) -> bool:
        """Return whether the load has not begun."""
        return digest in self._waiting

    def take(self, claimants: Claimants) -> tuple[AdapterLoad, ...]:
        """Return the loads to begin now, in order.

        Args:
          claimants: returns the principals that wait for a digest.
        """
        taken: list[AdapterLoad] = []
        while self._waiting:
            num_reads = Counter(self._readers.values())
            readers = {digest: self._reader(claimants(digest), num_reads) for digest in self._waiting}
            digest = min(readers, key=lambda digest: self._priority(readers[digest], num_reads))
            reader = readers[digest]
            if num_reads[reader] >= MAX_READS - len(self._readers):
                return tuple(taken)
            taken.append(self._waiting.pop(digest))
            self._readers[digest] = reader
            self._num_turns += 1
            self._last_turns[reader] = self._num_turns
        self._last_turns.clear()
        return tuple(taken)

    def end(self, digest: str) -> None:
        """End the read of a version, successful or not. May be called again."""
        self._readers.pop(digest, None)

    def _reader(self, principals: Iterable[str], num_reads: Counter[str]) -> str:
        return min(principals, key=lambda principal: self._priority(principal, num_reads), default="")

    def _priority(self, principal: str, num_reads: Counter[str]) -> tuple[int, int]:
        return num_reads[principal], self._last_turns.get(principal, 0)
