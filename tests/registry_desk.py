"""A registry between a real fetch, a real journal and a fake worker, for tests."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from descant.actor.actor import Actor
from descant.actor.errors import ActorFailed
from descant.actor.ref import Ref
from descant.actor.supervision import Supervisor
from descant.actors.fetch import Fetch
from descant.actors.registry import Registry
from descant.catalog.configured import reconcile
from descant.catalog.journal import Journal, open_journal
from descant.config import AdapterConfig, AdapterEntry
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.contract.worker import (
    ComposeAdapters,
    CreateVersion,
    ExportAdapter,
    Exported,
    ExportMerged,
    PrepareAdapter,
    Prepared,
)
from descant.messages import AdapterList, ChangeAdapter, ListRegistered, ResolveAdapters, VersionUnused
from descant.sessions.leases import Lease, LeaseTable
from descant_client.errors import AdapterInvalid
from descant_client.lifecycle import (
    AdapterInfo,
    Combination,
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
from descant_client.wire import WeightedAdapter

ADMIN = Principal("local", is_admin=True)
ANNA = Principal("anna")
BERT = Principal("bert")
CHANGES: dict[str, Any] = {
    "create": CreateAdapter,
    "fork": ForkAdapter,
    "load": LoadAdapter,
    "merge": MergeAdapters,
    "save": SaveAdapter,
    "merge_and_save": MergeAndSave,
    "pin": PinAdapter,
    "unpin": UnpinAdapter,
    "enable": EnableAdapter,
    "disable": DisableAdapter,
    "destroy": DestroyAdapter,
}


class Bench:
    """Instructions for the fake worker, and the asks it received. Outlives the worker's lives."""

    def __init__(self, store_dir: Path) -> None:
        self.store_dir = store_dir
        self.asked: list[Any] = []
        self.failures: list[Exception] = []  # the next asks get these
        self.killers: set[str] = set()  # adapters whose preparation crashes the worker
        self.vanishing: set[str] = set()  # adapters whose version is deleted once, just after it is made
        self.refused: set[str] = set()  # adapters that are not valid
        self.gates: dict[str, anyio.Event] = {}  # adapters that wait
        self.slow_gates: dict[str, anyio.Event] = {}  # likewise, after they were read
        self.in_flight: dict[int, asyncio.Future[None]] = {}
        self.most_in_flight = 0


