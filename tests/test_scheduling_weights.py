"""Fairness with weights that differ: whoever holds one thing never shields one who holds many."""

import pytest

from descant.contract.plan import EngineLimits
from fake_engine import FakeEngine
from fakes import Loop, version


def flooded(num_blocks: int = 4000, num_slots: int = 4, **options: int) -> Loop:
    return Loop(FakeEngine(EngineLimits(num_blocks, 4, 400, 1000, num_slots)), **options)


def run(loop: Loop, num_steps: int) -> None:
    for _ in range(num_steps):
        loop.step()
        while loop.loads:
            loop.finish_load()


@pytest.mark.parametrize(("single", "flood"), [(0.1, 1.0), (1.0, 10.0)])
def test_one_seat_of_light_weight_does_not_shield_a_flood_of_seats(single: float, flood: float) -> None:
    loop = flooded(max_num_seqs=8)
    loop.submit([7] * 5, max_tokens=300, principal="single", weight=single)
    run(loop, 1)
    for i in range(100):
        loop.submit([i] * 5, max_tokens=60, principal="flood", weight=flood)
    run(loop, 3)

    (newcomer,) = loop.submit([900] * 5, max_tokens=4, principal="newcomer", weight=flood)
    run(loop, 3)

    assert newcomer.first_scheduled_s is not None


def test_one_large_prompt_of_light_weight_does_not_shield_a_flood_of_blocks() -> None:
    loop = flooded(48, max_num_seqs=64)
    loop.submit([7] * 60, max_tokens=60, principal="single", weight=0.05)
    run(loop, 1)
    for i in range(60):
        loop.submit([i] * 30, max_tokens=60, principal="flood")
    run(loop, 3)

    (newcomer,) = loop.submit([900] * 6, max_tokens=4, principal="newcomer")
    run(loop, 3)

    assert newcomer.first_scheduled_s is not None


def test_one_adapter_of_light_weight_does_not_shield_a_flood_of_adapters() -> None:
    loop = flooded(max_num_seqs=16)
    loop.submit([7] * 5, max_tokens=300, principal="single", weight=0.1, adapter=version("single"))
    run(loop, 1)
    for i in range(100):
        loop.submit([i] * 5, max_tokens=60, principal="flood", adapter=version(f"f{i % 10}"))
    run(loop, 3)

    (newcomer,) = loop.submit([900] * 5, max_tokens=4, principal="newcomer", adapter=version("newcomer"))
    run(loop, 4)

    assert newcomer.first_scheduled_s is not None


def test_a_loaded_adapter_does_not_wait_for_the_oversized_one_of_another_principal() -> None:
    loop = flooded(max_num_seqs=64, adapter_bytes=256)
    loop.submit([1] * 3, max_tokens=350, adapter=version("busy", 64), principal="x")
    run(loop, 3)
    loop.submit([2] * 3, max_tokens=10, adapter=version("huge", 256), principal="x")

    answers = []
    for _ in range(90):
        answers += loop.submit([3] * 3, max_tokens=2, adapter=version("hot", 64), principal="y")
        run(loop, 3)

    assert max((one.first_scheduled_s or 1e9) - one.arrival_s for one in answers) <= 4


def test_a_queue_deadline_is_met_once_any_choice_of_the_request_runs() -> None:
    loop = flooded(max_num_seqs=1)

    choices = loop.submit([1] * 5, n=2, max_tokens=20, queue_deadline_s=6.0)
    run(loop, 60)

    assert [choice.finish_reason for choice in choices] == ["length", "length"]
