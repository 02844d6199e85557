"""Pins that come while answers are being given: they wait for who was promised a place before."""

from descant.contract.plan import EngineLimits
from descant.scheduling.gate import AdapterGate
from descant.scheduling.sequence import Sequence
from descant.scheduling.waiting_versions import MAX_PASSES
from fake_engine import FakeEngine
from fakes import FakeSink, Loop, make_sequence, version


def run(loop: Loop, num_steps: int) -> None:
    for _ in range(num_steps):
        loop.step()
        while loop.loads:
            loop.finish_load()


def parked(loop: Loop, digest: str, principal: str = "p") -> tuple[Sequence, FakeSink]:
    """A stream that has begun with an adapter as large as the arena, and waits for its reader."""
    sink = FakeSink(budget=2)
    adapter = version(digest, 256)
    (sequence,) = loop.submit([1] * 5, max_tokens=20, adapter=adapter, sinks=[sink], principal=principal)
    run(loop, 8)
    assert sequence.status == "parked"
    return sequence, sink


def test_a_pin_does_not_end_a_stream_that_has_begun() -> None:
    loop = Loop(FakeEngine(EngineLimits(4000, 4, 400, 1000, 4)), adapter_bytes=256)
    large, sink = parked(loop, "large")
    loop.policy.adapters.set_pins([version("pin", 64)])
    run(loop, 3)

    sink.budget = 100
    loop.policy.unpark(large.id)
    run(loop, 40)

    assert large.finish_reason == "length", large.error


def test_a_stream_that_waits_for_its_adapter_again_comes_before_a_pin_and_holds_up_nobody_for_good() -> None:
    loop = Loop(FakeEngine(EngineLimits(4000, 4, 400, 1000, 4)), adapter_bytes=256)
    (first, first_sink), (second, second_sink) = parked(loop, "first", "q"), parked(loop, "second")
    loop.submit([2] * 5, max_tokens=10, adapter=version("a", 128), principal="q")
    loop.submit([3] * 5, max_tokens=20, adapter=version("b", 128), principal="q")
    run(loop, 3)
    loop.policy.adapters.set_pins([version("pin", 64)])
    run(loop, 1)

    first_sink.budget = second_sink.budget = 10**9
    loop.policy.unpark(first.id)
    loop.policy.unpark(second.id)
    run(loop, 100)
    others = [loop.submit([i] * 5, max_tokens=3, adapter=version("a", 128))[0] for i in range(100)]
    run(loop, 600)

    assert first.finish_reason == second.finish_reason == "length"
    assert all(one.is_finished for one in others)


def test_passes_are_counted_for_who_is_first_alone() -> None:
    gate = AdapterGate(2, 128, 1)

    def sequence(number: int, digest: str, num_bytes: int = 64) -> Sequence:
        adapter = version(digest, num_bytes)
        return make_sequence(number, [1], request_id=str(number), adapter=adapter)

    gate.enter(sequence(1, "hot"))
    gate.place_waiting()
    for load in gate.take_work().loads:
        gate.on_placed(load)
    first = sequence(2, "large", 128)
    assert not gate.enter(first)
    for number in range(3, 3 + MAX_PASSES):
        passing = sequence(number, "hot")
        assert gate.enter(passing)
        gate.leave(passing)

    gate.leave(first)
    gate.place_waiting()

    assert not gate.enter(sequence(1000, "large", 128))
    assert gate.enter(sequence(1001, "hot")), "nobody has passed the second yet"
