"""`Principal`: the identity a request acts for."""

from __future__ import annotations

import msgspec


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
