"""Adapters as a program handles them: the catalog of a server, and a handle for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from descant_client.connection import Connection
from descant_client.errors import AdapterNotFound
from descant_client.lifecycle import (
    AdapterChange,
    AdapterInfo,
    Adapters,
    Combination,
    CombinationType,
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
from descant_client.operation import Operation
from descant_client.protocol import ListAdapters, OpenAdapter
from descant_client.question import Question
from descant_client.wire import AdapterSource, WeightedAdapter

Path = str | os.PathLike[str]
_LOCAL = "local:"


class Adapter:
    """A name at the server, and what was last heard of it: another client may have changed it since.

    Every method but `save` and `merge_and_save` changes the adapter for everybody who uses its name. Cancelling one
    does not undo it: the change may be made all the same. A change is asked for once; if the server restarts meanwhile,
    `fork` and `destroy`, which cannot safely be asked for again, raise `ConnectionLost`. All raise `AdapterNotFound`
    if the name is gone, and this handle does once `destroy` was answered.
    """

    def __init__(self, info: AdapterInfo, connection: Connection) -> None:
        self.info = info
        self._connection = connection
        self._is_destroyed = False

    # ---- what it is -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name requests use."""
        return self.info.name

    @property
    def source(self) -> str:
        """Where its content came from."""
        return self.info.source

    @property
    def digest(self) -> str | None:
        """Its version; None until it is first prepared."""
        return self.info.digest

    @property
    def rank(self) -> int | None:
        """The largest rank over its modules; None until it is first prepared."""
        return self.info.rank

    @property
    def num_bytes(self) -> int | None:
        """Bytes it takes on the device; None until it is first prepared."""
        return self.info.num_bytes

    @property
    def is_shared(self) -> bool:
        """Whether everybody may use it."""
        return self.info.is_shared

    @property
    def is_pinned(self) -> bool:
        """Whether it stays on the device."""
        return self.info.is_pinned

    @property
    def is_enabled(self) -> bool:
        """Whether it acts; if not, requests for it are answered by the base model."""
        return self.info.is_enabled

    # ---- what can be done to it -------------------------------------------------------------------

    async def fork(self, new_name: str, *, shared: bool = False) -> Adapter:
        """Give its version a second name, and return that; nothing is copied, and either may change without the other.

        Raises:
            AdapterExists: the new name is taken.
        """
        change = ForkAdapter(self._connection.new_request_id(), self.in_use(), new_name, shared)
        return Adapter(await _change(self._connection, change, new_name), self._connection)

    async def load(self, ref: Path, *, source: AdapterSource | None = None) -> Adapter:
        """Put what `ref` names, as `AdapterCatalog.load`, under this name; running requests finish on the old version.

        Raises:
            AdapterInvalid, AdapterUnsupported, AdapterTooLarge: it cannot be used; the old version stays.
        """
        request_id, name = self._connection.new_request_id(), self.in_use()
        return await self._become(LoadAdapter(request_id, name, reference(ref, source), source, self.is_shared))

    async def save(self, path: Path) -> Adapter:
        """Write it as a directory that PEFT reads, at a path of the server's machine.

        A relative path is taken from this program's working directory, not the server's.

        Raises:
            AdapterForbidden: the server may not write there for this client.
        """
        return await self._become(SaveAdapter(self._connection.new_request_id(), self.in_use(), _absolute(path)))

    async def merge_and_save(self, path: Path) -> Adapter:
        """Write the base model with the adapter merged into it as a Hugging Face checkpoint; the path is as `save`'s.

        Raises:
            AdapterForbidden: the server may not write there for this client.
        """
        return await self._become(MergeAndSave(self._connection.new_request_id(), self.in_use(), _absolute(path)))

    async def pin(self) -> Adapter:
        """Load it onto the device and keep it there. Raises AdapterTooLarge if pins may take no more room."""
        return await self._become(PinAdapter(self._connection.new_request_id(), self.in_use()))

    async def unpin(self) -> Adapter:
        """Let it leave the device when others need the room."""
        return await self._become(UnpinAdapter(self._connection.new_request_id(), self.in_use()))

    async def enable(self) -> Adapter:
        """Let it act again."""
        return await self._become(EnableAdapter(self._connection.new_request_id(), self.in_use()))

    async def disable(self) -> Adapter:
        """Let new requests for it be answered by the base model."""
        return await self._become(DisableAdapter(self._connection.new_request_id(), self.in_use()))

    async def destroy(self) -> None:
        """Forget the name. Running requests finish; then the version goes too, unless another name has it."""
        await Operation(DestroyAdapter(self._connection.new_request_id(), self.in_use())).ask(self._connection)
        self._is_destroyed = True

    def in_use(self) -> str:
        """Return the name, for a request. Raises AdapterNotFound after `destroy`."""
        if self._is_destroyed:
            raise AdapterNotFound(self.name)
        return self.name

    async def _become(self, change: AdapterChange) -> Adapter:
        self.info = await _change(self._connection, change, self.name)
        return self

    def __repr__(self) -> str:
        return f"Adapter({self.name!r})"


