"""The system: builds the actors in order, hands each what outlives it, and takes them down again.

gateway ─→ auth
        ─→ registry ─→ fetch
                    ─→ worker (process)
        ─→ scheduler ─→ executor (process)
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec

from descant.actor.child_process import StartChild, execute
from descant.actor.endpoint import Program, Remote
from descant.actor.errors import ActorStopped
from descant.actor.launcher import Launching, can_fork
from descant.actor.process import InProcess
from descant.actor.ref import Ref
from descant.actor.remote import spawn_remote
from descant.actor.supervision import RestartPolicy, Supervisor
from descant.actors.auth import Auth
from descant.actors.fetch import Fetch
from descant.actors.gateway import Gateway, open_listener
from descant.actors.scheduler import Scheduler, make_probe
from descant.assembly.registry_setup import spawn_registry
from descant.config import Config, check_config
from descant.contract.child_config import ExecutorConfig
from descant.contract.engine import EngineOptions
from descant.contract.executor import EngineReady, ExecutorNote, ExecutorReply, LoadProgress
from descant.messages import Drain, ExecutorDown, ExecutorUp, FetchModel, ForgetVersion, PinVersions
from descant.model.tokenizer import Tokenizer
from descant.requests.default_heads import DefaultHeads
from descant.requests.services import ModelState, Services
from descant.scheduling.policy import Policy
from descant.scheduling.sequence import SequenceTable
from descant.sessions.leases import LeaseTable
from descant.sessions.session import SessionTable
from descant.sessions.stream import Stream
from descant.sources.demo import DEMO_MODEL
from descant_client.errors import DescantError, ExecutorFailed, InternalError, ModelInvalid

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 24 * 3600.0
# What the launcher imports for executor and worker.
CHILD_MODULES = ("descant.actors.executor", "descant.engine.runner", "descant.actors.worker")
DRAIN_POLL_S = 0.05
LAUNCHER = "launcher"
EXECUTOR = "descant.actors.executor:start"


class System:
    """A running server. Made by `running`; everything in it stops when that block is left."""

    def __init__(self, config: Config, executor_factory: str = EXECUTOR) -> None:
        self.config = config
        self.executor_factory = executor_factory
        self.services: Services
        self.executor: Remote[Any]
        self.launcher: Launching | None = None  # None: children start from nothing
        self.gateway: Ref[Drain]
        self.port = config.server.port  # the real one, if 0 was asked for
        self.failed = anyio.Event()  # an actor was given up: drain and leave
        self.failure: DescantError | None = None

    def kill_executor(self) -> None:
        """End the executor as a crash would: every stream goes on with the next one."""
        self.executor.kill()

    def give_up(self, actor: str, error: Exception) -> None:
        """Take note that an actor cannot be kept running. Without the launcher, children only start more slowly."""
        if actor == LAUNCHER:
            logger.warning("children start from nothing: %s", error)
            return
        logger.error("%s was given up: %s", actor, error)
        self.failure = self.failure or (error if isinstance(error, DescantError) else InternalError(str(error)))
        if actor in ("executor", "scheduler"):
            self._end_streams(error if isinstance(error, ModelInvalid) else ExecutorFailed(str(error)))
        self.failed.set()

    def _end_streams(self, error: DescantError) -> None:
        """Nobody computes any more: end what runs, and whatever comes, with `error`."""
        self.services.model.give_up(error)
        for session in self.services.sessions:
            for one in session:
                if isinstance(one, Stream) and not one.is_ended:  # operations on adapters still have their answer
                    one.fail(error)

    async def ready(self) -> EngineReady:
        """Wait until the model is loaded. Raises what made it impossible."""
        await first_of(self.failed.wait, self.services.model.ready)
        if self.failure is not None:
            raise self.failure
        return self.services.model.engine

    async def drain(self, reason: str) -> None:
        """Refuse new requests and wait, at most `drain_s`, until the running ones have ended and were sent."""
        with contextlib.suppress(ActorStopped):  # the gateway itself may be what was given up
            await self.gateway.tell(Drain(reason))
        with anyio.move_on_after(self.config.server.drain_s):
            while self.services.sessions.is_busy:  # noqa: ASYNC110 - a table tells nobody of its last entry
                await anyio.sleep(DRAIN_POLL_S)


@asynccontextmanager
async def running(
    config: Config,
    on_progress: Callable[[LoadProgress], None] = lambda note: None,
    *,
    executor_factory: str = EXECUTOR,
) -> AsyncIterator[System]:
    """Run a server. It listens when the block is entered; clients that connect wait until the model is loaded.

    `executor_factory` is what the executor's process runs (`remote.Program.factory`).

    Raises:
        ConfigInvalid, ModelInvalid, SourceUnavailable: it cannot start.
    """
    check_config(config)
    system = System(config, executor_factory)
    with unwrapped(), open_listener(config.server.host, config.server.port) as listener:
        system.port = listener.getsockname()[1]
        async with AsyncExitStack() as exits, Supervisor(on_escalate=system.give_up) as supervisor:
            await _assemble(system, supervisor, exits, listener, on_progress)
            yield system


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise a lone exception of nested task groups as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup) and len(leaf.exceptions) == 1:
            leaf = leaf.exceptions[0]
        raise leaf from None


async def first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Return when one of these has, cancelling the others."""

    async def wait_for(wait: Callable[[], Awaitable[object]]) -> None:
        await wait()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for wait in waits:
            tasks.start_soon(wait_for, wait)


