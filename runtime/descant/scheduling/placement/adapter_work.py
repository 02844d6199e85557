"""`AdapterWork`: moves, loads and prefetches that the executor does between steps and beside them."""

from __future__ import annotations

from typing import NamedTuple

from descant.contract.executor import AdapterMove
from descant.contract.version import AdapterVersion


class AdapterLoad(NamedTuple):
    """A version to be put on the device. `epoch` tells an answer of the present executor from a late one."""

    epoch: int
    version: AdapterVersion
    adapter_slot: int
    offset: int


class AdapterWork(NamedTuple):
    """Work for the executor, in this order: moves, then loads. `prefetches` are read into host memory only."""

    moves: tuple[AdapterMove, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()
    prefetches: tuple[AdapterVersion, ...] = ()
