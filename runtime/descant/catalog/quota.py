"""`OwnerQuota`: limits on the names of one principal and their versions in the store. Pure.

Shared names have no owner's quota; only the limits on the whole apply to them.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from descant.catalog.entry import SHARED, Entry, Key
from descant.config import AdapterConfig
from descant.contract.version import AdapterVersion
from descant_client.errors import InvalidRequest, StoreFull


class OwnerQuota(msgspec.Struct, frozen=True):
    """Limits on the number of a principal's names, and on the bytes of their distinct versions."""

    max_names: int
    max_file_bytes: int

    @classmethod
    def of(cls, config: AdapterConfig) -> OwnerQuota:
        """Return the configured limits."""
        return cls(config.max_names, int(owner_share(config) * config.store_bytes))

    def check(self, key: Key, version: AdapterVersion, owned: Iterable[Entry]) -> None:
        """Check that a name may stand for a version beside the owner's other names.

        Raises:
            InvalidRequest: the owner has too many names. StoreFull: its versions take too much of the store.
        """
        owner, name = key
        if owner == SHARED:
            return
        others = [entry for entry in owned if entry.name != name]
        if len(others) >= self.max_names:
            reason = f"you have {self.max_names} adapters, the most there may be (`adapters.max_names`); destroy some."
            raise InvalidRequest("name", reason)
        sizes = {entry.version.digest: entry.version.file_bytes for entry in others if entry.version is not None}
        sizes[version.digest] = version.file_bytes
        if sum(sizes.values()) > self.max_file_bytes:
            raise StoreFull(name, version.file_bytes, self.max_file_bytes)


def owner_share(config: AdapterConfig) -> float:
    """Return the share of the store and of the pin budget that one principal may take."""
    return 1.0 if config.max_owner_share is None else config.max_owner_share
