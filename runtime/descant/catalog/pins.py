"""How much may be pinned: a share of the device's bytes for adapters, and of its slots. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from descant.catalog.entry import Entry
from descant.config import AdapterConfig
from descant.scheduling.version import AdapterVersion
from descant_client.errors import AdapterTooLarge, InvalidRequest


class PinBudget(msgspec.Struct, frozen=True):
    """Limits over distinct pinned versions."""

    max_bytes: int
    max_versions: int

    @classmethod
    def of(cls, config: AdapterConfig) -> PinBudget:
        """Return the configured share; one version may always be pinned unless the share is zero."""
        share = config.max_pinned_share
        return cls(int(share * config.memory_bytes), max(1, int(share * config.num_slots)) if share else 0)

    def check(self, name: str, version: AdapterVersion, others: Iterable[Entry]) -> None:
        """Check that a version may be pinned beside what `others` pin.

        Raises:
            AdapterTooLarge: its bytes do not fit in what is left. InvalidRequest: too many are pinned.
        """
        sizes = {entry.version.digest: entry.version.num_bytes for entry in others if entry.version is not None}
        if version.digest in sizes:
            return
        if len(sizes) >= self.max_versions:
            reason = f"{self.max_versions} adapters may be pinned at once (`adapters.max_pinned_share`); unpin another."
            raise InvalidRequest("name", reason)
        num_left = self.max_bytes - sum(sizes.values())
        if version.num_bytes > num_left:
            raise AdapterTooLarge(name, version.num_bytes, max(num_left, 0))

    def fitting(self, entries: Iterable[Entry]) -> tuple[AdapterVersion, ...]:
        """Return the versions of these entries as far as they fit, the first before the last.

        They all do unless the budget was lowered, or something larger was read at this start.
        """
        versions: dict[str, AdapterVersion] = {}
        num_bytes = 0
        for version in (entry.version for entry in entries if entry.version is not None):
            is_new = version.digest not in versions
            if is_new and len(versions) < self.max_versions and num_bytes + version.num_bytes <= self.max_bytes:
                versions[version.digest] = version
                num_bytes += version.num_bytes
        return tuple(versions.values())
