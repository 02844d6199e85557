"""The cost of a message: tell and ask against an anyio memory stream and pykka, and a remote round trip.

    python benchmarks/actors.py [--repeats 9] [--uvloop]

All contestants run in turn within each repeat, so that noise of the machine affects all alike. The table shows medians
over the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
import pykka
import uvloop

from descant.actor.actor import Actor
from descant.actor.endpoint import Program
from descant.actor.ref import Ref
from descant.actor.remote import spawn_remote
from descant.actor.remote_child import Notify
from descant.actor.supervision import Supervisor

NUM_LOCAL = 20_000  # messages per measurement
NUM_REMOTE = 1_000
MAILBOX_SIZE = 1024
LONG = 60.0


class Ping(msgspec.Struct, frozen=True, tag=True):
    """The only message, and its own reply."""

    number: int


class Echo(Actor[Ping]):
    """Replies with the message."""

    async def on_receive(self, message: Ping) -> Ping:
        return message


class PykkaEcho(pykka.ThreadingActor):
    """The same in pykka."""

    def on_receive(self, message: Any) -> Any:
        return message


class RemoteEcho:
    """The same in a child process."""

    messages = Ping

    def handle(self, message: Ping) -> Ping:
        """Reply with the message."""
        return message

    def close(self) -> None:
        """Do nothing: the actor holds no resources."""


def make(config: bytes, notify: Notify) -> RemoteEcho:
    """Factory of the child process."""
    return RemoteEcho()


async def memory_stream() -> None:
    """One send and one receive per message."""
    send, receive = anyio.create_memory_object_stream[Ping](MAILBOX_SIZE)

    async def take() -> None:
        async with receive:
            async for _ in receive:
                pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        async with send:
            for number in range(NUM_LOCAL):
                await send.send(Ping(number))


def tell(ref: Ref[Ping]) -> Callable[[], Awaitable[None]]:
    """Tells, and one ask at the end, which is answered once they are handled."""

    async def run() -> None:
        for number in range(NUM_LOCAL):
            await ref.tell(Ping(number))
        await ref.ask(Ping(0), timeout=LONG)

    return run


def ask(ref: Ref[Ping], count: int = NUM_LOCAL) -> Callable[[], Awaitable[None]]:
    """Asks, one after the other."""

    async def run() -> None:
        for number in range(count):
            await ref.ask(Ping(number), timeout=LONG)

    return run


def pykka_tell(ref: Any) -> Callable[[], Awaitable[None]]:
    """Tells from a thread to a thread."""

    async def run() -> None:
        for number in range(NUM_LOCAL):
            ref.tell(Ping(number))
        ref.ask(Ping(0), timeout=LONG)

    return run


def pykka_ask(ref: Any) -> Callable[[], Awaitable[None]]:
    """Asks from a thread to a thread."""

    async def run() -> None:
        for number in range(NUM_LOCAL):
            ref.ask(Ping(number), timeout=LONG)

    return run


async def measure(contestants: dict[str, tuple[int, Callable[[], Awaitable[None]]]], repeats: int) -> None:
    """Print the median time per message of each, and its ratio to the memory stream."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, (count, run) in contestants.items():
            started_s = time.perf_counter()
            await run()
            times[name].append((time.perf_counter() - started_s) / count * 1e6)
    base = statistics.median(times["anyio memory stream"])
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:22} {median:9.2f} us   x{median / base:6.2f} of the memory stream   ({spread})")


async def main(repeats: int) -> None:
    """Start every contestant, then measure them."""
    pykka_ref = PykkaEcho.start()
    program = Program(factory=f"{os.path.basename(__file__)[:-3]}:make", replies=Ping)
    async with Supervisor() as supervisor:
        local = supervisor.spawn(Echo, "echo", mailbox_size=MAILBOX_SIZE)
        remote = spawn_remote(supervisor, "remote", program)
        await remote.ref.ask(Ping(0), timeout=LONG)
        contestants = {
            "anyio memory stream": (NUM_LOCAL, memory_stream),
            "tell": (NUM_LOCAL, tell(local)),
            "ask": (NUM_LOCAL, ask(local)),
            "pykka tell": (NUM_LOCAL, pykka_tell(pykka_ref)),
            "pykka ask": (NUM_LOCAL, pykka_ask(pykka_ref)),
            "remote ask": (NUM_REMOTE, ask(remote.ref, NUM_REMOTE)),
        }
        await measure(contestants, repeats)
    pykka.ActorRegistry.stop_all()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} CPUs, load average {load} before, {'uvloop' if options.uvloop else 'asyncio'}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if options.uvloop else None) as runner:
        runner.run(main(options.repeats))
    print(f"load average after: {math.ceil(os.getloadavg()[0] * 100) / 100:.2f}")
