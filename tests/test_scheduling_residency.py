"""Adapter versions have a slot and bytes of their own for as long as anybody uses them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descant.scheduling.placement.residency import AdapterResidency
from descant.scheduling.placement.room import Piece, Room, find_room
from descant_client.errors import AdapterTooLarge, UnsupportedRequest
from fakes import version


def use(residency: AdapterResidency, digest: str, num_bytes: int = 64) -> bool:
    """Acquire and load a version; return whether there was room."""
    placement = residency.acquire(version(digest, num_bytes))
    if placement is not None and placement.is_new:
        residency.on_placed(digest)
    return placement is not None


def test_a_version_keeps_its_place_while_it_is_used_or_unneeded() -> None:
    residency = AdapterResidency(2, 256)
    first = residency.acquire(version("a"))
    assert first is not None
    assert first.is_new
    residency.on_placed("a")
    residency.release("a")

    again = residency.acquire(version("a"))

    assert again == first._replace(is_new=False)


def test_what_was_used_longest_ago_is_evicted() -> None:
    residency = AdapterResidency(2, 256)
    for digest in ("a", "b", "a"):
        use(residency, digest)
        residency.release(digest)

    assert use(residency, "c")

    assert residency.is_loaded("a")
    assert not residency.is_resident("b")


def test_what_is_in_use_is_never_evicted() -> None:
    residency = AdapterResidency(1, 256)
    use(residency, "a")
    use(residency, "a")
    residency.release("a")

    assert not use(residency, "b")
    residency.release("a")
    assert use(residency, "b")


def test_what_is_being_loaded_is_never_evicted() -> None:
    residency = AdapterResidency(1, 256)
    residency.acquire(version("a"))
    residency.release("a")

    assert not use(residency, "b")
    residency.on_placed("a")
    assert use(residency, "b")


def test_nothing_is_evicted_in_vain() -> None:
    residency = AdapterResidency(3, 192)
    for digest in ("a", "b", "c"):
        use(residency, digest)
    residency.release("a")
    residency.release("c")

    assert not use(residency, "big", 192)

    assert residency.is_loaded("a")
    assert residency.is_loaded("c")


def test_neighboring_free_bytes_are_joined() -> None:
    residency = AdapterResidency(3, 192)
    for digest in ("a", "b", "c"):
        use(residency, digest)
        residency.release(digest)

    assert use(residency, "big", 192)
    assert not residency.is_resident("a")


def test_a_failed_load_leaves_nothing() -> None:
    residency = AdapterResidency(1, 64)
    residency.acquire(version("a"))

    residency.forget("a")

    assert use(residency, "b")
    residency.check_integrity()


def test_a_version_larger_than_the_arena_is_refused() -> None:
    residency = AdapterResidency(1, 100)

    with pytest.raises(AdapterTooLarge) as caught:
        residency.acquire(version("a", 101))
    assert (caught.value.num_bytes, caught.value.max_bytes) == (101, 100)


def test_without_slots_there_are_no_adapters() -> None:
    with pytest.raises(UnsupportedRequest):
        AdapterResidency(0, 0).acquire(version("a"))


def filled(num_slots: int, *sizes: int) -> AdapterResidency:
    """Return a full arena of loaded versions a, b, c, … that are in use, from its beginning to its end."""
    residency = AdapterResidency(num_slots, sum(sizes))
    for digest, size in zip("abcdefgh", sizes, strict=False):
        use(residency, digest, size)
    return residency


def test_a_free_gap_that_fits_is_taken_before_anything_is_evicted() -> None:
    residency = filled(5, 128, 64, 64, 64)
    for digest in ("a", "c", "d"):
        residency.release(digest)
    residency.forget("a")
    residency.forget("c")

    placement = residency.acquire(version("small"))

    assert placement is not None
    assert placement.offset == 192  # the smaller gap
    assert residency.is_loaded("d")


def test_the_run_that_was_not_needed_for_longest_goes() -> None:
    residency = filled(6, 64, 64, 64, 64, 64)
    for digest in ("a", "d", "e", "b"):  # c stays in use
        residency.release(digest)

    assert use(residency, "big", 128)

    assert [digest for digest in "abde" if residency.is_resident(digest)] == ["a", "b"]


def test_of_the_run_no_more_goes_than_must() -> None:
    residency = filled(6, 64, 128, 64)
    for digest in ("a", "c", "b"):
        residency.release(digest)

    assert use(residency, "big", 128)

    assert [digest for digest in "abc" if residency.is_resident(digest)] == ["a", "c"]


def test_when_only_a_slot_is_missing_one_version_goes() -> None:
    residency = AdapterResidency(2, 256)
    for digest in ("a", "b"):
        use(residency, digest)
        residency.release(digest)

    placement = residency.acquire(version("c"))

    assert placement is not None
    assert placement.offset == 128
    assert not residency.is_resident("a")


def test_extents_slide_together_when_what_is_in_use_lies_between() -> None:
    residency = filled(5, 64, 64, 64, 64)
    for digest in ("a", "c"):
        residency.release(digest)

    placement = residency.acquire(version("big", 128))

    assert placement is not None
    assert [(move.adapter_slot, move.offset) for move in residency.take_moves()] == [(1, 0)]
    assert (placement.offset, residency.offset_of("b"), residency.offset_of("d")) == (64, 0, 192)
    residency.check_integrity()


def test_sliding_evicts_no_more_than_it_must() -> None:
    residency = filled(6, 128, 64, 64, 64, 128)
    for digest in ("a", "c", "e"):
        residency.release(digest)

    assert use(residency, "big", 256)

    assert [digest for digest in "ace" if residency.is_resident(digest)] == ["c"]
    residency.check_integrity()


def test_what_is_being_loaded_stays_where_it_is() -> None:
    residency = filled(5, 64, 64, 64)
    residency.release("b")
    residency.forget("b")
    loading = residency.acquire(version("loading"))
    for digest in ("a", "c"):
        residency.release(digest)

    assert residency.acquire(version("big", 128)) is None
    assert residency.take_moves() == []
    residency.on_placed("loading")
    assert use(residency, "big", 128)
    assert loading is not None
    assert residency.offset_of("loading") != loading.offset


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from("fipm")), min_size=1, max_size=12),
    st.integers(1, 12),
    st.booleans(),
)
def test_room_is_found_whenever_there_is_some_and_is_free_then(
    extents: list[tuple[int, str]], size: int, needs_victim: bool
) -> None:
    """f: free, i: idle, p: in place and movable, m: being loaded."""
    pieces: list[Piece] = []
    offset = 0
    for index, (length, kind) in enumerate(extents):
        pieces.append(Piece(offset, length, None if kind == "f" else f"v{index}", kind == "m"))
        offset += length
    idle = [piece.digest or "" for piece, (_, kind) in zip(pieces, extents, strict=True) if kind == "i"]
    zones = "".join("|" if kind == "m" else kind for _, kind in extents).split("|")
    lengths = iter([length for length, kind in extents if kind != "m"])
    spare = [
        sum(length for length, kind in zip(lengths_of(zone, lengths), zone, strict=True) if kind in "fi")
        for zone in zones
    ]

    room = find_room(pieces, idle, size, needs_victim)

    assert (room is not None) == (max(spare) >= size and bool(idle or not needs_victim))
    if room is not None:
        assert len(room.victims) >= needs_victim
        assert set(room.victims) <= set(idle)
        check_room(pieces, room, size)


def test_what_goes_for_its_slot_alone_does_not_move() -> None:
    kinds = {"f0": 1, "p1": 1, "f2": 1, "i3": 1, "p4": 1, "f5": 1}
    pieces = [Piece(i, size, None if name[0] == "f" else name) for i, (name, size) in enumerate(kinds.items())]

    room = find_room(pieces, ["i3"], 3, needs_victim=True)

    assert room is not None
    assert (room.victims, {digest for digest, _ in room.moves}) == (("i3",), {"p1", "p4"})
    check_room(pieces, room, 3)


def lengths_of(zone: str, lengths: Iterator[int]) -> list[int]:
    return [next(lengths) for _ in zone]


def check_room(pieces: list[Piece], room: Room, size: int) -> None:
    """Carry out evictions and moves byte by byte: nothing that stays is overwritten, and the room is free."""
    extents = {p.digest: (p.offset, p.num_bytes) for p in pieces if p.digest and p.digest not in room.victims}
    for digest, offset in (*room.moves, ("new", room.offset)):
        assert not any(piece.is_fixed and piece.digest == digest for piece in pieces)
        extents[digest] = (offset, extents[digest][1] if digest != "new" else size)
        others = {other: extent for other, extent in extents.items() if other != digest}
        for begin, length in others.values():
            assert begin + length <= offset or offset + extents[digest][1] <= begin
    end = pieces[-1].offset + pieces[-1].num_bytes
    assert all(begin >= 0 and begin + length <= end for begin, length in extents.values())


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.integers(64, 700),
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["use", "start", "finish", "fail", "release"]))),
)
def test_places_in_use_never_overlap(num_slots: int, num_bytes: int, operations: list[tuple[int, str]]) -> None:
    residency = AdapterResidency(num_slots, num_bytes)
    used: list[str] = []
    loading: set[str] = set()
    for number, operation in operations:
        digest, size = f"v{number}", min(64 * number + 1, num_bytes // 64 * 64)
        if operation in ("use", "start"):
            placement = residency.acquire(version(digest, size))
            used += [digest] if placement else []
            loading |= {digest} if placement and placement.is_new else set()
        if operation == "release" and digest in used:
            used.remove(digest)
            residency.release(digest)
        if operation in ("use", "finish") and digest in loading:
            loading.remove(digest)
            residency.on_placed(digest)
        if operation == "fail" and digest in loading:
            loading.remove(digest)
            used = [other for other in used if other != digest]
            residency.forget(digest)
        residency.check_integrity()
        assert all(residency.is_resident(digest) for digest in [*used, *loading])
