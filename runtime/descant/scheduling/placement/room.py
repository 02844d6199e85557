"""`find_room`: chooses the extent of a new version in the arena, the versions evicted for it and those moved.

Pure geometry: the arena is given as pieces from its beginning to its end, without gaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Piece(NamedTuple):
    """A range of bytes of the arena: free, or the extent of a version."""

    offset: int
    num_bytes: int
    digest: str | None = None  # None: free
    is_fixed: bool = False  # it cannot be moved


class Room(NamedTuple):
    """An extent at `offset` that is free once the victims are evicted and the moves done, in this order."""

    offset: int
    victims: tuple[str, ...] = ()
    moves: tuple[tuple[str, int], ...] = ()  # digest, new offset; none overwrites another that has not moved yet


def find_room(pieces: Sequence[Piece], idle: Sequence[str], num_bytes: int, needs_victim: bool) -> Room | None:
    """Return room for an extent, None if there is none.

    A free piece is used if one is large enough. Otherwise versions become candidates for eviction, the least recently
    used first, until some run of candidates and free bytes is long enough; within it as few bytes as possible are
    evicted. Only if no such run exists are extents moved together.

    Args:
      idle: versions that may be evicted, the least recently used first.
      needs_victim: at least one version must be evicted in any case, because its slot is needed.
    """
    if needs_victim and not idle:
        return None
    room = (
        _free_room(pieces, num_bytes) or _evicted_room(pieces, idle, num_bytes) or _slid_room(pieces, idle, num_bytes)
    )
    if room is not None and needs_victim and not room.victims:
        kept = tuple(move for move in room.moves if move[0] != idle[0])
        return room._replace(victims=(idle[0],), moves=kept)
    return room


def _free_room(pieces: Sequence[Piece], num_bytes: int) -> Room | None:
    """Return the smallest free piece that is large enough."""
    fitting = [piece for piece in pieces if piece.digest is None and piece.num_bytes >= num_bytes]
    return Room(min(fitting, key=lambda piece: piece.num_bytes).offset) if fitting else None


def _evicted_room(pieces: Sequence[Piece], idle: Sequence[str], num_bytes: int) -> Room | None:
    """Return room in the run whose most recently used member was used longest ago."""
    place = {piece.digest: index for index, piece in enumerate(pieces)}
    runs = _Runs(pieces)
    for index, piece in enumerate(pieces):
        if piece.digest is None:
            runs.add(index)
    for digest in idle:
        first, last = runs.add(place[digest])
        if pieces[last].offset + pieces[last].num_bytes - pieces[first].offset >= num_bytes:
            return _cheapest_run(pieces, first, last, place[digest], num_bytes)
    return None


class _Runs:
    """Runs of neighboring pieces that are free or may be evicted, joined as pieces are added."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._last_by_first: dict[int, int] = {}
        self._first_by_last: dict[int, int] = {}

    def add(self, index: int) -> tuple[int, int]:
        """Add a piece; return the first and the last piece of its run."""
        first = self._first_by_last.get(index - 1, index)
        last = self._last_by_first.get(index + 1, index)
        self._last_by_first[first], self._first_by_last[last] = last, first
        return first, last


def _cheapest_run(pieces: Sequence[Piece], first: int, last: int, latest: int, num_bytes: int) -> Room:
    """Return the part of a run, with piece `latest` in it, that evicts the fewest bytes."""
    evicted = [0, *accumulate(0 if piece.digest is None else piece.num_bytes for piece in pieces[first : last + 1])]
    best: tuple[int, int, int] | None = None
    for begin, end in _windows([piece.num_bytes for piece in pieces[first : last + 1]], num_bytes):
        end = max(end, latest - first + 1)
        if begin <= latest - first:
            cost = (evicted[end] - evicted[begin], begin, end)
            best = cost if best is None else min(best, cost)
    assert best is not None, "the whole run is long enough"
    run = pieces[first + best[1] : first + best[2]]
    return Room(run[0].offset, tuple(piece.digest for piece in run if piece.digest is not None))


def _slid_room(pieces: Sequence[Piece], idle: Sequence[str], num_bytes: int) -> Room | None:
    """Return room between two fixed pieces: as few versions as possible are evicted, oldest first, the others move."""
    zones = list(_zones(pieces))
    zone_of = {piece.digest: zone for zone in zones for piece in zone.pieces}
    gone: set[str] = set()
    for digest in (None, *idle):
        grown = zones if digest is None else [zone_of[digest]]
        if digest is not None:
            gone.add(digest)
            grown[0].num_spare += grown[0].size_of[digest]
        rooms = [_slide(zone.pieces, gone, num_bytes) for zone in grown if zone.num_spare >= num_bytes]
        if rooms:
            _, window, victims = min(rooms, key=lambda room: room[0])
            # The version that made it possible is evicted; of the others, those used last stay if possible.
            return _packed(window, _needed(window, [d for d in idle if d in victims], num_bytes))
    return None


@dataclass
class _Zone:
    """Consecutive pieces of which none is fixed."""

    pieces: Sequence[Piece]
    size_of: dict[str | None, int]
    num_spare: int  # bytes that are free or to be evicted


def _zones(pieces: Sequence[Piece]) -> Iterator[_Zone]:
    begin = 0
    for end in range(len(pieces) + 1):
        if end == len(pieces) or pieces[end].is_fixed:
            zone = pieces[begin:end]
            if zone:
                free = sum(piece.num_bytes for piece in zone if piece.digest is None)
                yield _Zone(zone, {piece.digest: piece.num_bytes for piece in zone if piece.digest}, free)
            begin = end + 1


def _slide(zone: Sequence[Piece], gone: set[str], num_bytes: int) -> tuple[int, Sequence[Piece], set[str]]:
    """Return the window of a zone with enough spare bytes and fewest to move: its cost, pieces and victims."""
    spare = [piece.num_bytes if piece.digest is None or piece.digest in gone else 0 for piece in zone]
    moved = [0, *accumulate(piece.num_bytes - free for piece, free in zip(zone, spare, strict=True))]
    cost, begin, end = min((moved[end] - moved[begin], begin, end) for begin, end in _windows(spare, num_bytes))
    window = zone[begin:end]
    return cost, window, {piece.digest for piece in window if piece.digest in gone}


def _needed(window: Sequence[Piece], victims: Sequence[str], num_bytes: int) -> set[str]:
    """Return the victims that must be evicted. `victims` are given least recently used first."""
    size_of = {piece.digest: piece.num_bytes for piece in window}
    needed, spare = set(victims), sum(piece.num_bytes for piece in window if piece.digest is None)
    spare += sum(size_of[digest] for digest in victims)
    for digest in reversed(victims):
        if spare - size_of[digest] >= num_bytes:
            spare -= size_of[digest]
            needed.discard(digest)
    return needed


def _packed(window: Sequence[Piece], victims: set[str]) -> Room:
    """Return the room behind the remaining versions, which move to the beginning of the window in order."""
    offset = window[0].offset
    moves: list[tuple[str, int]] = []
    for piece in window:
        if piece.digest is not None and piece.digest not in victims:
            if piece.offset != offset:
                moves.append((piece.digest, offset))
            offset += piece.num_bytes
    return Room(offset, tuple(sorted(victims)), tuple(moves))


def _windows(values: Sequence[int], total: int) -> Iterator[tuple[int, int]]:
    """Yield, for each beginning, the shortest range whose values sum up to at least `total`."""
    end = current = 0
    for begin in range(len(values)):
        while current < total and end < len(values):
            current += values[end]
            end += 1
        if current < total:
            return
        yield begin, end
        current -= values[begin]
