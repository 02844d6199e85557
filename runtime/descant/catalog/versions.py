"""`Versions`: versions in the store, made by the worker, cached by their origin, deleted when no longer needed.

A version is returned already held by the caller's lease, so it cannot be deleted in between. Files are deleted under
one lock. Under the same lock the file of a new version is checked to exist before its version is returned: a file that
was deleted while the worker took it for an existing version is made again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from descant.actor.errors import AskTimeout
from descant.actor.ref import Ref
from descant.catalog.single_flight import SingleFlight
from descant.catalog.store_index import StoreIndex, scan
from descant.catalog.worker_asks import WorkerAsks
from descant.contract.version import AdapterVersion
from descant.contract.worker import ComposeAdapters, MakeVersion, Member, PrepareAdapter, Prepared, TakeHeads
from descant.messages import FetchAdapter, FetchMessage
from descant.sessions.leases import Lease, LeaseTable
from descant_client.errors import DeadlineExceeded, InternalError, StoreFull
from descant_client.lifecycle import Combination

logger = logging.getLogger(__name__)

PREPARE_TIMEOUT_S = 600.0
FETCH_TIMEOUT_S = 60.0
NUM_TRIES = 3  # to make a version whose file is deleted at the same time


class Versions:
    """Makes, caches and deletes versions, for one life of the registry.

    `is_named` returns whether some name stands for a version. `on_forget` is called with the digest of each version
    that is deleted because its last name was removed or changed. `start_soon` starts tasks of the actor.
    """

    def __init__(
        self,
        *,
        fetch: Ref[FetchMessage],
        worker: WorkerAsks,
        leases: LeaseTable,
        max_store_bytes: int,
        is_named: Callable[[str], bool],
        on_forget: Callable[[str], None],
        start_soon: Callable[..., None],
    ) -> None:
        self._fetch = fetch
        self._worker = worker
        self._leases = leases
        self._is_named = is_named
        self._on_forget = on_forget
        self._index = StoreIndex(max_store_bytes)
        self._deleting = anyio.Lock()
        self._made: SingleFlight[AdapterVersion] = SingleFlight(start_soon)  # by directory or combination
        self._doomed: set[str] = set()  # to be deleted when their last lease is released
        self._damaged: set[str] = set()  # in the store, but their file could not be read

    async def open(self, store_dir: Path) -> None:
        """Index the store, and delete versions if it is larger than allowed."""
        for digest, path, num_bytes in await anyio.to_thread.run_sync(scan, store_dir):
            self._index.add(digest, path, num_bytes)
        async with self._deleting:
            await self._delete(self._index.victims(0, self._is_kept) or [])

    # ---- getting one ----------------------------------------------------------------------------------------------

    @contextmanager
    def temporary_lease(self) -> Iterator[Lease]:
        """Yield a lease that is released at the end of the block."""
        lease = self._leases.lease()
        try:
            yield lease
        finally:
            lease.release()

    def is_sound(self, digest: str) -> bool:
        """Return whether the version is in the store and not known to be damaged."""
        return digest in self._index and digest not in self._damaged

    def hold(self, version: AdapterVersion, lease: Lease) -> None:
        """Hold a version that is in the store by a lease."""
        lease.hold(version.digest)
        self._index.touch(version.digest)

    async def find(self, adapter: str, path: str, roots: tuple[str, ...] | None) -> str:
        """Return the directory of a local reference. Raises as `sources.local.find_adapter`, or DeadlineExceeded."""
        try:
            return str(await self._fetch.ask(FetchAdapter(adapter, path, roots), timeout=FETCH_TIMEOUT_S))
        except AskTimeout as exc:
            raise DeadlineExceeded(f"finding adapter {adapter!r}", FETCH_TIMEOUT_S) from exc

    async def read(self, adapter: str, directory: str, lease: Lease) -> AdapterVersion:
        """Return the version of a directory, as it was when it was first read. Raises as `make`."""
        return await self._remembered(directory, PrepareAdapter(adapter, directory), lease)

    async def read_anew(self, adapter: str, directory: str, lease: Lease) -> AdapterVersion:
        """Return the version of a directory as it is now. Raises as `make`."""
        version = await self.make(PrepareAdapter(adapter, directory), lease)
        self._made.put(directory, version)
        return version

    async def compose(
        self, label: str, members: tuple[Member, ...], combination: Combination, lease: Lease
    ) -> AdapterVersion:
        """Return the version of a combination. The caller holds the members. Raises as `make`."""
        parts = ([member.version.digest, member.weight] for member in members)
        key = msgspec.json.encode([combination, *parts]).decode()  # no path begins with a bracket
        return await self._remembered(key, ComposeAdapters(label, members, combination), lease)

    async def with_heads(
        self, label: str, version: AdapterVersion | None, heads: AdapterVersion, lease: Lease
    ) -> AdapterVersion:
        """Return `version`, None for the base, with other draft heads. The caller holds both. Raises as `make`."""
        key = msgspec.json.encode(["heads", version.digest if version else "", heads.digest]).decode()
        return await self._remembered(key, TakeHeads(label, version, heads), lease)

    async def make(self, message: MakeVersion, lease: Lease) -> AdapterVersion:
        """Have the worker make a version, and hold it by the lease.

        Raises:
            StoreFull: there is no room for it. InternalError: its file was deleted at each of `NUM_TRIES` tries.
            DeadlineExceeded, AdapterInvalid, DescantError: as `WorkerAsks.ask`.
        """
        version = await self._make(message)
        self.hold(version, lease)
        return version

    async def _remembered(self, key: str, message: MakeVersion, lease: Lease) -> AdapterVersion:
        claim = partial(self.hold, lease=lease)
        return await self._made.run(key, message.adapter, lambda: self._make(message), claim)

    async def _make(self, message: MakeVersion) -> AdapterVersion:
        for _ in range(NUM_TRIES):
            prepared: Prepared = await self._worker.ask(message, PREPARE_TIMEOUT_S)
            async with self._deleting:
                if await self._admit(message.adapter, prepared.version):
                    return prepared.version
        raise InternalError(f"the version of {message.adapter!r} vanished from the store {NUM_TRIES} times.")

    # ---- the store ------------------------------------------------------------------------------------------------

    async def _admit(self, adapter: str, version: AdapterVersion) -> bool:
        """Add a file that the worker wrote, making room for it. Return False if it has been deleted meanwhile."""
        path = Path(version.path)
        num_bytes = await anyio.to_thread.run_sync(_size, path)
        if num_bytes is None:
            return False
        victims = [] if version.digest in self._index else self._index.victims(num_bytes, self._is_kept)
        if victims is None:
            await anyio.to_thread.run_sync(_unlink, [path])
            raise StoreFull(adapter, num_bytes, self._index.max_bytes)
        self._index.add(version.digest, path, num_bytes)
        self._damaged.discard(version.digest)
        await self._delete(victims)
        return True

    def _is_kept(self, digest: str) -> bool:
        return self._is_named(digest) or self._leases.is_used(digest)

    async def _delete(self, digests: list[str]) -> None:
        paths: list[Path] = []
        for digest in digests:
            self._doomed.discard(digest)
            self._damaged.discard(digest)
            if (path := self._index.remove(digest)) is not None:
                paths.append(path)
        gone = set(digests)
        self._made.drop(lambda version: version.digest in gone)
        if paths:
            await anyio.to_thread.run_sync(_unlink, paths)

    # ---- events ---------------------------------------------------------------------------------------------------

    async def on_unnamed(self, digest: str) -> None:
        """Delete a version if no name stands for it any more, now or when its last lease is released."""
        async with self._deleting:
            if self._is_named(digest):
                return
            if self._leases.is_used(digest):
                self._doomed.add(digest)
                return
            await self._delete([digest])
        self._on_forget(digest)

    async def on_unused(self, digest: str) -> None:
        """Delete the version if it lost its last name while it was in use. Called when its last lease is released."""
        if digest in self._doomed:
            self._doomed.discard(digest)
            await self.on_unnamed(digest)

    def on_damaged(self, digest: str) -> None:
        """Mark a version whose file could not be read. It is made again before it is next returned."""
        if digest in self._index:
            self._damaged.add(digest)
        self._made.drop(lambda version: version.digest == digest)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            logger.warning("%s cannot be deleted: %s", path, exc)
