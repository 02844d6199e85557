"""Whoever has had least is served next, and who floods the server delays only itself."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from descant.contract.plan import EngineLimits
from descant.scheduling.sequence import Sequence
from fake_engine import FakeEngine
from fakes import Loop, version

STEPS_PER_SECOND = 20
LONG_ANSWER = 60
PRINCIPALS = "vwxyz"


def engine(num_blocks: int = 4000, num_adapter_slots: int = 4) -> FakeEngine:
    return FakeEngine(EngineLimits(num_blocks, 4, 400, 1000, num_adapter_slots))


def step(loop: Loop) -> bool:
    """Loads take a step: what is loaded during one can be used in the next."""
    has_run = loop.step()
    while loop.loads:
        loop.finish_load()
    return has_run


def flood(loop: Loop, count: int = 500, num_prompt: int = 5, num_adapters: int = 0) -> list[Sequence]:
    adapters = [version(f"flood{i}") for i in range(num_adapters)] or [None]
    return [
        loop.submit([i % 900] * num_prompt, max_tokens=LONG_ANSWER, adapter=adapters[i % len(adapters)], principal="f")[
            0
        ]
        for i in range(count)
    ]


def queue_steps(loop: Loop, num_seconds: int = 6, num_prompt: int = 6, **options: Any) -> list[float]:
    """Let another principal send a request per second; return the steps from each one's arrival to its first."""
    trickle: list[Sequence] = []
    for number in range(num_seconds * STEPS_PER_SECOND):
        if number % STEPS_PER_SECOND == 3:
            given = {"max_tokens": 12, "principal": "t", **options}
            if isinstance(given.get("adapter"), str):
                given["adapter"] = version(f"{given['adapter']}{len(trickle)}")
            trickle += loop.submit([901 + len(trickle)] * num_prompt, **given)
        step(loop)
    return [(one.first_scheduled_s or float("inf")) - one.arrival_s for one in trickle]


def served(loop: Loop, principal: str) -> float:
    return loop.policy.states.lineup.fairness.accounts[principal].service


# ---- floods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [2, 8, 16])
def test_a_flood_on_every_seat_delays_others_by_two_steps_at_most(max_num_seqs: int) -> None:
    loop = Loop(engine(), max_num_seqs=max_num_seqs)
    flood(loop)
    step(loop)

    assert max(queue_steps(loop)) <= 1 + 2


@pytest.mark.parametrize(("num_blocks", "num_prompt"), [(48, 6), (100, 6), (100, 44)])
def test_a_flood_in_every_block_delays_others_by_two_steps_at_most(num_blocks: int, num_prompt: int) -> None:
    loop = Loop(engine(num_blocks), max_num_seqs=64)
    seqs = flood(loop, 60, num_prompt=30)
    for _ in range(3):
        step(loop)
    assert sum(seq.status == "running" for seq in seqs) < 20

    assert max(queue_steps(loop, num_prompt=num_prompt)) <= 1 + 2


def test_a_flood_of_long_prompts_delays_others_by_two_steps_at_most() -> None:
    loop = Loop(engine(), max_num_seqs=16, max_num_batched_tokens=32)
    flood(loop, 200, num_prompt=300)
    for _ in range(3):
        step(loop)
    assert loop.engine.plans[-1].rows[0].num_new_tokens >= 16

    assert max(queue_steps(loop)) <= 1 + 2


@pytest.mark.parametrize(("adapter", "num_steps"), [(None, 1), (version("flood0"), 1), ("cold", 2)], ids=str)
def test_a_flood_in_every_adapter_slot_delays_others_by_two_steps_at_most(adapter: Any, num_steps: int) -> None:
    loop = Loop(engine(), max_num_seqs=8)
    flood(loop, 300, num_adapters=40)
    for _ in range(5):
        step(loop)

    assert max(queue_steps(loop, adapter=adapter)) <= num_steps + 2  # a load takes a step here


def test_three_who_send_little_are_not_delayed_by_two_who_flood() -> None:
    loop = Loop(engine(), max_num_seqs=16)
    for name in "fg":
        for i in range(200):
            loop.submit([i] * 5, max_tokens=LONG_ANSWER, principal=name)
    step(loop)
    trickle = [loop.submit([900] * 6, max_tokens=12, principal=name)[0] for name in "tuv"]

    for _ in range(3):
        step(loop)

    assert all(seq.first_scheduled_s is not None for seq in trickle)


