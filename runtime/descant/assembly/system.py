"""The running server: starts the actors in order, owns the state that outlives them, and stops them again.

gateway ─→ auth
        ─→ registry ─→ fetch
                    ─→ worker (process)
        ─→ scheduler ─→ executor (process)
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from descant.actor.child_process import execute
from descant.actor.endpoint import Remote
from descant.actor.errors import ActorStopped
from descant.actor.launcher import Launching, can_fork
from descant.actor.process import InProcess
from descant.actor.ref import Ref
from descant.actor.supervision import Supervisor
from descant.actors.auth import Auth
from descant.actors.fetch import Fetch
from descant.actors.gateway import Children, Gateway, open_listener
from descant.actors.scheduler import Scheduler, make_probe
from descant.assembly.executor_setup import FACTORY, spawn_executor
from descant.assembly.registry_setup import spawn_registry
from descant.assembly.site import Site
from descant.config import Config, check_config
from descant.contract.executor import EngineReady, LoadProgress
from descant.messages import Drain, FetchModel, RegistryMessage, SchedulerMessage
from descant.model.tokenizer import Tokenizer
from descant.requests.default_heads import DefaultHeads
from descant.requests.services import ModelState, Services
from descant.scheduling.policy import Policy
from descant.scheduling.sequence import SequenceTable
from descant.sessions.session import SessionTable
from descant.sessions.stream import OutgoingStream
from descant.sources.demo import DEMO_MODEL
from descant_client.errors import DescantError, ExecutorFailed, InternalError, ModelInvalid
from descant_client.task_groups import first_leaf

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 24 * 3600.0
# Modules that the launcher imports for executor and worker.
CHILD_MODULES = ("descant.actors.executor", "descant.engine.runner", "descant.actors.worker")
DRAIN_POLL_S = 0.05
LAUNCHER = "launcher"
SCHEDULER_MAILBOX_SIZE = 65536  # holds a cancellation of every stream; the executor's callbacks cannot wait


class System:
    """A running server, made by `running`. Everything in it stops when that block is left."""

    def __init__(self, config: Config, executor_factory: str = FACTORY) -> None:
        self.config = config
        self.executor_factory = executor_factory
        self.services: Services
        self.executor: Remote[Any]
        self.launcher: Launching | None = None  # None: each child runs a new interpreter
        self.gateway: Ref[Drain]
        self.port = config.server.port  # the actual one if 0 was asked for
        self.failed = anyio.Event()  # set when an actor was given up: the server must drain and end
        self.failure: DescantError | None = None

    def kill_executor(self) -> None:
        """Kill the executor as a crash would. Every stream continues with the next one."""
        self.executor.kill()

    def on_escalated(self, actor: str, error: Exception) -> None:
        """Record that an actor cannot be kept running. Without executor or scheduler every stream ends.

        Without the launcher, children only start more slowly.
        """
        if actor == LAUNCHER:
            logger.warning("children start from nothing: %s", error)
            return
        logger.error("%s was given up: %s", actor, error)
        self.failure = self.failure or (error if isinstance(error, DescantError) else InternalError(str(error)))
        if actor in ("executor", "scheduler"):
            self._end_streams(error if isinstance(error, ModelInvalid) else ExecutorFailed(str(error)))
        self.failed.set()

    def _end_streams(self, error: DescantError) -> None:
        """End running and future streams with `error`, as there is no executor any more."""
        self.services.model.on_given_up(error)
        for session in self.services.sessions:
            for one in session:
                if isinstance(one, OutgoingStream) and not one.is_ended:  # operations need no executor
                    one.fail(error)

    async def ready(self) -> EngineReady:
        """Wait until the model is loaded. Raises the error that made it impossible."""
        await first_of(self.failed.wait, self.services.model.ready)
        if self.failure is not None:
            raise self.failure
        return self.services.model.engine

    async def drain(self, reason: str) -> None:
        """Refuse new requests. Wait, at most `drain_s`, until the running ones have ended and were sent."""
        with contextlib.suppress(ActorStopped):  # the gateway itself may have been given up
            await self.gateway.tell(Drain(reason))
        with anyio.move_on_after(self.config.server.drain_s):
            while self.services.sessions.is_busy:  # noqa: ASYNC110 - the table has no event for it
                await anyio.sleep(DRAIN_POLL_S)


@asynccontextmanager
async def running(
    config: Config,
    on_progress: Callable[[LoadProgress], None] = lambda note: None,
    *,
    executor_factory: str = FACTORY,
) -> AsyncIterator[System]:
    """Run a server. It listens when the block is entered; clients that connect wait until the model is loaded.

    `on_progress` is called with each stage of the start. `executor_factory` is run by the executor's process
    (`Program.factory`).

    Raises:
        ConfigInvalid, ModelInvalid, SourceUnavailable: it cannot start.
    """
    check_config(config)
    system = System(config, executor_factory)
    with _unwrapping_groups(), open_listener(config.server.host, config.server.port) as listener:
        system.port = listener.getsockname()[1]
        async with AsyncExitStack() as exits, Supervisor(on_escalate=system.on_escalated) as supervisor:
            await _assemble(system, supervisor, exits, listener, on_progress)
            yield system


@contextmanager
def _unwrapping_groups() -> Iterator[None]:
    """Raise the only exception of nested task groups without the groups."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise first_leaf(group, if_alone=True) from None


