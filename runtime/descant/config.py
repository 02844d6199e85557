"""The server's configuration: TOML to frozen Structs. An unknown key is an error that names it.

No setting is read from the environment. Sizes are in bytes, durations in seconds.
"""

from __future__ import annotations

import hashlib
import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import platformdirs

from descant.contract.engine import Dtype, EngineKind
from descant.sources.grammar import NAME
from descant_client.errors import ConfigInvalid
from descant_client.speculation import Speculation, SpeculationChoice
from descant_client.wire import reason_and_path

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
MiB = 1024 * 1024


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table in the file."""


class ServerConfig(Section, frozen=True):
    """The listener, and limits of connections, sessions and streams."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8080
    max_frame_bytes: Positive = 4 * MiB
    max_sessions: Positive = 1024  # of one principal; beyond, the one without a connection for longest is dropped
    max_streams: Positive = 1024  # unfinished streams per session
    max_choices: Positive = 16  # `n` of one request
    stream_buffer_bytes: Positive = 64 * 1024  # unsent output of a stream, beyond which its sequences are parked
    resume_window_s: NonNegative = 60.0  # time for which a session without a connection, or a finished stream, is kept
    drain_s: NonNegative = 30.0  # time that running streams get to finish at shutdown


class ModelConfig(Section, frozen=True):
    """The base model and its memory."""

    path: str | None = None  # a directory or a Hub id; None: the embedded demo model
    revision: str | None = None  # of a Hub id
    engine: EngineKind = "model"
    dtype: Dtype | None = None  # None: the checkpoint's
    device: Literal["cpu", "cuda"] = "cpu"
    kv_bytes: Positive | None = None  # None: 256 MiB on a CPU, the rest of memory_fraction on a GPU
    memory_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9  # of a GPU's memory, for everything together
    num_threads: Positive | None = None  # None: one for small models, torch's choice for others
    dummy_tokens_per_s: NonNegative = 50.0  # per sequence, with the dummy engine; 0: no limit


class SchedulingConfig(Section, frozen=True):
    """Budgets of a step, queues, time limits and speculation."""

    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 1024
    cache_scope: Literal["principal", "shared"] = "principal"
    speculation: SpeculationChoice = "auto"  # for requests without a choice of their own
    max_executor_restarts: Positive = 5  # consecutive lives that complete no step
    max_queued: Positive = 4096  # waiting sequences of one principal; more are refused
    queue_timeout_s: Seconds | None = None  # until a request first runs; a request may set a shorter one
    timeout_s: Seconds | None = None  # until a request has ended; a request may set a shorter one


class AdapterEntry(Section, frozen=True):
    """An adapter that is registered at start. `--adapter NAME=REF` adds one."""

    name: str
    ref: str


class AdapterConfig(Section, frozen=True):
    """Adapters: registered names, limits, memory, and the directories that may be read."""

    memory_bytes: Positive = 256 * MiB  # on the device
    num_slots: Positive = 64  # adapters resident at once
    host_bytes: Annotated[int, msgspec.Meta(ge=0)] = 512 * MiB  # cache of versions in host memory
    store_bytes: Positive = 64 * 1024 * MiB  # on disk
    max_pinned_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5  # of device memory and of slots
    max_names: Positive = 10_000  # of one principal
    # Share of the store and of the pin budget for one principal; None: 0.5 with API keys, 1 without.
    max_owner_share: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    max_rank: Positive = 1024
    max_draft_heads: Positive = 16
    max_file_bytes: Positive = 4096 * MiB
    roots: list[str] | None = None  # where local references may point; None: anywhere while no API keys exist
    entries: list[AdapterEntry] = []


class KeyConfig(Section, frozen=True):
    """An API key, given by its SHA-256. `descant key NAME` makes one."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    roots: list[str] = []  # local directories this principal may name
    is_admin: bool = False  # may change shared adapters
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0  # share of the device relative to other principals
    max_queued: Positive | None = None  # None: `scheduling.max_queued`


class Config(Section, frozen=True):
    """The whole configuration of a server."""

    data_dir: str = platformdirs.user_data_dir("descant", appauthor=False)
    server: ServerConfig = ServerConfig()
    model: ModelConfig = ModelConfig()
    scheduling: SchedulingConfig = SchedulingConfig()
    adapters: AdapterConfig = AdapterConfig()
    keys: list[KeyConfig] = []


def load_config(path: Path) -> Config:
    """Read a TOML file.

    Raises:
        ConfigInvalid: unreadable, not TOML, an unknown key, or a wrong value; the error names the key.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Config)
    except OSError as exc:
        raise ConfigInvalid(str(path), exc.strerror or str(exc)) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigInvalid(str(path), str(exc)) from exc
    except msgspec.ValidationError as exc:
        reason, key = reason_and_path(exc)
        raise ConfigInvalid(key or str(path), reason) from exc


def check_config(config: Config) -> None:
    """Check rules that span several keys.

    Raises:
        ConfigInvalid: the server is reachable from other machines without API keys, two keys or adapters have one
            name, an adapter's name is invalid, or the speculation settings contradict themselves.
    """
    if not config.keys and not is_loopback(config.server.host):
        raise ConfigInvalid(
            "server.host",
            f"{config.server.host} is reachable from other machines and no API keys are configured. Run "
            "`descant key NAME`, put the lines it prints into the file given by --config, and send the key as the "
            "connection token; or bind to 127.0.0.1.",
        )
    for key, names in {
        "keys": [entry.name for entry in config.keys],
        "adapters.entries": [entry.name for entry in config.adapters.entries],
    }.items():
        for name in {name for name in names if names.count(name) > 1}:
            raise ConfigInvalid(key, f"the name {name!r} is used twice.")
    for entry in config.adapters.entries:
        if not NAME.fullmatch(entry.name):
            raise ConfigInvalid("adapters.entries", f"{entry.name!r} is no name of an adapter ({NAME.pattern}).")
    if isinstance(config.scheduling.speculation, Speculation):
        reason = config.scheduling.speculation.contradiction()
        if reason is not None:
            raise ConfigInvalid("scheduling.speculation", reason)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a listener on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name may resolve to any address
        return False


def hash_key(key: str) -> str:
    """Return the SHA-256 of an API key, in hex. Keys are 256 random bits, so no salt or stretching is needed."""
    return hashlib.sha256(key.encode()).hexdigest()
