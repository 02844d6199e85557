"""`Scheduler`: the actor with the step loop between the policy and the executor.

Accepts: Submit, CancelRequest, Unpark, ExecutorUp, ExecutorDown, PinVersions, ForgetVersion. Asks: executor. Tells:
registry. Owns: the policy of this life. The sequences themselves belong to the system and outlive the actor.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable

import anyio
import anyio.lowlevel

from descant.actor.actor import Actor
from descant.actor.endpoint import Remote
from descant.actor.errors import ActorError, ActorFailed, AskTimeout
from descant.actor.ref import Ref
from descant.contract.executor import (
    DropAdapter,
    EngineReady,
    ExecutorMessage,
    MoveAdapters,
    PlaceAdapter,
    StageAdapter,
    Step,
    StepDone,
)
from descant.contract.plan import StepResult
from descant.contract.version import AdapterVersion
from descant.messages import (
    CancelRequest,
    ExecutorDown,
    ExecutorUp,
    ForgetVersion,
    PinsRefused,
    PinVersions,
    RegistryMessage,
    SchedulerMessage,
    Submit,
    Unpark,
    VersionFailed,
)
from descant.requests.services import ModelState
from descant.scheduling.placement.loads import AdapterLoad
from descant.scheduling.policy import Policy
from descant.scheduling.rows import PlannedStep
from descant.scheduling.sequence import Sequence, SequenceRequest
from descant_client.errors import AdapterInvalid, DeadlineExceeded, DescantError
from descant_client.protocol import SamplingParams

logger = logging.getLogger(__name__)

STEP_TIMEOUT_S = 600.0  # a longer step is a fault; the end of the process is detected by socket and heartbeat
STAGE_TIMEOUT_S = 600.0  # for reading one version; then the requests that wait for it fail
MAX_PREFETCHES = 4  # at once; the other side threads of the executor are for loads


class Scheduler(Actor[SchedulerMessage]):
    """Passes messages between the policy and the executor. The policy makes every decision."""

    def __init__(
        self,
        policy: Policy,
        model: ModelState,
        executor: Remote[ExecutorMessage],
        registry: Ref[RegistryMessage],
        probe: Callable[[], Sequence],
    ) -> None:
        self._policy = policy
        self._model = model
        self._executor = executor
        self._registry = registry
        self._prefetches: dict[str, AdapterVersion] = {}  # by digest, not yet begun
        self._num_prefetching = 0
        self._outcomes: deque[tuple[PlannedStep, StepResult | DescantError]] = deque()  # of steps, not yet applied
        self._probe = probe  # makes a request that shows that the first executor can step
        self._refused_pins: tuple[str, ...] | None = None  # as last told to this life of the registry, if ever
        self._work = anyio.Event()
        self._work_turn = anyio.Lock()  # adapter work is told in the order in which it was decided

    async def on_start(self) -> None:
        """Start the step loop. If the executor is up, keep using it: a restart of this actor loses only its rows."""
        self.start_soon(self._run)
        self._policy.adapters.set_pins(self._model.pinned)
        if self._model.is_up:
            self._policy.on_executor_up(self._model.engine.limits, self._model.engine.info.num_adapter_bytes)
            await self._report_pins()

    async def on_receive(self, message: SchedulerMessage) -> None:
        """Handle one message."""
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
                await self._report_pins()
            case ExecutorDown(reason):
                self._down(reason)
            case PinVersions(versions):
                self._model.pinned = versions
                self._policy.adapters.set_pins(versions)
                self._refused_pins = None  # the registry may have been started again
                await self._report_pins()
            case ForgetVersion(digest):
                self._policy.adapters.forget_version(digest)
                self._drop(digest)
        self._work.set()

    def _up(self, engine: EngineReady) -> None:
        self._model.on_executor_up(engine)
        self._policy.on_executor_up(engine.limits, engine.info.num_adapter_bytes)
        if self._model.num_steps == 0:
            self._policy.submit([self._probe()])

    async def _report_pins(self) -> None:
        """Send the registry the pins without room on the device, for its answers to clients, if they have changed."""
        refused = tuple(version.digest for version in self._policy.adapters.unplaceable_pins)
        if self._model.is_up and refused != self._refused_pins:
            self._refused_pins = refused
            with contextlib.suppress(ActorError):  # without a registry no client can list adapters
                await self._registry.tell(PinsRefused(refused))

    def _down(self, reason: str) -> None:
        if not self._model.is_up:
            return
        self._model.is_up = False
        self._prefetches.clear()
        if self._policy.on_executor_lost(reason):
            self._executor.mark_productive()

    async def _run(self) -> None:
        while True:
            self._work = anyio.Event()  # first: a message that comes while moves are told may change the plan
            self._apply_outcomes()
            self._policy.expire()
            planned = self._policy.plan() if self._model.is_up else None
            await self._start_adapter_work()
            if planned is None:
                with anyio.move_on_after(self._policy.seconds_to_deadline()):
                    await self._work.wait()
            elif self._model.engine.limits.max_steps_in_flight == 1:
                await self._ask(planned)  # no step can be planned before its answer
            else:
                self.start_soon(self._ask, planned)
                await anyio.lowlevel.checkpoint()  # the step is in the mailbox before anything decided later

    async def _ask(self, planned: PlannedStep) -> None:
        try:
            done: StepDone = await self._executor.ref.ask(Step(planned.plan), timeout=STEP_TIMEOUT_S)
            self._outcomes.append((planned, done.result))
        except DescantError as error:
            self._outcomes.append((planned, error))
        self._work.set()

    def _apply_outcomes(self) -> None:
        while self._outcomes:
            planned, outcome = self._outcomes.popleft()
            if self._policy.is_in_flight(planned):
                self._apply(planned, outcome)

    def _apply(self, planned: PlannedStep, outcome: StepResult | DescantError) -> None:
        try:
            if isinstance(outcome, DescantError):
                raise outcome
            self._policy.apply(planned, outcome)
        except ActorFailed as error:
            self._down(str(error))
            return
        except DescantError as error:  # it refused the plan or answered another one: it cannot be trusted
            self._executor.kill()
            self._down(str(error))
            return
        self._model.num_steps += 1
        self._executor.mark_productive()

    # ---- adapters -------------------------------------------------------------------------------------------------

    async def _start_adapter_work(self) -> None:
        async with self._work_turn:
            work = self._policy.adapters.take_work()
            if work.moves:  # told before any step or load that relies on them
                with contextlib.suppress(ActorError):  # the executor is gone for good, or ExecutorDown is on its way
                    await self._executor.ref.tell(MoveAdapters(work.moves))
        for load in work.loads:
            self._prefetches.pop(load.version.digest, None)
            self.start_soon(self._load, load)
        for version in work.prefetches:
            self._prefetches[version.digest] = version
        while self._num_prefetching < min(MAX_PREFETCHES, len(self._prefetches)):
            self._num_prefetching += 1
            self.start_soon(self._prefetch)

    async def _load(self, load: AdapterLoad) -> None:
        """Stage a version beside the steps, then place it between two of them."""
        await self._stage_and_place(load)
        await self._start_adapter_work()  # loads that waited for the end of this one
        self._work.set()

    async def _stage_and_place(self, load: AdapterLoad) -> None:
        stage = StageAdapter(load.version, is_placed=True, epoch=load.epoch)
        place = PlaceAdapter(load.adapter_slot, load.offset, load.version)
        try:
            await self._executor.ref.ask(stage, timeout=STAGE_TIMEOUT_S)
            self._policy.adapters.on_staged(load)
            await self._start_adapter_work()  # other versions may be read while this one waits for a step to end
            await self._place(place)
            self._policy.adapters.on_placed(load)
            self._model.num_adapter_loads += 1
        except ActorFailed:
            return  # ExecutorDown reports it too
        except AskTimeout:
            self._policy.adapters.on_load_failed(
                load, DeadlineExceeded("reading an adapter from the store", STAGE_TIMEOUT_S)
            )
        except DescantError as error:
            if isinstance(error, AdapterInvalid):  # first, so that the next try finds a version made anew
                with contextlib.suppress(ActorError):
                    await self._registry.tell(VersionFailed(load.version.digest))
            self._drop(load.version.digest)
            self._policy.adapters.on_load_failed(load, error)

    async def _place(self, message: PlaceAdapter) -> None:
        try:
            await self._executor.ref.ask(message, timeout=STEP_TIMEOUT_S)
        except AskTimeout as error:  # it may still write there after the place is given to another version
            self._executor.kill()
            raise ActorFailed(self._executor.name, str(error)) from error

    async def _prefetch(self) -> None:
        """Have the versions that wait read, one after the other, in order of arrival."""
        try:
            while self._prefetches:
                version = self._prefetches.pop(next(iter(self._prefetches)))
                try:
                    stage = StageAdapter(version, is_placed=False, epoch=0)
                    await self._executor.ref.ask(stage, timeout=STAGE_TIMEOUT_S)
                except ActorFailed:
                    continue  # perhaps because of this version: at ExecutorDown it counts as being read
                except DescantError:
                    pass  # its load will report it
                self._policy.adapters.on_prefetch_done(version.digest)
        finally:
            self._num_prefetching -= 1

    def _drop(self, digest: str) -> None:
        if self._model.is_up:
            with contextlib.suppress(ActorError):  # the message would only have freed memory
                self._executor.ref.tell_nowait(DropAdapter(digest))


class Discard:
    """A sink that discards its tokens."""

    def put(self, sequence: Sequence, num_new: int) -> bool:
        """Discard the tokens."""
        return True

    def end(self, sequence: Sequence) -> None:
        """Log the error of a sequence that failed."""
        if sequence.error is not None:
            logger.error("the first step failed: %s", sequence.error)


def make_probe(sequence_id: int) -> Sequence:
    """Return a sequence of one prompt and one output token, which makes the executor complete a step."""
    request = SequenceRequest(
        request_id="descant/probe",
        prompt_ids=[0],
        sampling=SamplingParams(temperature=0.0),
        seed=0,
        sink=Discard(),
        max_tokens=1,
    )
    return Sequence(sequence_id, request)
