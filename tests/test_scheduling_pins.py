"""Pinned versions are on the device whatever else needs room, and cost nobody a place he was promised."""

from __future__ import annotations

import pytest

from descant.contract.plan import EngineLimits
from descant.scheduling.gate import AdapterGate
from descant.scheduling.sequence import Sequence
from descant.scheduling.waiting_versions import MAX_PASSES
from descant_client.errors import AdapterTooLarge
from fake_engine import FakeEngine
from fakes import Loop, make_sequence, version


def sequence(number: int, adapter: str, num_bytes: int = 64) -> Sequence:
    return make_sequence(number, [1], adapter=version(adapter, num_bytes))


def go_on(gate: AdapterGate) -> list[str]:
    """Open the gate and finish all loads; return what was loaded."""
    gate.place_waiting()
    loads = gate.take_work().loads
    for load in loads:
        gate.on_placed(load)
    gate.residency.check_integrity()
    return [load.version.digest for load in loads]


def use(gate: AdapterGate, number: int, adapter: str, num_bytes: int = 64) -> Sequence:
    gate.enter(seq := sequence(number, adapter, num_bytes))
    go_on(gate)
    return seq


def test_a_pin_is_loaded_at_once_and_never_evicted() -> None:
    gate = AdapterGate(2, 128, 1)
    gate.set_pins([version("p")])

    assert go_on(gate) == ["p"]
    for number, adapter in enumerate("abc", 1):
        gate.leave(use(gate, number, adapter))
    assert gate.residency.is_loaded("p")


def test_a_pin_takes_the_place_of_what_nobody_uses() -> None:
    gate = AdapterGate(1, 64, 1)
    gate.leave(use(gate, 1, "a"))

    gate.set_pins([version("p")])

    assert go_on(gate) == ["p"]


def test_what_is_no_longer_pinned_goes_like_any_other() -> None:
    gate = AdapterGate(1, 64, 1)
    gate.set_pins([version("p")])
    go_on(gate)

    gate.set_pins([])

    assert use(gate, 1, "a").device.spans is not None
    assert not gate.residency.is_resident("p")


def test_what_is_in_use_is_pinned_where_it_is() -> None:
    gate = AdapterGate(2, 128, 1)
    user = use(gate, 1, "p")

    gate.set_pins([version("p")])
    assert go_on(gate) == []
    gate.leave(user)

    assert gate.residency.is_pinned("p")
    with pytest.raises(AdapterTooLarge):
        gate.enter(sequence(2, "large", 128))


def test_a_pin_without_room_gets_it_as_soon_as_there_is_some() -> None:
    gate = AdapterGate(1, 64, 1)
    holder = use(gate, 1, "a")
    gate.set_pins([version("p")])
    assert go_on(gate) == []

    gate.leave(holder)

    assert go_on(gate) == ["p"]


def test_a_pin_waits_for_those_who_were_promised_a_place() -> None:
    gate = AdapterGate(2, 128, 1)
    holder = use(gate, 1, "a")
    gate.enter(large := sequence(2, "large", 128))
    gate.set_pins([version("p")])
    assert go_on(gate) == []

    gate.leave(holder)
    assert go_on(gate) == ["large"]
    with pytest.raises(AdapterTooLarge) as caught:
        gate.check_fits(version("another", 128))
    assert caught.value.max_bytes == 64
    gate.leave(large)
    assert go_on(gate) == ["p"]


def test_only_so_many_pass_a_pin() -> None:
    gate = AdapterGate(2, 192, 1)
    gate.enter(held := sequence(1, "a", 128))
    go_on(gate)
    gate.set_pins([version("p", 128)])
    go_on(gate)

    passing = [use(gate, number, "small") for number in range(2, 2 + MAX_PASSES)]
    assert all(seq.device.spans is not None for seq in passing)
    assert not gate.enter(late := sequence(1000, "small"))
    gate.leave(held)

    assert go_on(gate) == ["p"]
    assert late.device.spans is not None


def test_versions_that_do_not_fit_beside_the_pins_are_refused_with_what_is_left() -> None:
    gate = AdapterGate(3, 320, 1)
    gate.set_pins([version("p", 128), version("q", 64)])

    with pytest.raises(AdapterTooLarge) as caught:
        gate.check_fits(version("large", 192))
    assert (caught.value.num_bytes, caught.value.max_bytes) == (192, 128)
    gate.check_fits(version("fits", 128))
    gate.check_fits(version("p", 128))


def test_nothing_fits_when_pins_have_all_slots() -> None:
    gate = AdapterGate(1, 320, 1)
    gate.set_pins([version("p")])

    with pytest.raises(AdapterTooLarge) as caught:
        gate.check_fits(version("a"))
    assert caught.value.max_bytes == 0


def test_pins_that_can_never_fit_are_passed_over() -> None:
    gate = AdapterGate(2, 192, 1)
    gate.set_pins([version("p"), version("large", 192), version("q", 128), version("r")])

    assert go_on(gate) == ["p", "q"]
    assert [pin.digest for pin in gate.unplaceable_pins] == ["large", "r"]


