"""With several steps in flight the same holds as in `test_scheduling_promise`, whatever happens between and in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import test_scheduling_promise as promise
import test_scheduling_tiers as tiers
from descant.contract.plan import unpack_ints
from descant.scheduling.sequence import Sequence
from descant_client.errors import AdapterInvalid, DeadlineExceeded, InternalError
from fake_engine import FakeEngine
from fake_model import FakeRow
from fakes import Loop

FAILING = 8  # a row whose prompt ends with it fails after two tokens


@dataclass
class EvenPair:
    """Stops at two even tokens in a row, which are no part of the output."""

    seen: list[int] = field(default_factory=list)

    def push(self, token_ids: list[int]) -> int | None:
        self.seen += token_ids
        return len(self.seen) - 2 if len(self.seen) > 1 and self.seen[-1] % 2 == self.seen[-2] % 2 == 0 else None


class PipelinedLoop(Loop):
    """Gives some sequences a stop string, some a deadline, and lets some rows fail."""

    random: Random

    def submit(self, *args: object, **fields: object) -> list[Sequence]:
        stopper = EvenPair() if self.random.random() < 0.3 and fields["n"] == 1 else None
        deadline_s = self.clock + self.random.randint(1, 60) if self.random.random() < 0.2 else None
        return super().submit(*args, **fields, stopper=stopper, deadline_s=deadline_s)  # type: ignore[arg-type]


def fails(row: FakeRow) -> str | None:
    """A cause of failure that is the same whatever shares the batch."""
    is_failing = row.admit.choice == 0 and unpack_ints(row.admit.token_ids)[row.admit.num_prompt_tokens - 1] == FAILING
    return "a bad row" if is_failing and row.output_index >= 2 else None


class World(promise.World):
    """The world of the promise, with several steps in flight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = replace(self.loop.engine.limits, max_steps_in_flight=self.random.choice([2, 2, 3]))
        budgets = {name: value for name, value in self.loop.budgets.items() if value is not None}
        self.loop = PipelinedLoop(FakeEngine(limits, row_error=fails), **budgets, adapter_bytes=self.loop.adapter_bytes)
        self.loop.random = self.random

    def run(self) -> None:
        for _ in range(2 * promise.MAX_STEPS):
            self.loop.clock += 0.5
            self.disturb()
            if self.random.random() < 0.01:
                self.loop.restart_policy()
            if (self.random.random() < 0.4 or not self.loop.launch()) and self.loop.in_flight:
                self.loop.collect(self.disturb)
            if not self.num_requests and not self.loop.table:
                break
        else:
            raise AssertionError(f"{len(self.loop.table)} sequences starve")
        while self.loop.in_flight:
            self.loop.collect()


def expected(world: World, seq: Sequence) -> tuple[list[int], str]:
    """Return the output and the ending of a sequence that is alone in the world."""
    output = promise.undisturbed(seq, world.max_tokens)[0]
    reason = "stop" if seq.stop_token_ids & set(output[-1:]) else "length"
    if seq.prompt_ids[-1] == FAILING and seq.choice == 0 and len(output) > 2:
        output, reason = output[:2], "error"
    stopper = EvenPair()
    for index, token_id in enumerate(output if seq.stopper else []):
        if (kept := stopper.push([token_id])) is not None:
            return output[: index + 1][:kept], "stop"
    return output, reason


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_every_sequence_gets_the_tokens_it_would_have_got_alone(random: Random) -> None:
    world = World(random)
    world.run()

    for seq in world.sequences:
        output, reason = expected(world, seq)
        assert world.sinks[seq.id].ended == [seq]
        if isinstance(seq.error, DeadlineExceeded) or seq.finish_reason == "cancelled":
            assert seq.output_ids == promise.undisturbed(seq, world.max_tokens)[0][: seq.num_output_tokens]
        else:
            assert (seq.output_ids, seq.finish_reason) == (output, reason)
            assert seq.error is None or isinstance(seq.error, InternalError)
        if seq.stopper is None:
            assert seq.output_ids == world.sinks[seq.id].token_ids


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_everything_is_given_back_in_the_end(random: Random) -> None:
    world = World(random)
    world.run()
    while world.loop.loads:
        world.loop.finish_load()

    policy = world.loop.policy
    assert policy.plan() is None
    assert (policy.num_running, policy.num_waiting, policy._lineup.num_seated) == (0, 0, 0)
    assert policy._life is not None
    assert policy._life.blocks.num_available == world.loop.engine.limits.num_blocks
    assert all(resident.num_users == 0 for resident in policy._life.gate.residency._residents.values())
    assert set(world.loop.engine.rows) <= set(policy._life.take_drops())


@pytest.mark.parametrize("seed", range(40))
def test_every_sequence_gets_the_tokens_of_its_own_version(seed: int) -> None:
    world = tiers.World(Random(seed))
    world.loop.engine.limits = replace(world.loop.engine.limits, max_steps_in_flight=2)
    world.loop.restart_policy()
    world.run()

    for seq in world.sequences:
        if seq.finish_reason == "error":
            assert isinstance(seq.error, AdapterInvalid)
        elif seq.finish_reason != "cancelled":  # with the other choice of its request
            assert seq.output_ids == promise.undisturbed(seq, max_tokens=40)[0]
