"""What the scheduler has the executor do with adapters, between steps and beside them."""

from __future__ import annotations

from typing import NamedTuple

from descant.contract.executor import AdapterMove
from descant.contract.version import AdapterVersion


class AdapterLoad(NamedTuple):
    """A version to be put on the device. `epoch` tells a late answer from one about the present executor."""

    epoch: int
    version: AdapterVersion
    adapter_slot: int
    offset: int


class AdapterWork(NamedTuple):
    """What the executor is to do, in this order: move, then load. `prefetches` only go as far as host memory."""

    moves: tuple[AdapterMove, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()
    prefetches: tuple[AdapterVersion, ...] = ()
