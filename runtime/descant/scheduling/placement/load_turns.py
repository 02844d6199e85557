"""`LoadTurns`: in which order versions that have their place are read.

Only so many reads are begun as the executor carries out at once, and none is begun for a principal that has as many
under way as are left for all others. So one cold adapter never waits for all that another principal has asked for
before, and whoever is alone gets half of the reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from descant.scheduling.placement.adapter_work import AdapterLoad

MAX_READS = 8  # under way at once

# The principals that wait for a digest; none if it is only to be pinned.
Claimants = Callable[[str], Iterable[str]]


class LoadTurns:
    """The next load is one that the principal with the fewest under way waits for; among equals, whose turn is longest
    ago. The loads of one principal keep their order."""

    def __init__(self) -> None:
        self._waiting: dict[str, AdapterLoad] = {}  # by digest
        self._readers: dict[str, str] = {}  # by digest being read: the principal it was chosen for
        self._last_turns: dict[str, int] = {}  # by principal, while loads wait
        self._num_turns = 0

    def add(self, load: AdapterLoad) -> None:
        """Let it wait behind what its principals wait for already."""
        self._waiting[load.version.digest] = load

    def is_waiting(self, digest: str) -> bool:
        """Whether the load has not begun."""
        return digest in self._waiting

    def take(self, claimants: Claimants) -> tuple[AdapterLoad, ...]:
        """Return the loads to begin now, in order."""
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
        """The version has been read, or never will be; again is as well as once."""
        self._readers.pop(digest, None)

    def _reader(self, principals: Iterable[str], num_reads: Counter[str]) -> str:
        return min(principals, key=lambda principal: self._priority(principal, num_reads), default="")

    def _priority(self, principal: str, num_reads: Counter[str]) -> tuple[int, int]:
        return num_reads[principal], self._last_turns.get(principal, 0)
