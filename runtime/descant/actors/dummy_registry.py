"""The registry of the dummy engine: every adapter exists, every operation succeeds and changes nothing.

Accepts: ResolveAdapters, ListRegistered. Asks: nobody.
"""

from __future__ import annotations

import hashlib

from descant.actor import Actor
from descant.config import AdapterEntry
from descant.messages import AdapterList, ListRegistered, RegistryMessage, ResolveAdapters
from descant.references import parse_reference
from descant.scheduling.version import AdapterVersion
from descant_client.lifecycle import AdapterInfo

NUM_BYTES = 64


class DummyRegistry(Actor[RegistryMessage]):
    """For client developers: answers like the registry, reads nothing."""

    def __init__(self, entries: list[AdapterEntry]) -> None:
        self._names = [entry.name for entry in entries]

    async def on_receive(self, message: RegistryMessage) -> AdapterVersion | AdapterList:
        """Answer one message."""
        match message:
            case ResolveAdapters(members, _, source):
                for member in members:
                    parse_reference(member.adapter, source)
                digest = hashlib.sha256(repr(members).encode()).hexdigest()
                return AdapterVersion(digest=digest, path="", num_bytes=NUM_BYTES, max_rank=0, num_modules=0)
            case ListRegistered(_, name):
                names = self._names if name is None else [name]
                return AdapterList(tuple(AdapterInfo(name=each, source="dummy") for each in names))
