"""Starts the executor: its configuration, its restarts, and the messages to the scheduler about its lives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from descant.actor.endpoint import Program, Remote
from descant.actor.remote import spawn_remote
from descant.actor.supervision import RestartPolicy
from descant.assembly.site import Site
from descant.config import Config
from descant.contract.child_config import ExecutorConfig
from descant.contract.engine import EngineInfo, EngineOptions
from descant.contract.executor import EngineReady, ExecutorNote, ExecutorReply, LoadProgress
from descant.messages import ExecutorDown, ExecutorUp

FACTORY = "descant.actors.executor:start"


def spawn_executor(site: Site, factory: str, on_progress: Callable[[LoadProgress], None]) -> Remote[Any]:
    """Start the executor's process, which runs `factory` (see `Program.factory`)."""

    def program(earlier: EngineInfo | None) -> Program:
        settings = executor_config(site.config, site.model_dir, earlier)
        return Program(
            factory=factory, config=msgspec.msgpack.encode(settings), replies=ExecutorReply, notices=ExecutorNote
        )

    def on_notice(note: EngineReady | LoadProgress) -> None:
        if isinstance(note, EngineReady):
            executor.program = program(note.info)
            site.tell_scheduler(ExecutorUp(note))
        else:
            on_progress(note)

    if site.config.model.engine == "model":
        on_progress(LoadProgress("importing torch", 0.0))
    executor: Remote[Any] = spawn_remote(
        site.supervisor,
        "executor",
        program(None),
        placement=site.placement,
        on_notice=on_notice,
        on_down=lambda reason: site.tell_scheduler(ExecutorDown(str(reason))),
        restarts=RestartPolicy(max_restarts=site.config.scheduling.max_executor_restarts, within_s=math.inf),
    )
    return executor


def executor_config(config: Config, model_dir: Path, earlier: EngineInfo | None = None) -> ExecutorConfig:
    """Return the part of the configuration that the executor needs.

    `earlier` is the engine of an earlier life. Later lives take its number of threads, as the bits of sums depend on
    it, and its result of the probe.
    """
    return ExecutorConfig(
        engine=config.model.engine,
        model_dir=str(model_dir),
        options=EngineOptions(
            dtype=config.model.dtype,
            device=config.model.device,
            num_kv_bytes=config.model.kv_bytes,
            memory_fraction=config.model.memory_fraction,
            num_adapter_slots=config.adapters.num_slots,
            num_adapter_bytes=config.adapters.memory_bytes,
            num_host_bytes=config.adapters.host_bytes,
            max_num_batched_tokens=config.scheduling.max_num_batched_tokens,
            num_threads=earlier.num_threads if earlier else config.model.num_threads,
            is_invariant=earlier.is_invariant if earlier else None,
        ),
        dummy_tokens_per_s=config.model.dummy_tokens_per_s,
    )
