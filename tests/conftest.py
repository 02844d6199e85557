"""Fixtures for all tests."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import socket
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import msgspec
import pytest
from hypothesis import settings

from descant.actors import gateway
from descant.assembly import executor_setup, system
from descant.scheduling.policy import Policy
from zygote import Zygote

# The models are tiny, so more threads would be slower. Processes started by tests inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What `just test` takes. `just test-all` runs the usual 100 examples of each property.
settings.register_profile("quick", max_examples=50)

# Finalizing an interpreter with torch and Transformers takes a second. The exit status of a worker means nothing.
# What is registered first is called last.
if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)
else:
    atexit.register(gc.unfreeze)  # what pytest_collection_finish froze

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from descant.assembly.system import System
    from descant.config import Config
    from descant.contract.child_config import ExecutorConfig
    from descant.contract.engine import EngineInfo
    from descant.scheduling.life import ExecutorLife
    from descant.scheduling.rows import PlannedStep
    from servers import Checkpoint, Neighbor


def pytest_collection_finish() -> None:
    """Make every test cheaper, once all modules are imported.

    Garbage collections skip the objects of those modules. pytest attaches its log handlers six times per test to each
    logger that does not propagate; torch and Transformers create 58 of them.
    """
    gc.collect()
    gc.freeze()
    for logger in logging.getLogger().manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, as Descant does."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _zygote() -> Iterator[None]:
    """Fork the launchers of servers in this process from one that has imported torch."""
    zygote = Zygote()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("descant.actor.launcher.execute_module", zygote.execute_module)
        yield
    zygote.close()


@pytest.fixture(scope="session", autouse=True)
def every_idle_moment_shows_what_was_not_given_back() -> Iterator[None]:
    """Check that no block and no adapter place is in use whenever a policy of this process has nothing to run.

    Blocks are checked once per step, adapter places each time.
    """
    plan = Policy.plan
    checked: WeakKeyDictionary[ExecutorLife, int] = WeakKeyDictionary()

    def checked_plan(self: Policy) -> PlannedStep | None:
        planned, life = plan(self), self.states.life
        if planned is None and life is not None and not self.num_running and not self.states.in_flight:
            if checked.get(life) != life.num_steps:  # it takes milliseconds where there are many blocks
                self.states.check_integrity()
                checked[life] = life.num_steps
            life.gate.residency.check_integrity()
        return planned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "plan", checked_plan)
        yield


@pytest.fixture(scope="session", autouse=True)
def _probe_once() -> Iterator[None]:
    """Let only the first server of a model measure whether rows are invariant. It takes most of an engine's start."""
    make_config = executor_setup.executor_config
    measured: dict[tuple[Path, bytes], EngineInfo] = {}

    def make_config_once(config: Config, model_dir: Path, earlier: EngineInfo | None = None) -> ExecutorConfig:
        key = (model_dir, msgspec.json.encode(config.model))
        if earlier is not None:
            measured[key] = earlier
        return make_config(config, model_dir, measured.get(key))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor_setup, "executor_config", make_config_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _sweep_often() -> Iterator[None]:
    """Let servers in this process look for expired sessions every 0.1 s instead of every second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway, "SWEEP_S", 0.1)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny base model with four adapters, built once."""
    from servers import tiny_checkpoint  # the import takes seconds

    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def small_send_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the server's connections send buffers of 4 KiB, so that the kernel holds few unread bytes of a client."""
    open_listener = system.open_listener

    def open_small_listener(host: str, port: int) -> socket.socket:
        listener = open_listener(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        return listener

    monkeypatch.setattr(system, "open_listener", open_small_listener)


@pytest.fixture(scope="module")
async def neighbor(server: tuple[System, str]) -> AsyncIterator[Neighbor]:
    """A valid request to run beside each test of a module, on the `server` of the module."""
    from descant_client import connect
    from servers import Neighbor

    async with connect(server[1]) as client:
        yield await Neighbor.beside(client, num_tokens=20)
