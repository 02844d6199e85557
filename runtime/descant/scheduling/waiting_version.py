"""`WaitingVersion`: an entry in the queue of the adapter gate."""

from __future__ import annotations

from dataclasses import dataclass, field

from descant.contract.version import AdapterVersion
from descant.scheduling.sequence import Sequence


@dataclass(slots=True, eq=False)
class WaitingVersion:
    """A version that waits for a place, and who waits with it."""

    version: AdapterVersion
    turn: tuple[int, int]  # of who came first
    num_bytes: int  # of the arena
    sequences: list[Sequence] = field(default_factory=list[Sequence])  # in order of arrival
    is_pin: bool = False
    is_doomed: bool = False


def by_turn(waiting: WaitingVersion) -> tuple[int, int]:
    """Sort by this to put first what waits for whoever came first."""
    return waiting.turn
