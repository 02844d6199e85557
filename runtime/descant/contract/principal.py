"""`Principal`: the identity a request acts for."""

from __future__ import annotations

import msgspec


class Principal(msgspec.Struct, frozen=True):
    """The identity of a client.

    `roots` are the local directories it may name (None: any). An administrator may change shared adapters. `weight` is
    its share of the device relative to others. `max_queued` limits its waiting sequences (None: the server's limit).
    """

    name: str
    roots: tuple[str, ...] | None = None
    is_admin: bool = False
    weight: float = 1.0
    max_queued: int | None = None
