"""Whatever happens on the way, every sequence gets the tokens it would have got alone.

The fake engine's tokens depend on every token before them, the adapter, the seed and the choice, and it checks that
each position of its cache holds what the row needs. So one misplaced block changes everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from descant.contract.plan import EngineLimits
from descant.scheduling.sequence import Sequence, TokenLogprobs, unpack_logprobs
from fake_engine import FakeEngine
from fake_model import extend_history, logprob_rows
from fakes import FakeSink, Loop, version

ADAPTERS = [None, None, version("a", 64), version("b", 64), version("c", 128), version("d", 192)]
MAX_STEPS = 5000


def logprobs(history: int, token_id: int, num_top: int) -> TokenLogprobs:
    return unpack_logprobs(logprob_rows([history], num_top), [token_id])[0]


def undisturbed(
    seq: Sequence, max_tokens: int, num_words: int = 997
) -> tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]:
    """Return output, its log-probabilities and the prompt's, as if the sequence were alone in the world."""
    adapter = seq.adapter.digest if seq.adapter and seq.adapter.num_modules else ""
    output, scores = list[int](), list[TokenLogprobs]()
    histories = list(accumulate(seq.prompt_ids, lambda h, token: extend_history(h, token, adapter), initial=0))[1:]
    history = histories[-1]
    limit = max_tokens if seq.max_tokens is None else min(max_tokens, len(seq.prompt_ids) + seq.max_tokens)
    while len(seq.prompt_ids) + len(output) < limit and not seq.stop_token_ids & set(output[-1:]):
        output.append(extend_history(history, seq.seed, str(seq.choice)) % 997 % num_words)
        scores.append(logprobs(history, output[-1], seq.num_logprobs))
        history = extend_history(history, output[-1], adapter)
    prompt = [logprobs(h, token, seq.num_prompt_logprobs) for h, token in zip(histories, seq.prompt_ids[1:])]  # noqa: B905
    return output, scores if seq.num_logprobs >= 0 else [], prompt if seq.num_prompt_logprobs >= 0 else []


@dataclass
class World:
    """A server with little of everything, and a `random` that decides what happens to it."""

    random: Random
    cancelled: set[int] = field(default_factory=set)
    sequences: list[Sequence] = field(default_factory=list)
    sinks: dict[int, FakeSink] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pick = self.random.randint
        limits = EngineLimits(
            num_blocks=pick(6, 24),
            block_size=pick(1, 4),
            max_context=pick(12, 40),
            vocab_size=1000,
            num_adapter_slots=pick(1, 3),
        )
        budgets = {"max_num_seqs": pick(1, 8), "max_num_batched_tokens": pick(1, 24)}
        self.loop = Loop(self.engine(limits), **budgets, adapter_bytes=64 * pick(3, 6))
        self.max_tokens = min(limits.max_context, limits.num_blocks * limits.block_size)
        self.num_requests = pick(1, 12)

    def engine(self, limits: EngineLimits) -> FakeEngine:
        return FakeEngine(limits)

    def adapter(self) -> dict[str, object]:
        """What a request says of its adapter."""
        return {"adapter": self.random.choice(ADAPTERS)}

    def submit(self) -> None:
        pick, number = self.random.randint, len(self.sinks)
        sinks = [FakeSink(budget=self.random.choice([2, 5, 10**9])) for _ in range(self.random.choice([1, 1, 3]))]
        prompt_ids = [1, 2, 3, 4, 5, 6, 7, 8, 9][: pick(1, self.max_tokens - 1)] + [
            pick(0, 2) for _ in range(pick(0, 2))
        ]
        sequences = self.loop.submit(
            prompt_ids[: self.max_tokens - 1],
            request_id=str(number),
            sinks=sinks,
            n=len(sinks),
            max_tokens=self.random.choice([None, pick(1, 12)]),
            seed=pick(0, 1),
            stop=frozenset(range(pick(0, 100))),
            scope=self.random.choice(["", "other"]),
            principal=(principal := self.random.choice("abc")),
            weight={"a": 1.0, "b": 3.0, "c": 0.5}[principal],
            num_logprobs=pick(-1, 2),
            num_prompt_logprobs=self.random.choice([-1, -1, 1]),
            **self.adapter(),
        )
        self.sequences += sequences
        self.sinks |= {seq.id: sink for seq, sink in zip(sequences, sinks, strict=True)}

    def cancel(self) -> None:
        victim = self.random.choice(self.sequences)
        self.cancelled |= {seq.id for seq in self.loop.table.of_request(victim.request_id)}
        self.loop.policy.cancel(victim.request_id)

    def read(self) -> None:
        """A client catches up."""
        victim = self.random.choice([seq for seq in self.sequences if seq.status == "parked"] or self.sequences)
        self.sinks[victim.id].unread = 0
        self.loop.policy.unpark(victim.id)

    def crash(self) -> None:
        """The executor dies for no fault of anybody, and never so that the fault seems to be somebody's."""
        policy = self.loop.policy
        in_flight = policy._in_flight.sequences if policy._in_flight else ()
        if not policy._blame.is_watching or sum(not seq.is_finished for seq in in_flight) >= 2:
            self.loop.crash()

    def disturb(self) -> None:
        """Let something happen, perhaps."""
        if self.num_requests and (self.random.random() < 0.5 or not self.sequences):
            self.num_requests -= 1
            self.submit()
        chance = self.random.randint(0, 99)
        if chance < 3:
            self.cancel()
        elif chance < 20:
            self.read()
        elif chance < 26:
            self.crash()
        elif chance < 60 and self.loop.loads:
            self.loop.finish_load(self.random.randrange(len(self.loop.loads)))

    def run(self) -> None:
        """Go on until every sequence is finished."""
        for _ in range(MAX_STEPS):
            self.disturb()
            if self.random.random() < 0.01:
                self.loop.restart_policy()
            self.loop.step(self.disturb)
            if not self.num_requests and not self.loop.table:
                return
        raise AssertionError(f"{len(self.loop.table)} sequences starve")


@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_every_sequence_gets_the_tokens_it_would_have_got_alone(random: Random) -> None:
    world = World(random)
    world.run()

    for seq in world.sequences:
        output, scores, prompt_scores = undisturbed(seq, world.max_tokens)
        count = len(seq.output_ids)
        assert seq.output_ids == world.sinks[seq.id].token_ids
        assert world.sinks[seq.id].ended == [seq]
        assert (seq.output_ids, seq.output_logprobs) == (output[:count], scores[:count])
        if seq.id not in world.cancelled:
            assert count == len(output)
            assert seq.prompt_logprobs == prompt_scores
            assert seq.finish_reason == ("stop" if seq.is_ended_by_token else "length")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_everything_is_given_back_in_the_end(random: Random) -> None:
    world = World(random)
    world.run()
    while world.loop.loads:
        world.loop.finish_load()

    assert world.loop.policy.plan() is None
    life = world.loop.policy._life
    assert life is not None
    life.blocks.check_integrity()
    life.gate.residency.check_integrity()
    assert life.blocks.num_available == life.blocks.num_blocks
    assert (world.loop.policy.num_running, world.loop.policy.num_waiting) == (0, 0)
    assert all(resident.num_users == 0 for resident in life.gate.residency._residents.values())
