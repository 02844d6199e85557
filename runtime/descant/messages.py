"""What actors say to each other, grouped by receiver; one closed union per receiver.

Messages to the executor and the worker cross a socket and are pure data; those inside the server process may carry
live objects (a `Sequence` with its sink). What the wire says is in `descant_client.protocol`, what a step says in
`scheduling.plan`.
"""

from __future__ import annotations

import msgspec

from descant.engine.interface import EngineInfo
from descant.scheduling.plan import EngineLimits, StepPlan, StepResult
from descant.scheduling.sequence import Sequence
from descant.scheduling.version import AdapterVersion
from descant_client.lifecycle import AdapterInfo
from descant_client.wire import WeightedAdapter


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of every message; the tag is the class name."""


class Principal(msgspec.Struct, frozen=True):
    """Who a connection speaks for, and which local directories it may name (None: any)."""

    name: str
    roots: tuple[str, ...] | None = None


# ---- auth ----------------------------------------------------------------------------------------


class Authenticate(Message, frozen=True):
    """Who sends this API key? Reply: Principal. Refused with Unauthorized."""

    key: str | None


AuthMessage = Authenticate

# ---- fetch ---------------------------------------------------------------------------------------


class FetchAdapter(Message, frozen=True):
    """Where are the files of this adapter? Reply: its directory. `roots` limits where a path may lead."""

    adapter: str  # as the user wrote it, for errors
    path: str
    roots: tuple[str, ...] | None


class FetchModel(Message, frozen=True):
    """Where are the files of this base model? Downloads a Hub id. Reply: its directory."""

    model: str
    revision: str | None = None


FetchMessage = FetchAdapter | FetchModel

# ---- registry ------------------------------------------------------------------------------------


class ResolveAdapters(Message, frozen=True):
    """Which version is this weighted sum of adapters? Reply: AdapterVersion, prepared and on disk."""

    members: tuple[WeightedAdapter, ...]
    principal: Principal
    source: str | None = None


class ListRegistered(Message, frozen=True):
    """Which adapters may this principal use? Reply: AdapterList, in order of registration."""

    principal: Principal
    name: str | None = None  # only this one


class AdapterList(Message, frozen=True):
    """Registered adapters."""

    adapters: tuple[AdapterInfo, ...]


RegistryMessage = ResolveAdapters | ListRegistered

# ---- scheduler -----------------------------------------------------------------------------------


class Submit(Message, frozen=True):
    """Run these sequences: the choices of one request. Refused with InvalidRequest if they can never fit."""

    sequences: tuple[Sequence, ...]


class CancelRequest(Message, frozen=True):
    """End every sequence of this request; each sink hears of it. Unknown requests are no error."""

    request_key: str


class Unpark(Message, frozen=True):
    """The sinks of these sequences have room again."""

    sequence_ids: tuple[int, ...]


class ExecutorUp(Message, frozen=True):
    """A new life of the executor has loaded the model."""

    ready: EngineReady


class ExecutorDown(Message, frozen=True):
    """The executor died; every row it had is gone."""

    reason: str


SchedulerMessage = Submit | CancelRequest | Unpark | ExecutorUp | ExecutorDown

# ---- executor and worker (child processes) -------------------------------------------------------


class LoadAdapter(Message, frozen=True):
    """Read a version into the arena at `offset` bytes and point the adapter slot at it. Reply: Loaded."""

    adapter_slot: int
    offset: int
    version: AdapterVersion


class Step(Message, frozen=True):
    """Carry out a plan. Reply: StepDone."""

    plan: StepPlan


ExecutorMessage = LoadAdapter | Step


class Loaded(Message, frozen=True):
    """The adapter is in its slot."""

    adapter_slot: int


class StepDone(Message, frozen=True):
    """What a step did."""

    result: StepResult


class EngineReady(Message, frozen=True):
    """Upward from the executor once the model is loaded."""

    limits: EngineLimits
    info: EngineInfo


class LoadProgress(Message, frozen=True):
    """Upward from a child: what it is doing before it is ready, 0 to 1."""

    stage: str
    fraction: float


ExecutorReply = Loaded | StepDone
ExecutorNote = EngineReady | LoadProgress


class PrepareAdapter(Message, frozen=True):
    """Read, check and normalise a directory into the store. Reply: Prepared."""

    adapter: str
    directory: str


class Member(msgspec.Struct, frozen=True):
    """One term of a weighted sum."""

    version: AdapterVersion
    weight: float


class ComposeAdapters(Message, frozen=True):
    """Write the weighted sum of versions as a version of its own. Reply: Prepared."""

    adapter: str
    members: tuple[Member, ...]


WorkerMessage = PrepareAdapter | ComposeAdapters


class Prepared(Message, frozen=True):
    """A version in the store."""

    version: AdapterVersion


WorkerReply = Prepared


# ---- gateway -------------------------------------------------------------------------------------


class Drain(Message, frozen=True):
    """Take no new requests; `reason` is told to whoever asks."""

    reason: str


GatewayMessage = Drain
