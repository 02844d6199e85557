"""Base classes and constrained values of the messages on the wire.

Every integer has bounds within 64 bits: JSON sets none, and msgpack, used between the server's processes, has 64.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Rank = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]
AdapterSource = Literal["local", "hub", "s3", "pbase"]


class Wire(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all parts of messages."""


class Strict(Wire, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of the parts that clients send: an unknown field is refused by name."""


class ClientMessageBase(Strict, frozen=True, tag_field="type", tag=str.lower):
    """Base of the client's messages; the tag is the class name in lower case."""


class ServerMessageBase(Wire, frozen=True, tag_field="type", tag=str.lower):
    """Base of the server's messages; the tag is the class name in lower case."""


def reason_and_path(error: Exception) -> tuple[str, str]:
    """Split msgspec's text of a decoding error into the reason and the path of the field, empty if there is none."""
    reason, _, path = str(error).partition(" - at `")
    return reason, path.rstrip("`")


class WeightedAdapter(Strict, frozen=True, array_like=True):
    """A member of a weighted sum of adapters: `[adapter, weight]`."""

    adapter: str
    weight: float
