"""`Entry`: one registered name, as the catalog and the journal keep it."""

from __future__ import annotations

import msgspec

from descant.contract.version import AdapterVersion
from descant_client.lifecycle import AdapterInfo

SHARED = ""
"""The owner of names that are everybody's to use."""

Key = tuple[str, str]
"""Owner and name."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A name, whose it is, and what it stands for."""

    owner: str  # the principal's name, or SHARED
    name: str
    position: int  # in order of registration
    source: str  # what clients are told of its origin, one word
    reference: str | None = None  # what its content is read from again; None: it was made here
    sources: tuple[str, ...] = ()
    """References of all ancestors. Those of the operator's configuration begin with `operator:`."""
    configured: str | None = None  # the configuration's reference for this name, as last seen there
    is_replaced: bool = False  # a client put other content under a configured name
    version: AdapterVersion | None = None  # None: a configured adapter that nobody has used yet
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
