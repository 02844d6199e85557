"""The scheduler actor tells the registry which pins have no room on the device."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest

from descant.actor.actor import Actor
from descant.actor.ref import Ref
from descant.actor.supervision import Supervisor
from descant.actors.scheduler import Scheduler, make_probe
from descant.contract.engine import EngineInfo
from descant.contract.executor import EngineReady
from descant.contract.plan import EngineLimits
from descant.contract.version import AdapterVersion
from descant.messages import ExecutorDown, ExecutorUp, PinsRefused, PinVersions
from descant.requests.services import ModelState
from descant.scheduling.policy import Policy
from descant.scheduling.sequence import SequenceTable

pytestmark = pytest.mark.anyio

SMALL, LARGE = (AdapterVersion(name, name, size, 8, 1) for name, size in (("small", 256), ("large", 4096)))
LIMITS = EngineLimits(num_blocks=8, block_size=16, max_context=64, vocab_size=99, num_adapter_slots=2)


class Recorder(Actor[Any]):
    """An actor in the place of registry and executor: it keeps its messages and answers no ask."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.changed = anyio.Event()

    async def on_receive(self, message: Any) -> Any:
        self.messages.append(message)
        self.changed.set()
        self.changed = anyio.Event()
        return self.later(anyio.sleep_forever())

    async def refusals(self, count: int) -> list[tuple[str, ...]]:
        with anyio.fail_after(10):
            while len(found := [m.digests for m in self.messages if isinstance(m, PinsRefused)]) < count:
                await self.changed.wait()
        return found


class Executor:
    """The handle of an executor that does nothing."""

    name = "executor"

    def __init__(self, ref: Ref[Any]) -> None:
        self.ref = ref

    def mark_productive(self) -> None:
        """Ignore it."""


def up(num_adapter_bytes: int) -> ExecutorUp:
    info = EngineInfo("float32", "cpu", (), 1, num_adapter_bytes, is_invariant=True)
    return ExecutorUp(EngineReady(LIMITS, info))


async def test_the_registry_is_told_which_pins_have_no_room_whenever_that_changes() -> None:
    table, registry, device = SequenceTable(), Recorder(), Recorder()
    policy = Policy(table, max_num_seqs=4, max_num_batched_tokens=64, now=time.monotonic)
    async with Supervisor() as supervisor:
        registry_ref = supervisor.spawn(lambda: registry, "registry")
        executor: Any = Executor(supervisor.spawn(lambda: device, "executor"))
        model = ModelState("m")
        scheduler = supervisor.spawn(
            lambda: Scheduler(policy, model, executor, registry_ref, lambda: make_probe(table.next_id())), "scheduler"
        )
        await scheduler.tell(PinVersions((SMALL, LARGE)))
        await scheduler.tell(up(1024))
        assert await registry.refusals(1) == [("large",)]

        await scheduler.tell(PinVersions((SMALL, LARGE)))  # as a registry does after its restart
        await scheduler.tell(PinVersions((SMALL,)))
        assert await registry.refusals(3) == [("large",), ("large",), ()]

        await scheduler.tell(PinVersions((LARGE,)))
        await scheduler.tell(ExecutorDown("gone"))
        await scheduler.tell(up(1 << 20))
        assert await registry.refusals(5) == [("large",), ("large",), (), ("large",), ()]
        await supervisor.stop(timeout=0.1)
