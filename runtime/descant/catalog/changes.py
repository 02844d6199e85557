"""`Changes`: carries out each kind of `AdapterChange`.

Slow changes of one name take turns. Quick ones happen at once, between them, so `destroy` never waits for a `load` of
the same name. The loaded version is then dropped, and the caller of `load` gets AdapterNotFound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec

from descant.catalog.budgets import OwnerQuota, PinBudget
from descant.catalog.catalog import Catalog
from descant.catalog.contents import Contents, local_reference
from descant.catalog.entry import SHARED, Entry, Key
from descant.catalog.register import Register
from descant.catalog.versions import Versions
from descant.catalog.worker_asks import WorkerAsks
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.contract.worker import ComposeAdapters, CreateVersion, ExportAdapter, ExportMerged
from descant.sessions.leases import Lease
from descant.sources.grammar import parse_reference
from descant.sources.local import find_target
from descant_client.errors import AdapterExists, AdapterInvalid, AdapterNotFound, InvalidRequest
from descant_client.lifecycle import (
    AdapterChange,
    CreateAdapter,
    DestroyAdapter,
    DisableAdapter,
    EnableAdapter,
    ForkAdapter,
    LoadAdapter,
    MergeAdapters,
    MergeAndSave,
    PinAdapter,
    SaveAdapter,
    UnpinAdapter,
)

EXPORT_TIMEOUT_S = 3000.0  # a merged checkpoint is as large as the base; below requests.change.OPERATION_TIMEOUT_S


class Changes:
    """Carries out changes, for one life of the registry. `configured` maps names to the configuration's references."""

    def __init__(
        self,
        register: Register,
        contents: Contents,
        versions: Versions,
        worker: WorkerAsks,
        budget: PinBudget,
        quota: OwnerQuota,
        configured: Mapping[str, str],
    ) -> None:
        self._register = register
        self._contents = contents
        self._versions = versions
        self._worker = worker
        self._budget = budget
        self._quota = quota
        self._configured = configured

    @property
    def _catalog(self) -> Catalog:
        return self._register.catalog

    async def carry_out(self, principal: Principal, change: AdapterChange) -> Entry | None:
        """Carry out a change. Return the adapter's entry afterwards, None if it is destroyed.

        Raises:
            InvalidRequest, AdapterError, DeadlineExceeded, ModelInvalid, InternalError: refused or failed; nothing has
            changed.
        """
        match change:
            case CreateAdapter():
                return await self._create(principal, change)
            case ForkAdapter():
                return await self._fork(principal, change)
            case LoadAdapter():
                return await self._load(principal, change)
            case MergeAdapters():
                return await self._merge(principal, change)
            case SaveAdapter() | MergeAndSave():
                return await self._export(principal, change)
            case PinAdapter(_, name):
                return await self._pin(principal, name)
            case UnpinAdapter(_, name):
                return await self._set(principal, name, is_pinned=False)
            case EnableAdapter(_, name):
                return await self._set(principal, name, is_enabled=True)
            case DisableAdapter(_, name):
                return await self._set(principal, name, is_enabled=False)
            case DestroyAdapter(_, name):
                key = self._catalog.require_owned(principal, name).key
                return await self._contents.change(key, lambda now: _destroyed(name, now))

    # ---- new names ------------------------------------------------------------------------------------------------

    async def _create(self, principal: Principal, change: CreateAdapter) -> Entry | None:
        if change.alpha is not None and not math.isfinite(change.alpha):
            raise InvalidRequest("alpha", "it must be finite.")
        targets = None if change.target_modules is None else tuple(change.target_modules)
        with self._versions.temporary_lease() as lease:
            async with self._register.turn_for(
                lambda: self._catalog.new_key(principal, change.name, is_shared=change.is_shared)
            ) as key:
                message = CreateVersion(change.name, change.rank, change.alpha, targets)
                version = await self._versions.make(message, lease)
                return await self._add(key, source="create", version=version)

    async def _fork(self, principal: Principal, change: ForkAdapter) -> Entry | None:
        with self._versions.temporary_lease() as lease:
            async with self._register.turn_for(
                lambda: self._catalog.new_key(principal, change.new_name, is_shared=change.is_shared)
            ) as key:
                entry = self._catalog.require(principal, change.name)
                version = await self._contents.obtain(entry, lease)
                return await self._add(
                    key, source=entry.source, reference=entry.reference, sources=entry.sources, version=version
                )

    async def _add(self, key: Key, **content: Any) -> Entry | None:
        def edit(now: Entry | None) -> Entry:
            if now is not None:
                raise AdapterExists(key[1])
            return self._new(key, **content)

        return await self._contents.change(key, edit)

    def _new(self, key: Key, version: AdapterVersion, **content: Any) -> Entry:
        """Return the entry of a new name. If the name is configured, its adapter was destroyed and is replaced."""
        owner, name = key
        self._quota.check(key, version, self._catalog.owned(owner))
        configured = self._configured.get(name) if owner == SHARED else None
        return Entry(
            owner=owner,
            name=name,
            position=self._catalog.next_position,
            configured=configured,
            is_replaced=configured is not None,
            version=version,
            **content,
        )

    # ---- new content ----------------------------------------------------------------------------------------------

    async def _load(self, principal: Principal, change: LoadAdapter) -> Entry | None:
        reference = parse_reference(change.ref, change.adapter_source)
        if reference.source == "name":
            raise InvalidRequest("ref", "give a path; to use what is under another name, fork it or merge onto this.")
        with self._versions.temporary_lease() as lease:
            async with self._register.turn_for(
                lambda: self._catalog.target_key(principal, change.name, is_shared=change.is_shared)
            ) as key:
                started = self._catalog.get(key)
                directory = await self._versions.find(change.ref, reference.id, principal.roots)
                version = await self._versions.read_anew(change.name, directory, lease)
                where = local_reference(directory)
                return await self._switch(
                    key, started, version, source=reference.source, reference=where, sources=(where,)
                )

    async def _merge(self, principal: Principal, change: MergeAdapters) -> Entry | None:
        with self._versions.temporary_lease() as lease:
            async with self._register.turn_for(
                lambda: self._catalog.target_key(principal, change.name, is_shared=change.is_shared)
            ) as key:
                started = self._catalog.get(key)
                try:
                    version, sources = await self._combine(principal, change, lease)
                except AdapterInvalid as error:
                    self._contents.mark_damaged(error)
                    version, sources = await self._combine(principal, change, lease)  # makes it again
                return await self._switch(key, started, version, source="merge", reference=None, sources=sources)

    async def _combine(
        self, principal: Principal, change: MergeAdapters, lease: Lease
    ) -> tuple[AdapterVersion, tuple[str, ...]]:
        """Return the combination of the members, held by `lease`, and the references it was made from."""
        found = await self._contents.resolve(
            change.adapters, change.adapter_source, principal, lease, is_anew=True, includes_disabled=True
        )
        message = ComposeAdapters(change.name, found.members, change.combination)
        with found.naming_damage():
            return await self._versions.make(message, lease), found.sources

    async def _switch(self, key: Key, started: Entry | None, version: AdapterVersion, **content: Any) -> Entry | None:
        """Put new content under a name. `started` is its entry from when the work began."""

        def edit(now: Entry | None) -> Entry:
            if now is None and started is not None:
                raise AdapterNotFound(key[1])  # destroyed meanwhile; it cannot have been made again during this turn
            if now is None:
                return self._new(key, version=version, **content)
            self._quota.check(key, version, self._catalog.owned(now.owner))
            if now.is_pinned:
                self._check_budget(now, version)
            is_replaced = now.configured is not None
            return msgspec.structs.replace(now, is_replaced=is_replaced, version=version, **content)

        return await self._contents.change(key, edit)

    # ---- flags of a name --------------------------------------------------------------------------------

    async def _pin(self, principal: Principal, name: str) -> Entry | None:
        with self._versions.temporary_lease() as lease:
            entry = self._catalog.require_owned(principal, name)
            version = await self._contents.obtain(entry, lease)

            def edit(now: Entry | None) -> Entry:
                now = _present(name, now)
                if not now.is_pinned:
                    self._check_budget(now, now.version or version)
                return msgspec.structs.replace(now, is_pinned=True) if not now.is_pinned else now

            return await self._contents.change(entry.key, edit)

    def _check_budget(self, entry: Entry, version: AdapterVersion) -> None:
        self._budget.check(entry.key, version, self._catalog.pinned())

    async def _set(self, principal: Principal, name: str, **flag: bool) -> Entry | None:
        key = self._catalog.require_owned(principal, name).key
        return await self._contents.change(key, lambda now: msgspec.structs.replace(_present(name, now), **flag))

    # ---- files ----------------------------------------------------------------------------------------------------

    async def _export(self, principal: Principal, change: SaveAdapter | MergeAndSave) -> Entry | None:
        target = await anyio.to_thread.run_sync(find_target, change.name, change.path, principal.roots)
        with self._versions.temporary_lease() as lease:
            try:
                return await self._write(principal, change, target, lease)
            except AdapterInvalid as error:
                self._contents.mark_damaged(error)
            return await self._write(principal, change, target, lease)  # makes the damaged version again

    async def _write(
        self, principal: Principal, change: SaveAdapter | MergeAndSave, target: Path, lease: Lease
    ) -> Entry:
        kind = ExportAdapter if isinstance(change, SaveAdapter) else ExportMerged
        entry = self._catalog.require(principal, change.name)
        version = await self._contents.obtain(entry, lease)
        await self._worker.export(principal.name, kind(change.name, version, str(target)), EXPORT_TIMEOUT_S)
        return self._catalog.get(entry.key) or entry


def _present(name: str, entry: Entry | None) -> Entry:
    if entry is None:
        raise AdapterNotFound(name)  # destroyed meanwhile
    return entry


def _destroyed(name: str, entry: Entry | None) -> None:
    _present(name, entry)
