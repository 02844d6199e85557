"""A sequence's logits and tokens do not change, by a bit, with the rest of its batch or the chunks of its prompt."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from descant.adapters.prepare import AdapterWorker
from descant.engine.runner import Engine
from descant_client.protocol import SamplingParams
from engine_driver import Driver, Voice, engine_for

SAMPLED = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 40, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


QUICK = [("llama", "float32"), ("llama", "bfloat16"), ("mistral", "float32"), ("qwen3", "bfloat16")]
THOROUGH = [("mistral", "bfloat16"), ("qwen2", "float32"), ("qwen2", "bfloat16"), ("qwen3", "float32")]


@pytest.fixture(
    scope="module", params=[*QUICK, *(pytest.param(pair, marks=pytest.mark.slow) for pair in THOROUGH)], ids=" ".join
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A model with two adapters, of ranks 4 and 21, in slots 0 and 1."""
    name, dtype = request.param
    directory = tmp_path_factory.mktemp("model")
    family, changes = MODELS[name]
    tiny_models.save_model(directory / "base", tiny_models.tiny_config(family, **changes))
    engine = engine_for(directory / "base", dtype=dtype)
    load_adapters(engine, directory, dtype)
    return engine


def load_adapters(engine: Engine, directory: Path, dtype: Any) -> None:
    worker, offset = AdapterWorker(directory / "base", directory / "store", dtype), 0
    for slot, rank in enumerate((4, 21)):
        adapter = tiny_models.save_adapter(directory / f"{slot}", directory / "base", seed=slot, r=rank)
        version = worker.prepare(str(slot), adapter)
        engine.load_adapter(slot, offset, version.path)
        offset += version.num_bytes


def voice(**changes: Any) -> Voice:
    values = {"prompt": tiny_models.random_prompt(150), "max_tokens": 16, "sampling": SAMPLED, "seed": 5}
    return Voice(**values | changes)


def crowd(seed: int, count: int = 11) -> list[Voice]:
    """Return voices that start and end at different steps, of all lengths, with every adapter."""
    dice = random.Random(seed)
    return [
        Voice(
            prompt=tiny_models.random_prompt(dice.choice([1, 3, 16, 40, 129]), seed + i),
            max_tokens=dice.randint(1, 30),
            adapter_slot=dice.choice([-1, 0, 1]),
            sampling=dice.choice([SAMPLED, SamplingParams(temperature=0.0)]),
            seed=i,
            chunk=dice.choice([1, 7, 64]),
            first_step=dice.randint(0, 12),
        )
        for i in range(count)
    ]


def alone(engine: Engine, **changes: Any) -> Voice:
    return Driver(engine).run([voice(**changes)])[0]


@cache
def expected_of(engine: Engine, adapter_slot: int = -1) -> Voice:
    return alone(engine, adapter_slot=adapter_slot)


def sung(driver: Driver, voices: list[Voice], index: int) -> Voice:
    """Return one of the voices, once it has its tokens."""
    return driver.run(voices, voices[index])[index]


def assert_same(one: Voice, other: Voice) -> None:
    assert one.output == other.output
    assert one.logits.keys() == other.logits.keys()
    for position, logits in one.logits.items():
        assert logits.numpy().tobytes() == other.logits[position].numpy().tobytes(), f"position {position} differs"


@pytest.mark.parametrize("adapter_slot", [-1, 1])
def test_company_changes_nothing(engine: Engine, adapter_slot: int) -> None:
    seed = 2 + adapter_slot
    among = [*crowd(seed), voice(adapter_slot=adapter_slot, first_step=seed)]
    among[3], among[-1] = among[-1], among[3]
    assert_same(sung(Driver(engine), among, 3), expected_of(engine, adapter_slot))


def test_how_the_prompt_is_cut_changes_nothing(engine: Engine) -> None:
    for chunk in (16, 37, 128, 149):
        assert_same(alone(engine, adapter_slot=1, chunk=chunk), expected_of(engine, 1))


def test_which_blocks_hold_the_cache_changes_nothing(engine: Engine) -> None:
    shuffled = Driver(engine, lambda blocks: random.Random(3).sample(blocks, len(blocks)))
    assert_same(sung(shuffled, [*crowd(4, 3), voice()], -1), expected_of(engine))


def test_a_row_rebuilt_from_its_tokens_goes_on_as_if_nothing_had_happened(engine: Engine) -> None:
    broken_off = alone(engine, max_tokens=9)
    rebuilt = sung(Driver(engine), [*crowd(6, 3), voice(output=list(broken_off.output), chunk=50)], -1)
    assert_same(rebuilt, expected_of(engine))


@pytest.mark.slow
def test_token_by_token_is_as_good_as_all_at_once(engine: Engine) -> None:
    for adapter_slot in (-1, 0, 1):
        assert_same(alone(engine, adapter_slot=adapter_slot, chunk=1), expected_of(engine, adapter_slot))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_larger_model_on_two_threads_is_as_steady(tmp_path: Path, dtype: str) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32, "vocab_size": 4000}
    tiny_models.save_model(tmp_path / "base", tiny_models.tiny_config("llama", **shape))
    engine = engine_for(tmp_path / "base", dtype=dtype, num_threads=2)
    load_adapters(engine, tmp_path, dtype)
    expected = alone(engine, adapter_slot=1)
    for seed in range(3):
        assert_same(sung(Driver(engine), [*crowd(seed, 20), voice(adapter_slot=1)], -1), expected)
        assert_same(alone(engine, adapter_slot=1, chunk=13 * (seed + 1)), expected)
    torch.set_num_threads(1)
