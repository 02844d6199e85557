"""What actors say to each other, grouped by receiver; one closed union per receiver.

Messages to the executor and the worker cross a socket and are pure data; those inside the server process may carry
live objects (a `Sequence` with its sink). What the wire says is in `descant_client.protocol`, what a step says in
`scheduling.plan`.
"""

from __future__ import annotations

from pathlib import Path

from descant.actor.message import Ask, Message
from descant.contract.executor import EngineReady
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant.scheduling.sequence import Sequence
from descant.sessions.leases import Lease
from descant_client.lifecycle import AdapterChange, AdapterInfo, Combination
from descant_client.wire import AdapterSource, WeightedAdapter

# ---- auth ----------------------------------------------------------------------------------------


class Authenticate(Ask[Principal], frozen=True):
    """Who sends this API key? Reply: Principal. Refused with Unauthorized."""

    key: str | None


AuthMessage = Authenticate

# ---- fetch ---------------------------------------------------------------------------------------


class FetchAdapter(Ask[Path], frozen=True):
    """Where are the files of this adapter? Reply: its directory. `roots` limits where a path may lead."""

    adapter: str  # as the user wrote it, for errors
    path: str
    roots: tuple[str, ...] | None


class FetchModel(Ask[Path], frozen=True):
    """Where are the files of this base model? Downloads a Hub id. Reply: its directory."""

    model: str
    revision: str | None = None


FetchMessage = FetchAdapter | FetchModel

# ---- registry ------------------------------------------------------------------------------------


class AdapterList(Message, frozen=True):
    """Registered adapters."""

    adapters: tuple[AdapterInfo, ...]


class ResolveAdapters(Ask[AdapterVersion | None], frozen=True):
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


class ListRegistered(Ask[AdapterList], frozen=True):
    """Which adapters may this principal use? Reply: AdapterList, in order of registration."""

    principal: Principal
    name: str | None = None  # only this one


class ChangeAdapter(Ask[AdapterList], frozen=True):
    """Do this to an adapter for this principal. Reply: AdapterList of it as it is now, empty once it is destroyed."""

    principal: Principal
    change: AdapterChange


class VersionFailed(Message, frozen=True):
    """The device could not take this version: its stored file is to be made again before it is next used."""

    digest: str


class VersionUnused(Message, frozen=True):
    """The last request that used this version has ended."""

    digest: str


RegistryMessage = ResolveAdapters | ListRegistered | ChangeAdapter | VersionFailed | VersionUnused

# ---- scheduler -----------------------------------------------------------------------------------


class Submit(Ask[None], frozen=True):
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

# ---- gateway -------------------------------------------------------------------------------------


class Drain(Message, frozen=True):
    """Take no new requests; `reason` is told to whoever asks."""

    reason: str


GatewayMessage = Drain
