"""Leases: they keep a version on disk while a request needs it. They belong to the system and outlive every actor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class LeaseTable:
    """Number of requests that use each version, by digest.

    `on_unused` is called, without waiting, with the digest of a version when its last use ends.
    """

    def __init__(self, on_unused: Callable[[str], None] = lambda digest: None) -> None:
        self._counts: Counter[str] = Counter()
        self._on_unused = on_unused

    def lease(self) -> Lease:
        """Return a lease that holds nothing yet."""
        return Lease(self)

    def is_used(self, digest: str) -> bool:
        """Return whether some request uses the version."""
        return digest in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def add_use(self, digest: str) -> None:
        """Count a use. Called by `Lease`."""
        self._counts[digest] += 1

    def end_use(self, digest: str) -> None:
        """End a use. Called by `Lease`."""
        self._counts[digest] -= 1
        if not self._counts[digest]:
            del self._counts[digest]
            self._on_unused(digest)


class Lease:
    """The versions that one request uses, from before it is submitted until it has ended."""

    def __init__(self, table: LeaseTable) -> None:
        self._table = table
        self._digests: list[str] | None = []  # None: released

    def hold(self, digest: str) -> None:
        """Use a version until the lease is released. Ignored if it has been released already."""
        if self._digests is not None:
            self._digests.append(digest)
            self._table.add_use(digest)

    def release(self) -> None:
        """End the use of every version held. Releasing twice is harmless."""
        digests, self._digests = self._digests or [], None
        for digest in digests:
            self._table.end_use(digest)
