"""`Catalog`: registered names, their owners, and the rules of use and change. Pure.

A name belongs to a principal or is shared (`SHARED`). A plain name in a request means the caller's own adapter before
the shared one. Only an administrator may change shared adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from descant.catalog.entry import SHARED, Entry, Key
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.sources.grammar import check_name
from descant_client.errors import AdapterExists, AdapterForbidden, AdapterNotFound


class Catalog:
    """Every registered name. Entries are immutable: a change replaces an entry."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[str, dict[str, Entry]] = {}  # by owner and name
        self._num_names: Counter[str] = Counter()  # by digest
        self._next_position = 0
        for entry in entries:
            self.put(entry)

    # ---- look-ups -------------------------------------------------------------------------------------------------

    def get(self, key: Key) -> Entry | None:
        """Return the entry of exactly this owner and name."""
        owner, name = key
        return self._entries.get(owner, {}).get(name)

    def find(self, principal: Principal, name: str) -> Entry | None:
        """Return the entry that a name means to a principal: its own, else the shared one, else None."""
        return self.get((principal.name, name)) or self.get((SHARED, name))

    def require(self, principal: Principal, name: str) -> Entry:
        """Return the entry that a name means to a principal, as `find`. Raises AdapterNotFound."""
        entry = self.find(principal, name)
        if entry is None:
            raise AdapterNotFound(name)
        return entry

    def require_owned(self, principal: Principal, name: str) -> Entry:
        """Return the entry that a name means to a principal, which must be allowed to change it.

        Raises:
            AdapterNotFound: no such name. AdapterForbidden: it is shared and the principal is no administrator.
        """
        entry = self.require(principal, name)
        check_owner(principal, entry.key)
        return entry

    def new_key(self, principal: Principal, name: str, *, is_shared: bool) -> Key:
        """Return the key of a new name.

        Raises:
            InvalidRequest: it is no name. AdapterForbidden: only administrators share. AdapterExists: it is taken.
        """
        key = (SHARED if is_shared else principal.name, check_name(name))
        check_owner(principal, key)
        if self.get(key) is not None:
            raise AdapterExists(name)
        return key

    def target_key(self, principal: Principal, name: str, *, is_shared: bool) -> Key:
        """Return the key that new content is put under: the caller's own name, else the shared one, else a new one.

        With `is_shared` it is the shared name, new or not. Raises InvalidRequest and AdapterForbidden as `new_key`.
        """
        key = (SHARED if is_shared else principal.name, check_name(name))
        if self.get(key) is None and self.get((SHARED, name)) is not None:
            key = (SHARED, name)
        check_owner(principal, key)
        return key

    def visible(self, principal: Principal) -> list[Entry]:
        """Return the entries a principal may use, in order of registration. Its own hide shared ones of equal name."""
        mine = self._entries.get(SHARED, {}) | self._entries.get(principal.name, {})
        return sorted(mine.values(), key=lambda entry: entry.position)

    def owned(self, owner: str) -> Iterable[Entry]:
        """Return the entries of one owner."""
        return self._entries.get(owner, {}).values()

    def pinned(self) -> list[Entry]:
        """Return the pinned entries, in order of registration."""
        return sorted((entry for entry in self if entry.is_pinned), key=lambda entry: entry.position)

    def is_named(self, digest: str) -> bool:
        """Return whether some name stands for this version."""
        return digest in self._num_names

    @property
    def next_position(self) -> int:
        """Position of the next new name."""
        return self._next_position

    def __iter__(self) -> Iterator[Entry]:
        return chain.from_iterable(names.values() for names in self._entries.values())

    def __len__(self) -> int:
        return sum(len(names) for names in self._entries.values())

    # ---- changing -------------------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> None:
        """Add an entry, replacing the one of the same owner and name."""
        self.remove(entry.key)
        self._entries.setdefault(entry.owner, {})[entry.name] = entry
        self._next_position = max(self._next_position, entry.position + 1)
        if entry.version is not None:
            self._num_names[entry.version.digest] += 1

    def remove(self, key: Key) -> None:
        """Remove a name. An unknown one is ignored."""
        owner, name = key
        names = self._entries.get(owner, {})
        entry = names.pop(name, None)
        if not names:
            self._entries.pop(owner, None)
        if entry is not None and entry.version is not None:
            self._num_names[entry.version.digest] -= 1
            if not self._num_names[entry.version.digest]:
                del self._num_names[entry.version.digest]


def check_owner(principal: Principal, key: Key) -> None:
    """Check that a principal may change a name. Raises AdapterForbidden."""
    owner, name = key
    if owner == SHARED and not principal.is_admin:
        raise AdapterForbidden(name, "it is shared, and only an administrator may change shared adapters.")


def version_of(entry: Entry | None) -> AdapterVersion | None:
    """Return the version of an entry, None without an entry."""
    return None if entry is None else entry.version
