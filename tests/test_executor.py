"""What the executor does with adapters: staged once, placed from host memory, moved in order, forgotten when told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from descant.actors.executor import Executor
from descant.contract.executor import (
    AdapterMove,
    DropAdapter,
    MoveAdapters,
    PlaceAdapter,
    Placed,
    StageAdapter,
    Staged,
    Step,
)
from descant.contract.plan import StepPlan
from descant.engine.dummy import DummyEngine, DummyOptions
from fakes import version


@dataclass(frozen=True)
class StagedPath:
    path: str
    num_bytes: int = 64


@dataclass
class Engine(DummyEngine):
    """Notes what it is asked to do with adapters."""

    calls: list[tuple[object, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(DummyOptions(tokens_per_s=0))

    def stage_adapter(self, path: object) -> StagedPath:
        self.calls.append(("stage", path))
        return StagedPath(str(path))

    def place_adapter(self, adapter_slot: int, offset: int, staged: Any) -> None:
        self.calls.append(("place", adapter_slot, offset, staged.path))

    def move_adapter(self, adapter_slot: int, offset: int) -> None:
        self.calls.append(("move", adapter_slot, offset))


A = version("a")
STAGED, PLACED = ("stage", "a.safetensors"), ("place", 3, 128, "a.safetensors")
STAGE, PLACE = StageAdapter(A, is_placed=True, epoch=1), PlaceAdapter(3, 128, A)


@pytest.mark.parametrize("num_host_bytes", [0, 1 << 20])
def test_what_is_staged_is_placed_without_reading_it_again(num_host_bytes: int) -> None:
    executor = Executor(engine := Engine(), num_host_bytes)

    assert (executor.handle(STAGE), executor.handle(PLACE)) == (Staged("a"), Placed(3))
    assert engine.calls == [STAGED, PLACED]


def test_what_was_prefetched_or_used_is_not_read_for_its_load() -> None:
    executor = Executor(engine := Engine(), 1 << 20)
    executor.handle(StageAdapter(A, is_placed=False, epoch=0))
    for _ in range(2):
        executor.handle(STAGE)
        executor.handle(PLACE)

    assert engine.calls == [STAGED, PLACED, PLACED]
    executor.handle(DropAdapter("a"))
    executor.handle(STAGE)
    assert engine.calls[3:] == [STAGED]


def test_what_is_gone_when_it_is_to_be_placed_is_read_again() -> None:
    executor = Executor(engine := Engine(), 0)
    executor.handle(STAGE)
    executor.handle(Step(StepPlan(2, 1)))  # of another scheduler, which knows of no claim

    executor.handle(PLACE)

    assert engine.calls == [STAGED, STAGED, PLACED]


def test_moves_are_made_in_their_order() -> None:
    executor = Executor(engine := Engine(), 0)

    assert executor.handle(MoveAdapters((AdapterMove(2, 64), AdapterMove(1, 0)))) is None

    assert engine.calls == [("move", 2, 64), ("move", 1, 0)]
