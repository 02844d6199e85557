"""The executor actor: the device, in a process of its own.

Accepts: StageAdapter, PlaceAdapter, MoveAdapters, DropAdapter, Step. Sends up: LoadProgress while loading, EngineReady
once. Owns: weights, KV cache, arena, adapters in host memory.

This module runs in the child. The server process holds a `Ref` and never imports torch; nor does this module, before
it builds an engine.
"""

from __future__ import annotations

import sys
from collections import deque

import msgspec

from descant.actor.remote_child import Later, Notify
from descant.contract.child_config import ExecutorConfig
from descant.contract.engine import StagedAdapter, StepEngine
from descant.contract.executor import (
    DropAdapter,
    EngineReady,
    ExecutorMessage,
    LoadProgress,
    MoveAdapters,
    PlaceAdapter,
    Placed,
    StageAdapter,
    Staged,
    Step,
    StepDone,
)
from descant.contract.plan import StepPlan, StepResult
from descant.engine.allocator import keep_freed_memory
from descant.engine.dummy import DummyEngine, DummyOptions
from descant.engine.host_cache import HostCache

SWITCH_INTERVAL_S = 0.0005  # longest delay of a step's operator by a side thread that runs Python


class Executor:
    """The handler of the child. Staging runs on side threads, all else on the main thread, one message at a time."""

    messages = ExecutorMessage
    beside = (StageAdapter,)

    def __init__(self, engine: StepEngine, num_host_bytes: int) -> None:
        self._engine = engine
        self._host: HostCache[StagedAdapter] = HostCache(num_host_bytes)
        self._epoch = 0  # of the latest step
        self._num_launched = 0  # steps launched and not collected
        self._collected: deque[StepResult] = deque()  # results not answered yet

    def handle(self, message: ExecutorMessage) -> Staged | Placed | StepDone | Later | None:
        """Carry out one message. A DescantError is its answer; any other exception ends the process."""
        match message:
            case StageAdapter():
                return self._stage(message)
            case PlaceAdapter(adapter_slot, offset, version):
                # If it was dropped meanwhile it is read again, on the main thread.
                staged = self._host.take(version.digest) or self._engine.stage_adapter(version.path)
                self._engine.place_adapter(adapter_slot, offset, staged)
                return Placed(adapter_slot)
            case MoveAdapters(moves):
                for move in moves:
                    self._engine.move_adapter(move.adapter_slot, move.offset)
                return None
            case DropAdapter(digest):
                self._host.drop(digest)
                return None
            case Step(plan):
                self._host.begin(plan.epoch)
                return self._step(plan)

    def close(self) -> None:
        """Do nothing: the executor holds no resources that outlive its process."""

    def _step(self, plan: StepPlan) -> StepDone | Later:
        """Carry out a step. If steps may be in flight, launch it, and answer once it is done."""
        if self._engine.limits.max_steps_in_flight == 1:
            return StepDone(self._engine.step(plan))
        if plan.epoch != self._epoch:  # of a new scheduler, which expects no results of earlier epochs
            self._epoch = plan.epoch
            while self._num_launched:
                self._collect()
        self._engine.launch(plan)
        self._num_launched += 1
        return Later(self._wait, self._reply)

    def _wait(self) -> None:
        if not self._collected:
            self._engine.block_until_done()

    def _reply(self) -> StepDone:
        if not self._collected:
            self._collect()
        return StepDone(self._collected.popleft())

    def _collect(self) -> None:
        self._num_launched -= 1
        self._collected.append(self._engine.collect())

    def _stage(self, message: StageAdapter) -> Staged:
        version = message.version
        claim_epoch = message.epoch if message.is_placed else None
        self._host.stage(
            version.digest, version.num_bytes, lambda: self._engine.stage_adapter(version.path), claim_epoch
        )
        return Staged(version.digest)


def start(config: bytes, notify: Notify) -> Executor:
    """Build the configured engine and report the stages to the parent. `config` is an encoded `ExecutorConfig`."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_freed_memory()
    settings = msgspec.msgpack.decode(config, type=ExecutorConfig)
    engine = _dummy_engine(settings) if settings.engine == "dummy" else _model_engine(settings, notify)
    notify(EngineReady(engine.limits, engine.info))
    return Executor(engine, settings.options.num_host_bytes)


def _dummy_engine(settings: ExecutorConfig) -> StepEngine:
    options = settings.options
    return DummyEngine(
        DummyOptions(
            tokens_per_s=settings.dummy_tokens_per_s,
            num_adapter_slots=options.num_adapter_slots,
            num_adapter_bytes=options.num_adapter_bytes or DummyOptions().num_adapter_bytes,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_steps_in_flight=options.pipeline_depth,
        )
    )


def _model_engine(settings: ExecutorConfig, notify: Notify) -> StepEngine:
    from descant.engine.runner import Engine

    def on_progress(fraction: float) -> None:
        stage = "loading and packing the weights" if fraction < 1.0 else "preparing the engine"
        notify(LoadProgress(stage, fraction))

    return Engine(settings.model_dir, settings.options, on_progress)
