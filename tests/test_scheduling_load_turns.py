"""Which cold adapter is read next, when several principals wait for theirs."""

from __future__ import annotations

import random

from descant.contract.plan import EngineLimits
from descant.scheduling.placement.loads import MAX_READS, AdapterLoad, LoadTurns
from fake_engine import FakeEngine
from fakes import Loop, version

NUM_SLOTS = 64


def test_a_cold_adapter_does_not_wait_for_all_that_another_principal_has_asked_for():
    assert _steps_until_it_runs(num_flood=500) <= _steps_until_it_runs(num_flood=0) + 2


def test_who_joins_a_load_of_a_flood_brings_it_forward():
    assert _steps_until_it_runs(num_flood=500, adapter="f40") <= _steps_until_it_runs(num_flood=0) + 2


def test_a_principal_alone_gets_half_of_the_reads():
    turns = _turns(20)

    assert len(turns.take(lambda digest: {"only"})) == MAX_READS // 2
    assert turns.take(lambda digest: {"only"}) == ()


def test_the_loads_of_one_principal_keep_their_order():
    assert _reads(_turns(20), lambda digest: {"only"}) == [str(i) for i in range(20)]


def test_principals_take_turns_when_there_are_more_than_reads():
    order = _reads(_turns(60), lambda digest: {f"p{int(digest) // 3}"})  # twenty principals, three loads each

    assert sorted(int(digest) // 3 for digest in order[:20]) == list(range(20))


def test_pins_are_read_although_nobody_waits_for_them():
    assert _reads(_turns(9), lambda digest: set()) == [str(i) for i in range(9)]


def test_every_load_is_read_once_whoever_waits_and_however_reads_end():
    rng = random.Random(4)
    for _ in range(50):
        turns, begun, reading = LoadTurns(), [], []
        names = [str(i) for i in range(rng.randint(1, 40))]
        claimants = {name: {f"p{rng.randint(0, 9)}" for _ in range(rng.randint(0, 3))} for name in names}
        waiting = list(names)
        while waiting or reading or len(begun) < len(names):
            if waiting and rng.random() < 0.5:
                turns.add(_load(waiting.pop()))
            taken = [load.version.digest for load in turns.take(claimants.__getitem__)]
            begun += taken
            reading += taken
            assert len(reading) <= MAX_READS
            if reading and rng.random() < 0.7:
                turns.end(reading.pop(rng.randrange(len(reading))))
        assert sorted(begun) == sorted(names)


def _load(name: str) -> AdapterLoad:
    return AdapterLoad(0, version(name), 0, 0)


def _turns(num_loads: int) -> LoadTurns:
    turns = LoadTurns()
    for i in range(num_loads):
        turns.add(_load(version(str(i)).digest))
    return turns


def _reads(turns: LoadTurns, claimants) -> list[str]:
    """The order in which loads begin if the oldest read always ends first."""
    begun: list[str] = []
    reading: list[str] = []
    while True:
        taken = [load.version.digest for load in turns.take(claimants)]
        begun, reading = begun + taken, reading + taken
        if not reading:
            return begun
        turns.end(reading.pop(0))


def _steps_until_it_runs(num_flood: int, adapter: str = "trickle") -> int:
    """Steps from arrival to the first step of a cold request; every read takes one step."""
    engine = FakeEngine(EngineLimits(4000, 4, 400, 1000, NUM_SLOTS))
    loop = Loop(engine, max_num_seqs=64, adapter_bytes=64 * NUM_SLOTS)

    def step() -> None:
        due = len(loop.loads)
        loop.step()
        for _ in range(due):
            loop.finish_load()

    for i in range(num_flood):
        loop.submit([i] * 5, max_tokens=60, adapter=version(f"f{i}"), principal="flood")
    for _ in range(3):
        step()
    (trickle,) = loop.submit([901] * 5, max_tokens=4, adapter=version(adapter), principal="trickle")
    num_steps = 0
    while trickle.first_scheduled_s is None and num_steps < 400:
        step()
        num_steps += 1
    return num_steps
