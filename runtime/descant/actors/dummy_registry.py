"""The registry of the dummy engine: every adapter exists, and changes apply to names only, with the catalog's rules.

Accepts: ResolveAdapters, ListRegistered, ChangeAdapter, VersionFailed, VersionUnused, PinsRefused. Asks: no actor.
Owns: the names that were made, for this life only.
"""

from __future__ import annotations

import hashlib

import msgspec

from descant.actor.actor import Actor
from descant.catalog.catalog import Catalog
from descant.catalog.entry import SHARED, Entry, Key
from descant.config import AdapterEntry
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.messages import (
    AdapterList,
    ChangeAdapter,
    ListRegistered,
    PinsRefused,
    RegistryMessage,
    ResolveAdapters,
    VersionFailed,
    VersionUnused,
)
from descant.sources.grammar import check_name, parse_reference
from descant_client.errors import AdapterNotFound
from descant_client.lifecycle import (
    AdapterChange,
    AdapterInfo,
    CreateAdapter,
    DestroyAdapter,
    DisableAdapter,
    EnableAdapter,
    ForkAdapter,
    LoadAdapter,
    MergeAdapters,
    PinAdapter,
    UnpinAdapter,
)

NUM_BYTES = 64
SOURCE = "dummy"


class DummyRegistry(Actor[RegistryMessage]):
    """A stand-in for the registry, for client developers. It reads no files."""

    def __init__(self, entries: list[AdapterEntry]) -> None:
        names = [entry.name for entry in entries]
        self._catalog = Catalog(
            Entry(owner=SHARED, name=name, position=position, source=SOURCE) for position, name in enumerate(names)
        )

    async def on_receive(self, message: RegistryMessage) -> AdapterVersion | AdapterList | None:
        """Answer one message."""
        match message:
            case ResolveAdapters(members, source=source):
                for member in members:
                    parse_reference(member.adapter, source)
                digest = hashlib.sha256(repr(members).encode()).hexdigest()
                return AdapterVersion(digest=digest, path="", num_bytes=NUM_BYTES, max_rank=1, num_modules=1)
            case ListRegistered(principal, name):
                return self._list(principal, name)
            case ChangeAdapter(principal, change):
                entry = self._change(principal, change)
                return AdapterList(() if entry is None else (entry.info(),))
            case VersionFailed() | VersionUnused() | PinsRefused():
                return None

    def _list(self, principal: Principal, name: str | None) -> AdapterList:
        if name is None:
            return AdapterList(tuple(entry.info() for entry in self._catalog.visible(principal)))
        try:
            return AdapterList((self._catalog.require(principal, name).info(),))
        except AdapterNotFound:
            return AdapterList((AdapterInfo(name=name, source=SOURCE),))  # every adapter exists

    def _change(self, principal: Principal, change: AdapterChange) -> Entry | None:
        match change:
            case CreateAdapter(_, name, is_shared=is_shared) | ForkAdapter(_, _, name, is_shared):
                return self._put(self._catalog.new_key(principal, name, is_shared=is_shared))
            case LoadAdapter(_, name, is_shared=is_shared) | MergeAdapters(_, name, is_shared=is_shared):
                return self._put(self._catalog.target_key(principal, name, is_shared=is_shared))
            case PinAdapter(_, name):
                return self._put(self._key(principal, name), is_pinned=True)
            case UnpinAdapter(_, name):
                return self._put(self._key(principal, name), is_pinned=False)
            case EnableAdapter(_, name):
                return self._put(self._key(principal, name), is_enabled=True)
            case DisableAdapter(_, name):
                return self._put(self._key(principal, name), is_enabled=False)
            case DestroyAdapter(_, name):
                return self._catalog.remove(self._key(principal, name))
            case _:  # nothing is written
                return self._put(self._key(principal, change.name))

    def _key(self, principal: Principal, name: str) -> Key:
        return self._catalog.target_key(principal, check_name(name), is_shared=False)

    def _put(self, key: Key, **flags: bool) -> Entry:
        owner, name = key
        position = self._catalog.next_position
        entry = self._catalog.get(key) or Entry(owner=owner, name=name, position=position, source=SOURCE)
        self._catalog.put(msgspec.structs.replace(entry, **flags))
        return msgspec.structs.replace(entry, **flags)
