"""`Entry`: one registered name, as the catalog and the journal keep it."""

from __future__ import annotations

import msgspec

from descant.contract.version import AdapterVersion
from descant_client.lifecycle import AdapterInfo

SHARED = ""
"""The owner of names that every principal may use."""

Key = tuple[str, str]
"""Owner and name."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A name, its owner, and the content it stands for."""

    owner: str  # the principal's name, or SHARED
    name: str
    position: int  # in order of registration
    source: str  # kind of origin, one word, shown to clients
    reference: str | None = None  # source from which its content can be read again; None: it was made here
    sources: tuple[str, ...] = ()
    """References of all ancestors. Those of the configuration begin with `operator:`."""
    configured: str | None = None  # the reference that the configuration last had for this name
    is_replaced: bool = False  # a client put other content under a configured name
    version: AdapterVersion | None = None  # None: a configured adapter that has not been used yet
    is_pinned: bool = False
    is_enabled: bool = True

    @property
    def key(self) -> Key:
        """Owner and name."""
        return self.owner, self.name

    def info(self) -> AdapterInfo:
        """Return the entry as clients see it."""
        version = self.version
        return AdapterInfo(
            name=self.name,
            source=self.source,
            digest=version and version.digest,
            rank=version and version.max_rank,
            num_bytes=version and version.num_bytes,
            is_shared=self.owner == SHARED,
            is_pinned=self.is_pinned,
            is_enabled=self.is_enabled,
        )
