"""Configs of Transformers 4 and 5 are read as Transformers reads them; unsupported settings are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import tiny_models
from descant.model.arch import DecoderConfig, from_hf, lora_modules
from descant_client.errors import ModelInvalid

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}

QWEN_WINDOW = {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}


def read(directory: Path, generation: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    (directory / "config.json").write_text(json.dumps(BASE | changes))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return from_hf(directory)


def test_a_config_of_transformers_4_reads_like_its_successor(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = read(tmp_path, torch_dtype="bfloat16", rope_theta=5e5, rope_scaling=scaling | {"rope_type": "llama3"})
    parameters = scaling | {"rope_type": "llama3", "rope_theta": 5e5}
    assert old == read(tmp_path, dtype="bfloat16", rope_parameters=parameters)
    assert (old.dtype, old.rope.kind, old.rope.theta, old.rope.factor) == ("bfloat16", "llama3", 5e5, 8.0)


def test_the_oldest_spelling_of_rope_scaling_is_read(tmp_path: Path) -> None:
    rope = read(tmp_path, rope_scaling={"type": "linear", "factor": 2}).rope
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 2.0, 10_000.0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_writes_is_read_as_it_means_it(tmp_path: Path, family: str) -> None:
    config = tiny_models.tiny_config(family, rms_norm_eps=1e-5, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    read_back = from_hf(tmp_path)
    assert (read_back.family, read_back.num_layers, read_back.head_dim) == (family, 2, 12)
    assert (read_back.num_heads, read_back.num_kv_heads, read_back.rms_norm_eps) == (4, 2, 1e-5)
    assert read_back.tie_word_embeddings
    assert read_back.eos_token_ids == ()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_keys_left_out_mean_what_transformers_takes_for_them(tmp_path: Path, family: str) -> None:
    shape = BASE | {"num_attention_heads": 32, "hidden_size": 64 * 32, "model_type": family}
    del shape["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    ours = from_hf(tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 64)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.windows == ((theirs.sliding_window if family == "mistral" else None),) * 3
    assert (ours.bos_token_id, ours.rms_norm_eps) == (theirs.bos_token_id, theirs.rms_norm_eps)
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


def test_biases_and_head_norms_follow_the_family(tmp_path: Path) -> None:
    flags = {
        family: (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm)
        for family in ("llama", "mistral", "qwen2", "qwen3")
        for c in [read(tmp_path, model_type=family)]
    }
    assert flags["llama"] == flags["mistral"] == (False, False, False, False)
    assert flags["qwen2"] == (True, False, False, False)
    assert flags["qwen3"] == (False, False, False, True)
    llama = read(tmp_path, attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)


def test_a_null_window_sees_everything(tmp_path: Path) -> None:
    assert read(tmp_path, model_type="mistral", sliding_window=None).windows == (None, None, None)
    assert read(tmp_path, model_type="mistral", sliding_window=7).windows == (7, 7, 7)


def test_qwen_windows_begin_at_max_window_layers_unless_layer_types_say_otherwise(tmp_path: Path) -> None:
    window = {"model_type": "qwen2", "sliding_window": 8}
    assert read(tmp_path, **window).windows == (None, None, None)
    assert read(tmp_path, **window, use_sliding_window=True, max_window_layers=2).windows == (None, None, 8)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert read(tmp_path, **window, use_sliding_window=True, layer_types=kinds).windows == (8, None, None)


def test_end_tokens_are_those_of_both_files_each_once(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=7).eos_token_ids == (7,)
    assert read(tmp_path, {"eos_token_id": [9, 7]}, eos_token_id=7).eos_token_ids == (9, 7)


def test_yarn_reaches_as_far_as_its_factor(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read(tmp_path, max_position_embeddings=128, rope_scaling=yarn).max_context == 512
    assert read(tmp_path, max_position_embeddings=128).max_context == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"auto_map": {"AutoModel": "code.py"}}, "'auto_map'"),
        ({"logits_soft_cap": 30.0}, "'logits_soft_cap'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type 'linear' has no factor"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "'mrope_section'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "attention_bias": True}, "'attention_bias'"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"rope_scaling": {"rope_type": {}}}, "rope_type {}"),
        ({"layer_types": [[], {}, 1]}, "layer_types"),
        (QWEN_WINDOW | {"max_window_layers": "2"}, "max_window_layers is '2'"),
    ],
)
def test_what_could_change_the_numbers_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelInvalid) as caught:
        read(tmp_path, **changes)
    assert named in caught.value.reason


def test_a_directory_without_a_config_and_a_broken_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalid, match=r"no config\.json"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ModelInvalid, match=r"config\.json cannot be read"):
        from_hf(tmp_path)


def test_keys_that_tools_leave_in_real_configs_change_nothing(tmp_path: Path) -> None:
    plain = read(tmp_path)
    left = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": "fp16"}}
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 40, "top_p": 0.9}
    assert read(tmp_path, **left, **sampling, tokenizer_model_max_length=4096, unsloth_fixed=True) == plain


def test_adaptable_modules_are_listed_layer_by_layer_and_the_head_last(tmp_path: Path) -> None:
    modules = lora_modules(read(tmp_path, num_key_value_heads=2))
    assert len(modules) == 7 * 3 + 1
    assert modules[7] == ("model.layers.1.self_attn.q_proj", 48, 48)
    assert [module.name.rpartition(".")[2] for module in modules[14:]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "lm_head",
    ]
    assert [tuple(module[1:]) for module in modules[1:7]] == [
        (48, 24),
        (48, 24),
        (48, 48),
        (48, 80),
        (48, 80),
        (80, 48),
    ]
    assert tuple(modules[-1]) == ("lm_head", 48, 100)
