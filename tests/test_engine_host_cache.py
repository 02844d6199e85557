"""Adapters in host memory: claimed versions stay, others stay within the budget, and each is read once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import pytest

from descant.engine.host_cache import HostCache


@dataclass(frozen=True)
class Version:
    num_bytes: int


def never() -> Version:
    raise AssertionError("it is there")


def stage(cache: HostCache[Version], digest: str, num_bytes: int = 10, epoch: int | None = None) -> None:
    cache.stage(digest, num_bytes, lambda: Version(num_bytes), epoch)


def use(cache: HostCache[Version], digest: str, num_bytes: int = 10) -> None:
    """Stage and place a version."""
    stage(cache, digest, num_bytes, 0)
    assert cache.take(digest) == Version(num_bytes)


def kept(cache: HostCache[Version]) -> list[str]:
    return [digest for digest in "abcdefgh" if digest in cache]


def test_what_has_been_used_stays_and_is_not_read_again() -> None:
    cache = HostCache[Version](100)
    use(cache, "a")

    cache.stage("a", 10, never, 0)

    assert cache.take("a") == Version(10)


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = HostCache[Version](30)
    for digest in "abcad":
        use(cache, digest)

    assert kept(cache) == ["a", "c", "d"]
    assert cache.num_bytes == 30


def test_what_is_claimed_stays_over_the_budget_until_it_is_placed() -> None:
    cache = HostCache[Version](20)
    for digest in "abc":
        stage(cache, digest, epoch=0)
    assert kept(cache) == ["a", "b", "c"]

    assert cache.take("c") == Version(10)

    assert kept(cache) == ["a", "b"]


def test_each_claim_is_consumed_by_one_placing() -> None:
    cache = HostCache[Version](0)
    for _ in range(2):
        stage(cache, "a", epoch=0)

    assert cache.take("a") == Version(10)
    assert cache.take("a") == Version(10)
    assert cache.take("a") is None


def test_a_version_larger_than_the_budget_costs_nobody_a_place() -> None:
    cache = HostCache[Version](30)
    use(cache, "a")

    use(cache, "large", 31)

    assert kept(cache) == ["a"]
    assert "large" not in cache


def test_a_prefetch_makes_room_among_what_was_used_but_not_among_prefetches() -> None:
    cache = HostCache[Version](30)
    use(cache, "a")
    for digest in "bcd":
        stage(cache, digest)
    assert kept(cache) == ["b", "c", "d"]

    cache.stage("e", 10, never, None)  # not read at all

    assert kept(cache) == ["b", "c", "d"]
    use(cache, "b")
    stage(cache, "e")
    assert kept(cache) == ["c", "d", "e"]


def test_claims_end_with_their_epoch() -> None:
    cache = HostCache[Version](0)
    stage(cache, "a", epoch=1)
    stage(cache, "b", epoch=2)
    assert kept(cache) == ["b"]

    stage(cache, "c", epoch=1)  # claimed, and never taken
    assert kept(cache) == ["b"]
    cache.begin(3)
    assert (kept(cache), cache.num_bytes) == ([], 0)


def test_what_is_dropped_goes_at_once_or_with_its_last_claim() -> None:
    cache = HostCache[Version](100)
    use(cache, "a")
    stage(cache, "b", epoch=0)

    for digest in ("a", "b", "unknown"):
        cache.drop(digest)

    assert kept(cache) == ["b"]
    assert cache.take("b") == Version(10)
    assert (kept(cache), cache.num_bytes) == ([], 0)


class Reader:
    """A reader that blocks until a test releases it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.num_reads = 0
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> Version:
        self.num_reads += 1
        self.has_begun.set()
        assert self.may_end.wait(30)
        if self.error is not None:
            raise self.error
        return Version(10)


def at_once(*calls: Callable[[], None], reader: Reader) -> list[BaseException | None]:
    """Make the calls while the first one's reader reads. Return their results."""
    with ThreadPoolExecutor(len(calls)) as threads:
        first = threads.submit(calls[0])
        assert reader.has_begun.wait(30)
        others = [threads.submit(call) for call in calls[1:]]
        reader.may_end.set()
        return [future.exception(30) for future in (first, *others)]


def test_one_reading_serves_all_who_ask_meanwhile() -> None:
    cache, reader = HostCache[Version](0), Reader()

    outcomes = at_once(*[lambda: cache.stage("a", 10, reader, 0)] * 4, reader=reader)

    assert (outcomes, reader.num_reads) == ([None] * 4, 1)
    assert [cache.take("a") is not None for _ in range(5)] == [True] * 4 + [False]


def test_a_failure_is_everybodys_who_waited_and_is_not_remembered() -> None:
    cache, reader = HostCache[Version](100), Reader(ValueError("damaged"))

    outcomes = at_once(lambda: cache.stage("a", 10, reader, 0), reader=reader)

    assert [str(outcome) for outcome in outcomes] == ["damaged"]
    use(cache, "a")


def test_a_slow_reading_holds_up_nobody_else() -> None:
    cache, reader = HostCache[Version](100), Reader()

    outcomes = at_once(lambda: cache.stage("a", 10, reader, 0), lambda: use(cache, "b"), reader=reader)

    assert outcomes == [None, None]
    with ThreadPoolExecutor(1) as threads:
        blocked = Reader()
        waiting = threads.submit(cache.stage, "c", 10, blocked, 0)
        assert blocked.has_begun.wait(30)
        use(cache, "d")
        assert not waiting.done()
        blocked.may_end.set()


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_holds_for_all_that_is_not_claimed(seed: int) -> None:
    random, claims = Random(seed), list[str]()
    sizes = {digest: random.randint(1, 40) for digest in "abcdefgh"}
    cache = HostCache[Version](random.randint(0, 100))
    for _ in range(300):
        digest = random.choice("abcdefgh")
        match random.choice(["claim", "prefetch", "take", "drop"]):
            case "claim":
                stage(cache, digest, sizes[digest], 0)
                claims.append(digest)
            case "prefetch":
                stage(cache, digest, sizes[digest])
            case "take" if claims:
                claims.remove(digest := random.choice(claims))
                assert cache.take(digest) == Version(sizes[digest])
            case _:
                cache.drop(digest)
        assert set(claims) <= set(kept(cache))
        assert cache.num_bytes == sum(sizes[digest] for digest in kept(cache))
        unclaimed = sum(sizes[digest] for digest in kept(cache) if digest not in claims)
        claimed = sum(sizes[digest] for digest in set(claims) if sizes[digest] <= cache._max_bytes)
        assert unclaimed == 0 or unclaimed + claimed <= cache._max_bytes
