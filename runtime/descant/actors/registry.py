"""The registry actor: names of adapters, and the versions they stand for.

Accepts: ResolveAdapters, ListRegistered. Asks: fetch, worker. Owns: names, prepared versions, composed sums.

Content is read once: a version stays what it is until the server ends, whatever happens to the files it came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from descant.actor import Actor, ActorFailed, AskTimeout, Later, Ref
from descant.config import AdapterEntry
from descant.messages import (
    AdapterList,
    ComposeAdapters,
    FetchAdapter,
    FetchMessage,
    ListRegistered,
    Member,
    PrepareAdapter,
    Prepared,
    RegistryMessage,
    ResolveAdapters,
    WorkerMessage,
)
from descant.references import Reference, parse_reference
from descant.scheduling.version import AdapterVersion
from descant_client.errors import AdapterInvalid, AdapterNotFound, DeadlineExceeded, InvalidRequest
from descant_client.lifecycle import AdapterInfo
from descant_client.wire import WeightedAdapter

PREPARE_TIMEOUT_S = 600.0
FETCH_TIMEOUT_S = 60.0
NUM_TRIES = 2  # of preparing an adapter: the first worker may have been killed by somebody else


class Registry(Actor[RegistryMessage]):
    """Turns what a request names into one effective version."""

    def __init__(self, entries: list[AdapterEntry], fetch: Ref[FetchMessage], worker: Ref[WorkerMessage]) -> None:
        self._references = {entry.name: parse_reference(entry.ref) for entry in entries}
        self._fetch = fetch
        self._worker = worker
        self._worker_turn = anyio.Lock()
        self._versions = SingleFlight()
        self._by_name: dict[str, AdapterVersion] = {}

    async def on_receive(self, message: RegistryMessage) -> Later | AdapterList:
        """Answer one message."""
        match message:
            case ResolveAdapters():
                return self.later(self._resolve(message))
            case ListRegistered(_, name):
                return self._list(name)

    def _list(self, only: str | None) -> AdapterList:
        names = [name for name in self._references if only is None or name == only]
        return AdapterList(tuple(self._describe(name) for name in names))

    def _describe(self, name: str) -> AdapterInfo:
        source, version = self._references[name].source, self._by_name.get(name)
        if version is None:
            return AdapterInfo(name=name, source=source)
        return AdapterInfo(
            name=name, source=source, digest=version.digest, rank=version.max_rank, num_bytes=version.num_bytes
        )

    async def _resolve(self, message: ResolveAdapters) -> AdapterVersion:
        members = [await self._member(member, message) for member in message.members]
        if len(members) == 1 and members[0].weight == 1.0:
            return members[0].version
        label = " + ".join(f"{member.weight:g}*{member.adapter}" for member in message.members)
        key = repr([(member.version.digest, member.weight) for member in members])
        return await self._versions.run(key, lambda: self._ask_worker(ComposeAdapters(label, tuple(members))))

    async def _member(self, member: WeightedAdapter, message: ResolveAdapters) -> Member:
        reference = parse_reference(member.adapter, message.source)
        if reference.source != "name":
            return Member(await self._version(member.adapter, reference, message.principal.roots), member.weight)
        if reference.id not in self._references:
            raise AdapterNotFound(member.adapter)
        # A registered name is the operator's: roots do not apply to it.
        version = self._by_name.get(reference.id)
        if version is None:
            version = await self._version(member.adapter, self._references[reference.id], None)
            self._by_name[reference.id] = version
        return Member(version, member.weight)

    async def _version(self, adapter: str, reference: Reference, roots: tuple[str, ...] | None) -> AdapterVersion:
        # The roots are checked on every request, prepared or not: what one principal loaded is not another's to use.
        directory = await self._fetch.ask(FetchAdapter(adapter, reference.id, roots), timeout=FETCH_TIMEOUT_S)
        prepare = PrepareAdapter(adapter, str(directory))
        return await self._versions.run(str(directory), lambda: self._ask_worker(prepare))

    async def _ask_worker(self, message: WorkerMessage) -> AdapterVersion:
        reason = ""
        async with self._worker_turn:  # it works on one at a time: if it dies, it is of this one
            for _ in range(NUM_TRIES):
                try:
                    prepared: Prepared = await self._worker.ask(message, timeout=PREPARE_TIMEOUT_S)
                except ActorFailed as error:
                    reason = error.data()["reason"]
                except AskTimeout as exc:
                    raise DeadlineExceeded(f"preparing adapter {message.adapter!r}", PREPARE_TIMEOUT_S) from exc
                else:
                    return prepared.version
        raise AdapterInvalid(message.adapter, f"preparing it ended the worker: {reason}")


class SingleFlight:
    """Results by key: the first caller does the work, the others wait for it; a failure is not remembered."""

    def __init__(self) -> None:
        self._results: dict[str, asyncio.Future[Any]] = {}

    async def run(self, key: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """Return the result of `key`, doing `work` if nobody has. Cancelling the first caller fails the others."""
        if key in self._results:
            return await asyncio.shield(self._results[key])
        future = self._results[key] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(await work())
        except BaseException as exc:
            del self._results[key]
            future.set_exception(exc if isinstance(exc, Exception) else InvalidRequest("adapter", "was cancelled."))
            future.exception()  # seen: nobody may be waiting
            raise
        return future.result()
