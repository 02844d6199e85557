"""Limits on a principal's names and on pins. Pure.

Shared names have no owner's quota; only the limits on the whole apply to them.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from descant.catalog.entry import SHARED, Entry, Key
from descant.config import AdapterConfig
from descant.contract.version import AdapterVersion
from descant_client.errors import AdapterTooLarge, InvalidRequest, StoreFull


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


class PinBudget(msgspec.Struct, frozen=True):
    """Limits on distinct pinned versions together."""

    max_bytes: int
    max_versions: int
    max_owner_share: float = 1.0  # of both, for one principal's own names

    @classmethod
    def of(cls, config: AdapterConfig) -> PinBudget:
        """Return the budget of the configuration, of at least one version unless the share is zero."""
        share = config.max_pinned_share
        max_versions = max(1, int(share * config.num_slots)) if share else 0
        return cls(int(share * config.memory_bytes), max_versions, owner_share(config))

    def check(self, key: Key, version: AdapterVersion, pinned: Iterable[Entry]) -> None:
        """Check that a name may pin a version beside the entries that are `pinned`. Errors do not name these.

        Raises:
            AdapterTooLarge: it is larger than the whole budget. InvalidRequest: the budget, or the owner's share of it,
            has no room for it beside the others.
        """
        owner, name = key
        others = [entry for entry in pinned if entry.key != key]
        if self.max_versions and version.num_bytes > self.max_bytes:
            raise AdapterTooLarge(name, version.num_bytes, self.max_bytes)
        self.check_room(version, others, "max_pinned_share")
        if owner != SHARED:
            self._share().check_room(version, [entry for entry in others if entry.owner == owner], "max_owner_share")

    def check_room(self, version: AdapterVersion, others: Iterable[Entry], setting: str) -> None:
        """Check that a version fits beside others. Raises InvalidRequest, naming the setting that limits it."""
        sizes = {entry.version.digest: entry.version.num_bytes for entry in others if entry.version is not None}
        if version.digest in sizes:
            return
        if len(sizes) >= self.max_versions:
            reason = f"{self.max_versions} adapters may be pinned at once (`adapters.{setting}`); unpin another."
            raise InvalidRequest("name", reason)
        if version.num_bytes > self.max_bytes - sum(sizes.values()):
            reason = f"its {version.num_bytes} bytes do not fit beside what is pinned already, {self.max_bytes} in all "
            raise InvalidRequest("name", reason + f"(`adapters.{setting}`); unpin another.")

    def _share(self) -> PinBudget:
        """Return the budget of one principal, of at least one version unless the whole budget is of none."""
        max_versions = max(1, int(self.max_owner_share * self.max_versions)) if self.max_versions else 0
        return PinBudget(int(self.max_owner_share * self.max_bytes), max_versions)

    def fitting(self, entries: Iterable[Entry]) -> tuple[AdapterVersion, ...]:
        """Return the versions of these entries that fit, in their order.

        All of them fit unless the budget was lowered, or a source holds a larger version than at the last start.
        """
        versions: dict[str, AdapterVersion] = {}
        num_bytes = 0
        for version in (entry.version for entry in entries if entry.version is not None):
            is_new = version.digest not in versions
            if is_new and len(versions) < self.max_versions and num_bytes + version.num_bytes <= self.max_bytes:
                versions[version.digest] = version
                num_bytes += version.num_bytes
        return tuple(versions.values())
