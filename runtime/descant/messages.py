"""What actors say to each other, grouped by receiver; one closed union per receiver.

Messages to the executor and the worker cross a socket and are pure data; those inside the server process may carry
live objects (a `Sequence` with its sink). What the wire says is in `descant_client.protocol`, what a step says in
`scheduling.plan`.
"""

from __future__ import annotations

import msgspec

from descant.engine.interface import EngineInfo
from descant.leases import Lease
from descant.scheduling.adapter_work import AdapterMove
from descant.scheduling.plan import EngineLimits, StepPlan, StepResult
from descant.scheduling.sequence import Sequence
from descant.scheduling.version import AdapterVersion
from descant_client.lifecycle import AdapterChange, AdapterInfo, Combination
from descant_client.wire import AdapterSource, WeightedAdapter


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of every message; the tag is the class name."""


class Principal(msgspec.Struct, frozen=True):
    """Who a connection speaks for.

    `roots` are the local directories it may name (None: any). An administrator may change shared adapters. `weight`
    is its share of the device against others', `max_queued` how many of its sequences may wait (None: the server's).
    """

    name: str
    roots: tuple[str, ...] | None = None
    is_admin: bool = False
    weight: float = 1.0
    max_queued: int | None = None


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
    """Which version is this combination of adapters?

    Reply: AdapterVersion, prepared and on disk, and held by the lease; or None if the base alone is meant, because
    its members are disabled.
    """

    members: tuple[WeightedAdapter, ...]
    principal: Principal
    lease: Lease
    combination: Combination = Combination()
    source: AdapterSource | None = None  # of the members
    heads: str | None = None  # the adapter whose draft heads it shall have, in place of its own


class ListRegistered(Message, frozen=True):
    """Which adapters may this principal use? Reply: AdapterList, in order of registration."""

    principal: Principal
    name: str | None = None  # only this one


class AdapterList(Message, frozen=True):
    """Registered adapters."""

    adapters: tuple[AdapterInfo, ...]


class ChangeAdapter(Message, frozen=True):
    """Do this to an adapter for this principal. Reply: AdapterList of it as it is now, empty once it is destroyed."""

    principal: Principal
    change: AdapterChange


class VersionFailed(Message, frozen=True):
    """The device could not take this version: its stored file is to be made again before it is next used."""

    digest: str


class VersionFree(Message, frozen=True):
    """The last request that used this version has ended."""

    digest: str


RegistryMessage = ResolveAdapters | ListRegistered | ChangeAdapter | VersionFailed | VersionFree

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


class PinVersions(Message, frozen=True):
    """These versions, and no others, are to be on the device always."""

    versions: tuple[AdapterVersion, ...]


class ForgetVersion(Message, frozen=True):
    """No request will name this version again: let go of what is kept of it once nothing uses it."""

    digest: str


SchedulerMessage = Submit | CancelRequest | Unpark | ExecutorUp | ExecutorDown | PinVersions | ForgetVersion

# ---- executor and worker (child processes) -------------------------------------------------------


class StageAdapter(Message, frozen=True):
    """Read a version into host memory and verify it, beside the steps. Reply: Staged.

    With `is_placed` it stays there until its `PlaceAdapter` comes or a later epoch begins, otherwise as long as there
    is room.
    """

    version: AdapterVersion
    is_placed: bool
    epoch: int


class PlaceAdapter(Message, frozen=True):
    """Copy a version, staged or not, into the arena at `offset` bytes and put it in the slot. Reply: Loaded."""

    adapter_slot: int
    offset: int
    version: AdapterVersion


class MoveAdapters(Message, frozen=True):
    """Move these versions within the arena, one after the other; the next step finds them there. No reply."""

    moves: tuple[AdapterMove, ...]


class DropAdapter(Message, frozen=True):
    """Forget what is kept of a version in host memory. No reply."""

    digest: str


class Step(Message, frozen=True):
    """Carry out a plan. Reply: StepDone."""

    plan: StepPlan


ExecutorMessage = StageAdapter | PlaceAdapter | MoveAdapters | DropAdapter | Step


class Staged(Message, frozen=True):
    """The version is in host memory."""

    digest: str


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


ExecutorReply = Staged | Loaded | StepDone
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
    """Write a combination of versions as a version of its own. Reply: Prepared."""

    adapter: str
    members: tuple[Member, ...]
    combination: Combination


class TakeHeads(Message, frozen=True):
    """Make a version with one's factors, or none, and another's draft heads. Reply: Prepared."""

    adapter: str
    version: AdapterVersion | None
    heads: AdapterVersion


class CreateVersion(Message, frozen=True):
    """Write a version that changes nothing: B is zero. Reply: Prepared."""

    adapter: str
    rank: int
    alpha: float | None
    target_modules: tuple[str, ...] | None


class ExportAdapter(Message, frozen=True):
    """Write a version as a PEFT directory. Reply: Exported."""

    adapter: str
    version: AdapterVersion
    directory: str


class ExportMerged(Message, frozen=True):
    """Write the base with a version merged into it as a Hugging Face checkpoint. Reply: Exported."""

    adapter: str
    version: AdapterVersion
    directory: str


WorkerMessage = PrepareAdapter | ComposeAdapters | TakeHeads | CreateVersion | ExportAdapter | ExportMerged


class Prepared(Message, frozen=True):
    """A version in the store."""

    version: AdapterVersion


class Exported(Message, frozen=True):
    """A directory that is whole and on disk."""

    directory: str
    num_bytes: int


WorkerReply = Prepared | Exported


# ---- gateway -------------------------------------------------------------------------------------


class Drain(Message, frozen=True):
    """Take no new requests; `reason` is told to whoever asks."""

    reason: str


GatewayMessage = Drain