def test_the_next_place_on_the_device_is_not_for_who_has_most() -> None:
    loop = Loop(engine(num_adapter_slots=1))
    flood(loop, 3, num_adapters=3)
    step(loop)
    (late,) = loop.submit([900] * 5, adapter=version("late"), principal="t")
    waiting = list(loop.table)[1:]

    while late.first_scheduled_s is None:
        step(loop)

    assert [seq.first_scheduled_s for seq in waiting[:2]] == [None, None]


def test_nobody_gives_way_where_that_frees_no_place() -> None:
    loop = Loop(engine(num_adapter_slots=2))
    seqs = flood(loop, 4, num_adapters=2)
    for i in range(2):
        loop.submit([i], max_tokens=LONG_ANSWER, adapter=version(f"flood{i}"), principal="same")
    for _ in range(3):
        step(loop)
    (cold,) = loop.submit([900], adapter=version("cold"), principal="t")

    for _ in range(9):
        step(loop)

    assert cold.first_scheduled_s is None
    assert sum(seq.num_preemptions for seq in seqs) == 0


def test_who_has_had_more_than_the_others_waits_for_a_seat() -> None:
    loop = Loop(engine(), max_num_seqs=4, max_num_batched_tokens=400)
    flood(loop, 50)
    step(loop)
    loop.submit([900] * 300, max_tokens=1, principal="t")
    step(loop)
    step(loop)

    (greedy,) = loop.submit([901], principal="t")
    step(loop)
    assert greedy.first_scheduled_s is None

    while served(loop, "f") < served(loop, "t"):
        step(loop)
    step(loop)
    assert greedy.first_scheduled_s is not None


@pytest.mark.parametrize("num_held", [0, 24])
def test_who_needs_many_blocks_is_not_passed_by_many_who_need_few(num_held: int) -> None:
    loop = Loop(engine(50), max_num_seqs=16)
    for i in range(40):
        loop.submit([i] * 4, max_tokens=10 + i * 7 % 20, principal="small")
    held = loop.submit([901] * num_held, max_tokens=60, principal="big") if num_held else []
    step(loop)
    (big,) = loop.submit([900] * (100 if num_held else 190), max_tokens=4, principal="big")

    for i in range(100):
        loop.submit([i] * 4, max_tokens=10 + i * 7 % 20, principal="small")
        step(loop)
        if big.first_scheduled_s is not None:
            break

    assert big.first_scheduled_s is not None
    assert not any(seq.is_finished for seq in held)


def test_preempted_sequences_keep_their_order_and_their_tokens() -> None:
    loop, alone = Loop(engine(), max_num_seqs=4), Loop(engine(), max_num_seqs=4)
    seqs = flood(loop, 12)
    expected = flood(alone, 12)
    alone.run(5000)

    queue_steps(loop, 12)
    loop.run(5000)

    assert sum(seq.num_preemptions for seq in seqs) > 0
    assert [seq.output_ids for seq in seqs] == [seq.output_ids for seq in expected]
    started = [seq.first_scheduled_s for seq in seqs]
    assert started == sorted(started, key=lambda at: at or 0)


# ---- shares -------------------------------------------------------------------------------------------------------


def test_who_weighs_three_times_as_much_gets_three_times_the_service() -> None:
    loop, random = Loop(engine(), max_num_seqs=8), Random(0)
    weights = {"a": 1.0, "b": 3.0}
    for i in range(600):
        for name, weight in weights.items():
            prompt_ids = [i] * random.randint(1, 20)
            options = {"scope": name, "principal": name, "weight": weight}
            loop.submit(prompt_ids, max_tokens=random.randint(1, 20), **options)
    seqs = list(loop.table)
    for _ in range(300):
        step(loop)

    tokens = Counter[str]()
    for seq in seqs:
        tokens[seq.request.principal] += seq.num_charged + 2 * seq.num_output_tokens
    assert 2.8 < tokens["b"] / tokens["a"] < 3.2
    assert abs(served(loop, "a") - served(loop, "b")) < 8 * (20 + 2 * 20)
    assert sum(seq.num_preemptions for seq in seqs) < 30  # of about 400 that ran


def test_the_counters_of_those_who_wait_stay_close() -> None:
    loop, random = Loop(engine(), max_num_seqs=8), Random(1)
    for i in range(300):
        for name in "abc":
            size = {"a": 2, "b": 10, "c": 30}[name]
            loop.submit([i] * size, max_tokens=random.randint(1, size), principal=name)

    for _ in range(150):
        step(loop)
        services = [served(loop, name) for name in "abc"]
        assert max(services) - min(services) < 8 * (30 + 2 * 30)


