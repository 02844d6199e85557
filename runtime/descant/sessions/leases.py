"""Leases: what keeps a version on disk while a request needs it. They belong to the system and outlive any actor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class LeaseTable:
    """How many requests use each version, by digest."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.on_free: Callable[[str], None] = lambda digest: None
        """Called, without waiting, when the last use of a version has ended."""

    def lease(self) -> Lease:
        """Return a lease that holds nothing yet."""
        return Lease(self)

    def is_used(self, digest: str) -> bool:
        """Return whether some request uses the version."""
        return digest in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def add_use(self, digest: str) -> None:
        """Count a use; a `Lease` does it."""
        self._counts[digest] += 1

    def end_use(self, digest: str) -> None:
        """End a use; a `Lease` does it."""
        self._counts[digest] -= 1
        if not self._counts[digest]:
            del self._counts[digest]
            self.on_free(digest)


class Lease:
    """The versions one request uses, from before it is submitted until it has ended."""

    def __init__(self, table: LeaseTable) -> None:
        self._table = table
        self._digests: list[str] | None = []  # None: the request has ended

    def hold(self, digest: str) -> None:
        """Use a version; nothing happens if the request has ended meanwhile."""
        if self._digests is not None:
            self._digests.append(digest)
            self._table.add_use(digest)

    def release(self) -> None:
        """The request has ended. More than once is no fault."""
        digests, self._digests = self._digests or [], None
        for digest in digests:
            self._table.end_use(digest)
