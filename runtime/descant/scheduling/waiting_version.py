"""`WaitingVersion`: an entry in the queue of the adapter gate."""

from __future__ import annotations

from dataclasses import dataclass, field

from descant.contract.version import AdapterVersion
from descant.scheduling.sequence import Sequence


@dataclass(slots=True, eq=False)
class WaitingVersion:
    """A version that waits for a place, and the sequences that wait for it."""

    version: AdapterVersion
    turn: tuple[int, int]  # of the first sequence or pin: its id, and the number of the pin
    num_bytes: int  # aligned size in the arena
    sequences: list[Sequence] = field(default_factory=list[Sequence])  # in order of arrival
    is_pin: bool = False
    is_doomed: bool = False  # to be forgotten once no sequence uses it


def by_turn(waiting: WaitingVersion) -> tuple[int, int]:
    """Sort key: order of turns."""
    return waiting.turn
