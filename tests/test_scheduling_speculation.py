"""Drafts in the schedule: sequences get the tokens they would have got without, in fewer steps."""

from __future__ import annotations

import random

import msgspec
import pytest

from descant.contract.plan import BASE_SPANS, StepPlan
from descant.scheduling.life import ExecutorLife
from descant.scheduling.sequence import Sequence
from descant.scheduling.speculation.drafting import Drafter
from descant_client.speculation import Speculation
from fake_engine import LIMITS, FakeEngine
from fake_model import FakeRow, echo, extend_history, hash_history
from fakes import Loop, version

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
    return [(one.output_ids, one.output.logprobs, one.finish_reason) for one in sequences]


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


def test_what_a_stop_string_cuts_off_is_no_step_saved() -> None:
    class StopAtTen:
        num_taken = 0

        def push(self, token_ids: list[int]) -> int | None:
            self.num_taken += len(token_ids)
            return 10 if self.num_taken >= 10 else None

    drafting = loop(behavior=echo)
    (sequence,) = drafting.submit([5, 6], max_tokens=100, drafter=eager(), stopper=StopAtTen(), marks_guesses=True)
    drafting.run()

    assert sequence.drafter is not None
    assert (sequence.num_output_tokens, sequence.finish_reason) == (10, "stop")
    assert sequence.drafter.num_accepted == len(sequence.output.guessed or ()) == 10 - (len(drafting.engine.plans) - 1)


def test_who_always_verifies_pays_for_it() -> None:
    drafting = loop(behavior=echo)
    for principal, drafter in (("plain", None), ("choosy", Drafter()), ("eager", eager())):
        drafting.submit([1, 2], max_tokens=40, principal=principal, drafter=drafter)
    drafting.run()

    accounts = drafting.policy.states.lineup.fairness.accounts
    assert accounts["plain"].service == accounts["choosy"].service < accounts["eager"].service


def test_engines_that_are_told_of_steps_ahead_get_no_drafts() -> None:
    assert ExecutorLife(1, msgspec.structs.replace(DRAFTING, max_steps_in_flight=2), 1024).max_draft_nodes == 0


def test_a_draft_gives_no_more_tokens_than_were_asked_for() -> None:
    drafting = loop(behavior=echo)
    (sequence,) = drafting.submit([5, 6], max_tokens=31, drafter=eager())

    drafting.run()

    assert len(sequence.output_ids) == 31
    assert sequence.finish_reason == "length"
    assert sequence.drafter is not None
    assert sequence.drafter.read(sequence, 99) == 33  # what it knew of the text is gone


@pytest.mark.parametrize("tree", [None, [[1], [1, 0]]])
def test_heads_alone_speed_up_text_that_never_repeats_under_any_adapter(tree: list[list[int]] | None) -> None:
    """Two heads: the first one's second candidate is right, the other's first."""

    def heads(row: FakeRow, history: int) -> list[list[int]]:
        first = hash_history(row, history) % LIMITS.vocab_size
        second = hash_history(row, extend_history(history, first, "a")) % LIMITS.vocab_size
        return [[first + 1, first], [second, second + 1]]

    drafting = loop(behavior=hash_history)
    drafting.engine.heads = heads
    with_heads = msgspec.structs.replace(version("a"), num_heads=2)
    only_heads = Speculation(always=True, ngram=False, tree=tree)
    (fast,) = drafting.submit([5, 6], max_tokens=40, adapter=with_heads, drafter=Drafter(only_heads))
    (plain,) = drafting.submit([5, 6], max_tokens=40, adapter=with_heads)
    drafting.run()

    assert fast.output_ids == plain.output_ids
    assert fast.drafter is not None
    assert fast.drafter.num_accepted >= 24
    nodes = {len(row.draft.token_ids) // 4 for plan in drafting.engine.plans for row in plan.rows if row.draft}
    assert max(nodes) == (6 if tree is None else 2)


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
    (sequence,) = loop().submit([1, 2, 3, 4])
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


def test_no_more_is_read_before_a_step_than_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole_read = Drafter.read

    def counted(self: Drafter, sequence: Sequence, max_tokens: int) -> int:
        read[-1] += (num_read := whole_read(self, sequence, max_tokens))
        return num_read

    monkeypatch.setattr(Drafter, "read", counted)
    monkeypatch.setattr("descant.scheduling.planning.MAX_READ", 16)
    drafting = loop(behavior=echo)
    sequences = [drafting.submit([*range(40)], max_tokens=30, drafter=eager())[0] for _ in range(4)]
    while not all(sequence.is_finished for sequence in sequences):
        read.append(0)
        drafting.step()

    assert max(read) == 16
    assert num_drafted(drafting) > 0


def test_a_draft_that_is_cut_short_for_want_of_room_breaks_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExecutorLife, "room_behind", lambda *_: [])  # no block more than for the next token
    drafting = loop(behavior=echo)
    drafting.engine.seconds = lambda plan: 1.0
    (sequence,) = drafting.submit([5, 6], max_tokens=60, drafter=Drafter())
    shares: list[float] = []
    while not sequence.is_finished:
        drafting.step()
        assert sequence.drafter is not None
        shares.append(sequence.drafter.acceptance_share)

    assert num_drafted(drafting) > 3
    assert min(shares) > 0.9


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
