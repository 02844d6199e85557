"""Starts the registry and its worker: configured names, the place of its journal and store, limits."""

from __future__ import annotations

import contextlib
import hashlib
import re
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from descant.actor.endpoint import Program, Remote
from descant.actor.errors import ActorStopped, MailboxFull
from descant.actor.ref import Ref
from descant.actor.remote import spawn_remote
from descant.actors.dummy_registry import DummyRegistry
from descant.actors.registry import Registry
from descant.assembly.site import Site
from descant.catalog.configured import reconcile
from descant.catalog.journal import open_journal
from descant.config import AdapterConfig, AdapterEntry, Config
from descant.contract.child_config import AdapterLimits, WorkerConfig
from descant.contract.engine import Dtype
from descant.contract.worker import WorkerMessage, WorkerReply
from descant.messages import FetchMessage, ForgetVersion, PinVersions, RegistryMessage, VersionUnused
from descant.model.arch import from_hf
from descant.sessions.leases import LeaseTable
from descant.sources.demo import DEMO_ADAPTERS, DEMO_HEADS, DEMO_HEADS_DIRECTORY
from descant_client.errors import ConfigInvalid, ModelInvalid
from descant_client.speculation import SpeculationChoice, named_heads

MAILBOX_SIZE = 65536  # holds a message for the end of every stream; leases cannot wait
MAX_SLUG_CHARS = 64
KEYS_OWNER_SHARE = 0.5

_ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class RegistryParts(NamedTuple):
    """The registry of a model, the leases that it respects, and its worker."""

    ref: Ref[RegistryMessage]
    leases: LeaseTable
    worker: Remote[WorkerMessage] | None  # None with the dummy engine


async def spawn_registry(
    site: Site, exits: AsyncExitStack, *, model_id: str, fetch: Ref[FetchMessage]
) -> RegistryParts:
    """Start the registry of a model and its worker. The journal is open until `exits` is left.

    Raises:
        ConfigInvalid: another server uses the directory, its journal cannot be read, a configured reference is invalid
            or of a source that is not served, or as `registry_config`.
    """
    config, supervisor = site.config, site.supervisor
    adapters = registry_config(config)
    if config.model.engine == "dummy":
        ref = supervisor.spawn(partial(DummyRegistry, adapters.entries), "registry", mailbox_size=MAILBOX_SIZE)
        return RegistryParts(ref, LeaseTable(), None)
    directory = model_directory(config, model_id)
    journal = await exits.enter_async_context(open_journal(directory, _itemsize(config, site.model_dir)))
    # Once per server, not once per life of the registry: content that was read since the start must not change.
    await journal.apply(*reconcile(await journal.entries(), adapters.entries))
    store_dir = directory / "store"
    worker = _spawn_worker(site, store_dir)
    ref = supervisor.reserve("registry", mailbox_size=MAILBOX_SIZE)
    leases = LeaseTable(partial(_tell_unused, ref))
    make = partial(
        Registry,
        adapters,
        journal,
        store_dir,
        fetch,
        worker.ref,
        leases,
        on_pins=lambda versions: site.tell_scheduler(PinVersions(versions)),
        on_forget=lambda digest: site.tell_scheduler(ForgetVersion(digest)),
    )
    supervisor.start(ref, make)
    return RegistryParts(ref, leases, worker)


def _tell_unused(registry: Ref[RegistryMessage], digest: str) -> None:
    # A lost message does no harm: the version stays in the store until its room is needed.
    with contextlib.suppress(ActorStopped, MailboxFull):
        registry.tell_nowait(VersionUnused(digest))


def model_directory(config: Config, model_id: str) -> Path:
    """Return the directory of the journal and the store of a base model."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", model_id).strip("-")[-MAX_SLUG_CHARS:]
    name = f"{slug}-{hashlib.sha256(model_id.encode()).hexdigest()[:8]}"
    return Path(config.data_dir).expanduser() / "models" / name


def registry_config(config: Config) -> AdapterConfig:
    """Return the registry's configuration: every configured name, and the share that one principal may take.

    Raises:
        ConfigInvalid: the default draft heads are not those of a configured name.
    """
    share = config.adapters.max_owner_share
    if share is None:
        share = KEYS_OWNER_SHARE if config.keys else 1.0  # without API keys there is one principal
    entries = configured_adapters(config)
    _check_heads(config.scheduling.speculation, [entry.name for entry in entries])
    return msgspec.structs.replace(config.adapters, entries=entries, max_owner_share=share)


def _check_heads(speculation: SpeculationChoice, names: list[str]) -> None:
    heads = named_heads(speculation)
    if heads is not None and heads not in names:
        reason = f"{heads!r} is none of adapters.entries; draft heads for the base can be those of {', '.join(names)}."
        raise ConfigInvalid("scheduling.speculation.heads", reason)


def configured_adapters(config: Config) -> list[AdapterEntry]:
    """Return the configured adapters, after those that come with the embedded model if that is served."""
    entries = list(config.adapters.entries)
    if config.model.path is not None:
        return entries
    names = {entry.name for entry in entries}
    return [*[entry for entry in demo_adapters() if entry.name not in names], *entries]


def demo_adapters() -> list[AdapterEntry]:
    """Return the adapters that come with the embedded model, and the draft heads of its base."""
    directories = {path.name: path for path in sorted(DEMO_ADAPTERS.iterdir())} | {DEMO_HEADS: DEMO_HEADS_DIRECTORY}
    return [AdapterEntry(name=name, ref=f"local:{path}") for name, path in directories.items()]


def _itemsize(config: Config, model_dir: Path) -> int:
    try:
        return _ITEM_BYTES[config.model.dtype or from_hf(model_dir).dtype]
    except ModelInvalid:
        return _ITEM_BYTES["float32"]  # the executor reports the error


def _spawn_worker(site: Site, store_dir: Path) -> Remote[Any]:
    config = site.config
    worker_config = WorkerConfig(
        model_dir=str(site.model_dir),
        store_dir=str(store_dir),
        dtype=config.model.dtype,
        limits=AdapterLimits(
            max_rank=config.adapters.max_rank,
            max_draft_heads=config.adapters.max_draft_heads,
            max_file_bytes=config.adapters.max_file_bytes,
            max_extent_bytes=config.adapters.memory_bytes,
        ),
    )
    program = Program(
        factory="descant.actors.worker:start", config=msgspec.msgpack.encode(worker_config), replies=WorkerReply
    )
    # Only lives that never came up count: an adapter that crashes the worker must not stop the server.
    worker: Remote[Any] = spawn_remote(
        site.supervisor, "worker", program, placement=site.placement, on_up=lambda life: worker.mark_productive()
    )
    return worker
