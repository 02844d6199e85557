"""`Contents`: from what a request names to a version that is held, preparing or mending it first if need be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import msgspec

from descant.catalog.catalog import version_of
from descant.catalog.entry import Entry, Key
from descant.catalog.register import Edit, Register
from descant.catalog.versions import Versions
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.sessions.leases import Lease
from descant.sources.grammar import Reference, parse_reference
from descant_client.errors import AdapterInvalid

ResultT = TypeVar("ResultT")


class Content(NamedTuple):
    """A version and the references of everything it was made from."""

    version: AdapterVersion
    sources: tuple[str, ...]


class Contents:
    """Names and the versions they stand for, kept together. `on_change` is called after whatever may change pins."""

    def __init__(self, register: Register, versions: Versions, on_change: Callable[[], None]) -> None:
        self._register = register
        self._versions = versions
        self._on_change = on_change

    def locate(self, adapter: str, source: str | None, principal: Principal) -> Entry | Reference:
        """Return what a member of a request is.

        Raises:
            InvalidRequest, AdapterUnsupported: no reference that is served. AdapterNotFound: no such name.
        """
        reference = parse_reference(adapter, source)
        if reference.source != "name":
            return reference
        return self._register.catalog.used(principal, reference.id)

    async def content(
        self,
        adapter: str,
        located: Entry | Reference,
        roots: tuple[str, ...] | None,
        lease: Lease,
        *,
        is_anew: bool = False,
    ) -> Content:
        """Return the version, held by `lease`. With `is_anew` what a path leads to is read again.

        `roots` limit paths, on every request: what one principal has loaded is not another's to use. To names they do
        not apply.
        """
        if isinstance(located, Entry):
            return Content(await self.ready(located, lease), located.sources)
        directory = await self._versions.find(adapter, located.id, roots)
        read = self._versions.read_anew if is_anew else self._versions.read
        return Content(await read(adapter, directory, lease), (local_reference(directory),))

    async def ready(self, entry: Entry, lease: Lease) -> AdapterVersion:
        """Return an entry's version, held by `lease`; `entry` must be as the catalog has it now.

        Raises:
            AdapterInvalid: its file is gone or damaged, and cannot be made again. DescantError: its source's.
        """
        version = entry.version
        if version is not None and self._versions.is_sound(version.digest):
            self._versions.hold(version, lease)
            return version
        if entry.reference is None:
            raise AdapterInvalid(entry.name, "its stored version is damaged and it was made here; make it again.")
        # No roots: the configuration has none, and others are given only what they had already.
        directory = await self._versions.find(entry.name, parse_reference(entry.reference).id, None)
        found = await self._versions.read(entry.name, directory, lease)
        if version is None:
            await self.change(entry.key, lambda now: _with_version(entry, now, found))
        elif found.digest != version.digest:
            reason = "its stored version is damaged and its source has changed; load it again."
            raise AdapterInvalid(entry.name, reason)
        self._on_change()
        return found

    async def mending(
        self, work: Callable[[], Awaitable[ResultT]], names: Mapping[str, str] = MappingProxyType({})
    ) -> ResultT:
        """Do `work`, which readies versions and has the worker read them. Once more if the worker finds one damaged.

        It is made again when `work` readies it again. Should that not help, the error calls it by its name in `names`,
        which are by digest. Raises as `work`.
        """
        try:
            return await work()
        except AdapterInvalid as error:
            if error.digest is None:
                raise
            self._versions.failed(error.digest)
            self._on_change()
        try:
            return await work()
        except AdapterInvalid as error:
            raise AdapterInvalid(names.get(error.digest or "", error.adapter), error.reason, error.digest) from error

    async def change(self, key: Key, edit: Edit) -> Entry | None:
        """Edit an entry, durably, and let go of the version it no longer stands for. Raises as `Register.change`."""
        before, after = await self._register.change(key, edit)
        self._on_change()
        old, new = version_of(before), version_of(after)
        if old is not None and (new is None or new.digest != old.digest):
            await self._versions.let_go(old.digest)
        return after


def local_reference(directory: str) -> str:
    """Return the reference of a directory of this machine."""
    return f"local:{directory}"


def _with_version(asked: Entry, now: Entry | None, version: AdapterVersion) -> Entry | None:
    """Record what was prepared, unless the name stands for something else by now."""
    if now is None or now.version is not None or now.reference != asked.reference:
        return now
    return msgspec.structs.replace(now, version=version)
