"""The scheduler actor: the step loop between the policy and the executor.

Accepts: Submit, CancelRequest, Unpark, ExecutorUp, ExecutorDown. Asks: executor. Owns: the policy of this life; the
sequences themselves belong to the system and outlive it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio

from descant.actor import Actor, ActorFailed
from descant.messages import (
    CancelRequest,
    EngineReady,
    ExecutorDown,
    ExecutorMessage,
    ExecutorUp,
    LoadAdapter,
    SchedulerMessage,
    Step,
    StepDone,
    Submit,
    Unpark,
)
from descant.remote import Remote
from descant.scheduling.gate import AdapterLoad
from descant.scheduling.policy import Policy
from descant.scheduling.rows import PlannedStep
from descant.scheduling.sequence import Sequence
from descant.services import ModelState
from descant_client.errors import DescantError
from descant_client.protocol import SamplingParams

logger = logging.getLogger(__name__)

STEP_TIMEOUT_S = 600.0  # a step this long is a fault of ours; a dead executor is noticed by its socket and heartbeat


class Scheduler(Actor[SchedulerMessage]):
    """Moves messages; every decision is the policy's."""

    def __init__(
        self,
        policy: Policy,
        model: ModelState,
        executor: Remote[ExecutorMessage],
        probe: Callable[[], Sequence],
    ) -> None:
        self._policy = policy
        self._model = model
        self._executor = executor
        self._probe = probe  # makes the request that shows a first life can step
        self._work = anyio.Event()

    async def on_start(self) -> None:
        """Go on with the executor as it is: a restart of this actor alone loses its rows, not the process."""
        self.start_soon(self._run)
        if self._model.is_up:
            self._policy.executor_up(self._model.engine.limits, self._model.engine.info.num_adapter_bytes)

    async def on_receive(self, message: SchedulerMessage) -> None:
        """Answer one message."""
        match message:
            case Submit(sequences):
                self._policy.submit(sequences)
            case CancelRequest(request_key):
                self._policy.cancel(request_key)
            case Unpark(sequence_ids):
                for sequence_id in sequence_ids:
                    self._policy.unpark(sequence_id)
            case ExecutorUp(engine):
                self._up(engine)
            case ExecutorDown(reason):
                self._down(reason)
        self._work.set()

    def _up(self, engine: EngineReady) -> None:
        self._model.up(engine)
        self._policy.executor_up(engine.limits, engine.info.num_adapter_bytes)
        if self._model.num_steps == 0:
            self._policy.submit([self._probe()])

    def _down(self, reason: str) -> None:
        if not self._model.is_up:
            return
        self._model.is_up = False
        if self._policy.executor_lost(reason):
            self._executor.mark_productive()

    async def _run(self) -> None:
        while True:
            planned = self._policy.plan() if self._model.is_up else None
            for load in self._policy.loads():
                self.start_soon(self._load, load)
            if planned is None:
                self._work = anyio.Event()
                await self._work.wait()
            else:
                await self._step(planned)

    async def _step(self, planned: PlannedStep) -> None:
        try:
            done: StepDone = await self._executor.ref.ask(Step(planned.plan), timeout=STEP_TIMEOUT_S)
            self._policy.apply(planned, done.result)
        except ActorFailed as error:
            self._down(str(error))
            return
        except DescantError as error:  # it refused the plan, or answered another one: it is not to be trusted any more
            self._executor.kill()
            self._down(str(error))
            return
        self._model.num_steps += 1
        self._executor.mark_productive()

    async def _load(self, load: AdapterLoad) -> None:
        message = LoadAdapter(load.adapter_slot, load.offset, load.version)
        try:
            await self._executor.ref.ask(message, timeout=STEP_TIMEOUT_S)
            self._policy.loaded(load)
        except ActorFailed:
            return  # ExecutorDown says so too, and counts once
        except DescantError as error:
            self._policy.load_failed(load, error)
        self._work.set()


class Discard:
    """The sink of a sequence nobody reads."""

    def put(self, sequence: Sequence, num_new: int) -> bool:
        """Take everything."""
        return True

    def end(self, sequence: Sequence) -> None:
        """Say so if even this failed."""
        if sequence.error is not None:
            logger.error("the first step failed: %s", sequence.error)


def make_probe(sequence_id: int) -> Sequence:
    """Return a request of one token, which makes the executor complete a step."""
    return Sequence(
        id=sequence_id,
        request_id="descant/probe",
        prompt_ids=[0],
        sampling=SamplingParams(temperature=0.0),
        seed=0,
        sink=Discard(),
        max_tokens=1,
    )
