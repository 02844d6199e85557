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
"""Returns the new entry for the current one (None: no such name). None removes it. May raise to refuse."""


class Register:
    """The catalog of one life of the registry, kept equal to the journal."""

    def __init__(self, catalog: Catalog, journal: Journal) -> None:
        self.catalog = catalog
        self._journal = journal
        self._writing = anyio.Lock()
        self._turns: dict[Key, _Turn] = {}  # of slow changes, running or waiting

    async def change(self, key: Key, edit: Edit) -> tuple[Entry | None, Entry | None]:
        """Edit an entry, durably, after all edits before it. Return the entry before and after.

        Raises:
            InternalError: the journal could not be written; nothing has changed. DescantError: raised by `edit`.
        """
        async with self._writing:  # one at a time, as on the journal's thread
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
        """Wait for the turn of a slow change of one name, and yield its key.

        Slow changes of one name happen one after the other, in order of arrival; other names are not delayed. `find`
        returns the key; it is called again after waiting, as the name may then mean another entry.

        Raises:
            AdapterNotFound: the caller's own adapter was destroyed meanwhile, so that the name means the shared one,
            which this change is not for. Others as `find`.
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
        turn = self._turns.setdefault(key, _Turn())
        turn.num_users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.num_users -= 1
            if not turn.num_users:
                del self._turns[key]


class _Turn:
    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.num_users = 0  # running or waiting
