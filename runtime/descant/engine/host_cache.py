"""`HostCache`: adapter versions in host memory, laid out for the device. Thread-safe. Does not import torch."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """An object with a known size in host memory."""

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        ...


EntryT = TypeVar("EntryT", bound=Sized)


class HostCache(Generic[EntryT]):
    """Versions by digest, in at most `max_bytes`. The least recently used version is evicted first.

    A version staged for placement is claimed: it stays until it is placed, even beyond the budget. A prefetched version
    stays while there is room. It does not evict another prefetched version that is still unused, because versions are
    prefetched in the order in which they will be needed.

    Claims belong to an epoch and end with it. Concurrent requests for one digest read it once.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, EntryT] = OrderedDict()  # least recently used first
        self._claims: Counter[str] = Counter()
        self._unused: set[str] = set()  # read, not placed yet
        self._dropped: set[str] = set()  # to be removed with the last claim
        self._flights: dict[str, _Flight[EntryT]] = {}
        self._num_bytes = 0
        self._epoch = 0

    @property
    def num_bytes(self) -> int:
        """Total size of all versions in bytes."""
        return self._num_bytes

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def begin(self, epoch: int) -> None:
        """Start a new epoch: release every claim made in earlier epochs."""
        with self._lock:
            self._begin(epoch)

    def stage(self, digest: str, num_bytes: int, read: Callable[[], EntryT], claim_epoch: int | None) -> None:
        """Bring a version into memory, calling `read` if it is absent. With `claim_epoch` it is claimed until taken.

        Without a claim the call is a prefetch. It reads nothing if there is no room for `num_bytes`, the expected size.
        Blocks while another thread reads the same digest.

        Raises:
            Exception: the error of `read`, also if another thread called it. It is not cached.
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
        """Return a version for placement and release one claim; None if it is not in memory."""
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
        """Remove a version, at once or with its last claim. A read in progress is not affected."""
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
        """Return whether a version fits beside the claimed and the unused versions."""
        kept = self._claims.keys() | self._unused
        return sum(self._entries[digest].num_bytes for digest in kept) + num_bytes <= self._max_bytes

    def _shrink(self, is_prefetch: bool = False) -> None:
        """Evict versions beyond the budget. A version larger than the whole budget is evicted once it is unclaimed."""
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
    """A read in progress."""

    def __init__(self, claim_epoch: int | None) -> None:
        self.claim_epochs = [claim_epoch]  # one per caller; None = prefetch
        self._has_ended = threading.Event()
        self._error: BaseException | None = None

    def end(self, error: BaseException | None) -> None:
        self._error = error
        self._has_ended.set()

    def block_until_ended(self) -> None:
        self._has_ended.wait()
        if self._error is not None:
            raise self._error
