"""The adapters of a server: its catalog, and a handle for each adapter."""

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
    """A handle for a name at the server, with its latest known state; another client may have changed it since.

    Every method except `fork`, `save` and `merge_and_save` changes the adapter for all users of its name. Cancelling a
    method does not undo it: the change may still be made. A change is made once. If the server restarts meanwhile,
    `fork`, `merge_and_save` and `destroy`, which cannot safely be repeated, raise `ConnectionLost`. All methods except
    `load`, which makes the name again, raise `AdapterNotFound` if the name no longer exists; all of them do on this
    handle once `destroy` was answered. Methods that change a shared adapter raise `AdapterForbidden` unless the client
    is an administrator. `fork` and `load` also raise the errors that `AdapterCatalog` lists for names.
    """

    def __init__(self, info: AdapterInfo, connection: Connection) -> None:
        self.info = info
        self._connection = connection
        self._is_destroyed = False

    # ---- state ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name in requests."""
        return self.info.name

    @property
    def source(self) -> str:
        """Kind of origin of its content, such as `local`, `create` or `merge`."""
        return self.info.source

    @property
    def digest(self) -> str | None:
        """Digest of its version; None until it is first prepared."""
        return self.info.digest

    @property
    def rank(self) -> int | None:
        """Largest rank over its modules; None until it is first prepared."""
        return self.info.rank

    @property
    def num_bytes(self) -> int | None:
        """Size on the device in bytes; None until it is first prepared."""
        return self.info.num_bytes

    @property
    def is_shared(self) -> bool:
        """Whether all principals may use it."""
        return self.info.is_shared

    @property
    def is_pinned(self) -> bool:
        """Whether it is pinned: kept on the device, if there is room (`is_unplaceable`)."""
        return self.info.is_pinned

    @property
    def is_unplaceable(self) -> bool:
        """Whether it is pinned and the server has no room for it beside the pins before it."""
        return self.info.is_unplaceable

    @property
    def is_enabled(self) -> bool:
        """Whether it is applied; if not, the base model answers requests for it."""
        return self.info.is_enabled

    # ---- changes ----------------------------------------------------------------------------------

    async def fork(self, new_name: str, *, shared: bool = False) -> Adapter:
        """Give its version a second name and return that adapter. Either can be changed without the other.

        Nothing is copied.

        Raises:
            AdapterExists: the new name is taken.
        """
        change = ForkAdapter(self._connection.new_request_id(), self.require_name(), new_name, shared)
        return Adapter(await _change(self._connection, change, new_name), self._connection)

    async def load(self, ref: Path, *, source: AdapterSource | None = None) -> Adapter:
        """Replace the version of this name by the adapter at `ref`, as `AdapterCatalog.load` does.

        Running requests finish on the old version.

        Raises:
            AdapterNotFound: there is no adapter at `ref`.
            AdapterForbidden: this client may not read `ref`, or may not change this name.
            AdapterInvalid, AdapterUnsupported, AdapterTooLarge: the new adapter cannot be used; the old version stays.
        """
        request_id, name = self._connection.new_request_id(), self.require_name()
        return await self._update(LoadAdapter(request_id, name, reference(ref, source), source, self.is_shared))

    async def save(self, path: Path) -> Adapter:
        """Write it as a directory that PEFT reads, at a path on the server's machine.

        A relative path is relative to the working directory of this program, not of the server.

        Raises:
            AdapterForbidden: the server may not write there for this client.
            AdapterInvalid: it changes no module and has no draft heads.
            InvalidRequest: the path holds anything but a saved adapter, or cannot be written.
        """
        return await self._update(SaveAdapter(self._connection.new_request_id(), self.require_name(), _absolute(path)))

    async def merge_and_save(self, path: Path) -> Adapter:
        """Write the base model with the adapter merged into it as a Hugging Face checkpoint. `path` is as in `save`.

        Raises:
            AdapterForbidden: the server may not write there for this client.
            AdapterInvalid: it changes no module, or a merged weight leaves the range of the checkpoint's dtype.
            InvalidRequest: the path holds files, or cannot be written.
        """
        return await self._update(MergeAndSave(self._connection.new_request_id(), self.require_name(), _absolute(path)))

    async def pin(self) -> Adapter:
        """Load it onto the device and keep it there. Returns when the pin is recorded, before the version is loaded.

        Raises:
            AdapterTooLarge: it is larger than all pins together may be.
            InvalidRequest: there is no room for it beside the other pins.
        """
        return await self._update(PinAdapter(self._connection.new_request_id(), self.require_name()))

    async def unpin(self) -> Adapter:
        """Allow its eviction from the device when other adapters need the room."""
        return await self._update(UnpinAdapter(self._connection.new_request_id(), self.require_name()))

    async def enable(self) -> Adapter:
        """Apply it again in new requests for it."""
        return await self._update(EnableAdapter(self._connection.new_request_id(), self.require_name()))

    async def disable(self) -> Adapter:
        """Answer new requests for it with the base model."""
        return await self._update(DisableAdapter(self._connection.new_request_id(), self.require_name()))

    async def destroy(self) -> None:
        """Remove the name. The version is removed once running requests have finished, unless it has another name."""
        await Operation(DestroyAdapter(self._connection.new_request_id(), self.require_name())).ask(self._connection)
        self._is_destroyed = True

    def require_name(self) -> str:
        """Return the name for use in a request. Raises AdapterNotFound after `destroy`."""
        if self._is_destroyed:
            raise AdapterNotFound(self.name)
        return self.name

    async def _update(self, change: AdapterChange) -> Adapter:
        self.info = await _change(self._connection, change, self.name)
        return self

    def __repr__(self) -> str:
        return f"Adapter({self.name!r})"