async def _assemble(
    system: System,
    supervisor: Supervisor,
    exits: AsyncExitStack,
    listener: socket.socket,
    on_progress: Callable[[LoadProgress], None],
) -> None:
    config = system.config
    fetch = supervisor.spawn(Fetch, "fetch")
    start_child = execute
    if config.model.engine != "dummy" and can_fork():
        start_child = system.launcher = Launching(supervisor, CHILD_MODULES, LAUNCHER)
    model_dir = await _model_dir(config, fetch)
    model = ModelState("descant-demo" if config.model.path is None else config.model.path)
    sequences = SequenceTable()
    leases = LeaseTable()
    auth = supervisor.spawn(partial(Auth, config), "auth")
    addresses: list[Ref[Any]] = []  # the scheduler's: the registry, which it needs, tells it of pins
    registry = await spawn_registry(
        config,
        supervisor,
        exits,
        model_id=model.id,
        model_dir=model_dir,
        fetch=fetch,
        leases=leases,
        tell_scheduler=partial(_tell_first, addresses),
        placement=InProcess(start_child=start_child),
    )
    scheduler = _spawn_scheduler(system, supervisor, model, sequences, registry, model_dir, start_child, on_progress)
    addresses.append(scheduler)  # nothing has run since the registry was spawned
    system.services = Services(
        config=config,
        model=model,
        tokenizer=Tokenizer(model_dir),
        auth=auth,
        registry=registry,
        scheduler=scheduler,
        sequences=sequences,
        leases=leases,
        default_heads=DefaultHeads(config.scheduling.speculation),
        sessions=SessionTable(config.server.max_streams, config.server.stream_buffer_bytes, config.server.max_sessions),
    )
    system.gateway = supervisor.spawn(partial(Gateway, system.services, listener, supervisor.stats), "gateway")


def _tell_first(addresses: list[Ref[Any]], message: PinVersions | ForgetVersion) -> None:
    with contextlib.suppress(ActorStopped):  # everything is being cancelled
        addresses[0].tell_nowait(message)


async def _model_dir(config: Config, fetch: Ref[FetchModel]) -> Path:
    if config.model.path is None or config.model.engine == "dummy":
        return DEMO_MODEL  # the dummy engine borrows its tokenizer
    return await fetch.ask(FetchModel(config.model.path, config.model.revision), timeout=FETCH_TIMEOUT_S)


def _spawn_scheduler(
    system: System,
    supervisor: Supervisor,
    model: ModelState,
    sequences: SequenceTable,
    registry: Ref[Any],
    model_dir: Path,
    start_child: StartChild,
    on_progress: Callable[[LoadProgress], None],
) -> Ref[Any]:
    config = system.config
    addresses: list[Ref[Any]] = []  # the scheduler's, which the executor's callbacks need and which needs the executor

    def tell_scheduler(message: ExecutorUp | ExecutorDown) -> None:
        with contextlib.suppress(ActorStopped):  # everything is being cancelled
            addresses[0].tell_nowait(message)

    def on_notice(note: EngineReady | LoadProgress) -> None:
        if isinstance(note, EngineReady):
            # Lives to come need not measure again.
            system.executor.program = _executor_program(system, model_dir, note.info.is_invariant)
            tell_scheduler(ExecutorUp(note))
        else:
            on_progress(note)

    system.executor = spawn_remote(
        supervisor,
        "executor",
        _executor_program(system, model_dir),
        placement=InProcess(start_child=start_child),
        on_notice=on_notice,
        on_down=lambda reason: tell_scheduler(ExecutorDown(str(reason))),
        restarts=RestartPolicy(max_restarts=config.scheduling.max_executor_restarts, within_s=math.inf),
    )

    def make_scheduler() -> Scheduler:
        policy = Policy(
            sequences,
            max_num_seqs=config.scheduling.max_num_seqs,
            max_num_batched_tokens=config.scheduling.max_num_batched_tokens,
            now=time.monotonic,
            max_queued=config.scheduling.max_queued,
        )
        return Scheduler(policy, model, system.executor, registry, lambda: make_probe(sequences.next_id()))

    # Large enough for a cancellation of every stream at once; the executor's callbacks cannot wait.
    addresses.append(supervisor.spawn(make_scheduler, "scheduler", mailbox_size=65536))
    return addresses[0]


def _executor_program(system: System, model_dir: Path, is_invariant: bool | None = None) -> Program:
    config = system.config
    executor_config = ExecutorConfig(
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
            is_invariant=is_invariant,
        ),
        dummy_tokens_per_s=config.model.dummy_tokens_per_s,
    )
    return Program(
        factory=system.executor_factory,
        config=msgspec.msgpack.encode(executor_config),
        replies=ExecutorReply,
        notices=ExecutorNote,
    )
