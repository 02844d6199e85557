"""An executor that dies of certain prompts; `running(..., executor_factory=FACTORY)` starts it in the child."""

from __future__ import annotations

import os
import signal

from descant.actor.remote_child import Later, Notify
from descant.actors.executor import Executor
from descant.actors.executor import start as start_executor
from descant.contract.executor import ExecutorMessage, Placed, Staged, Step, StepDone
from descant.contract.plan import unpack_ints

FACTORY = "poison_executor:start"
POISON = 7  # the token id


class PoisonedExecutor:
    """The real one, except that a step which admits a poisoned prompt kills the process."""

    messages = ExecutorMessage
    beside = Executor.beside

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def handle(self, message: ExecutorMessage) -> Staged | Placed | StepDone | Later | None:
        """Carry out one message, or die of it."""
        if isinstance(message, Step) and any(POISON in unpack_ints(admit.token_ids) for admit in message.plan.admit):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._executor.handle(message)

    def close(self) -> None:
        """Nothing outlives the process."""


def start(config: bytes, notify: Notify) -> PoisonedExecutor:
    """Start the real executor inside."""
    return PoisonedExecutor(start_executor(config, notify))
