"""The adapters of the fake server: names without content, changed according to the protocol."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from descant_client.errors import AdapterExists, AdapterNotFound
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


def digest_of(number: int) -> str:
    """Return the digest made by change number `number`, counted from 1."""
    return hashlib.sha256(str(number).encode()).hexdigest()


class FakeCatalog:
    """Adapters by name. Every change of content makes a new digest."""

    def __init__(self, names: Iterable[str]) -> None:
        self._adapters = {name: AdapterInfo(name, "local") for name in names}
        self.num_changes: Counter[str] = Counter()  # by name

    def all(self, name: str | None = None) -> list[AdapterInfo]:
        """Return every adapter, or those of one name."""
        return [adapter for adapter in self._adapters.values() if name in (None, adapter.name)]

    def change(self, change: AdapterChange) -> list[AdapterInfo]:
        """Make a change and return the adapters of its answer."""
        self.num_changes[change.name] += 1
        match change:
            case CreateAdapter(_, name, rank=rank, is_shared=is_shared):
                return self._add(AdapterInfo(name, "create", self._digest(), rank, 64 * rank, is_shared))
            case ForkAdapter(_, name, new_name, is_shared):
                forked = msgspec.structs.replace(self._found(name), name=new_name, is_shared=is_shared)
                return self._add(forked)
            case LoadAdapter(_, name, ref, is_shared=is_shared):
                self._adapters[name] = AdapterInfo(name, ref, self._digest(), 16, 1024, is_shared)
                return [self._adapters[name]]
            case MergeAdapters(_, name, is_shared=is_shared):
                self._adapters[name] = AdapterInfo(name, "merge", self._digest(), 16, 1024, is_shared)
                return [self._adapters[name]]
            case PinAdapter(_, name) | UnpinAdapter(_, name):
                return self._set(name, is_pinned=isinstance(change, PinAdapter))
            case EnableAdapter(_, name) | DisableAdapter(_, name):
                return self._set(name, is_enabled=isinstance(change, EnableAdapter))
            case DestroyAdapter(_, name):
                del self._adapters[self._found(name).name]
                return []
            case _:
                return [self._found(change.name)]

    def _digest(self) -> str:
        return digest_of(self.num_changes.total())

    def _found(self, name: str) -> AdapterInfo:
        if name not in self._adapters:
            raise AdapterNotFound(name)
        return self._adapters[name]

    def _add(self, adapter: AdapterInfo) -> list[AdapterInfo]:
        if adapter.name in self._adapters:
            raise AdapterExists(adapter.name)
        self._adapters[adapter.name] = adapter
        return [adapter]

    def _set(self, name: str, **flags: Any) -> list[AdapterInfo]:
        self._adapters[name] = msgspec.structs.replace(self._found(name), **flags)
        return [self._adapters[name]]
