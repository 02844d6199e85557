"""Messages between the scheduler and the executor process. They are pure data: they cross a socket."""

from __future__ import annotations

import msgspec

from descant.actor.message import Ask, Message
from descant.contract.engine import EngineInfo
from descant.contract.plan import EngineLimits, StepPlan, StepResult
from descant.contract.version import AdapterVersion


class AdapterMove(msgspec.Struct, frozen=True):
    """A move of the version in a slot to `offset` bytes of the arena. It overwrites no other version in use."""

    adapter_slot: int
    offset: int


class Staged(Message, frozen=True):
    """The version is in host memory."""

    digest: str


class Placed(Message, frozen=True):
    """The adapter is in its slot."""

    adapter_slot: int


class StepDone(Message, frozen=True):
    """The result of a step."""

    result: StepResult


class StageAdapter(Ask[Staged], frozen=True):
    """Read a version into host memory and verify it, beside the steps. Reply: Staged.

    With `is_placed` it stays there until its `PlaceAdapter` comes or a later epoch begins, otherwise as long as there
    is room.
    """

    version: AdapterVersion
    is_placed: bool
    epoch: int


class PlaceAdapter(Ask[Placed], frozen=True):
    """Copy a version, staged or not, into the arena at `offset` bytes and put it in the slot. Reply: Placed."""

    adapter_slot: int
    offset: int
    version: AdapterVersion


class MoveAdapters(Message, frozen=True):
    """Move these versions within the arena, one after the other; the next step finds them there. No reply."""

    moves: tuple[AdapterMove, ...]


class DropAdapter(Message, frozen=True):
    """Forget what is kept of a version in host memory. No reply."""

    digest: str


class Step(Ask[StepDone], frozen=True):
    """Carry out a plan. Reply: StepDone."""

    plan: StepPlan


ExecutorMessage = StageAdapter | PlaceAdapter | MoveAdapters | DropAdapter | Step


class EngineReady(Message, frozen=True):
    """Upward from the executor once the model is loaded."""

    limits: EngineLimits
    info: EngineInfo


class LoadProgress(Message, frozen=True):
    """Upward from a child: the stage of its start, and the progress of the start, 0 to 1."""

    stage: str
    fraction: float


ExecutorReply = Staged | Placed | StepDone
ExecutorNote = EngineReady | LoadProgress
