"""The executor: the device, in a process of its own.

Accepts: LoadAdapter, Step. Sends up: LoadProgress while loading, EngineReady once. Owns: weights, KV cache, arena.

Its code runs in the child; the server process holds a `Ref` and never imports torch, and neither does this module.
"""

from __future__ import annotations

import msgspec

from descant.child_config import ExecutorConfig
from descant.engine.dummy import DummyEngine, DummyOptions
from descant.engine.interface import StepEngine
from descant.messages import EngineReady, ExecutorMessage, LoadAdapter, Loaded, LoadProgress, Step, StepDone
from descant.remote_child import Notify


class Executor:
    """The handler of the child's main thread: one message at a time."""

    messages = ExecutorMessage

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine

    def handle(self, message: ExecutorMessage) -> Loaded | StepDone:
        """Carry out one message. DescantErrors concern that message; anything else ends the process."""
        match message:
            case LoadAdapter(adapter_slot, offset, version):
                self._engine.load_adapter(adapter_slot, offset, version.path)
                return Loaded(adapter_slot)
            case Step(plan):
                return StepDone(self._engine.step(plan))

    def close(self) -> None:
        """Nothing outlives the process."""


def start(config: bytes, notify: Notify) -> Executor:
    """Build the engine the configuration asks for, telling the parent how far it is."""
    settings = msgspec.msgpack.decode(config, type=ExecutorConfig)
    engine = _dummy_engine(settings) if settings.engine == "dummy" else _model_engine(settings, notify)
    notify(EngineReady(engine.limits, engine.info))
    return Executor(engine)


def _dummy_engine(settings: ExecutorConfig) -> StepEngine:
    options = settings.options
    return DummyEngine(
        DummyOptions(
            tokens_per_s=settings.dummy_tokens_per_s,
            num_adapter_slots=options.num_adapter_slots,
            num_adapter_bytes=options.num_adapter_bytes,
            max_num_batched_tokens=options.max_num_batched_tokens,
        )
    )


def _model_engine(settings: ExecutorConfig, notify: Notify) -> StepEngine:
    notify(LoadProgress("importing torch", 0.0))
    from descant.engine.runner import Engine

    return Engine(settings.model_dir, settings.options, lambda at: notify(LoadProgress("loading weights", at)))
