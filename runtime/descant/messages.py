"""Messages between the actors of the server process, grouped by receiver, with one closed union per receiver.

They may carry live objects, such as a `Sequence` with its sink. Messages to the child processes are pure data, in
`contract.executor` and `contract.worker`. The client's protocol is in `descant_client.protocol`.
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
    """Authenticate a client by its API key. Reply: Principal. Refused with Unauthorized."""

    key: str | None


AuthMessage = Authenticate

# ---- fetch ---------------------------------------------------------------------------------------


class FetchAdapter(Ask[Path], frozen=True):
    """Find the directory of an adapter. Reply: its path. It must be below one of `roots` (None: no limit)."""

    adapter: str  # as the user wrote it, for errors
    path: str
    roots: tuple[str, ...] | None


class FetchModel(Ask[Path], frozen=True):
    """Find the directory of a base model, downloading a Hub id. Reply: its path."""

    model: str
    revision: str | None = None


FetchMessage = FetchAdapter | FetchModel

# ---- registry ------------------------------------------------------------------------------------


class AdapterList(Message, frozen=True):
    """Registered adapters."""

    adapters: tuple[AdapterInfo, ...]


class ResolveAdapters(Ask[AdapterVersion | None], frozen=True):
    """Resolve a combination of adapters to one version.

    Reply: AdapterVersion, prepared, on disk and held by the lease; or None for the base alone, if every member is
    disabled.
    """

    members: tuple[WeightedAdapter, ...]
    principal: Principal
    lease: Lease
    combination: Combination = Combination()
    source: AdapterSource | None = None  # of the members
    heads: str | None = None  # adapter whose draft heads replace its own


class ListRegistered(Ask[AdapterList], frozen=True):
    """List the adapters that a principal may use. Reply: AdapterList, in order of registration."""

    principal: Principal
    name: str | None = None  # only this one


class ChangeAdapter(Ask[AdapterList], frozen=True):
    """Change an adapter for a principal. Reply: AdapterList of it after the change, empty if it is destroyed."""

    principal: Principal
    change: AdapterChange


class VersionFailed(Message, frozen=True):
    """The device could not load this version. Its file is made again before it is next used."""

    digest: str


class PinsRefused(Message, frozen=True):
    """The pinned versions, by digest, for which the device has no room beside the pins before them."""

    digests: tuple[str, ...]


class VersionUnused(Message, frozen=True):
    """The last lease on this version was released."""

    digest: str


RegistryMessage = ResolveAdapters | ListRegistered | ChangeAdapter | VersionFailed | VersionUnused | PinsRefused

# ---- scheduler -----------------------------------------------------------------------------------


class Submit(Ask[None], frozen=True):
    """Run these sequences, the choices of one request.

    Refused with InvalidRequest, AdapterTooLarge or UnsupportedRequest if they can never fit, with Overloaded if
    too many sequences of the principal wait.
    """

    sequences: tuple[Sequence, ...]


class CancelRequest(Message, frozen=True):
    """End every sequence of a request, and tell their sinks. Unknown requests are ignored."""

    request_key: str


class Unpark(Message, frozen=True):
    """Let parked sequences run again: their sinks have room."""

    sequence_ids: tuple[int, ...]


class ExecutorUp(Message, frozen=True):
    """A new life of the executor has loaded the model."""

    ready: EngineReady


class ExecutorDown(Message, frozen=True):
    """The executor died and lost every row."""

    reason: str


class PinVersions(Message, frozen=True):
    """Keep exactly these versions on the device."""

    versions: tuple[AdapterVersion, ...]


class ForgetVersion(Message, frozen=True):
    """No request can name this version any more: drop it once no sequence uses it."""

    digest: str


SchedulerMessage = Submit | CancelRequest | Unpark | ExecutorUp | ExecutorDown | PinVersions | ForgetVersion

# ---- gateway -------------------------------------------------------------------------------------


class Drain(Message, frozen=True):
    """Refuse new requests with `reason`."""

    reason: str


GatewayMessage = Drain