def test_idle_time_is_not_saved_up() -> None:
    loop = Loop(engine(), max_num_seqs=2)
    loop.submit([1], max_tokens=1, principal="idle")
    seqs = flood(loop, 100)
    for _ in range(100):
        step(loop)

    late = [loop.submit([2] * 5, max_tokens=LONG_ANSWER, principal="idle")[0] for _ in range(20)]
    before = sum(seq.num_output_tokens for seq in seqs)
    for _ in range(200):
        step(loop)

    gained = sum(seq.num_output_tokens for seq in seqs) - before
    assert 0.8 < gained / sum(seq.num_output_tokens for seq in late) < 1.25


def test_the_adapters_of_one_principal_take_turns() -> None:
    loop = Loop(engine(), max_num_seqs=1)
    many = [loop.submit([1] * 5, max_tokens=4, adapter=version("a"))[0] for _ in range(10)]
    one = loop.submit([1] * 5, max_tokens=4, adapter=version("b"))[0]

    while one.first_scheduled_s is None:
        step(loop)

    assert sum(seq.first_scheduled_s is not None for seq in many) <= 2


def test_a_token_is_charged_once() -> None:
    loop = Loop(engine())
    (seq,) = loop.submit([1] * 9, max_tokens=4, principal="p")
    for _ in range(2):
        step(loop)
    loop.policy.states.preempt(seq)
    step(loop)
    loop.crash()
    loop.run()
    loop.submit([1] * 9, max_tokens=1, principal="p")
    loop.run()

    assert served(loop, "p") == (9 + 4 * 2) + (1 + 2)  # the second finds 8 tokens in the cache


def test_nobody_is_preempted_for_its_own_principal_or_in_turns() -> None:
    loop = Loop(engine(), max_num_seqs=4)
    seqs = [loop.submit([i] * 5, max_tokens=30, principal="ab"[i % 2])[0] for i in range(30)]

    loop.run(5000)

    assert sum(seq.num_preemptions for seq in seqs) <= 3


# ---- many -----------------------------------------------------------------------------------------------------------


def crowd(random: Random, **budgets: Any) -> tuple[Loop, list[Sequence]]:
    loop = Loop(engine(random.randint(30, 80), 2), adapter_bytes=192, **budgets)
    weights = {name: random.choice([0.2, 1.0, 5.0]) for name in PRINCIPALS}
    adapters = [None, None, version("a"), version("b"), version("c", 128)]
    for _ in range(60):
        name = random.choice(PRINCIPALS)
        prompt_ids = [random.randint(0, 3) for _ in range(random.randint(1, 60))]
        options = {"adapter": random.choice(adapters), "scope": name, "seed": random.randint(0, 9)}
        loop.submit(prompt_ids, max_tokens=random.randint(1, 40), principal=name, weight=weights[name], **options)
    return loop, list(loop.table)


@pytest.mark.parametrize("seed", range(12))
def test_nobody_starves_and_every_run_is_the_same(seed: int) -> None:
    plans = []
    for _ in range(2):
        random = Random(seed)
        loop, seqs = crowd(random, max_num_seqs=random.randint(2, 8), max_num_batched_tokens=random.randint(4, 40))
        loop.run(5000)
        assert {seq.finish_reason for seq in seqs} == {"length"}
        plans.append(loop.engine.plans)

    assert plans[0] == plans[1]


@pytest.mark.parametrize("seed", range(6))
def test_no_seat_is_idle_while_somebody_could_take_it(seed: int) -> None:
    random = Random(seed)
    loop = Loop(engine(), max_num_seqs=5, max_num_batched_tokens=200)
    while loop.clock < 200:
        for name in PRINCIPALS[: random.randint(0, 3)]:
            loop.submit(
                [random.randint(0, 900)] * random.randint(1, 30), max_tokens=random.randint(1, 30), principal=name
            )
        step(loop)

        budget_left = 200 - sum(row.num_new_tokens for row in loop.engine.plans[-1].rows) if loop.engine.plans else 0
        rows = len(loop.engine.plans[-1].rows) if loop.engine.plans else 5
        waiting = [seq for seq in loop.table if seq.status == "waiting"]
        assert rows == 5 or not budget_left or not waiting