class AdapterCatalog:
    """The adapters of the server that this client may use.

    A name belongs to the principal that made it. `shared` names can be used by all principals and changed by
    administrators. Cancelling a method does not undo it. If the server restarts meanwhile, `create` and `merge` raise
    `ConnectionLost`; `open` then shows whether the adapter was made. Paths are as in `reference`.

    Methods that make a name or replace its version raise `InvalidRequest` if the name is not valid or its owner has too
    many, `AdapterForbidden` if it is shared and this client is no administrator, `StoreFull` if the version has no room
    in the store.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def open(self, name: str) -> Adapter | None:
        """Return the adapter of a name, None if there is none. Raises as `list`."""
        answer = await Question(OpenAdapter(self._connection.new_request_id(), name), Adapters).ask(self._connection)
        return Adapter(answer.adapters[0], self._connection) if answer.adapters else None

    async def list(self) -> list[Adapter]:
        """Return all adapters in order of registration.

        Raises:
            DescantError: the server's refusal, or `ConnectionLost`.
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
        """Make a zero adapter: its answers are those of the base model until `load` or `merge` replaces its content.

        The default of `alpha` is the rank. `target_modules` are ends of module names, by default `q_proj` and `v_proj`.

        Raises:
            AdapterExists: the name is taken.
            AdapterInvalid: a target matches no linear module, or the rank or alpha is out of range.
            AdapterUnsupported: a target matches the input embedding.
            AdapterTooLarge: it takes more bytes on the device than the server allows.
            InvalidRequest: alpha is not finite, or the rank is no rank of the protocol.
        """
        targets = None if target_modules is None else list(target_modules)
        change = CreateAdapter(self._connection.new_request_id(), name, rank, alpha, targets, shared)
        return await self._made(change)

    async def load(self, name: str, ref: Path, *, source: AdapterSource | None = None, shared: bool = False) -> Adapter:
        """Read the adapter at `ref` and make it the version of the name, which is created if there is none.

        The content is read again even if `ref` is the same. Running requests finish on the version they began with.

        Raises:
            AdapterNotFound: there is no adapter at `ref`.
            AdapterForbidden: this client may not read `ref`.
            AdapterInvalid, AdapterUnsupported, AdapterTooLarge: it cannot be used; the name keeps its version.
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
        """Make a combination of weighted adapters the version of the name, which is created if there is none.

        `lifecycle.Combination` documents the keywords.

        Raises:
            AdapterInvalid: the ranks of the members do not fit this type, or a value of the result is out of range.
            AdapterTooLarge: the result takes more bytes on the device than the server allows.
            AdapterNotFound, AdapterForbidden: as `load`, for a member.
            AdapterUnsupported: a member's reference or files need a feature that the server does not support.
            InvalidRequest: a keyword that this type needs is missing, or one that it does not take is given.
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
    """Return the text that refers to an adapter in a request.

    A local path (`./`, `../`, `~`, `local:`, a `Path` object, or any text with source `local`) is made absolute,
    relative to the working directory of this program: the server, which reads the path, has another one.

    Raises:
        AdapterNotFound: the adapter was destroyed through this handle.
    """
    if isinstance(adapter, Adapter):
        return adapter.require_name()
    text = os.fspath(adapter)
    if text.startswith(_LOCAL) and source is None:
        return _LOCAL + _absolute(text.removeprefix(_LOCAL))
    is_path = not isinstance(adapter, str) or text in (".", "..") or text.startswith(("./", "../", "~"))
    return _absolute(text) if source == "local" or (source is None and is_path) else text


def weighted(
    members: Sequence[tuple[str | Adapter, float]], source: AdapterSource | None = None
) -> list[WeightedAdapter]:
    """Return weighted members in the form of a request, with the texts that `reference` returns."""
    return [WeightedAdapter(reference(member, source), weight) for member, weight in members]


async def _change(connection: Connection, change: AdapterChange, name: str) -> AdapterInfo:
    answer = await Operation(change).ask(connection)
    if not answer.adapters:
        raise AdapterNotFound(name)  # destroyed by another client at the same moment
    return answer.adapters[0]


def _absolute(path: Path) -> str:
    expanded = os.path.expanduser(os.fspath(path))
    # An absolute path is kept as it is: only the server, which has the files, can resolve ".." after a link.
    return expanded if not expanded or os.path.isabs(expanded) else os.path.abspath(expanded)
