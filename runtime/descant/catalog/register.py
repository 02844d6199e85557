"""`Register`: the catalog and its journal, changed together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from descant.catalog.catalog import Catalog
from descant.catalog.entry import SHARED, Entry, Key
from descant.catalog.journal import Journal
from descant_client.errors import AdapterNotFound

Edit = Callable[[Entry | None], Entry | None]
"""What becomes of an entry (None: of a name that is not there); None removes it. It may refuse by raising."""


class Register:
    """What is in the catalog is in the journal. Belongs to one life of the registry."""

    def __init__(self, catalog: Catalog, journal: Journal) -> None:
        self.catalog = catalog
        self._journal = journal
        self._writing = anyio.Lock()
        self._making: dict[Key, tuple[anyio.Lock, list[None]]] = {}

    async def change(self, key: Key, edit: Edit) -> tuple[Entry | None, Entry | None]:
        """Edit an entry, durably; return it as it was and as it is now. `edit` sees what every change before left.

        Raises:
            InternalError: the journal could not be written, and nothing has changed. DescantError: what `edit` raised.
        """
        async with self._writing:  # a write at a time: that is what the journal's thread does anyway
            before = self.catalog.get(key)
            after = edit(before)
            if after == before:
                return before, after
            if after is None:
                await self._journal.apply([], [key])
                self.catalog.remove(key)
            else:
                await self._journal.apply([after])
                self.catalog.put(after)
            return before, after

    @asynccontextmanager
    async def turn_for(self, find: Callable[[], Key]) -> AsyncIterator[Key]:
        """Wait for one's turn to put new content under the name that `find` says, which may change while one waits.

        Slow changes of one name happen one after the other, in the order they came; other names are not held up.

        Raises:
            AdapterNotFound: the caller's own adapter is gone when its turn comes, and the name now means the shared
            one, which nobody asked to change. Also what `find` raises.
        """
        is_own = False
        while True:
            key = find()
            if is_own and key[0] == SHARED:
                raise AdapterNotFound(key[1])
            is_own = key[0] != SHARED
            async with self._turn(key):
                if find() == key:
                    yield key
                    return

    @asynccontextmanager
    async def _turn(self, key: Key) -> AsyncIterator[None]:
        lock, waiting = self._making.setdefault(key, (anyio.Lock(), []))
        waiting.append(None)
        try:
            async with lock:
                yield
        finally:
            waiting.pop()
            if not waiting:
                del self._making[key]
