"""`descant serve`: runs a server until a signal, and shows the stages of its start on standard error."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import AsyncIterator
from functools import partial

import anyio
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from descant.assembly.system import System, first_of, running
from descant.config import Config
from descant.contract.executor import EngineReady, LoadProgress


def serve_forever(config: Config) -> None:
    """Run a server until SIGINT or SIGTERM. A first signal drains it, a second one ends it at once.

    Raises:
        DescantError: the server could not start, or an actor could not be kept running.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    anyio.run(_serve, config, backend_options={"loop_factory": uvloop.new_event_loop})


async def _serve(config: Config) -> None:
    console = Console(stderr=True)
    started_s = time.monotonic()
    with StartUp(console) as start_up:
        async with running(config, start_up.show) as system:
            # Not earlier: during the start a signal ends the process, which interrupts a download too.
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_announce, system, console, start_up, started_s)
                    tasks.start_soon(_drain_on_signal, system, signals, console, tasks.cancel_scope)
            if system.failure is not None:
                raise system.failure


async def _announce(system: System, console: Console, start_up: StartUp, started_s: float) -> None:
    engine = await system.ready()
    start_up.stop()
    seconds = time.monotonic() - started_s
    console.print(f"{banner(system, engine)} · {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)
    if system.config.model.engine == "model" and engine.info.device == "cpu" and not engine.info.is_invariant:
        console.print("On this machine tokens may depend, by rounding, on what shares a batch: see `descant doctor`.")


def banner(system: System, engine: EngineReady) -> str:
    """Return one line with the address, the model and the size of the cache."""
    host, limits, info = system.config.server.host, engine.limits, engine.info
    host = f"[{host}]" if ":" in host else host
    capacity = limits.num_blocks * limits.block_size
    model = f"{system.services.model.id} ({info.num_parameters / 1e6:.1f} M, {info.dtype}, {info.device})"
    return f"Descant at ws://{host}:{system.port} · {model} · KV for {capacity:,} tokens"


async def _drain_on_signal(
    system: System, signals: AsyncIterator[signal.Signals], console: Console, scope: anyio.CancelScope
) -> None:
    await first_of(partial(anext, signals), system.failed.wait)
    reason = "it received a signal to stop." if system.failure is None else str(system.failure)
    console.print("Draining; a second signal ends it at once.")
    await first_of(partial(anext, signals), partial(system.drain, reason))
    scope.cancel()


class StartUp:
    """The display of a start: a progress bar on a terminal, elsewhere one line for each stage."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        self._console = console
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("starting", total=1.0)
        self._stage: str | None = None
        self._is_stopped = False

    def __enter__(self) -> StartUp:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def show(self, note: LoadProgress) -> None:
        """Show a stage and the progress of the start. Ignored after `stop`, when an executor starts again."""
        if self._is_stopped:
            return
        self._progress.update(self._task, description=note.stage, completed=note.fraction)
        if not self._console.is_terminal and note.stage != self._stage:
            self._console.print(f"Starting: {note.stage}", highlight=False, markup=False, soft_wrap=True)
        self._stage = note.stage

    def stop(self) -> None:
        """Remove the bar and ignore all later stages."""
        self._progress.stop()
        self._is_stopped = True