class AdapterCatalog:
    """The adapters of the server that this client may use.

    A name is its maker's own; `shared` names are everybody's to use and an administrator's to change. Cancelling a
    method does not undo it. `create` and `merge` raise `ConnectionLost` if the server restarts meanwhile: whether they
    were done is then to be seen with `open`. Paths are as in `reference`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def open(self, name: str) -> Adapter | None:
        """Return the adapter of that name, None if there is none. Raises as `list`."""
        answer = await Question(OpenAdapter(self._connection.new_request_id(), name), Adapters).ask(self._connection)
        return Adapter(answer.adapters[0], self._connection) if answer.adapters else None

    async def list(self) -> list[Adapter]:
        """Return all adapters in order of registration.

        Raises:
            DescantError: what the server refused, or `ConnectionLost`.
        """
        answer = await Question(ListAdapters(self._connection.new_request_id()), Adapters).ask(self._connection)
        return [Adapter(info, self._connection) for info in answer.adapters]

    async def create(
        self,
        name: str,
        *,
        rank: int = 8,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        shared: bool = False,
    ) -> Adapter:
        """Make an adapter that changes nothing yet: its answers are the base model's.

        `alpha` is by default the rank, `target_modules` (ends of module names) `q_proj` and `v_proj`.

        Raises:
            AdapterExists: the name is taken.
        """
        targets = None if target_modules is None else list(target_modules)
        change = CreateAdapter(self._connection.new_request_id(), name, rank, alpha, targets, shared)
        return await self._made(change)

    async def load(self, name: str, ref: Path, *, source: AdapterSource | None = None, shared: bool = False) -> Adapter:
        """Read what `ref` names and put it under the name, which is made if there is none.

        The content is read again even if `ref` is what it was. Running requests finish on the version they began with.

        Raises:
            AdapterNotFound, AdapterForbidden: there is nothing at `ref`, or nothing for this client.
            AdapterInvalid, AdapterUnsupported, AdapterTooLarge: it cannot be used; what was under the name stays.
        """
        request_id = self._connection.new_request_id()
        return await self._made(LoadAdapter(request_id, name, reference(ref, source), source, shared))

    async def merge(
        self,
        name: str,
        members: Sequence[tuple[str | Adapter, float]],
        *,
        type: CombinationType = "cat",  # noqa: A002 - its name on the wire
        rank: int | None = None,
        clamp: float | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
        seed: int = 0,
        source: AdapterSource | None = None,
        shared: bool = False,
    ) -> Adapter:
        """Put a combination of weighted adapters under the name, which is made if there is none.

        `lifecycle.Combination` says what the keywords mean.

        Raises:
            AdapterInvalid: the members' ranks are not those that this type takes.
            AdapterUnsupported: a member that cannot be combined so; it names the feature.
            InvalidRequest: a keyword that this type needs, or does not know.
        """
        change = MergeAdapters(
            self._connection.new_request_id(),
            name,
            weighted(members, source),
            source,
            Combination(type, rank, clamp, density, majority_sign_method, seed),
            shared,
        )
        return await self._made(change)

    async def _made(self, change: AdapterChange) -> Adapter:
        return Adapter(await _change(self._connection, change, change.name), self._connection)


def reference(adapter: Path | Adapter, source: AdapterSource | None = None) -> str:
    """Return what stands for an adapter in a request.

    A local path (`./`, `../`, `~`, `local:`, a `Path` object, or anything with source `local`) is made absolute here:
    the working directory of the server, which reads it, means nothing to its clients. Raises AdapterNotFound if it
    was destroyed.
    """
    if isinstance(adapter, Adapter):
        return adapter.in_use()
    text = os.fspath(adapter)
    if text.startswith(_LOCAL) and source is None:
        return _LOCAL + _absolute(text.removeprefix(_LOCAL))
    is_path = not isinstance(adapter, str) or text in (".", "..") or text.startswith(("./", "../", "~"))
    return _absolute(text) if source == "local" or (source is None and is_path) else text


def weighted(
    members: Sequence[tuple[str | Adapter, float]], source: AdapterSource | None = None
) -> list[WeightedAdapter]:
    """Return weighted members as a request has them; each as in `reference`."""
    return [WeightedAdapter(reference(member, source), weight) for member, weight in members]


async def _change(connection: Connection, change: AdapterChange, name: str) -> AdapterInfo:
    answer = await Operation(change).ask(connection)
    if not answer.adapters:
        raise AdapterNotFound(name)  # destroyed by another client at the same moment
    return answer.adapters[0]


def _absolute(path: Path) -> str:
    expanded = os.path.expanduser(os.fspath(path))
    # An absolute one is left as it is: only who has the files knows what ".." after a link means.
    return expanded if not expanded or os.path.isabs(expanded) else os.path.abspath(expanded)
