"""Messages between the registry and the worker process. Pure data, as they cross a socket."""

from __future__ import annotations

import msgspec

from descant.actor.message import Ask, Message
from descant.contract.version import AdapterVersion
from descant_client.lifecycle import Combination


class Prepared(Message, frozen=True):
    """A version in the store."""

    version: AdapterVersion


class Exported(Message, frozen=True):
    """A directory that was written completely and is on disk."""

    directory: str
    num_bytes: int


class PrepareAdapter(Ask[Prepared], frozen=True):
    """Read, check and normalize a directory into the store. Reply: Prepared."""

    adapter: str
    directory: str


class Member(msgspec.Struct, frozen=True):
    """One term of a weighted sum."""

    version: AdapterVersion
    weight: float


class ComposeAdapters(Ask[Prepared], frozen=True):
    """Write a combination of versions as a new version. Reply: Prepared."""

    adapter: str
    members: tuple[Member, ...]
    combination: Combination


class TakeHeads(Ask[Prepared], frozen=True):
    """Write a version with the factors of `version`, if given, and the draft heads of `heads`. Reply: Prepared."""

    adapter: str
    version: AdapterVersion | None
    heads: AdapterVersion


class CreateVersion(Ask[Prepared], frozen=True):
    """Write a version with B zero, which does not change the base's output. Reply: Prepared."""

    adapter: str
    rank: int
    alpha: float | None
    target_modules: tuple[str, ...] | None


class ExportAdapter(Ask[Exported], frozen=True):
    """Write a version as a PEFT directory. Reply: Exported."""

    adapter: str
    version: AdapterVersion
    directory: str


class ExportMerged(Ask[Exported], frozen=True):
    """Write the base, with a version merged into it, as a Hugging Face checkpoint. Reply: Exported."""

    adapter: str
    version: AdapterVersion
    directory: str


MakeVersion = PrepareAdapter | ComposeAdapters | TakeHeads | CreateVersion  # each is answered with Prepared
Export = ExportAdapter | ExportMerged  # each is answered with Exported
WorkerMessage = MakeVersion | Export


WorkerReply = Prepared | Exported
