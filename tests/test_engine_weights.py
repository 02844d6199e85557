"""Checkpoints are read completely or refused, with a reason that names the tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from descant.engine.weights import DecoderWeights, load_weights
from descant.model.arch import from_hf
from descant_client.errors import ModelInvalid
from descant_kernels import linear

HEAD, DOWN = "lm_head.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tiny_models.save_model(tmp_path, tiny_models.tiny_config("qwen2"))
    return tmp_path


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> DecoderWeights:
    return load_weights(directory, from_hf(directory), dtype, torch.device("cpu"), **options)


def edit(directory: Path, **changes: torch.Tensor | None) -> None:
    """Overwrite, add or (None) remove tensors; `__` in a name stands for a dot."""
    tensors = load_file(directory / "model.safetensors")
    for key, tensor in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if tensor is not None:
            tensors[key.replace("__", ".")] = tensor
    save_file(tensors, directory / "model.safetensors")


def test_query_key_and_value_are_one_linear_with_their_biases(model_dir: Path) -> None:
    stored = load_file(model_dir / "model.safetensors")
    names = [f"model.layers.1.self_attn.{letter}_proj" for letter in "qkv"]
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([x @ stored[f"{n}.weight"].T + stored[f"{n}.bias"] for n in names], dim=1)
    torch.testing.assert_close(linear(x, load(model_dir).layers[1].qkv), expected)


def test_every_parameter_is_counted_once(model_dir: Path) -> None:
    stored = load_file(model_dir / "model.safetensors")
    assert load(model_dir).num_parameters == sum(tensor.numel() for tensor in stored.values())


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    model = tiny_models.save_model(tmp_path, tiny_models.tiny_config("llama"), max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path).embedding, model.model.embed_tokens.weight)


def test_tensors_are_converted_to_the_serving_dtype(model_dir: Path) -> None:
    weights = load(model_dir, torch.bfloat16)
    assert (weights.embedding.dtype, weights.lm_head.dtype) == (torch.bfloat16, torch.bfloat16)
    assert weights.layers[0].input_norm.dtype == torch.bfloat16


def test_progress_rises_to_one(model_dir: Path) -> None:
    fractions: list[float] = []
    load(model_dir, on_progress=fractions.append)
    assert fractions == sorted(fractions)
    assert (0 < fractions[0] < 0.1, fractions[-1]) == (True, 1.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__layers__1__mlp__down_proj__weight": None}, f"{DOWN} is missing"),
        ({"model__layers__1__mlp__down_proj__weight": torch.zeros(48, 79)}, f"{DOWN} has shape"),
        ({"lm_head__weight": torch.zeros(199, 48, dtype=torch.int8)}, f"{HEAD} has dtype int8"),
        ({"model__layers__1__self_attn__o_proj__bias": torch.zeros(48)}, "o_proj.bias is not part of the model"),
        ({"model__layers__2__input_layernorm__weight": torch.zeros(48)}, "layers.2.input_layernorm.weight is not"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(model_dir: Path, changes: dict[str, Any], reason: str) -> None:
    edit(model_dir, **changes)
    with pytest.raises(ModelInvalid) as caught:
        load(model_dir)
    assert reason in caught.value.reason


def test_stored_rotary_tables_are_harmless(model_dir: Path) -> None:
    edit(model_dir, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(6))
    load(model_dir)


def test_a_tied_head_may_be_stored_too_if_it_is_the_embedding(tmp_path: Path) -> None:
    model = tiny_models.save_model(tmp_path, tiny_models.tiny_config("llama", tie_word_embeddings=True))
    embedding = model.model.embed_tokens.weight.detach().clone()
    edit(tmp_path, lm_head__weight=embedding)
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x, load(tmp_path).lm_head), x @ embedding.T)
    edit(tmp_path, lm_head__weight=embedding + 1)
    with pytest.raises(ModelInvalid, match=r"lm_head\.weight differs"):
        load(tmp_path)


def test_a_directory_without_tensors_and_a_broken_file_are_refused(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelInvalid, match=r"model\.safetensors cannot be read"):
        load(model_dir)
    path.unlink()
    with pytest.raises(ModelInvalid, match=r"neither model\.safetensors nor"):
        load(model_dir)


@pytest.mark.parametrize("name", ["../model.safetensors", "weights.bin"])
def test_an_index_may_only_name_safetensors_beside_it(model_dir: Path, name: str) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "elsewhere.safetensors")
    (model_dir / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"lm_head.weight": "{name}"}}}}')
    with pytest.raises(ModelInvalid, match="weight_map"):
        load(model_dir)
