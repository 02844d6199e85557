"""The dummy engine emits text at a set pace, needs no torch, and checks plans by the rules of the model's engine."""

import subprocess
import sys
from typing import Any

import pytest

from descant.contract.plan import Admit, Row, StepPlan, pack_ints, unpack_floats, unpack_ints
from descant.engine import dummy
from descant.engine.dummy import DummyEngine, DummyOptions
from descant_client.errors import InvalidRequest, UnsupportedRequest
from descant_client.protocol import SamplingParams

PROMPT = list(b"sing")


def admit(row: int = 0, tokens: list[int] = PROMPT, seed: int = 0, **changes: Any) -> Admit:
    values = {"num_prompt_tokens": len(PROMPT), "num_cached_tokens": 0, "blocks": pack_ints(range(16))}
    return Admit(row=row, token_ids=pack_ints(tokens), sampling=SamplingParams(), seed=seed, **values | changes)


def say(num_tokens: int, chunk: int = 100, **changes: Any) -> bytes:
    """Return the text of one sequence."""
    engine, entry = DummyEngine(DummyOptions(tokens_per_s=0)), admit(**changes)
    engine.step(StepPlan(0, 0, admit=(entry,)))
    said, missing = [], len(unpack_ints(entry.token_ids))
    while len(said) < num_tokens:
        (row,) = engine.step(StepPlan(0, 0, rows=(Row(0, min(missing, chunk)),))).rows
        said += unpack_ints(row.token_ids)
        missing = max(1, missing - chunk)
    return bytes(said)


def test_it_imports_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import descant.engine.dummy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_says_words() -> None:
    text = say(200).decode()
    assert "consectetur" in text
    assert text.isprintable()


def test_what_it_says_depends_on_seed_and_choice_alone() -> None:
    assert say(40, seed=3) == say(40, seed=3, chunk=1)
    assert len({say(40, seed=seed, choice=choice) for seed in range(3) for choice in range(3)}) > 5


def test_a_row_rebuilt_from_its_tokens_goes_on_as_if_nothing_had_happened() -> None:
    whole = say(30, seed=7)
    assert say(20, seed=7, tokens=[*PROMPT, *whole[:10]]) == whole[10:]


def test_every_step_that_samples_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(dummy.time, "monotonic", lambda: 100.0 + sum(naps))
    monkeypatch.setattr(dummy.time, "sleep", naps.append)
    engine = DummyEngine(DummyOptions(tokens_per_s=10))
    engine.step(StepPlan(0, 0, admit=(admit(),), rows=(Row(0, 3),)))
    assert naps == []
    for _ in range(3):
        engine.step(StepPlan(0, 0, rows=(Row(0, 1),)))
    assert naps == pytest.approx([0.0, 0.1, 0.1])


def test_every_adapter_loads_and_changes_nothing() -> None:
    engine = DummyEngine(DummyOptions(tokens_per_s=0))
    staged = engine.stage_adapter("/nowhere")
    engine.place_adapter(5, 0, staged)
    engine.move_adapter(5, 64)
    assert staged.num_bytes == 0
    assert engine.step(StepPlan(0, 0, admit=(admit(),), rows=(Row(0, 4),))).rows[0].token_ids


def test_log_probabilities_have_the_shape_that_was_asked_for() -> None:
    engine = DummyEngine(DummyOptions(tokens_per_s=0))
    rows = (Row(0, 4, num_prompt_logprobs=2),)
    (row,) = engine.step(StepPlan(0, 0, admit=(admit(num_logprobs=0),), rows=rows)).rows
    assert row.logprobs is not None
    assert row.prompt_logprobs is not None
    assert (row.logprobs.num_tokens, row.logprobs.top_ids, len(unpack_floats(row.logprobs.chosen))) == (1, b"", 1)
    assert unpack_ints(row.prompt_logprobs.top_ids)[::2] == PROMPT[1:]
    assert len(unpack_floats(row.prompt_logprobs.top)) == 2 * 3


def test_plans_are_held_to_the_rules_of_the_model() -> None:
    engine = DummyEngine(DummyOptions(tokens_per_s=0))
    with pytest.raises(InvalidRequest, match="known tokens"):
        engine.step(StepPlan(0, 0, admit=(admit(),), rows=(Row(0, 5),)))
    with pytest.raises(UnsupportedRequest):
        engine.step(StepPlan(0, 0, admit=(admit(),), rows=(Row(0, 1, positions=pack_ints([0])),)))
