"""An executor that takes two steps at once, whatever its device; `running(..., executor_factory=FACTORY)` starts it."""

from __future__ import annotations

import dataclasses

import msgspec

from descant.actor.remote_child import Notify
from descant.actors.executor import Executor
from descant.actors.executor import start as start_executor
from descant.contract.child_config import ExecutorConfig

FACTORY = "pipelined_executor:start"


def start(config: bytes, notify: Notify) -> Executor:
    """Start the real executor with this one option changed."""
    settings = msgspec.msgpack.decode(config, type=ExecutorConfig)
    options = dataclasses.replace(settings.options, max_steps_in_flight=2)
    return start_executor(msgspec.msgpack.encode(msgspec.structs.replace(settings, options=options)), notify)
