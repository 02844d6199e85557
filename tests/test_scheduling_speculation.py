"""Drafts in the schedule: sequences get the tokens they would have got without, in fewer steps."""

from __future__ import annotations

import random

import msgspec
import pytest

from descant.scheduling.drafting import MAX_CATCH_UP, Drafter, depth_of
from descant.scheduling.life import ExecutorLife
from descant.scheduling.ngram import DraftTree
from descant.scheduling.plan import BASE_SPANS, HeadCandidates, StepPlan, pack_floats, pack_ints
from descant.scheduling.sequence import Sequence
from descant_client.protocol import SamplingParams
from descant_client.speculation import Speculation
from fake_engine import LIMITS, FakeEngine
from fake_model import FakeRow, counter, echo, extend_history, hash_history
from fakes import FakeSink, Loop, version

DRAFTING = msgspec.structs.replace(LIMITS, max_draft_nodes=16)


def eager() -> Drafter:
    """A drafter whose every guess is verified."""
    return Drafter(Speculation(always=True))


def of_three(row: FakeRow, history: int) -> int:
    """Tokens that depend on everything before them, and still repeat all the time."""
    return hash_history(row, history) % 3


def loop(num_blocks: int = 64, behavior: object = of_three, **budgets: int) -> Loop:
    limits = msgspec.structs.replace(DRAFTING, num_blocks=num_blocks)
    return Loop(FakeEngine(limits, behavior), **budgets)  # type: ignore[arg-type]


def submit(loop: Loop, with_drafts: bool, **fields: object) -> list[Sequence]:
    """Submit eight sequences of all kinds."""
    dice, sequences = random.Random(5), list[Sequence]()
    for seed in range(8):
        prompt = [dice.randrange(3) for _ in range(dice.randint(1, 30))]
        adapter = dice.choice([None, version("a")])
        drafter = eager() if with_drafts else None
        sequences += loop.submit(
            prompt, seed=seed, max_tokens=40, adapter=adapter, num_logprobs=2, drafter=drafter, **fields
        )
    return sequences


def said(sequences: list[Sequence]) -> list[object]:
    return [(one.output_ids, one.output_logprobs, one.finish_reason) for one in sequences]


def undisturbed() -> list[object]:
    plain = loop()
    sequences = submit(plain, with_drafts=False)
    plain.run()
    return said(sequences)


def num_drafted(loop: Loop) -> int:
    return sum(row.draft is not None for plan in loop.engine.plans for row in plan.rows)


@pytest.mark.parametrize("num_blocks", [64, 20, 18])  # 18: one sequence at a time
def test_sequences_say_the_same_with_drafts_however_few_blocks_there_are(num_blocks: int) -> None:
    drafting = loop(num_blocks)
    sequences = submit(drafting, with_drafts=True)

    drafting.run()

    assert said(sequences) == undisturbed()
    assert sum(one.drafter.num_accepted for one in sequences if one.drafter) > 30


def test_sequences_say_the_same_when_executors_die_between_drafts() -> None:
    drafting = loop()
    sequences = submit(drafting, with_drafts=True)

    for _ in range(12):
        for _ in range(4):
            while drafting.loads:
                drafting.finish_load()
            drafting.step()
        drafting.crash()
    drafting.run()

    assert said(sequences) == undisturbed()
    assert num_drafted(drafting) > 10


def test_text_that_repeats_takes_a_fraction_of_the_steps() -> None:
    drafting = loop(behavior=echo)
    (sequence,) = drafting.submit([5, 6, 7, 8], max_tokens=100, drafter=eager())

    drafting.run()

    assert sequence.output_ids == [5, 6, 7, 8] * 25
    assert len(drafting.engine.plans) < 25


def test_a_draft_gives_no_more_tokens_than_were_asked_for() -> None:
    drafting = loop(behavior=echo)
    (sequence,) = drafting.submit([5, 6], max_tokens=31, drafter=eager())

    drafting.run()

    assert len(sequence.output_ids) == 31
    assert sequence.finish_reason == "length"


