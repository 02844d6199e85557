"""Sequences wait for their adapters, and only for their own."""

from __future__ import annotations

import pytest

from descant.scheduling.gate import AdapterGate
from descant.scheduling.sequence import Sequence
from descant.scheduling.waiting_versions import MAX_PASSES
from descant_client.errors import AdapterTooLarge
from fakes import make_sequence, version


def sequence(number: int, adapter: str | None = None, num_bytes: int = 64) -> Sequence:
    adapter_version = version(adapter, num_bytes) if adapter else None
    return make_sequence(number, [1], adapter=adapter_version)


def finish_loads(gate: AdapterGate) -> list[int]:
    """Finish all loads; return the ids of the sequences that may run then."""
    return [ready.id for load in gate.take_work().loads for ready in gate.on_placed(load)]


def test_the_base_model_needs_no_gate() -> None:
    assert AdapterGate(0, 0, 1).enter(sequence(1))


def test_sequences_of_one_version_wait_for_one_load() -> None:
    gate = AdapterGate(2, 128, 7)

    assert not any(gate.enter(sequence(number, "a")) for number in (1, 2))
    (load,) = gate.take_work().loads
    assert (load.epoch, load.version.digest, gate.num_sequences) == (7, "a", 2)
    assert [ready.id for ready in gate.on_placed(load)] == [1, 2]
    assert gate.enter(sequence(3, "a"))
    assert gate.take_work().loads == ()


def test_a_version_without_a_place_does_not_hold_up_the_others() -> None:
    gate = AdapterGate(1, 64, 1)
    first = sequence(1, "a")
    gate.enter(first)
    finish_loads(gate)

    assert not gate.enter(sequence(2, "b"))
    assert gate.enter(sequence(3, "a"))
    assert gate.place_waiting() == []


def test_who_came_first_gets_the_place_that_becomes_free() -> None:
    gate = AdapterGate(1, 64, 1)
    holder = sequence(1, "a")
    gate.enter(holder)
    finish_loads(gate)
    for number, adapter in ((4, "c"), (3, "b"), (5, "b")):
        gate.enter(sequence(number, adapter))

    gate.leave(holder)
    assert gate.place_waiting() == []

    assert finish_loads(gate) == [3, 5]


def test_a_small_version_may_pass_a_large_one_for_which_there_are_no_bytes() -> None:
    gate = AdapterGate(3, 192, 1)
    gate.enter(sequence(1, "a"))
    finish_loads(gate)
    gate.enter(sequence(2, "large", 192))

    gate.enter(sequence(3, "small"))

    assert finish_loads(gate) == [3]


def test_only_so_many_pass_somebody_who_waits() -> None:
    gate = AdapterGate(1, 64, 1)
    holder = sequence(1, "a")
    gate.enter(holder)
    finish_loads(gate)
    gate.enter(sequence(2, "b"))
    passing = [sequence(number, "a") for number in range(3, 3 + MAX_PASSES)]

    assert all(gate.enter(passer) for passer in passing)
    assert not gate.enter(sequence(1000, "a"))

    for passer in [holder, *passing]:
        gate.leave(passer)
    gate.place_waiting()
    assert finish_loads(gate) == [2]


def test_small_versions_do_not_pass_a_large_one_for_ever() -> None:
    gate = AdapterGate(2, 192, 1)
    small = [sequence(number, f"v{number}") for number in range(100, 100 + 2 * MAX_PASSES)]
    gate.enter(small[0])
    gate.enter(sequence(1, "large", 192))
    for seq in small[1:]:
        gate.enter(seq)

    finish_loads(gate)
    passing = [small[1]]
    while passing[-1].device.spans is not None:
        gate.leave(passing[-1])
        gate.place_waiting()
        finish_loads(gate)
        passing.append(small[len(passing) + 1])

    assert len(passing) == MAX_PASSES + 1
    gate.leave(small[0])
    gate.place_waiting()
    assert gate.residency.is_resident("large")


def test_who_is_next_may_be_passed_again() -> None:
    gate = AdapterGate(1, 64, 1)
    gate.enter(first := sequence(1, "a"))
    gate.enter(second := sequence(2, "b"))
    finish_loads(gate)
    passing = [sequence(number, "a") for number in range(3, 3 + MAX_PASSES)]
    for seq in [*passing, sequence(1000, "c")]:
        gate.enter(seq)

    for seq in [first, *passing]:
        gate.leave(seq)
    gate.place_waiting()
    finish_loads(gate)

    assert second.device.spans is not None
    assert gate.enter(sequence(1001, "b"))


def test_leaving_while_waiting_or_loading_leaves_nothing_behind() -> None:
    gate = AdapterGate(1, 64, 1)
    loading, waiting = sequence(1, "a"), sequence(2, "b")
    gate.enter(loading)
    gate.enter(waiting)

    gate.leave(waiting)
    gate.leave(loading)

    assert gate.num_sequences == 0
    assert finish_loads(gate) == []
    gate.residency.check_integrity()
    assert not gate.enter(sequence(3, "b"))
    assert finish_loads(gate) == [3]


def test_a_failed_load_fails_those_who_waited_for_it() -> None:
    gate = AdapterGate(1, 64, 1)
    gate.enter(first := sequence(1, "a"))
    gate.enter(sequence(2, "b"))
    (load,) = gate.take_work().loads

    assert gate.on_load_failed(load) == [first]

    assert gate.place_waiting() == []
    assert finish_loads(gate) == [2]


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(AdapterTooLarge):
        AdapterGate(1, 64, 1).enter(sequence(1, "a", 65))
