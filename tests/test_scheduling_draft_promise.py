"""Whatever is guessed, every sequence gets the tokens it would have got alone, and no plan breaks a limit."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from descant.contract.engine import check_plan
from descant.contract.plan import EngineLimits, StepPlan
from descant.scheduling.speculation.drafting import Drafter
from descant_client.errors import AdapterInvalid
from descant_client.speculation import Speculation
from fake_engine import FakeEngine
from fake_model import FakeRow, hash_history
from fakes import version
from test_scheduling_promise import World, undisturbed

NUM_WORDS = 3  # so few that texts repeat themselves
WITH_HEADS = [msgspec.structs.replace(version(name, size), num_heads=2) for name, size in (("b", 64), ("c", 128))]
HEADS_ALONE = [
    msgspec.structs.replace(version(name, size), num_heads=2, num_modules=0) for name, size in (("o", 64), ("p", 256))
]


def words(row: FakeRow, history: int) -> int:
    return hash_history(row, history) % NUM_WORDS


class CheckedEngine(FakeEngine):
    """Holds every plan to what the real engine does."""

    max_num_batched_tokens = 0

    def launch(self, plan: StepPlan) -> None:
        rows = {
            key: SimpleNamespace(num_tokens=len(row.tokens), num_computed=row.num_computed, num_blocks=len(row.blocks))
            for key, row in self.rows.items()
            if plan.epoch == self.epoch
        }
        check_plan(plan, self.limits, rows, self.max_num_batched_tokens)
        super().launch(plan)


class GuessingWorld(World):
    """A world in which most sequences guess, with draft heads and without, and steps take what they like."""

    def __post_init__(self) -> None:
        super().__post_init__()
        engine, dice = self.loop.engine, self.random
        assert isinstance(engine, CheckedEngine)
        engine.max_num_batched_tokens = self.loop.budgets["max_num_batched_tokens"]
        engine.seconds = lambda plan: dice.choice([0.0, 1.0, 1.0, 1.2, 5.0])
        self.loop.load_error = lambda load: (
            AdapterInvalid("x", "damaged") if load.version in HEADS_ALONE and dice.random() < 0.4 else None
        )

    def engine(self, limits: EngineLimits) -> FakeEngine:
        def heads(row: FakeRow, history: int) -> list[list[int]]:
            right = words(row, history)
            return [[right, 3, 4] if history % 5 < 3 else [5, right, 1], [history % NUM_WORDS, 8, 9]]

        limits = msgspec.structs.replace(limits, max_draft_nodes=self.random.randint(1, 20))
        return CheckedEngine(limits, words, heads=heads)

    def adapter(self) -> dict[str, object]:
        if self.random.random() < 0.3:
            return {"adapter": self.random.choice(HEADS_ALONE), "is_adapter_optional": True}
        return {"adapter": self.random.choice([None, version("a", 64), *WITH_HEADS])}

    def submit(self) -> None:
        num_before, pick = len(self.sequences), self.random.choice
        super().submit()
        for sequence in self.sequences[num_before:]:
            if self.random.random() < 0.8:
                tree = pick([None, None, [[0], [1], [1, 0], [0, 2]]])
                always, ngram = self.random.random() < 0.6, self.random.random() < 0.7
                depth, width = self.random.randint(1, 9), self.random.randint(1, 8)
                sequence.drafter = Drafter(
                    Speculation(ngram=ngram, max_depth=depth, max_width=width, tree=tree, always=always)
                )
                sequence.output.guessed = []


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_every_sequence_gets_the_tokens_it_would_have_got_without_guesses(seed: int) -> None:
    world = GuessingWorld(Random(seed))

    world.run()

    for sequence in world.sequences:
        if sequence.id in world.cancelled:
            continue
        assert sequence.error is None
        output, scores, prompt = undisturbed(sequence, world.max_tokens, NUM_WORDS)
        assert (sequence.output_ids, sequence.output.logprobs) == (output, scores)
        assert sequence.output.prompt_logprobs == prompt
        assert world.sinks[sequence.id].token_ids == output
        if sequence.drafter is not None:
            assert len(sequence.output.guessed or ()) == sequence.drafter.num_accepted
