"""The registry actor: names of adapters, and the versions that they stand for.

Accepts: ResolveAdapters, ListRegistered, ChangeAdapter, VersionFailed, VersionUnused, PinsRefused. Asks: fetch,
worker. Owns: the catalog, the store's index, the versions that were prepared in this life.

The journal belongs to the system, as its lock must outlast a crash of this actor. Each life reads the names from it and
indexes the store. Content is read once: later changes of its files have no effect until a client loads it again.
`catalog.configured` defines what happens to configured names at a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from descant.actor.actor import Actor, Later
from descant.actor.ref import Ref
from descant.catalog.budgets import OwnerQuota, PinBudget
from descant.catalog.catalog import Catalog
from descant.catalog.changes import Changes
from descant.catalog.contents import Contents
from descant.catalog.entry import Entry
from descant.catalog.journal import Journal
from descant.catalog.register import Register
from descant.catalog.versions import Versions
from descant.catalog.worker_asks import WorkerAsks
from descant.config import AdapterConfig
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.contract.worker import Member, WorkerMessage
from descant.messages import (
    AdapterList,
    ChangeAdapter,
    FetchMessage,
    ListRegistered,
    PinsRefused,
    RegistryMessage,
    ResolveAdapters,
    VersionFailed,
    VersionUnused,
)
from descant.sessions.leases import Lease, LeaseTable
from descant_client.errors import AdapterInvalid, DescantError
from descant_client.lifecycle import AdapterInfo
from descant_client.wire import WeightedAdapter

logger = logging.getLogger(__name__)


class Registry(Actor[RegistryMessage]):
    """Resolves the adapters of a request to one effective version, and carries out changes of adapters.

    `on_pins` is called with all versions to be kept on the device, at the start of each life and after each change.
    `on_forget` is called with the digest of each version that no request can name any more. Neither may wait.
    """

    def __init__(
        self,
        config: AdapterConfig,
        journal: Journal,
        store_dir: Path,
        fetch: Ref[FetchMessage],
        worker: Ref[WorkerMessage],
        leases: LeaseTable,
        *,
        on_pins: Callable[[tuple[AdapterVersion, ...]], None],
        on_forget: Callable[[str], None],
    ) -> None:
        self._config = config
        self._journal = journal
        self._store_dir = store_dir
        self._fetch = fetch
        self._asks = WorkerAsks(worker)
        self._leases = leases
        self._on_pins = on_pins
        self._on_forget = on_forget
        self._budget = PinBudget.of(config)
        self._quota = OwnerQuota.of(config)
        self._pins: tuple[AdapterVersion, ...] | None = None
        self._omitted_pins: tuple[str, ...] = ()  # digests that do not fit the budget
        self._refused_pins: tuple[str, ...] = ()  # digests that do not fit the device

    async def on_start(self) -> None:
        """Read the journal and index the store."""
        self._catalog = Catalog(await self._journal.entries())
        self._versions = Versions(
            fetch=self._fetch,
            worker=self._asks,
            leases=self._leases,
            max_store_bytes=self._config.store_bytes,
            is_named=self._catalog.is_named,
            on_forget=self._on_forget,
            start_soon=self.start_soon,
        )
        await self._versions.open(self._store_dir)
        register = Register(self._catalog, self._journal)
        self._contents = Contents(register, self._versions, self._update_pins)
        configured = {entry.name: entry.ref for entry in self._config.entries}
        self._changes = Changes(
            register, self._contents, self._versions, self._asks, self._budget, self._quota, configured
        )
        self._update_pins()
        self.start_soon(self._restore_pins)

    async def on_receive(self, message: RegistryMessage) -> Later | AdapterList | None:
        """Answer one message."""
        match message:
            case ResolveAdapters():
                return self.later(self._resolve(message))
            case ListRegistered(principal, name):
                return self._list(principal, name)
            case ChangeAdapter():
                return self.later(self._change(message))
            case VersionFailed(digest):
                self._versions.on_damaged(digest)
                self._update_pins()
            case PinsRefused(digests):
                self._refused_pins = digests
            case VersionUnused(digest):
                return self.later(self._versions.on_unused(digest))
        return None

    def _list(self, principal: Principal, name: str | None) -> AdapterList:
        if name is None:
            return AdapterList(tuple(map(self._info, self._catalog.visible(principal))))
        entry = self._catalog.find(principal, name)
        return AdapterList(() if entry is None else (self._info(entry),))

    def _info(self, entry: Entry) -> AdapterInfo:
        return entry.info(self._omitted_pins + self._refused_pins)

    async def _resolve(self, message: ResolveAdapters) -> AdapterVersion | None:
        with self._versions.temporary_lease() as lease:
            try:
                return await self._effective_version(message, lease)
            except AdapterInvalid as error:
                self._contents.mark_damaged(error)
            return await self._effective_version(message, lease)  # makes the damaged version again

    async def _effective_version(self, message: ResolveAdapters, lease: Lease) -> AdapterVersion | None:
        """Combine the members, held by `lease` meanwhile, and add the draft heads that the message names."""
        found = await self._contents.resolve(message.members, message.source, message.principal, lease)
        with found.naming_damage():
            version = await self._combine(message, found.members)
        if message.heads is None:
            return version
        heads = await self._contents.resolve((WeightedAdapter(message.heads, 1.0),), None, message.principal, lease)
        if not heads.members:
            return version
        with heads.naming_damage(), found.naming_damage():
            return await self._versions.with_heads(message.heads, version, heads.members[0].version, message.lease)

    async def _combine(self, message: ResolveAdapters, members: tuple[Member, ...]) -> AdapterVersion | None:
        """Return the version of a combination, held by the message's lease. None without members."""
        if not members:
            return None
        if len(members) == 1 and members[0].weight == 1.0 and message.combination.type == "cat":
            self._versions.hold(members[0].version, message.lease)
            return members[0].version
        label = " + ".join(f"{member.weight:g}*{member.adapter}" for member in message.members)
        return await self._versions.compose(label, members, message.combination, message.lease)

    async def _change(self, message: ChangeAdapter) -> AdapterList:
        entry = await self._changes.carry_out(message.principal, message.change)
        return AdapterList(() if entry is None else (self._info(entry),))

    # ---- pins -----------------------------------------------------------------------------------------------------

    def _update_pins(self) -> None:
        """Report the pinned versions if they have changed. Damaged ones are left out until they are made again."""
        pinned = [e for e in self._catalog.pinned() if e.version and self._versions.is_sound(e.version.digest)]
        pins = self._budget.fitting(pinned)
        fitting = {version.digest for version in pins}
        self._omitted_pins = tuple(e.version.digest for e in pinned if e.version and e.version.digest not in fitting)
        if pins != self._pins:
            self._pins = pins
            self._on_pins(pins)

    async def _restore_pins(self) -> None:
        """Prepare pinned versions that are not in the store. A failed one is off the device until a request uses it."""
        for pinned in self._catalog.pinned():
            entry = self._catalog.get(pinned.key)  # may have changed meanwhile
            if entry is None or not entry.is_pinned:
                continue
            with self._versions.temporary_lease() as lease:
                try:
                    await self._contents.obtain(entry, lease)
                except DescantError as error:
                    logger.warning("the pinned adapter %s is not on the device: %s", entry.name, error)
