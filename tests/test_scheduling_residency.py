"""Adapter versions have a slot and bytes of their own for as long as anybody uses them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descant.scheduling.residency import AdapterResidency
from descant_client.errors import AdapterTooLarge, UnsupportedRequest
from fakes import version


def use(residency: AdapterResidency, digest: str, num_bytes: int = 64) -> bool:
    """Acquire and load a version; return whether there was room."""
    placement = residency.acquire(version(digest, num_bytes))
    if placement is not None and placement.is_new:
        residency.loaded(digest)
    return placement is not None


def test_a_version_keeps_its_place_while_it_is_used_or_unneeded() -> None:
    residency = AdapterResidency(2, 256)
    first = residency.acquire(version("a"))
    assert first is not None
    assert first.is_new
    residency.loaded("a")
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
    residency.loaded("a")
    assert use(residency, "b")


def test_nothing_is_evicted_in_vain() -> None:
    residency = AdapterResidency(3, 192)
    for digest in ("a", "b", "c"):
        use(residency, digest)
    residency.release("a")
    residency.release("c")

    assert not use(residency, "big", 128)

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
            residency.loaded(digest)
        if operation == "fail" and digest in loading:
            loading.remove(digest)
            used = [other for other in used if other != digest]
            residency.forget(digest)
        residency.check_integrity()
        assert all(residency.is_resident(digest) for digest in [*used, *loading])
