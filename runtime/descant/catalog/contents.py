"""`Contents`: resolves the adapters of a request to versions held by a lease, and changes the entries of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from descant.catalog.catalog import version_of
from descant.catalog.entry import Entry, Key
from descant.catalog.register import Edit, Register
from descant.catalog.versions import Versions
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.contract.worker import Member
from descant.sessions.leases import Lease
from descant.sources.grammar import Reference, parse_reference
from descant_client.errors import AdapterInvalid
from descant_client.wire import WeightedAdapter


class Resolution(NamedTuple):
    """Adapters of a request, resolved to versions that a lease holds."""

    members: tuple[Member, ...]
    names: Mapping[str, str]  # by digest: the adapter that the request named
    sources: tuple[str, ...]  # references of everything the members were made from

    @contextmanager
    def naming_damage(self) -> Iterator[None]:
        """Replace the name in an AdapterInvalid of the block about a damaged member by the name in the request.

        Raises:
            AdapterInvalid: with the other name, if its digest is that of a member; else unchanged.
        """
        try:
            yield
        except AdapterInvalid as error:
            name = self.names.get(error.digest or "")
            if name is None:
                raise
            raise AdapterInvalid(name, error.reason, error.digest) from error


class Contents:
    """Names and the versions that they stand for.

    `on_change` is called after everything that may change which versions are pinned.
    """

    def __init__(self, register: Register, versions: Versions, on_change: Callable[[], None]) -> None:
        self._register = register
        self._versions = versions
        self._on_change = on_change

    async def resolve(
        self,
        adapters: Iterable[WeightedAdapter],
        source: str | None,
        principal: Principal,
        lease: Lease,
        *,
        is_anew: bool = False,
        includes_disabled: bool = False,
    ) -> Resolution:
        """Return the versions that adapters of a request stand for, held by `lease`.

        Disabled ones are left out unless `includes_disabled`. With `is_anew` the directories of paths are read again.

        Raises:
            InvalidRequest: the text is no reference. AdapterUnsupported: its source is not served.
            AdapterNotFound: there is no such name or directory. AdapterForbidden: the path is outside the principal's
            roots. Others as `obtain`, `Versions.find` and `Versions.read`.
        """
        members: list[Member] = []
        names: dict[str, str] = {}
        sources: list[str] = []
        for adapter in adapters:
            located = self._locate(adapter.adapter, source, principal)
            if isinstance(located, Entry):
                if not located.is_enabled and not includes_disabled:
                    continue
                version = await self.obtain(located, lease)
                sources += located.sources
            else:
                # On every request: a version that another principal has loaded may be outside this one's roots.
                directory = await self._versions.find(adapter.adapter, located.id, principal.roots)
                read = self._versions.read_anew if is_anew else self._versions.read
                version = await read(adapter.adapter, directory, lease)
                sources.append(local_reference(directory))
            members.append(Member(version, adapter.weight))
            names[version.digest] = adapter.adapter
        return Resolution(tuple(members), names, tuple(dict.fromkeys(sources)))

    def _locate(self, adapter: str, source: str | None, principal: Principal) -> Entry | Reference:
        reference = parse_reference(adapter, source)
        if reference.source != "name":
            return reference
        return self._register.catalog.require(principal, reference.id)

    async def obtain(self, entry: Entry, lease: Lease) -> AdapterVersion:
        """Return an entry's version, held by `lease`. Read it first if it is damaged or not in the store.

        `entry` must be the one that is in the catalog now. If it has no version, it gets the one that was read.

        Raises:
            AdapterInvalid: its file is gone or damaged, and cannot be made again. DescantError: of its source.
        """
        version = entry.version
        if version is not None and self._versions.is_sound(version.digest):
            self._versions.hold(version, lease)
            return version
        if entry.reference is None:
            raise AdapterInvalid(entry.name, "its stored version is damaged and it was made here; make it again.")
        # No roots: the configuration's references have none, and those of clients were checked when they were loaded.
        directory = await self._versions.find(entry.name, parse_reference(entry.reference).id, None)
        found = await self._versions.read(entry.name, directory, lease)
        if version is None:
            await self.change(entry.key, lambda now: _with_version(entry, now, found))
        elif found.digest != version.digest:
            reason = "its stored version is damaged and its source has changed; load it again."
            raise AdapterInvalid(entry.name, reason)
        self._on_change()
        return found

    def mark_damaged(self, error: AdapterInvalid) -> None:
        """Mark the stored version that `error` is about as damaged: it is made again when it is next obtained.

        Raises:
            AdapterInvalid: `error` itself, if it is not about a stored version.
        """
        if error.digest is None:
            raise error
        self._versions.on_damaged(error.digest)
        self._on_change()

    async def change(self, key: Key, edit: Edit) -> Entry | None:
        """Edit an entry, durably, and return the new one. Raises as `Register.change`.

        The version that it stood for is deleted, once unused, if no name stands for it any more.
        """
        before, after = await self._register.change(key, edit)
        self._on_change()
        old, new = version_of(before), version_of(after)
        if old is not None and (new is None or new.digest != old.digest):
            await self._versions.on_unnamed(old.digest)
        return after


def local_reference(directory: str) -> str:
    """Return the reference of a directory of this machine."""
    return f"local:{directory}"


def _with_version(asked: Entry, now: Entry | None, version: AdapterVersion) -> Entry | None:
    """Return the present entry with the version, or unchanged if it has a version or another reference by now."""
    if now is None or now.version is not None or now.reference != asked.reference:
        return now
    return msgspec.structs.replace(now, version=version)
