"""Versions come, go, move, are pinned and forgotten, executors die: every sequence gets its own adapter's tokens.

The fake engine knows whose each byte of its arena is, so that a row whose adapter is not whole is an AssertionError.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from descant.contract.plan import EngineLimits
from descant.contract.version import AdapterVersion
from descant.scheduling.placement.loads import AdapterLoad
from descant.scheduling.placement.residency import AdapterResidency
from descant.scheduling.sequence import Sequence
from descant_client.errors import AdapterInvalid, DescantError
from fake_engine import FakeEngine
from fakes import Loop, version
from test_scheduling_promise import undisturbed

UNIT, MAX_STEPS, NUM_REQUESTS = 64, 3000, 60


@dataclass
class World:
    """A server whose arena is always too small, and a `random` that decides what happens to it.

    Versions take up to half of the arena, and so do the pins: nothing is ever refused.
    """

    random: Random
    num_requests: int = NUM_REQUESTS
    num_versions: int = 0
    num_moves: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        pick = self.random.randint
        self.num_slots, self.num_units = pick(2, 8), pick(4, 16)
        limits = EngineLimits(64, 4, 40, vocab_size=1000, num_adapter_slots=self.num_slots)
        self.loop = Loop(
            FakeEngine(limits), max_num_seqs=pick(2, 12), adapter_bytes=UNIT * self.num_units + pick(0, 63)
        )
        self.loop.load_error = self.load_error
        self.names = [self.new_version() for _ in range(pick(3, 12))]
        self.move, self.loop.engine.arena.move = self.loop.engine.arena.move, self.count_move

    def count_move(self, move: object) -> None:
        self.num_moves += 1
        self.move(move)  # type: ignore[arg-type]

    def new_version(self) -> AdapterVersion:
        self.num_versions += 1
        return version(
            f"v{self.num_versions}", UNIT * self.random.randint(1, self.num_units // 2) - self.random.randint(0, 1)
        )

    def load_error(self, load: AdapterLoad) -> DescantError | None:
        if load.version.digest in self.damaged:
            return AdapterInvalid(load.version.digest, "damaged")
        return None

    def submit(self) -> None:
        self.num_requests -= 1
        self.sequences += self.loop.submit(
            [self.random.randint(0, 2) for _ in range(self.random.randint(1, 6))],
            n=self.random.choice([1, 1, 2]),
            max_tokens=self.random.randint(1, 12),
            adapter=self.random.choice([None, *self.names]),
        )

    def swap(self) -> None:
        """A name gets another version; the old one is forgotten."""
        at = self.random.randrange(len(self.names))
        self.loop.policy.adapters.forget_version(self.names[at].digest)
        self.names[at] = self.new_version()

    def pin(self) -> None:
        pins, num_units = [], 0
        for name in self.random.sample(self.names, k=self.random.randint(0, len(self.names))):
            num_units += -(-name.num_bytes // UNIT)
            if num_units <= self.num_units // 2 and len(pins) + 1 < self.num_slots:
                pins.append(name)
        self.loop.policy.adapters.set_pins(pins)

    def damage(self) -> None:
        self.damaged = set(self.random.sample([name.digest for name in self.names], k=1))

    def disturb(self) -> None:
        if self.num_requests and self.random.random() < 0.5:
            self.submit()
        chance = self.random.randint(0, 99)
        if chance < 5:
            self.swap()
        elif chance < 10:
            self.pin()
        elif chance < 12:
            self.damage()
        elif chance < 14 and self.loop.policy.num_running != 1:  # alone, it would be blamed
            self.loop.crash()
        elif chance < 15:
            self.loop.restart_policy()
        elif chance < 70 and self.loop.loads:
            self.loop.finish_load(self.random.randrange(len(self.loop.loads)))

    def run(self) -> None:
        for _ in range(MAX_STEPS):
            self.disturb()
            self.loop.step(self.meanwhile)
            if not self.num_requests and not self.loop.table:
                return
        raise AssertionError(f"{len(self.loop.table)} sequences starve")

    def meanwhile(self) -> None:
        """Something happens while a step is in flight, and some of it at once."""
        if self.loop.loads and self.random.random() < 0.5:
            self.loop.finish_load(self.random.randrange(len(self.loop.loads)))
        if self.num_requests:
            self.submit()


def residency_of(loop: Loop) -> AdapterResidency:
    life = loop.policy.states.life
    assert life is not None
    return life.gate.residency


@pytest.mark.parametrize("seed", range(60))
def test_every_sequence_gets_the_tokens_of_its_own_version(seed: int) -> None:
    world = World(Random(seed))
    world.run()

    for seq in world.sequences:
        if seq.finish_reason == "error":
            assert isinstance(seq.error, AdapterInvalid)
        elif seq.finish_reason != "cancelled":  # with the other choice of its request
            assert seq.output_ids == undisturbed(seq, max_tokens=40)[0]


@pytest.mark.parametrize("seed", range(20))
def test_pins_get_their_place_whatever_goes_on_and_nothing_else_stays(seed: int) -> None:
    world = World(Random(seed))
    world.run()
    world.damaged.clear()
    world.pin()
    pins = world.loop.policy.adapters.pins
    world.loop.run()
    while world.loop.loads:
        world.loop.finish_load()
        world.loop.run()

    residency = residency_of(world.loop)
    residency.check_integrity()
    assert all(residency.is_loaded(pin.digest) and residency.is_pinned(pin.digest) for pin in pins)
    world.loop.policy.adapters.set_pins([])
    for digest in list(residency._residents):
        world.loop.policy.adapters.forget_version(digest)
    assert not residency._residents


def test_the_random_worlds_move_extents() -> None:
    worlds = [World(Random(seed)) for seed in range(30)]
    for world in worlds:
        world.run()
    assert sum(world.num_moves for world in worlds) > 10