def test_the_policy_shows_the_pins_that_its_executor_has_no_place_for() -> None:
    loop = Loop(adapter_bytes=192)
    loop.policy.adapters.set_pins([version("p"), version("large", 192)])

    assert [pin.digest for pin in loop.policy.adapters.unplaceable_pins] == ["large"]
    loop.policy.on_executor_lost("off")
    assert loop.policy.adapters.unplaceable_pins == ()


def test_a_pin_that_cannot_be_loaded_is_not_tried_for_ever() -> None:
    gate = AdapterGate(2, 128, 1)
    gate.set_pins([version("p")])
    gate.place_waiting()
    (load,) = gate.take_work().loads

    assert gate.on_load_failed(load) == []
    assert go_on(gate) == []
    gate.set_pins([version("p")])
    assert go_on(gate) == ["p"]


def test_a_pin_that_could_not_be_loaded_is_pinned_once_a_request_gets_it_loaded() -> None:
    gate = AdapterGate(2, 128, 1)
    gate.set_pins([version("p")])
    gate.place_waiting()
    gate.on_load_failed(gate.take_work().loads[0])

    use(gate, 1, "p")
    gate.place_waiting()

    assert gate.residency.is_pinned("p")


def test_a_pin_and_its_users_wait_for_one_load() -> None:
    gate = AdapterGate(1, 64, 1)
    holder = use(gate, 1, "a")
    gate.enter(early := sequence(2, "p"))
    gate.set_pins([version("p")])
    gate.enter(late := sequence(3, "p"))
    gate.leave(holder)

    assert go_on(gate) == ["p"]
    assert early.device.spans == late.device.spans != None  # noqa: E711
    gate.leave(early)
    gate.leave(late)
    gate.place_waiting()
    assert gate.residency.is_pinned("p")


def test_a_forgotten_version_goes_with_its_last_user() -> None:
    gate = AdapterGate(2, 128, 1)
    first, second = use(gate, 1, "a"), use(gate, 2, "a")
    gate.leave(use(gate, 3, "b"))

    for digest in ("a", "b", "unknown"):
        gate.forget_version(digest)

    assert not gate.residency.is_resident("b")
    gate.leave(first)
    assert gate.residency.is_loaded("a")
    gate.leave(second)
    assert not gate.residency.is_resident("a")
    gate.residency.check_integrity()


def test_a_version_forgotten_while_it_waits_or_is_loaded_goes_after_its_use() -> None:
    gate = AdapterGate(1, 64, 1)
    gate.enter(loading := sequence(1, "a"))
    gate.enter(waiting := sequence(2, "b"))
    for digest in ("a", "b"):
        gate.forget_version(digest)

    for seq in (loading, waiting):
        go_on(gate)
        assert seq.device.spans is not None
        gate.leave(seq)
    assert not gate.residency.is_resident("a")
    assert not gate.residency.is_resident("b")


def test_a_version_that_has_to_wait_is_prefetched_once() -> None:
    gate = AdapterGate(1, 64, 1)
    gate.enter(holder := sequence(1, "a"))
    gate.enter(sequence(2, "b"))
    gate.enter(sequence(3, "b"))

    assert [one.digest for one in gate.take_work().prefetches] == ["b"]
    gate.enter(sequence(4, "b"))
    assert gate.take_work().prefetches == ()
    gate.leave(holder)


def test_what_gets_its_place_at_once_is_loaded_and_not_prefetched() -> None:
    gate = AdapterGate(1, 64, 1)
    gate.set_pins([version("p")])
    gate.place_waiting()

    work = gate.take_work()

    assert [load.version.digest for load in work.loads] == ["p"]
    assert work.prefetches == ()


def test_a_closed_gate_does_not_look_again_until_something_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = AdapterGate(1, 64, 1)
    holder = use(gate, 1, "a")
    for number in range(2, 50):
        gate.enter(sequence(number, f"v{number}"))
    gate.place_waiting()
    asked: list[str] = []
    place = gate.residency.place
    monkeypatch.setattr(gate.residency, "place", lambda one: asked.append(one.digest) or place(one))

    assert gate.place_waiting() == []
    assert asked == []
    gate.leave(holder)
    gate.place_waiting()
    assert asked[0] == "v2"


def test_of_those_who_give_way_for_blocks_one_may_end_with_its_sibling() -> None:
    loop = Loop(FakeEngine(EngineLimits(21, 4, 64, 1000, 2)), max_num_batched_tokens=6)

    def step() -> None:
        while loop.loads:
            loop.finish_load()
        loop.step()

    (old,) = loop.submit(list(range(36)), max_tokens=12, principal="ann")
    large = version("c", 512)
    loop.submit([1], max_tokens=1, adapter=large, principal="ann")
    for _ in range(6):
        step()
    prompt = [900 + i for i in range(16)]
    both = loop.submit(prompt, n=2, max_tokens=40, adapter=large, principal="ann", num_prompt_logprobs=1)
    while not all(choice.status == "running" for choice in both):
        step()
    loop.policy.adapters.set_pins([version("p", 1024)])  # for `large` there is no place any more
    (new,) = loop.submit([700 + i for i in range(32)], max_tokens=4, principal="bob")

    loop.run()

    assert {str(choice.finish_reason) for choice in both} == {"error", "cancelled"}
    assert (old.finish_reason, new.finish_reason) == ("length", "length")