def test_heads_alone_speed_up_text_that_never_repeats_under_any_adapter() -> None:
    """Two heads: the first one's second candidate is right, the other's first."""

    def heads(row: FakeRow, history: int) -> list[list[int]]:
        first = hash_history(row, history) % LIMITS.vocab_size
        second = hash_history(row, extend_history(history, first, "a")) % LIMITS.vocab_size
        return [[first + 1, first], [second, second + 1]]

    drafting = loop(behavior=hash_history)
    drafting.engine.heads = heads
    with_heads = msgspec.structs.replace(version("a"), num_heads=2)
    only_heads = Speculation(always=True, ngram=False)
    (fast,) = drafting.submit([5, 6], max_tokens=40, adapter=with_heads, drafter=Drafter(only_heads))
    (plain,) = drafting.submit([5, 6], max_tokens=40, adapter=with_heads)
    drafting.run()

    assert fast.output_ids == plain.output_ids
    assert fast.drafter is not None
    assert fast.drafter.num_accepted >= 24


@pytest.mark.parametrize("settings", [Speculation(always=True), Speculation(always=True, max_nodes=5), Speculation()])
def test_text_and_heads_together_keep_to_every_limit(settings: Speculation) -> None:
    drafting = loop(max_num_batched_tokens=1024)
    drafting.engine.heads = lambda row, history: [[500 + 10 * i + j for j in range(4)] for i in range(5)]
    drafting.engine.seconds = lambda plan: 1.0  # nodes cost nothing
    with_heads = msgspec.structs.replace(version("a"), num_heads=5)
    (sequence,) = drafting.submit(
        [1, 2, 3, 1, 2, 0, 1, 2], max_tokens=500, adapter=with_heads, drafter=Drafter(settings)
    )

    drafting.run()

    assert len(sequence.output_ids) == LIMITS.max_context - 8
    nodes = [len(row.draft.token_ids) // 4 for plan in drafting.engine.plans for row in plan.rows if row.draft]
    assert 0 < max(nodes) <= min(DRAFTING.max_draft_nodes, settings.max_nodes)


@pytest.mark.parametrize(
    "candidates",
    [
        HeadCandidates(0, b"", b""),
        HeadCandidates(2, pack_ints([1]), pack_floats([0.5])),
        HeadCandidates(1, pack_ints([1, 2]), pack_floats([0.5])),
        HeadCandidates(1, pack_ints([1]), pack_floats([float("nan")])),
        HeadCandidates(1, pack_ints([1]), pack_floats([2.0])),
    ],
)
def test_candidates_that_make_no_sense_are_dropped(candidates: HeadCandidates) -> None:
    drafter = Drafter(Speculation(ngram=False))

    drafter.take_candidates(3, candidates)

    assert drafter.guess(text(loop(), [1, 2, 3]), 64) is None
    assert drafter.chain == []


def test_others_are_guessed_for_again_once_who_always_verifies_has_gone() -> None:
    for arrival in range(58, 70):  # among them when a plain step is due
        drafting = loop(behavior=echo, max_num_batched_tokens=1024)
        drafting.engine.seconds = lambda plan: 1.0
        (steady,) = drafting.submit([5, 6, 7, 8], max_tokens=190, drafter=Drafter(Speculation(max_depth=1)))
        for _ in range(arrival):
            drafting.step()
        (brief,) = drafting.submit([1, 2, 1, 2], max_tokens=6, drafter=eager())
        while not brief.is_finished:
            drafting.step()
        num_before = num_drafted(drafting)

        drafting.run()

        assert steady.is_finished
        assert num_drafted(drafting) > num_before + 5


def test_heads_alone_share_blocks_with_the_base_and_run_without_an_adapter() -> None:
    only_heads = msgspec.structs.replace(version("a"), num_modules=0, max_rank=0, num_heads=2)
    drafting = loop(behavior=echo)
    (base,) = drafting.submit([5, 6, 7, 8], max_tokens=20)
    drafting.run()

    (again,) = drafting.submit([*base.prompt_ids, *base.output_ids], max_tokens=4, adapter=only_heads)
    drafting.run()

    assert again.num_cached_tokens == 20
    assert {row.spans for plan in drafting.engine.plans for row in plan.rows} == {BASE_SPANS}


def test_a_draft_leaves_a_block_free_for_everybody_who_runs() -> None:
    life = ExecutorLife(1, msgspec.structs.replace(DRAFTING, num_blocks=8), 1024)
    sequence = text(loop(), [1, 2, 3, 4])
    sequence.forget_device_state()
    assert life.allocate(sequence, 0)

    assert life.room_behind(sequence, 5 * 4, num_running=3) == []
    assert len(life.room_behind(sequence, 4 * 4, num_running=3)) == 4


def test_what_a_step_takes_is_seen_from_its_plan_to_its_result() -> None:
    drafting = loop(behavior=echo)

    def pass_a_second(plan: StepPlan) -> float:
        drafting.clock += 1.0
        return 0.0  # the engine says nothing

    drafting.engine.seconds = pass_a_second
    drafting.submit([5, 6, 7, 8], max_tokens=60, drafter=Drafter())
    drafting.run()

    assert num_drafted(drafting) > 0


def test_a_long_prompt_is_indexed_part_by_part() -> None:
    drafter, tokens = Drafter(), [7, *range(10, 10 + MAX_CATCH_UP), 7, *range(10, 13)]
    sequence = Sequence(1, "", tokens, SamplingParams(), 0, FakeSink())

    assert drafter.guess(sequence, 64) is None
    assert drafter.guess(sequence, 64) is not None


def test_candidates_are_good_for_one_place_only() -> None:
    drafter, sequence = Drafter(Speculation(ngram=False)), text(loop(), [1, 2, 3])
    candidates = HeadCandidates(1, pack_ints([7, 8]), pack_floats([0.9, 0.8]))

    drafter.take_candidates(3, candidates)
    guess = drafter.guess(sequence, 64)
    drafter.take_candidates(2, candidates)

    assert guess is not None
    assert guess.tree == DraftTree((7, 8), (-1, 0))
    assert drafter.guess(sequence, 64) is None


def test_heads_that_were_wrong_are_believed_less() -> None:
    drafter, said = Drafter(Speculation(ngram=False)), [1, 2, 3]
    for _ in range(20):
        drafter.take_candidates(len(said), HeadCandidates(1, pack_ints([7]), pack_floats([0.9])))
        drafter.guess(text(loop(), [*said, 9]), 64)
        said.append(9)

    drafter.take_candidates(len(said), HeadCandidates(1, pack_ints([7]), pack_floats([0.9])))
    guess = drafter.guess(text(loop(), said), 64)

    assert guess is not None
    assert guess.probabilities[0] < 0.2


def test_nobody_is_preempted_for_a_draft() -> None:
    drafting = loop(num_blocks=12, behavior=echo)  # of four: two sequences of 24 tokens fill it
    sequences = [drafting.submit([5, 6], max_tokens=22, drafter=eager())[0] for _ in range(2)]

    drafting.run()

    assert [one.num_preemptions for one in sequences] == [0, 0]


def test_drafts_stay_within_half_of_what_decoding_leaves_of_a_step() -> None:
    drafting = loop(behavior=echo, max_num_batched_tokens=24)
    for _ in range(4):
        drafting.submit([5, 6], max_tokens=40, drafter=eager())

    drafting.run()

    nodes = [sum(len(row.draft.token_ids) // 4 for row in plan.rows if row.draft) for plan in drafting.engine.plans]
    assert 0 < max(nodes) <= (24 - 1) // 2


def test_an_engine_that_verifies_nothing_gets_no_drafts() -> None:
    plain = Loop(FakeEngine(LIMITS, echo))
    plain.submit([5, 6], max_tokens=40, drafter=eager())

    plain.run()

    assert num_drafted(plain) == 0


def test_blocks_that_drafts_filled_are_found_by_those_who_come_after() -> None:
    drafting = loop(behavior=echo)
    (first,) = drafting.submit([5, 6, 7, 8], max_tokens=40, drafter=eager())
    drafting.run()

    (second,) = drafting.submit([*first.prompt_ids, *first.output_ids], max_tokens=4)
    drafting.run()

    assert second.num_cached_tokens == 40


def test_a_stop_token_within_a_draft_ends_the_sequence_there() -> None:
    drafting = loop(behavior=echo)
    (sequence,) = drafting.submit([5, 6, 7, 6, 7, 6, 7, 9], max_tokens=40, stop=frozenset({9}), drafter=eager())

    drafting.run()

    assert sequence.output_ids == [5, 6, 7, 6, 7, 6, 7, 9]
    assert sequence.finish_reason == "stop"


def text(loop: Loop, token_ids: list[int]) -> Sequence:
    return loop.submit(token_ids, max_tokens=1)[0]


def test_the_depth_of_a_tree_is_that_of_its_longest_branch() -> None:
    assert depth_of((-1, 0, -1, 1)) == 3


def test_a_guess_is_what_followed_the_same_tokens_before() -> None:
    sequence = text(loop(behavior=counter), [1, 2, 3, 4, 5, 6, 7, 2, 3])

    guess = eager().guess(sequence, 3)

    assert guess is not None
    assert guess.tree == DraftTree((4, 5, 6), (-1, 0, 1))
