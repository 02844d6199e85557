"""The decoder agrees with Transformers and PEFT in float32: logits within 1e-4, equal greedy tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from descant.adapters.prepare import AdapterWorker
from descant.engine.rotary import rope_tables
from descant.model.arch import from_hf
from engine_driver import Driver, Voice, engine_for

TOLERANCE = 1e-4  # of logits; a smaller gap between the top two may be decided either way

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, all keys": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, untruncated": YARN | {"truncate": False, "attention_factor": 1.3},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, MHA, tied": ("llama", {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True}),
    "llama, MQA, one head size for all": ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": ROPES["linear"]}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral, window": ("mistral", {"sliding_window": 20}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, window in layer 1": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, biases, heads wider than hidden": ("qwen3", {"attention_bias": True, "head_dim": 32}),
}


def assert_says_what_the_reference_says(voice: Voice, reference: Any) -> None:
    """Check every position of the output against one pass of the reference over all of it (teacher forcing)."""
    expected = tiny_models.reference_logits(reference, voice.tokens[:-1])
    logits = torch.stack([voice.logits[position] for position in range(len(expected))])
    assert (logits - expected).abs().max() <= TOLERANCE
    best = expected[len(voice.prompt) - 1 :].topk(2)
    is_clear = best.values[:, 0] - best.values[:, 1] >= TOLERANCE
    assert torch.equal(best.indices[is_clear, 0], torch.tensor(voice.output)[is_clear])


@pytest.mark.parametrize("name", MODELS)
def test_every_family_says_what_transformers_says(tmp_path: Path, name: str) -> None:
    family, changes = MODELS[name]
    reference = tiny_models.save_model(tmp_path, tiny_models.tiny_config(family, **changes))
    prompts = [tiny_models.random_prompt(length) for length in (1, 2, 15, 64, 300)]
    for voice in Driver(engine_for(tmp_path)).run([Voice(prompt, max_tokens=24) for prompt in prompts]):
        assert_says_what_the_reference_says(voice, reference)


def test_prompts_about_as_long_as_a_tile_of_attention_are_no_special_case(tmp_path: Path) -> None:
    config = tiny_models.tiny_config("llama", num_key_value_heads=4, head_dim=16)
    reference = tiny_models.save_model(tmp_path, config)
    voices = [Voice(tiny_models.random_prompt(length)) for length in (1, 16, 17)]
    for voice in Driver(engine_for(tmp_path)).run(voices):
        assert_says_what_the_reference_says(voice, reference)


@pytest.mark.parametrize("name", ROPES)
def test_rotary_tables_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config = tiny_models.tiny_config("llama", head_dim=32, rope_parameters=ROPES[name])
    reference = tiny_models.save_model(tmp_path, config)
    cos, sin = rope_tables(from_hf(tmp_path), 400, torch.device("cpu"))
    expected_cos, expected_sin = reference.model.rotary_emb(torch.zeros(1), torch.arange(400)[None])
    torch.testing.assert_close(torch.cat([cos, cos], dim=-1), expected_cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([sin, sin], dim=-1), expected_sin[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_of_any_rank_share_a_batch_and_say_what_peft_says(tmp_path: Path, family: str) -> None:
    base = tmp_path / "base"
    tiny_models.save_model(base, tiny_models.tiny_config(family))
    engine, worker = engine_for(base), AdapterWorker(base, tmp_path / "store", "float32")
    shapes: list[dict[str, Any]] = [
        {"r": 1},
        {"r": 19, "use_rslora": True},
        {"r": 8, "target_modules": ["q_proj", "down_proj", "lm_head"], "rank_pattern": {"q_proj": 3}},
    ]
    voices, references, offset = [], [], 0
    for slot, shape in enumerate(shapes):
        adapter = tiny_models.save_adapter(tmp_path / f"adapter-{slot}", base, seed=slot, **shape)
        version = worker.prepare(f"adapter-{slot}", adapter)
        engine.load_adapter(slot, offset, version.path)
        offset += version.num_bytes
        voices += [Voice(tiny_models.random_prompt(n, slot), 24, adapter_slot=slot, chunk=16) for n in (1, 40)]
        references += [tiny_models.load_adapted(base, adapter)] * 2
    voices.insert(1, Voice(tiny_models.random_prompt(30), 24))
    references.insert(1, tiny_models.load_model(base))
    for voice, reference in zip(Driver(engine).run(voices), references, strict=True):
        assert_says_what_the_reference_says(voice, reference)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [(2, 1), (3, 1), (6, 2), (8, 8)])
@pytest.mark.parametrize("head_dim", [4, 8, 40])
def test_every_number_of_heads_says_what_transformers_says(
    tmp_path: Path, family: str, heads: tuple[int, int], head_dim: int
) -> None:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head_dim}
    config = tiny_models.tiny_config(family, **shape, hidden_size=72, intermediate_size=77)
    reference = tiny_models.save_model(tmp_path, config)
    prompts = [tiny_models.random_prompt(length) for length in (1, 16, 17, 128, 129, 255, 300)]
    for voice in Driver(engine_for(tmp_path)).run([Voice(prompt, max_tokens=24) for prompt in prompts]):
        assert_says_what_the_reference_says(voice, reference)