class FakeWorker(Actor[Any]):
    """A version is the bytes of the file `content` in an adapter's directory: as large on disk as on the device."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    async def on_receive(self, message: Any) -> Any:
        self._bench.asked.append(message)
        return self.later(self._handle(message, len(self._bench.asked)))

    async def _handle(self, message: Any, number: int) -> Any:
        bench = self._bench
        if bench.failures:
            raise bench.failures.pop(0)
        death = bench.in_flight[number] = asyncio.get_running_loop().create_future()
        bench.most_in_flight = max(bench.most_in_flight, len(bench.in_flight))
        try:
            await asyncio.sleep(0)
            if message.adapter in bench.killers:
                for other in [*bench.in_flight.values()]:
                    if not other.done():
                        other.set_exception(ActorFailed("worker", "killed by SIGSEGV"))
            if message.adapter in bench.gates:
                gate = asyncio.ensure_future(bench.gates[message.adapter].wait())
                await asyncio.wait([gate, death], return_when=asyncio.FIRST_COMPLETED)
                gate.cancel()
            if death.done():
                raise death.exception() or RuntimeError
            if message.adapter in bench.refused:
                raise AdapterInvalid(message.adapter, "it is refused")
            reply = self._reply(message)
            if message.adapter in bench.slow_gates:
                await bench.slow_gates[message.adapter].wait()
            if message.adapter in bench.vanishing:
                bench.vanishing.remove(message.adapter)
                Path(reply.version.path).unlink()  # noqa: ASYNC240 - a few bytes
            return reply
        finally:
            del bench.in_flight[number]

    def _reply(self, message: Any) -> Any:
        match message:
            case PrepareAdapter(_, directory):
                return self._prepared((Path(directory) / "content").read_bytes())
            case ComposeAdapters(_, members, combination):
                for member in members:
                    check(message.adapter, member.version)
                parts = [(member.version.digest, member.weight) for member in members]
                return self._prepared(f"{combination.type} {parts}".encode())
            case CreateVersion(_, rank):
                return self._prepared(b"\0" * rank)
            case ExportAdapter(_, version, directory) | ExportMerged(_, version, directory):
                check(message.adapter, version)
                return Exported(directory, version.num_bytes)

    def _prepared(self, content: bytes) -> Prepared:
        digest = digest_of(content)
        path = self._bench.store_dir / "versions" / f"{digest}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return Prepared(AdapterVersion(digest, str(path), len(content), 8, 1, len(content)))


def check(adapter: str, version: AdapterVersion) -> None:
    """Check that the file of a version exists, as it is held, and is whole."""
    path = Path(version.path)
    assert path.exists(), "what is read is held"
    if digest_of(path.read_bytes()) != version.digest:
        raise AdapterInvalid(adapter, "its file is damaged", version.digest)


class Desk:
    """A client of the registry for tests."""

    def __init__(self, root: Path, registry: Ref[Any], journal: Journal, bench: Bench, leases: LeaseTable) -> None:
        self.root = root
        self.registry = registry
        self.journal = journal
        self.bench = bench
        self.leases = leases
        self.pins: list[tuple[AdapterVersion, ...]] = []
        self.forgotten: list[str] = []

    @property
    def asked(self) -> list[Any]:
        return self.bench.asked

    def write(self, name: str, content: bytes | str) -> str:
        """Make or change the files of an adapter; return its path."""
        return write_adapter(self.root, name, content)

    async def resolve(
        self,
        *members: str | tuple[str, float],
        principal: Principal = ADMIN,
        lease: Lease | None = None,
        combination: Combination = Combination(),  # noqa: B008 - frozen
    ) -> AdapterVersion | None:
        """Return the version of a request, released at once unless a lease is given."""
        weighted = tuple(WeightedAdapter(*(m if isinstance(m, tuple) else (m, 1.0))) for m in members)
        held = lease or self.leases.lease()
        try:
            return await self.registry.ask(ResolveAdapters(weighted, principal, held, combination), timeout=30)
        finally:
            if lease is None:
                held.release()

    async def content(self, *members: str | tuple[str, float], principal: Principal = ADMIN) -> bytes | None:
        """Return the content of the version that a request for these gets."""
        with_lease = self.leases.lease()
        version = await self.resolve(*members, principal=principal, lease=with_lease)
        try:
            return None if version is None else Path(version.path).read_bytes()  # noqa: ASYNC240 - a few bytes
        finally:
            with_lease.release()

    async def change(self, kind: str, name: str, *, principal: Principal = ADMIN, **fields: Any) -> AdapterInfo | None:
        """Change an adapter and return its description afterwards."""
        if "adapters" in fields:
            fields["adapters"] = [WeightedAdapter(*member) for member in fields["adapters"]]
        change = CHANGES[kind](request_id="r", name=name, **fields)
        answer: AdapterList = await self.registry.ask(ChangeAdapter(principal, change), timeout=30)
        return answer.adapters[0] if answer.adapters else None

    async def listed(self, name: str | None = None, *, principal: Principal = ADMIN) -> list[AdapterInfo]:
        answer: AdapterList = await self.registry.ask(ListRegistered(principal, name), timeout=30)
        return list(answer.adapters)

    async def holding(self, *members: str, principal: Principal = ADMIN) -> Lease:
        """Return a lease on the version that a request for these gets."""
        lease = self.leases.lease()
        await self.resolve(*members, principal=principal, lease=lease)
        return lease

    def stored(self) -> set[str]:
        """Return the contents of the store."""
        return {path.read_bytes().decode() for path in (self.bench.store_dir / "versions").glob("*.safetensors")}


async def wait_until(condition: Callable[[], Any]) -> None:
    """Let other tasks run until a condition holds. Fail after 30 seconds."""
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - not every condition has an event
            await asyncio.sleep(0.001)


def write_adapter(root: Path, name: str, content: bytes | str) -> str:
    """Write an adapter the fake worker can read; return its path."""
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "content").write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root / name)


def digest_of(content: bytes | str) -> str:
    """Return the digest of the version with this content."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def crash(actor: Ref[Any]) -> None:
    """End this life of an actor with an unexpected exception."""

    async def fail() -> None:
        raise RuntimeError("injected by a test")

    assert actor._address.tasks is not None
    actor._address.tasks.start_soon(fail)


@asynccontextmanager
async def open_desk(
    tmp_path: Path, entries: tuple[str, ...] = (), spoil: Callable[[Path], None] = lambda store: None, **config: Any
) -> AsyncIterator[Desk]:
    """Start a server's registry with the adapters `entries` configured; what is in `tmp_path` from before is kept."""
    bench = Bench(tmp_path / "model" / "store")
    configured = [AdapterEntry(name=name, ref=f"local:{tmp_path / name}") for name in entries]
    adapters = AdapterConfig(entries=configured, **config)
    async with open_journal(tmp_path / "model", 1) as journal, Supervisor() as supervisor:
        await journal.apply(*reconcile(await journal.entries(), configured))
        spoil(bench.store_dir)
        worker = supervisor.spawn(lambda: FakeWorker(bench), "worker")
        fetch = supervisor.spawn(Fetch, "fetch")
        pins: list[tuple[AdapterVersion, ...]] = []
        forgotten: list[str] = []
        registry = supervisor.reserve("registry", mailbox_size=65536)
        leases = LeaseTable(lambda digest: registry.tell_nowait(VersionUnused(digest)))
        make = partial(Registry, adapters, journal, bench.store_dir, fetch, worker, leases)
        make = partial(make, on_pins=pins.append, on_forget=forgotten.append)
        supervisor.start(registry, make)
        desk = Desk(tmp_path, registry, journal, bench, leases)
        desk.pins, desk.forgotten = pins, forgotten
        yield desk
