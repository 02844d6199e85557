"""Adapters beyond plain LoRA are refused by name; broken or hostile ones are refused before they can do harm."""

import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

import peft_fixture
from descant.adapters.formats.read import read_adapter
from descant.contract.child_config import AdapterLimits
from descant.model.base_model import BaseModel
from descant_client.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported
from peft_fixture import TENSORS, edit_config, edit_tensors

LAYER = "model__layers__0__self_attn__q_proj__"
LIMITS = AdapterLimits(max_rank=64, max_file_bytes=1 << 20, pattern_budget_s=0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = tmp_path_factory.mktemp("base")
    peft_fixture.tiny_base().save_pretrained(directory)
    return BaseModel.open(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    return peft_fixture.save_peft(
        peft_fixture.tiny_base(), directory, r=4, target_modules=["q_proj", "v_proj", "lm_head"]
    )


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


UNSUPPORTED_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "PEFT method IA3"),
    "dora": ({"use_dora": True}, "use_dora"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "bias all": ({"bias": "all"}, "bias 'all'"),
    "bias lora_only": ({"bias": "lora_only"}, "bias 'lora_only'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "target_parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "weight tying": ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "monteclora": ({"monteclora_config": {"num_samples": 4}}, "monteclora_config"),
    "velora": ({"velora_config": {"num_groups": 4}}, "velora_config"),
    "megatron": ({"megatron_config": {"tensor_model_parallel_size": 2}}, "megatron_config"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa'"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "'olora'"),
    "corda": ({"init_lora_weights": "corda"}, "'corda'"),
    "loftq": ({"init_lora_weights": "loftq"}, "'loftq'"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
    "unknown key": ({"new_maths": 2}, "'new_maths'"),
    "embedding in list": ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
    "embedding in regex": ({"target_modules": ".*(q_proj|embed_tokens)"}, "model.embed_tokens"),
}


@pytest.mark.parametrize(("changes", "feature"), UNSUPPORTED_KEYS.values(), ids=UNSUPPORTED_KEYS)
def test_a_feature_in_the_config_is_refused_by_name(
    changes: dict[str, Any], feature: str, adapter: Path, base: BaseModel
) -> None:
    with pytest.raises(AdapterUnsupported) as caught:
        read_adapter("mine", edit_config(adapter, **changes), base, LIMITS)

    assert feature in caught.value.feature
    assert caught.value.adapter == "mine"


UNSUPPORTED_TENSORS: dict[str, tuple[str, str]] = {
    "dora": (LAYER + "lora_magnitude_vector", "DoRA"),
    "embedding": ("model__embed_tokens__lora_embedding_A", "LoRA on the input embedding"),
    "lora_bias": (LAYER + "lora_B__bias", "a bias on lora_B"),
    "trainable tokens": ("model__embed_tokens__token_adapter__trainable_tokens_delta", "trained token embeddings"),
    "kasa": (LAYER + "lora_diag", "KaSA"),
    "bias": (LAYER + "base_layer__bias", "trained biases"),
    "resized embedding": ("model__embed_tokens__weight", "its own embedding or head"),
    "embedding copy": ("model__embed_tokens__base_layer__weight", "its own embedding or head"),
    "saved head": ("lm_head__weight", "its own embedding or head"),
    "saved module": ("model__norm__modules_to_save__weight", "fully trained modules"),
    "anything else": ("model__norm__weight", "the unknown tensor"),
}


@pytest.mark.parametrize(("tensor", "feature"), UNSUPPORTED_TENSORS.values(), ids=UNSUPPORTED_TENSORS)
def test_a_feature_that_only_tensors_show_is_refused_by_name(
    tensor: str, feature: str, adapter: Path, base: BaseModel
) -> None:
    with pytest.raises(AdapterUnsupported) as caught:
        read_adapter("a", edit_tensors(adapter, **{tensor: torch.ones(4)}), base, LIMITS)

    assert caught.value.feature.startswith(feature)
    assert peft_fixture.PREFIX + tensor.replace("__", ".") in caught.value.feature


@pytest.mark.parametrize("rows", [96, 97])
def test_a_head_that_is_not_the_base_s_own_is_refused(rows: int, adapter: Path, base: BaseModel) -> None:
    edit_tensors(adapter, lm_head__base_layer__weight=torch.randn(rows, 32))

    with pytest.raises(AdapterUnsupported, match="other than the base's"):
        read_adapter("a", adapter, base, LIMITS)


def test_a_pickle_is_refused_by_its_file_name(adapter: Path, base: BaseModel) -> None:
    (adapter / TENSORS).rename(adapter / "adapter_model.bin")

    with pytest.raises(AdapterUnsupported, match=r"adapter_model\.bin"):
        read_adapter("a", adapter, base, LIMITS)


@pytest.mark.parametrize("value", [None, False, {}, [], "none", 0])
def test_an_unknown_key_that_is_off_is_ignored(value: object, adapter: Path, base: BaseModel) -> None:
    assert read_adapter("a", edit_config(adapter, new_maths=value), base, LIMITS).factors


INVALID_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no method": ({"peft_type": None}, "no peft_type"),
    "rank 0": ({"r": 0}, "rank 0"),
    "rank over limit": ({"r": 65}, "1 to 64"),
    "rank in pattern": ({"rank_pattern": {"q_proj": -1}}, "rank -1"),
    "rank is text": ({"r": "8"}, "cannot be read"),
    "alpha null": ({"lora_alpha": None}, "cannot be read"),
    "targets nothing": ({"target_modules": ["c_attn"]}, "selects no linear"),
    "word as regex": ({"target_modules": "q_proj"}, "selects no linear"),
    "bad regex": ({"target_modules": "(q_proj"}, "no expression"),
    "long regex": ({"target_modules": "q" * 4097}, "4096"),
    "layers with regex": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
    "pattern without layers": ({"layers_pattern": "layers"}, "layers_pattern"),
    "rank unlike tensors": ({"r": 5}, "[5, 32]"),
    "more modules than tensors": ({"target_modules": ["q_proj", "v_proj", "k_proj", "lm_head"]}, "k_proj"),
    "fewer modules than tensors": ({"target_modules": ["q_proj", "lm_head"]}, "does not target"),
    "scaling overflows": ({"lora_alpha": 1e300}, "not finite"),
}


@pytest.mark.parametrize(("changes", "reason"), INVALID_CONFIGS.values(), ids=INVALID_CONFIGS)
def test_a_config_that_does_not_fit_is_invalid(
    changes: dict[str, Any], reason: str, adapter: Path, base: BaseModel
) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter("a", edit_config(adapter, **changes), base, LIMITS)

    assert reason in caught.value.reason


EVIL = {"exponential": "(.*.*)*#", "polynomial": ".*" * 40 + "#", "alternatives": "(m|m)(o|o|.)*(.|.)*(.|.|.)*#"}


@pytest.mark.parametrize("pattern", EVIL.values(), ids=EVIL)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_a_pattern_that_runs_forever_is_stopped(key: str, pattern: str, adapter: Path, base: BaseModel) -> None:
    changes: dict[str, Any] = {"rank_pattern": {key: {pattern: 2}}, "layers_pattern": {"layers_to_transform": [0]}}
    edit_config(adapter, **({key: pattern} | changes.get(key, {})))

    limits = msgspec.structs.replace(LIMITS, pattern_budget_s=0.1)  # the patterns would take hours
    with pytest.raises(AdapterInvalid, match="take longer than"):
        read_adapter("a", adapter, base, limits)


INVALID_TENSORS: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "missing A": (LAYER + "lora_A__weight", None, "lora_A of model.layers.0.self_attn.q_proj"),
    "missing B": (LAYER + "lora_B__weight", None, "lora_B of model.layers.0.self_attn.q_proj"),
    "A of another width": (LAYER + "lora_A__weight", torch.ones(4, 64), "[4, 64]"),
    "B of another height": (LAYER + "lora_B__weight", torch.ones(64, 4), "[64, 4]"),
    "B transposed": (LAYER + "lora_B__weight", torch.ones(4, 32), "[4, 32]"),
    "empty": (LAYER + "lora_A__weight", torch.ones(0), "[0]"),
    "not a number": (LAYER + "lora_A__weight", torch.full((4, 32), torch.nan), "not finite"),
    "infinite": (LAYER + "lora_B__weight", torch.full((32, 4), -torch.inf), "not finite"),
    "integers": (LAYER + "lora_A__weight", torch.ones(4, 32, dtype=torch.int64), "int64"),
    "third layer": ("model__layers__2__self_attn__q_proj__lora_A__weight", torch.ones(4, 32), "does not have"),
    "same twice": (LAYER + "lora_A__default__weight", torch.ones(4, 32), "both mean"),
    "long name": ("x" * 600, torch.ones(1), "characters"),
}


@pytest.mark.parametrize(("tensor", "value", "reason"), INVALID_TENSORS.values(), ids=INVALID_TENSORS)
def test_tensors_that_do_not_fit_are_invalid(
    tensor: str, value: torch.Tensor | None, reason: str, adapter: Path, base: BaseModel
) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter("a", edit_tensors(adapter, **{tensor: value}), base, LIMITS)

    assert reason in caught.value.reason


def test_an_adapter_of_another_model_is_invalid(base: BaseModel, tmp_path: Path) -> None:
    other = peft_fixture.tiny_base(hidden_size=64, num_attention_heads=8)
    directory = peft_fixture.save_peft(other, tmp_path, r=4, target_modules=["q_proj"])

    with pytest.raises(AdapterInvalid, match=r"\[4, 64\]; its config and this base model need \[4, 32\]"):
        read_adapter("a", directory, base, LIMITS)


BROKEN_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "header cut": lambda data: data[:20],
    "trailing bytes": lambda data: data + b"0",
    "huge header": lambda data: struct.pack("<Q", 1 << 60) + data[8:],
    "pickle": lambda data: pickle.dumps({"a": 1}),
    "json": lambda data: b'{"a": 1}',
}


@pytest.mark.parametrize("breaking", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_file_that_is_no_whole_safetensors_is_invalid(
    breaking: Callable[[bytes], bytes], adapter: Path, base: BaseModel
) -> None:
    path = adapter / TENSORS
    path.write_bytes(breaking(path.read_bytes()))

    with pytest.raises(AdapterInvalid, match="no readable safetensors"):
        read_adapter("a", adapter, base, LIMITS)


def test_a_file_over_the_limit_is_too_large(adapter: Path, base: BaseModel) -> None:
    save_file({"x": torch.zeros(1 << 18)}, adapter / TENSORS)

    with pytest.raises(AdapterTooLarge) as caught:
        read_adapter("a", adapter, base, LIMITS)

    assert caught.value.max_bytes == 1 << 20


@pytest.mark.parametrize("text", ["", "{", "[]", '{"peft_type": "LORA", "r": NaN}', '"' + "x" * (5 << 20), "[" * 10**6])
def test_a_config_that_is_no_json_object_is_invalid(text: str, adapter: Path, base: BaseModel) -> None:
    (adapter / "adapter_config.json").write_text(text)

    with pytest.raises(AdapterInvalid):
        read_adapter("a", adapter, base, LIMITS)


@pytest.mark.parametrize("name", ["adapter_config.json", TENSORS])
def test_a_missing_file_is_named(name: str, adapter: Path, base: BaseModel) -> None:
    (adapter / name).unlink()

    with pytest.raises(AdapterInvalid, match=name):
        read_adapter("a", adapter, base, LIMITS)


def test_a_missing_directory_is_named(tmp_path: Path, base: BaseModel) -> None:
    with pytest.raises(AdapterInvalid, match="nowhere"):
        read_adapter("a", tmp_path / "nowhere", base, LIMITS)
