"""Builds the registry: which names the configuration gives it, where its journal and its store are, and its worker."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from descant.actor.endpoint import Program, Remote
from descant.actor.errors import ActorStopped, MailboxFull
from descant.actor.process import InProcess
from descant.actor.ref import Ref
from descant.actor.remote import spawn_remote
from descant.actor.supervision import Supervisor
from descant.actors.dummy_registry import DummyRegistry
from descant.actors.registry import Registry
from descant.catalog.configured import reconcile
from descant.catalog.journal import opened
from descant.config import AdapterConfig, AdapterEntry, Config
from descant.contract.child_config import WorkerConfig
from descant.contract.engine import Dtype
from descant.contract.limits import AdapterLimits
from descant.contract.worker import WorkerReply
from descant.messages import ForgetVersion, PinVersions, VersionFree
from descant.model.arch import from_hf
from descant.sessions.leases import LeaseTable
from descant.sources.demo import DEMO_ADAPTERS, DEMO_HEADS, DEMO_HEADS_DIRECTORY
from descant_client.errors import ConfigInvalid, ModelInvalid
from descant_client.speculation import SpeculationChoice, named_heads

MAILBOX_SIZE = 65536  # large enough for the end of every stream at once: leases cannot wait
MAX_SLUG_CHARS = 64
KEYS_OWNER_SHARE = 0.5

_ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


async def spawn_registry(
    config: Config,
    supervisor: Supervisor,
    exits: AsyncExitStack,
    *,
    model_id: str,
    model_dir: Path,
    fetch: Ref[Any],
    leases: LeaseTable,
    tell_scheduler: Callable[[PinVersions | ForgetVersion], None],
    placement: InProcess,
) -> Ref[Any]:
    """Start the registry of a model and its worker; the journal is open until `exits` is left.

    Raises:
        ConfigInvalid: another server uses the directory, its journal is not to be read, a configured reference is none
            that is served, or as `registry_config`.
    """
    adapters = registry_config(config)
    entries = adapters.entries
    if config.model.engine == "dummy":
        return supervisor.spawn(partial(DummyRegistry, entries), "registry", mailbox_size=MAILBOX_SIZE)
    directory = model_directory(config, model_id)
    journal = await exits.enter_async_context(opened(directory, _itemsize(config, model_dir)))
    # Once per server, not once per life of the registry: what was read since the start stays what it is.
    await journal.apply(*reconcile(await journal.entries(), entries))
    store_dir = directory / "store"
    worker = _spawn_worker(config, supervisor, model_dir, store_dir, placement)
    make = partial(
        Registry,
        adapters,
        journal,
        store_dir,
        fetch,
        worker.ref,
        leases,
        on_pins=lambda versions: tell_scheduler(PinVersions(versions)),
        on_forget=lambda digest: tell_scheduler(ForgetVersion(digest)),
    )
    registry = supervisor.spawn(make, "registry", mailbox_size=MAILBOX_SIZE)

    def on_free(digest: str) -> None:
        # Not to hear of it is no harm: the version stays in the store until its room is needed.
        with contextlib.suppress(ActorStopped, MailboxFull):
            registry.tell_nowait(VersionFree(digest))

    leases.on_free = on_free
    return registry


def model_directory(config: Config, model_id: str) -> Path:
    """Return where the journal and the store of a base model are."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", model_id).strip("-")[-MAX_SLUG_CHARS:]
    name = f"{slug}-{hashlib.sha256(model_id.encode()).hexdigest()[:8]}"
    return Path(config.data_dir).expanduser() / "models" / name


def registry_config(config: Config) -> AdapterConfig:
    """Return what the registry is told: every configured name, and what one principal's own may take.

    Raises:
        ConfigInvalid: the draft heads to be used by default are of none of these names.
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
    """Return the names that the configuration gives, those that come with the embedded model first."""
    entries = list(config.adapters.entries)
    if config.model.path is not None:
        return entries
    names = {entry.name for entry in entries}
    return [*[entry for entry in demo_adapters() if entry.name not in names], *entries]


def demo_adapters() -> list[AdapterEntry]:
    """Return the adapters that come with the embedded model, by name, and the draft heads of the base alone."""
    directories = {path.name: path for path in sorted(DEMO_ADAPTERS.iterdir())} | {DEMO_HEADS: DEMO_HEADS_DIRECTORY}
    return [AdapterEntry(name=name, ref=f"local:{path}") for name, path in directories.items()]


def _itemsize(config: Config, model_dir: Path) -> int:
    try:
        return _ITEM_BYTES[config.model.dtype or from_hf(model_dir).dtype]
    except ModelInvalid:
        return _ITEM_BYTES["float32"]  # the executor says what is wrong with it


def _spawn_worker(
    config: Config, supervisor: Supervisor, model_dir: Path, store_dir: Path, placement: InProcess
) -> Remote[Any]:
    worker_config = WorkerConfig(
        model_dir=str(model_dir),
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
    # Only lives that never came up count against it: no adapter that crashes it may bring the server down.
    worker: Remote[Any] = spawn_remote(
        supervisor, "worker", program, placement=placement, on_up=lambda life: worker.mark_productive()
    )
    return worker
