"""Deletions when the store is full: the least recently used versions, as few as possible, never kept ones."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from descant.catalog.store_index import StoreIndex, scan

SIZES = st.lists(st.integers(1, 20), max_size=8)


def index_of(sizes: list[int], max_bytes: int) -> StoreIndex:
    index = StoreIndex(max_bytes)
    for number, size in enumerate(sizes):
        index.add(str(number), Path(f"/{number}"), size)
    return index


@given(SIZES, st.integers(1, 60), st.integers(0, 40), st.sets(st.integers(0, 7)))
def test_victims_are_enough_and_none_of_them_is_needless(
    sizes: list[int], max_bytes: int, num_new: int, kept: set[int]
) -> None:
    index = index_of(sizes, max_bytes)
    missing = sum(sizes) + num_new - max_bytes
    free = [size for number, size in enumerate(sizes) if number not in kept]

    victims = index.victims(num_new, lambda digest: int(digest) in kept)

    if victims is None:
        assert sum(free) < missing
        return
    freed = sum(sizes[int(victim)] for victim in victims)
    assert not kept & {int(victim) for victim in victims}
    assert freed >= missing
    assert all(freed - sizes[int(victim)] < missing for victim in victims)
    # The versions used up to the last victim suffice, so no version that was used later is deleted.
    if victims:
        last = int(victims[-1])
        assert sum(size for number, size in enumerate(sizes[:last]) if number not in kept) < missing


def test_what_is_used_again_is_not_the_first_to_go() -> None:
    index = index_of([5, 5, 5], 15)
    index.touch("0")
    index.touch("unknown")

    assert index.victims(5, lambda digest: False) == ["1"]
    assert index.victims(6, lambda digest: False) == ["1", "2"]
    assert index.victims(0, lambda digest: False) == []


def test_a_large_late_one_spares_small_early_ones() -> None:
    assert index_of([1, 1, 10], 12).victims(10, lambda digest: False) == ["2"]


def test_bytes_are_counted_once_for_each_file() -> None:
    index = index_of([3, 4], 100)
    index.add("0", Path("/0"), 10)
    assert (index.num_bytes, len(index)) == (14, 2)

    assert index.remove("0") == Path("/0")
    assert index.remove("0") is None
    assert (index.num_bytes, len(index), "0" in index) == (4, 1, False)


def test_a_scan_finds_versions_and_nothing_else_in_order_of_writing(tmp_path: Path) -> None:
    assert scan(tmp_path / "nothing") == []
    (tmp_path / "versions").mkdir()
    names = ["b" * 64, "a" * 64, "c" * 64]
    for age, name in enumerate(names):
        path = tmp_path / "versions" / f"{name}.safetensors"
        path.write_bytes(b"x" * (age + 1))
        os.utime(path, (age, age))
    for other in (".tmp.partial", "foreign.safetensors", f"{'d' * 64}.bin"):
        (tmp_path / "versions" / other).write_bytes(b"x")

    assert [(digest, size) for digest, _, size in scan(tmp_path)] == list(zip(names, (1, 2, 3), strict=True))
