"""The engine carries out plans as described in `contract.plan`, and refuses those that contradict its state."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import tiny_models
from descant.adapters.prepare import AdapterWorker
from descant.contract.plan import AdapterSpan, Admit, Row, StepPlan, TokenDraft, pack_ints, unpack_floats, unpack_ints
from descant.engine.runner import Engine
from descant_client.errors import ConfigInvalid, InvalidRequest, UnsupportedRequest
from descant_client.protocol import SamplingParams
from engine_driver import GREEDY, Driver, Voice, engine_for

PROMPT = tiny_models.random_prompt(20)


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("model")
    tiny_models.save_model(directory, tiny_models.tiny_config("llama"))
    return engine_for(directory, max_num_batched_tokens=400)


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    yield shared_engine
    shared_engine.step(StepPlan(0, 0, drop=pack_ints(range(8))))


def admit(row: int = 0, tokens: list[int] = PROMPT, blocks: tuple[int, ...] = (3, 1), **changes: Any) -> Admit:
    values = {"num_prompt_tokens": len(tokens), "num_cached_tokens": 0, "sampling": GREEDY, "seed": 0}
    return Admit(row=row, token_ids=pack_ints(tokens), blocks=pack_ints(blocks), **values | changes)


def draft(token_ids: list[int], parents: list[int]) -> TokenDraft:
    return TokenDraft(pack_ints(token_ids), pack_ints(parents))


def step(engine: Engine, *rows: Row, **plan: Any) -> list[tuple[int, list[int]]]:
    """Return positions computed and tokens sampled, per row."""
    result = engine.step(StepPlan(0, 0, rows=rows, **plan))
    return [(row.num_computed, unpack_ints(row.token_ids)) for row in result.rows]


def test_a_row_is_sampled_only_when_its_last_known_token_is_computed(engine: Engine) -> None:
    assert step(engine, Row(0, 12), admit=(admit(),)) == [(12, [])]
    (prefilled,) = step(engine, Row(0, 8))
    (decoded,) = step(engine, Row(0, 1))
    assert (prefilled[0], len(prefilled[1]), decoded[0], len(decoded[1])) == (20, 1, 21, 1)


def test_results_come_in_the_order_of_the_plan_with_its_epoch_and_step(engine: Engine) -> None:
    slots = {2: 1, 0: -1, 1: 0}
    admits = tuple(admit(row, PROMPT[: 5 + row], blocks=(row,)) for row in slots)
    rows = tuple(Row(row, 5 + row, spans=(AdapterSpan(0, slot),)) for row, slot in slots.items())
    result = engine.step(StepPlan(epoch=4, step=9, admit=admits, rows=rows))
    assert (result.epoch, result.step) == (4, 9)
    assert [(row.row, row.num_computed) for row in result.rows] == [(2, 7), (0, 5), (1, 6)]


def test_a_cached_prefix_is_not_computed_again(engine: Engine) -> None:
    (whole,) = step(engine, Row(0, 20), admit=(admit(),))
    (rest,) = step(engine, Row(1, 4), admit=(admit(1, blocks=(3, 7), num_cached_tokens=16),))
    assert rest == whole


def test_blocks_given_later_lengthen_the_table(engine: Engine) -> None:
    (whole,) = step(engine, Row(0, 20), admit=(admit(),))
    step(engine, Row(1, 16), admit=(admit(1, blocks=(5,)),))
    assert step(engine, Row(1, 4, blocks=pack_ints([6]))) == [whole]


def test_a_plan_without_rows_only_changes_the_rows(engine: Engine) -> None:
    assert step(engine, admit=(admit(),)) == []
    assert step(engine, Row(0, 3), drop=pack_ints([5])) == [(3, [])]
    step(engine, drop=pack_ints([0]))
    with pytest.raises(InvalidRequest, match="not a row"):
        step(engine, Row(0, 3))


def test_admitting_a_row_again_replaces_it(engine: Engine) -> None:
    (first,) = step(engine, Row(0, 20), admit=(admit(),))
    again = admit(0, [*PROMPT, *first[1]], num_prompt_tokens=20, blocks=(11, 12))
    (rebuilt,) = step(engine, Row(0, 21), admit=(again,))
    (other,) = step(engine, Row(1, 20), Row(0, 1), admit=(admit(1),))[:1]
    assert (rebuilt[0], other) == (21, first)


@pytest.mark.parametrize(
    ("row", "plan", "reason"),
    [
        (Row(0, 21), {}, "position 20 is beyond the 20 known tokens"),
        (Row(0, 20), {"admit": (admit(blocks=(1,)),)}, "beyond the 16 positions of its blocks"),
        (Row(0, 401), {"admit": (admit(tokens=PROMPT * 25, blocks=tuple(range(40))),)}, "exceed the engine's 400"),
        (Row(7, 1), {}, "is not a row"),
        (Row(0, 1, spans=(AdapterSpan(0, 8),)), {}, "adapter slot 8 does not exist"),
        (Row(0, 1, draft=draft([1], [-1])), {}, "follows the row's last token"),
        (Row(0, 20, draft=draft([1], [-1])), {}, "follows the row's last token"),
        (Row(0, 1, draft=draft([1], [0])), {}, "parent does not come before"),
        (Row(0, 1, draft=draft([199], [-1])), {}, "outside the vocabulary"),
        (Row(0, 1, draft=draft([1] * 65, [-1] * 65)), {}, "65 nodes"),
    ],
)
def test_a_plan_that_contradicts_the_rows_is_refused_whole(engine: Engine, row: Row, plan: Any, reason: str) -> None:
    step(engine, admit=(admit(),))
    with pytest.raises(InvalidRequest, match=reason):
        step(engine, row, **{"drop": pack_ints([0]) if plan.get("admit") else b""} | plan)
    assert step(engine, Row(0, 4)) == [(4, [])]


def test_what_is_not_done_yet_is_refused(engine: Engine) -> None:
    with pytest.raises(UnsupportedRequest):
        step(engine, Row(0, 1, spans=(AdapterSpan(0, 0), AdapterSpan(1, 1))), admit=(admit(),))


def test_a_row_whose_logits_are_not_finite_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(engine, Row(0, 20), Row(1, 20), admit=(admit(0), admit(1, blocks=(5, 6))))
    logits = engine._decoder.logits
    poison = torch.zeros(2, 1)
    poison[1] = torch.nan
    monkeypatch.setattr(engine._decoder, "logits", lambda *args: logits(*args) + poison)
    rows = engine.step(StepPlan(0, 0, admit=(admit(0), admit(1, blocks=(5, 6))), rows=(Row(0, 20), Row(1, 20)))).rows
    assert (rows[0].error, unpack_ints(rows[0].token_ids)) == (None, expected[0][1])
    assert (rows[1].token_ids, rows[1].num_computed) == (b"", 20)
    assert "not finite" in (rows[1].error or "")


@pytest.mark.parametrize("chunk", [400, 13])
def test_prompt_logprobs_are_those_of_the_tokens_that_follow(engine: Engine, chunk: int) -> None:
    prompt = tiny_models.random_prompt(300)
    voice = Driver(engine).run([Voice(prompt, 3, num_prompt_logprobs=2, num_logprobs=1, chunk=chunk)])[0]
    parts = [result.prompt_logprobs for result in voice.results if result.prompt_logprobs is not None]
    chosen = [value for part in parts for value in unpack_floats(part.chosen)]
    top_ids = [value for part in parts for value in unpack_ints(part.top_ids)]
    expected = torch.stack([voice.logits[position] for position in range(299)]).log_softmax(-1)
    targets = torch.tensor(prompt[1:])
    torch.testing.assert_close(torch.tensor(chosen), expected.gather(1, targets[:, None])[:, 0])
    assert torch.equal(torch.tensor(top_ids).view(-1, 2), expected.topk(2).indices)


def test_a_prompt_that_cannot_be_scored_fails_its_row_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = engine._decoder.logits

    def overflowing(hidden: torch.Tensor, segments: Any, lora: Any) -> torch.Tensor:
        scores = logits(hidden, segments, lora)
        return scores.index_fill(0, torch.tensor([1]), torch.inf) if len(hidden) == 7 else scores

    monkeypatch.setattr(engine._decoder, "logits", overflowing)
    voices = [Voice(PROMPT[:9], max_tokens=2, num_prompt_logprobs=2, chunk=chunk) for chunk in (8, 7)]
    Driver(engine).run(voices)
    assert [bool(result.error) for voice in voices for result in voice.results] == [False] * 3 + [True]
    assert "not finite" in (voices[1].results[0].error or "")


def test_output_logprobs_are_reported_for_sampled_tokens(engine: Engine) -> None:
    voice = Driver(engine).run([Voice(PROMPT, 4, num_logprobs=3)])[0]
    reported = [result.logprobs for result in voice.results]
    best = [unpack_ints(logprobs.top_ids)[0] for logprobs in reported if logprobs]
    assert (best, [logprobs.num_top for logprobs in reported if logprobs]) == (voice.output, [3] * 4)


def test_penalties_see_the_tokens_of_the_row(engine: Engine) -> None:
    forbid_repeats = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    plain, varied = Driver(engine).run([Voice([5] * 4, 60), Voice([5] * 4, 60, sampling=forbid_repeats)])
    assert len(set(varied.output)) > len(set(plain.output))


def test_an_unloaded_adapter_changes_nothing_any_more(engine: Engine, tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path / "base", tiny_models.tiny_config("llama"))
    adapter = tiny_models.save_adapter(tmp_path / "adapter", tmp_path / "base")
    version = AdapterWorker(tmp_path / "base", tmp_path / "store", "float32").prepare("adapter", adapter)
    (base,) = Driver(engine).run([Voice(PROMPT)])
    engine.load_adapter(2, 0, version.path)
    (adapted,) = Driver(engine).run([Voice(PROMPT, adapter_slot=2)])
    engine.unload_adapter(2)
    (unloaded,) = Driver(engine).run([Voice(PROMPT, adapter_slot=2)])
    assert adapted.output != base.output == unloaded.output


def test_a_version_is_staged_placed_and_moved_between_steps_and_stays_what_it_is(
    engine: Engine, tmp_path: Path
) -> None:
    tiny_models.save_model(tmp_path / "base", tiny_models.tiny_config("llama"))
    adapter = tiny_models.save_adapter(tmp_path / "adapter", tmp_path / "base")
    version = AdapterWorker(tmp_path / "base", tmp_path / "store", "float32").prepare("adapter", adapter)
    engine.load_adapter(1, 0, version.path)
    (expected,) = Driver(engine).run([Voice(PROMPT, adapter_slot=1)])

    staged = engine.stage_adapter(version.path)
    assert staged.num_bytes == version.num_bytes
    engine.place_adapter(3, 256 * 13, staged)
    (placed,) = Driver(engine).run([Voice(PROMPT, adapter_slot=3)])
    engine.unload_adapter(1)
    engine.move_adapter(3, 256)
    (moved,) = Driver(engine).run([Voice(PROMPT, adapter_slot=3)])
    assert expected.output == placed.output == moved.output


def test_limits_and_info_describe_the_engine(engine: Engine) -> None:
    limits = {"num_blocks": 256, "block_size": 16, "max_context": 512, "vocab_size": 199, "num_adapter_slots": 8}
    limits |= {"max_steps_in_flight": 1, "max_draft_nodes": 64}
    assert msgspec.structs.asdict(engine.limits) == limits
    info = dataclasses.asdict(engine.info)
    assert (info["dtype"], info["device"], info["eos_token_ids"]) == ("float32", "cpu", ())
    assert (info["num_parameters"] > 50_000, info["num_adapter_bytes"]) == (True, 2**20)


def test_the_cache_fills_its_byte_budget_and_bounds_the_context(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, tiny_models.tiny_config("llama"))
    one_block = 2 * 2 * 24 * 16 * 4  # keys and values, layers, their width, positions, bytes
    limits = engine_for(tmp_path, num_blocks=None, num_kv_bytes=3 * one_block + 5).limits
    assert (limits.num_blocks, limits.max_context) == (3, 48)
    with pytest.raises(ConfigInvalid, match=f"one takes {one_block} bytes"):
        engine_for(tmp_path, num_blocks=None, num_kv_bytes=one_block - 1)


def test_the_probe_says_whether_rows_are_invariant(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, tiny_models.tiny_config("llama"))
    assert engine_for(tmp_path, is_invariant=None, dtype="bfloat16").info.is_invariant
    assert not engine_for(tmp_path, is_invariant=False, dtype="bfloat16").info.is_invariant