async def first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Wait until one of these returns, and cancel the others."""

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
    """Start the actors, each after those that it asks. Addresses that are needed earlier are reserved."""
    config = system.config
    fetch = supervisor.spawn(Fetch, "fetch")
    placement = _place_children(system, supervisor)
    on_progress(LoadProgress("finding the model", 0.0))
    model_dir = await _model_dir(config, fetch)
    model = ModelState("descant-demo" if config.model.path is None else config.model.path)
    sequences = SequenceTable()
    auth = supervisor.spawn(partial(Auth, config), "auth")
    scheduler = supervisor.reserve("scheduler", mailbox_size=SCHEDULER_MAILBOX_SIZE)
    site = Site(config, supervisor, model_dir, placement, partial(_tell, scheduler))
    registry = await spawn_registry(site, exits, model_id=model.id, fetch=fetch)
    system.executor = executor = spawn_executor(site, system.executor_factory, on_progress)
    supervisor.start(scheduler, partial(_make_scheduler, config, sequences, model, executor, registry.ref))
    system.services = Services(
        config=config,
        model=model,
        tokenizer=Tokenizer(model_dir),
        auth=auth,
        registry=registry.ref,
        scheduler=scheduler,
        sequences=sequences,
        leases=registry.leases,
        default_heads=DefaultHeads(config.scheduling.speculation),
        sessions=SessionTable(config.server.max_streams, config.server.stream_buffer_bytes, config.server.max_sessions),
    )
    children = Children(executor, registry.worker, system.launcher)
    make_gateway = partial(Gateway, system.services, listener, supervisor.stats, children)
    system.gateway = supervisor.spawn(make_gateway, "gateway")


def _place_children(system: System, supervisor: Supervisor) -> InProcess:
    """Return how executor and worker start: forked by a launcher where that is possible and saves imports."""
    if system.config.model.engine != "dummy" and can_fork():
        system.launcher = Launching(supervisor, CHILD_MODULES, LAUNCHER)
    return InProcess(start_child=system.launcher or execute)


def _tell(scheduler: Ref[SchedulerMessage], message: SchedulerMessage) -> None:
    with contextlib.suppress(ActorStopped):  # everything is being cancelled
        scheduler.tell_nowait(message)


async def _model_dir(config: Config, fetch: Ref[FetchModel]) -> Path:
    if config.model.path is None or config.model.engine == "dummy":
        return DEMO_MODEL  # the dummy engine borrows its tokenizer
    return await fetch.ask(FetchModel(config.model.path, config.model.revision), timeout=FETCH_TIMEOUT_S)


def _make_scheduler(
    config: Config, sequences: SequenceTable, model: ModelState, executor: Remote[Any], registry: Ref[RegistryMessage]
) -> Scheduler:
    policy = Policy(
        sequences,
        max_num_seqs=config.scheduling.max_num_seqs,
        max_num_batched_tokens=config.scheduling.max_num_batched_tokens,
        now=time.monotonic,
        max_queued=config.scheduling.max_queued,
    )
    return Scheduler(policy, model, executor, registry, lambda: make_probe(sequences.next_id()))
