"""Starts the executor: its configuration, its restarts, and the messages to the scheduler about its lives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from descant.actor.endpoint import Program, Remote
from descant.actor.remote import spawn_remote
from descant.actor.supervision import RestartPolicy, Supervisor
from descant.config import Config
from descant.contract.child_config import ExecutorConfig
from descant.contract.engine import EngineOptions
from descant.contract.executor import EngineReady, ExecutorNote, ExecutorReply, LoadProgress
from descant.messages import ExecutorDown, ExecutorUp

FACTORY = "descant.actors.executor:start"


def spawn_executor(
    config: Config,
    supervisor: Supervisor,
    *,
    factory: str,
    model_dir: Path,
    tell_scheduler: Callable[[ExecutorUp | ExecutorDown], None],
    on_progress: Callable[[LoadProgress], None],
) -> Remote[Any]:
    """Start the executor's process, which runs `factory` (see `Program.factory`)."""

    def on_notice(note: EngineReady | LoadProgress) -> None:
        if isinstance(note, EngineReady):
            tell_scheduler(ExecutorUp(note))
        else:
            on_progress(note)

    return spawn_remote(
        supervisor,
        "executor",
        Program(
            factory=factory,
            config=msgspec.msgpack.encode(executor_config(config, model_dir)),
            replies=ExecutorReply,
            notices=ExecutorNote,
        ),
        on_notice=on_notice,
        on_down=lambda reason: tell_scheduler(ExecutorDown(str(reason))),
        restarts=RestartPolicy(max_restarts=config.scheduling.max_executor_restarts, within_s=math.inf),
    )


def executor_config(config: Config, model_dir: Path) -> ExecutorConfig:
    """Return the part of the configuration that the executor needs."""
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
            num_threads=config.model.num_threads,
        ),
        dummy_tokens_per_s=config.model.dummy_tokens_per_s,
    )
