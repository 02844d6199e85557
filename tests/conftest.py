"""Fixtures for all tests."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import socket
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import settings

from descant.actors import gateway
from descant.assembly import system
from descant.scheduling import life
from zygote import Zygote

# Check for leaked resources whenever the scheduler is idle.
life.CHECKS_IDLE = True

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

    from descant.actor.endpoint import Program
    from descant.assembly.system import System
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
def _probe_once() -> Iterator[None]:
    """Let only the first server of a model measure whether rows are invariant. It takes most of an engine's start."""
    make_program = system._executor_program
    measured: dict[tuple[Path, bytes], bool] = {}

    def make_program_once(system: System, model_dir: Path, is_invariant: bool | None = None) -> Program:
        key = (model_dir, msgspec.json.encode(system.config.model))
        if is_invariant is not None:
            measured[key] = is_invariant
        return make_program(system, model_dir, measured.get(key))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "_executor_program", make_program_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _sweep_often() -> Iterator[None]:
    """Let servers in this process look ten times a second for sessions that are over, instead of once."""
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
    """Let the kernel hold little of what the server's clients do not read."""
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
