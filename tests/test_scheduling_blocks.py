"""Blocks are used by count, shared by content, and taken oldest first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descant.scheduling.blocks import (
    EVICTION_BATCH,
    KEPT_PER_EVICTED,
    BlockAllocator,
    block_hash,
    hash_of,
    root_hash,
)
from descant.scheduling.placement.free_runs import FreeRuns
from fakes import make_sequence, version


def digests(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def cached(allocator: BlockAllocator, *names: str) -> list[int]:
    """Compute, register and release blocks of these contents."""
    blocks = allocator.allocate(len(names))
    assert blocks is not None
    for block, digest in zip(blocks, digests(*names), strict=True):
        allocator.register(block, digest)
    allocator.release(blocks)
    return blocks


def test_blocks_of_one_sequence_are_consecutive() -> None:
    allocator = BlockAllocator(64, 16)
    first, second = allocator.allocate(5), allocator.allocate(5)
    assert first is not None
    assert second is not None

    for blocks in (first, second):
        for _ in range(3):
            blocks += allocator.allocate(1, after=blocks[-1]) or []
        assert blocks == list(range(blocks[0], blocks[0] + 8))


def test_no_more_blocks_are_given_than_there_are() -> None:
    allocator = BlockAllocator(4, 16)

    assert allocator.allocate(5) is None
    assert sorted(allocator.allocate(4) or []) == [0, 1, 2, 3]
    assert allocator.allocate(1) is None


def test_the_longest_known_prefix_is_matched() -> None:
    allocator = BlockAllocator(8, 16)
    blocks = cached(allocator, "a", "b", "c")

    assert allocator.match(digests("a", "b", "x", "c")) == blocks[:2]
    allocator.check_integrity([blocks[:2]])


def test_cached_blocks_are_taken_oldest_first_and_the_end_of_a_table_before_its_beginning() -> None:
    allocator = BlockAllocator(4, 16)
    old, new = cached(allocator, "a", "b"), cached(allocator, "x", "y")

    taken = [(allocator.allocate(1) or [])[0] for _ in range(3)]

    assert taken == [old[1], old[0], new[1]]


def test_a_block_in_use_is_never_taken() -> None:
    allocator = BlockAllocator(2, 16)
    cached(allocator, "a", "b")
    used = allocator.match(digests("a"))

    assert allocator.allocate(2) is None
    assert allocator.allocate(1) != used


def test_of_two_blocks_with_the_same_content_one_is_kept() -> None:
    allocator = BlockAllocator(4, 16)
    first, second = allocator.allocate(1) or [], allocator.allocate(1) or []
    for blocks in (first, second):
        allocator.register(blocks[0], b"a")

    allocator.release(first)
    allocator.release(second)

    assert allocator.num_cached == 1
    assert allocator.match([b"a"]) == first


def test_releasing_twice_is_a_mistake() -> None:
    allocator = BlockAllocator(4, 16)
    blocks = allocator.allocate(1) or []
    allocator.release(blocks)

    with pytest.raises(AssertionError, match="released twice"):
        allocator.release(blocks)


def test_the_integrity_check_notices_a_lost_block() -> None:
    allocator = BlockAllocator(4, 16)
    allocator.allocate(1)

    with pytest.raises(AssertionError):
        allocator.check_integrity()


def test_scope_version_and_everything_before_enter_the_digest() -> None:
    def digest(scope: str = "", adapter: str | None = None, prompt: tuple[int, ...] = (1, 2, 3, 4)) -> bytes:
        seq = make_sequence(1, list(prompt), cache_scope=scope)
        seq.adapter = version(adapter) if adapter else None
        return hash_of(seq, 1, 2)

    variants = [digest(), digest("s"), digest("", "s"), digest("s", "s"), digest("1:s"), digest(prompt=(0, 2, 3, 4))]
    assert len(set(variants)) == len(variants)
    assert digest("s", "v") == digest("s", "v")


def test_digests_are_those_of_the_chain() -> None:
    seq = make_sequence(1, [1, 2, 3])
    seq.output.token_ids = [4, 5]

    first = block_hash(root_hash("", ""), [1, 2])
    assert hash_of(seq, 1, 2) == block_hash(first, [3, 4])
    assert seq.block_hashes == [first, block_hash(first, [3, 4])]


class SlowAllocator:
    """The same, obviously: lists, and a search for everything."""

    def __init__(self, num_blocks: int) -> None:
        self.users: Counter[int] = Counter()
        self.unknown = set(range(num_blocks))  # free
        self.content: dict[int, bytes] = {}
        self.idle: list[int] = []  # cached, oldest first

    def allocate(self, blocks: list[int] | None, count: int) -> None:
        """Check what the real one answered, and do the same."""
        if blocks is None:
            assert count > len(self.unknown) + len(self.idle)
            return
        if count > len(self.unknown):
            evicted = max(count - len(self.unknown), min(EVICTION_BATCH, len(self.idle) // KEPT_PER_EVICTED))
            for block in self.idle[:evicted]:
                del self.content[block]
            self.unknown |= set(self.idle[:evicted])
            self.idle = self.idle[evicted:]
        assert len(set(blocks)) == count
        assert set(blocks) <= self.unknown
        self.unknown -= set(blocks)
        self.users.update(blocks)

    def match(self, hashes: list[bytes]) -> list[int]:
        found: list[int] = []
        for digest in hashes:
            block = next((block for block, content in self.content.items() if content == digest), None)
            if block is None:
                break
            found.append(block)
        self.idle = [block for block in self.idle if block not in found]
        self.users.update(found)
        return found

    def register(self, block: int, digest: bytes) -> None:
        if block not in self.content and digest not in self.content.values():
            self.content[block] = digest

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                if block in self.content:
                    self.idle.append(block)
                else:
                    self.unknown.add(block)


CONTENT = st.sampled_from(["a", "b", "c", "d", "e"]).map(str.encode)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(0, 5)),
        st.tuples(st.just("match"), st.lists(CONTENT, max_size=4, unique=True)),
        st.tuples(st.just("register"), st.tuples(st.integers(0, 9), CONTENT)),
        st.tuples(st.just("release"), st.integers(0, 9)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(st.integers(1, 12), OPERATIONS)
def test_the_allocator_does_what_the_slow_one_does(num_blocks: int, operations: list[tuple[str, object]]) -> None:
    real, slow = BlockAllocator(num_blocks, 16), SlowAllocator(num_blocks)
    tables: list[list[int]] = []
    for name, argument in operations:
        match name, argument:
            case "allocate", int(count):
                blocks = real.allocate(count, after=tables[-1][-1] if tables and tables[-1] else -1)
                slow.allocate(blocks, count)
                tables += [blocks] if blocks else []
            case "match", list(hashes):
                blocks = real.match(hashes)
                assert blocks == slow.match(hashes)
                tables += [blocks] if blocks else []
            case "register", (index, digest) if tables:
                for allocator in (real, slow):
                    allocator.register(tables[index % len(tables)][-1], digest)
            case "release", int(index) if tables:
                table = tables.pop(index % len(tables))
                real.release(table)
                slow.release(table)
        real.check_integrity(tables)
        assert real.num_available == len(slow.unknown) + len(slow.idle)


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 50), max_size=60))
def test_free_runs_are_a_set(count: int, choices: list[int]) -> None:
    runs, taken = FreeRuns(count), list[int]()
    for choice in choices:
        if choice % 2 and taken:
            runs.give(taken.pop(choice % len(taken)))
        elif choice // 2 <= len(runs):
            after = taken[-1] if taken else -1
            taken += runs.take(choice // 2, after)
        runs.check_integrity()
        assert sorted([*runs, *taken]) == list(range(count))


def test_free_runs_forget_what_is_stale() -> None:
    runs = FreeRuns(100)
    for _ in range(1000):
        for value in runs.take(3):
            runs.give(value)

    assert len(runs._by_length) < 100
    assert runs.take(100) == list(range(100))
