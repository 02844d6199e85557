"""The messages that change adapters: names, versions, combinations. `protocol` has the other messages.

A name belongs to the principal that made it. A shared name (`is_shared`) can be used by all principals and changed by
administrators. A plain name refers to the caller's own adapter before a shared one. Each message is answered by one
`adapters` (with the adapter as it is now, or empty once it is destroyed) or by one `error`. `progress` may come before.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from descant_client.wire import (
    AdapterSource,
    ClientMessageBase,
    Rank,
    RequestId,
    Seed,
    ServerMessageBase,
    Strict,
    WeightedAdapter,
    Wire,
)

CombinationType = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
Members = Annotated[list[WeightedAdapter], msgspec.Meta(min_length=1, max_length=64)]


class Combination(Strict, frozen=True):
    """How to combine weighted members into one adapter, with the names of PEFT's `add_weighted_adapter`.

    `cat` is the exact weighted sum. `rank` and `clamp` are for the `svd` types only: `rank` is the rank of the result
    (default: the largest rank of the members), `clamp` the quantile, above 0.5, to which values of singular vectors are
    clamped. `density` is the share of values that `ties`, `dare` and `magnitude_prune` keep; these types require it.
    `majority_sign_method` is for types with `ties`. `seed` is for the random choice of the values that `dare` drops.
    """

    type: CombinationType = "cat"
    rank: Rank | None = None
    clamp: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"
    seed: Seed = 0


class CreateAdapter(ClientMessageBase, frozen=True, tag="adapter.create"):
    """Make a zero adapter: its output is that of the base until it is loaded into.

    `target_modules` are the ends of module names, as in PEFT. None: `q_proj` and `v_proj`.
    """

    request_id: RequestId
    name: str
    rank: Rank = 8
    alpha: float | None = None  # None: the rank, so that its scaling is 1
    target_modules: list[str] | None = None
    is_shared: bool = False


class ForkAdapter(ClientMessageBase, frozen=True, tag="adapter.fork"):
    """Give the version of a name a second name. Nothing is copied. Either name can be changed without the other."""

    request_id: RequestId
    name: str
    new_name: str
    is_shared: bool = False


class LoadAdapter(ClientMessageBase, frozen=True, tag="adapter.load"):
    """Read the adapter at `ref` and make it the version of the name, which is created if there is none.

    Running requests finish on the version they began with. The content is read again even if `ref` is the same.
    """

    request_id: RequestId
    name: str
    ref: str
    adapter_source: AdapterSource | None = None
    is_shared: bool = False


class MergeAdapters(ClientMessageBase, frozen=True, tag="adapter.merge"):
    """Make a combination of adapters the version of a name, which is created if there is none."""

    request_id: RequestId
    name: str
    adapters: Members
    adapter_source: AdapterSource | None = None
    combination: Combination = Combination()
    is_shared: bool = False


class SaveAdapter(ClientMessageBase, frozen=True, tag="adapter.save"):
    """Write the adapter as a PEFT directory at an absolute path of the server's machine."""

    request_id: RequestId
    name: str
    path: str


class MergeAndSave(ClientMessageBase, frozen=True, tag="adapter.merge_and_save"):
    """Write base and adapter merged into one Hugging Face checkpoint, at a path as `adapter.save`."""

    request_id: RequestId
    name: str
    path: str


class PinAdapter(ClientMessageBase, frozen=True, tag="adapter.pin"):
    """Load the adapter onto the device and keep it there until it is unpinned."""

    request_id: RequestId
    name: str


class UnpinAdapter(ClientMessageBase, frozen=True, tag="adapter.unpin"):
    """Allow the eviction of the adapter from the device when others need the room."""

    request_id: RequestId
    name: str


class EnableAdapter(ClientMessageBase, frozen=True, tag="adapter.enable"):
    """Apply the adapter again in new requests for it."""

    request_id: RequestId
    name: str


class DisableAdapter(ClientMessageBase, frozen=True, tag="adapter.disable"):
    """Answer new requests for the adapter with the base model."""

    request_id: RequestId
    name: str


class DestroyAdapter(ClientMessageBase, frozen=True, tag="adapter.destroy"):
    """Remove the name at once, and its version once the last request that uses it has ended."""

    request_id: RequestId
    name: str


AdapterChange = (
    CreateAdapter
    | ForkAdapter
    | LoadAdapter
    | MergeAdapters
    | SaveAdapter
    | MergeAndSave
    | PinAdapter
    | UnpinAdapter
    | EnableAdapter
    | DisableAdapter
    | DestroyAdapter
)


class AdapterInfo(Wire, frozen=True):
    """A registered adapter."""

    name: str
    source: str  # kind of origin of its content: `local`, `create`, `merge`
    digest: str | None = None  # of its version; None until it is first prepared, as are the next two
    rank: int | None = None  # the largest over its modules
    num_bytes: int | None = None  # on the device
    is_shared: bool = False
    is_pinned: bool = False
    is_enabled: bool = True
    is_unplaceable: bool = False  # pinned, and there is no room for it beside the pins before it


class Adapters(ServerMessageBase, frozen=True):
    """Answer to every `adapter.*` message."""

    request_id: str
    adapters: list[AdapterInfo]
