"""The worker: heavy adapter work in a process of its own.

Accepts: PrepareAdapter, ComposeAdapters, TakeHeads, CreateVersion, ExportAdapter, ExportMerged. Owns: the base model's
shapes. Only this process writes into the store.

This module runs in the child. A file that crashes the child fails one request.
"""

from __future__ import annotations

import msgspec

from descant.actor.remote_child import Notify
from descant.adapters.prepare import AdapterWorker
from descant.contract.child_config import WorkerConfig
from descant.contract.worker import (
    ComposeAdapters,
    CreateVersion,
    ExportAdapter,
    Exported,
    ExportMerged,
    PrepareAdapter,
    Prepared,
    TakeHeads,
    WorkerMessage,
    WorkerReply,
)
from descant.model.arch import from_hf


class Worker:
    """The handler of the child. It handles any number of messages at once, as no state is kept between them."""

    messages = WorkerMessage
    beside: tuple[type, ...] = (PrepareAdapter, ComposeAdapters, TakeHeads, CreateVersion, ExportAdapter, ExportMerged)

    def __init__(self, adapters: AdapterWorker) -> None:
        self._adapters = adapters

    def handle(self, message: WorkerMessage) -> WorkerReply:
        """Carry out one message. Raises AdapterError for every fault of an adapter."""
        match message:
            case PrepareAdapter(adapter, directory):
                return Prepared(self._adapters.prepare(adapter, directory))
            case ComposeAdapters(adapter, members, combination):
                weighted = [(member.version, member.weight) for member in members]
                return Prepared(self._adapters.compose(adapter, weighted, combination))
            case TakeHeads(adapter, version, heads):
                return Prepared(self._adapters.with_heads(adapter, version, heads))
            case CreateVersion(adapter, rank, alpha, target_modules):
                return Prepared(self._adapters.create(adapter, rank, alpha, target_modules))
            case ExportAdapter(adapter, version, directory):
                return Exported(directory, self._adapters.export(adapter, version, directory))
            case ExportMerged(adapter, version, directory):
                return Exported(directory, self._adapters.export_merged(adapter, version, directory))

    def close(self) -> None:
        """Do nothing: the worker holds no resources that outlive its process."""


def start(config: bytes, notify: Notify) -> Worker:
    """Return the handler for a `WorkerConfig`, encoded as msgpack."""
    settings = msgspec.msgpack.decode(config, type=WorkerConfig)
    dtype = settings.dtype or from_hf(settings.model_dir).dtype
    return Worker(AdapterWorker(settings.model_dir, settings.store_dir, dtype, settings.limits))
