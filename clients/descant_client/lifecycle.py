"""The wire's messages about adapters themselves: names, versions, combinations. `protocol` has the rest.

A name belongs to whoever made it; `is_shared` names are everybody's to use and an administrator's to change. A plain
name means the caller's own before the shared one. Each of these messages is answered by one `adapters` (with the
adapter as it is now, or none once it is destroyed) or one `error`; `progress` may come before.
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
    """How weighted members become one adapter, as PEFT's `add_weighted_adapter` names it.

    `cat` is the exact weighted sum. `rank` is of the result and for the `svd` types only (default: the largest of the
    members'), `clamp` likewise: the quantile beyond which singular vectors are cut off. `density` is the share of
    values kept by `ties`, `dare` and `magnitude_prune`, which need it. `seed` draws what `dare` drops.
    """

    type: CombinationType = "cat"
    rank: Rank | None = None
    clamp: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"
    seed: Seed = 0


class CreateAdapter(ClientMessageBase, frozen=True, tag="adapter.create"):
    """Make an adapter that changes nothing yet, of a rank, on these modules (None: `q_proj` and `v_proj`)."""

    request_id: RequestId
    name: str
    rank: Rank = 8
    alpha: float | None = None  # None: the rank, so that its scaling is 1
    target_modules: list[str] | None = None  # suffixes of module names, as in PEFT
    is_shared: bool = False


class ForkAdapter(ClientMessageBase, frozen=True, tag="adapter.fork"):
    """Give the version under a name a second name. Nothing is copied: either may be replaced without the other."""

    request_id: RequestId
    name: str
    new_name: str
    is_shared: bool = False


class LoadAdapter(ClientMessageBase, frozen=True, tag="adapter.load"):
    """Read what `ref` names and put it under the name, which is made if there is none.

    Running requests finish on the version they began with. The content is read again even if `ref` is the same.
    """

    request_id: RequestId
    name: str
    ref: str
    adapter_source: AdapterSource | None = None
    is_shared: bool = False


class MergeAdapters(ClientMessageBase, frozen=True, tag="adapter.merge"):
    """Put a combination of adapters under a name, which is made if there is none."""

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
    """Load the adapter onto the device and keep it there."""

    request_id: RequestId
    name: str


class UnpinAdapter(ClientMessageBase, frozen=True, tag="adapter.unpin"):
    """Let the adapter leave the device when others need the room."""

    request_id: RequestId
    name: str


class EnableAdapter(ClientMessageBase, frozen=True, tag="adapter.enable"):
    """Let the adapter act again."""

    request_id: RequestId
    name: str


class DisableAdapter(ClientMessageBase, frozen=True, tag="adapter.disable"):
    """Let new requests for the adapter be answered by the base model."""

    request_id: RequestId
    name: str


class DestroyAdapter(ClientMessageBase, frozen=True, tag="adapter.destroy"):
    """Forget the name at once, and its version once the last request that uses it has ended."""

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
    source: str
    digest: str | None = None  # None until it is first prepared
    rank: int | None = None  # the largest over its modules
    num_bytes: int | None = None  # on the device
    is_shared: bool = False
    is_pinned: bool = False
    is_enabled: bool = True


class Adapters(ServerMessageBase, frozen=True):
    """Answer to every `adapter.*` message."""

    request_id: str
    adapters: list[AdapterInfo]
