"""`HostCache`: adapter versions in host memory, laid out and ready for the device. Any thread may call it. No torch."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that takes host memory."""

    @property
    def num_bytes(self) -> int:
        """How much."""
        ...


EntryT = TypeVar("EntryT", bound=Sized)


class HostCache(Generic[EntryT]):
    """Versions by digest, in at most `max_bytes`, the least recently used going first.

    What is staged to be placed is claimed, and stays until it has been, whatever it takes. What is only prefetched is
    kept as long as there is room, and takes none from another prefetched version that nobody has used yet: versions
    are prefetched in the order in which they will be needed.

    Claims belong to an epoch; they end with it. A digest is read once, however many ask for it meanwhile.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, EntryT] = OrderedDict()  # least recently used first
        self._claims: Counter[str] = Counter()
        self._unused: set[str] = set()  # prefetched, not placed yet
        self._dropped: set[str] = set()  # forgotten, but still claimed
        self._flights: dict[str, _Flight[EntryT]] = {}
        self._num_bytes = 0
        self._epoch = 0

    @property
    def num_bytes(self) -> int:
        """What all versions take now."""
        return self._num_bytes

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def begin(self, epoch: int) -> None:
        """Another scheduler speaks: claims of earlier epochs are void."""
        with self._lock:
            self._begin(epoch)

    def stage(self, digest: str, num_bytes: int, read: Callable[[], EntryT], claim_epoch: int | None) -> None:
        """Have a version in memory, calling `read` if it is not there; with `claim_epoch` it stays until it is taken.

        A prefetch, without a claim, that would find no room (`num_bytes` is what it is expected to take) reads nothing.

        Raises:
            Exception: what `read` raised, whichever caller it read for. It is not remembered.
        """
        with self._lock:
            if claim_epoch is not None:
                self._begin(claim_epoch)
            if digest in self._entries:
                return self._keep(digest, self._entries[digest], claim_epoch)
            flight = self._flights.get(digest)
            if flight is None and claim_epoch is None and not self._has_room(num_bytes):
                return None
            if flight is not None:
                flight.claim_epochs.append(claim_epoch)
            else:
                self._flights[digest] = _Flight(claim_epoch)
        if flight is not None:
            return flight.block_until_ended()
        return self._fly(digest, read)

    def take(self, digest: str) -> EntryT | None:
        """Return a version to be placed, consuming a claim; None if it is not there."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                return None
            self._claims -= Counter([digest])
            self._unused.discard(digest)
            self._entries.move_to_end(digest)
            if digest in self._dropped and digest not in self._claims:
                self._remove(digest)
            self._shrink()
            return entry

    def drop(self, digest: str) -> None:
        """Forget a version, or let it go with its last claim. What is being read now is not meant."""
        with self._lock:
            if digest in self._claims:
                self._dropped.add(digest)
            else:
                self._remove(digest)

    def _fly(self, digest: str, read: Callable[[], EntryT]) -> None:
        flight = self._flights[digest]
        try:
            entry = read()
        except BaseException as error:
            with self._lock:
                del self._flights[digest]
            flight.end(error)
            raise
        with self._lock:
            del self._flights[digest]
            for claim_epoch in flight.claim_epochs:
                self._keep(digest, entry, claim_epoch)
        flight.end(None)

    def _begin(self, epoch: int) -> None:
        if epoch > self._epoch:
            self._epoch = epoch
            self._claims.clear()
            self._shrink()

    def _keep(self, digest: str, entry: EntryT, claim_epoch: int | None) -> None:
        if digest not in self._entries:
            self._entries[digest] = entry
            self._num_bytes += entry.num_bytes
            self._unused.add(digest)
        self._entries.move_to_end(digest)
        if claim_epoch is not None and claim_epoch == self._epoch:
            self._claims[digest] += 1
        self._shrink(is_prefetch=claim_epoch is None)

    def _has_room(self, num_bytes: int) -> bool:
        """Whether a version fits beside what is claimed and what was prefetched and not used."""
        kept = self._claims.keys() | self._unused
        return sum(self._entries[digest].num_bytes for digest in kept) + num_bytes <= self._max_bytes

    def _shrink(self, is_prefetch: bool = False) -> None:
        """Let go of what is over the budget. What is larger than all of it goes as soon as it is not claimed."""
        if self._num_bytes <= self._max_bytes:
            return
        large = [digest for digest, entry in self._entries.items() if entry.num_bytes > self._max_bytes]
        for digest in large:
            if digest not in self._claims:
                self._remove(digest)
        excess = self._num_bytes - self._max_bytes
        excess -= sum(self._entries[digest].num_bytes for digest in large if digest in self._entries)
        loose = [digest for digest in self._entries if digest not in self._claims]
        if is_prefetch:
            loose.sort(key=self._unused.__contains__)
        for digest in loose:
            if excess > 0:
                excess -= self._entries[digest].num_bytes
                self._remove(digest)

    def _remove(self, digest: str) -> None:
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self._num_bytes -= entry.num_bytes
        self._claims.pop(digest, None)
        self._unused.discard(digest)
        self._dropped.discard(digest)


class _Flight(Generic[EntryT]):
    """A version that is being read."""

    def __init__(self, claim_epoch: int | None) -> None:
        self.claim_epochs = [claim_epoch]  # of all who want it
        self._has_ended = threading.Event()
        self._error: BaseException | None = None

    def end(self, error: BaseException | None) -> None:
        self._error = error
        self._has_ended.set()

    def block_until_ended(self) -> None:
        self._has_ended.wait()
        if self._error is not None:
            raise self._error
