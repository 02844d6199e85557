"""PEFT directories are read as PEFT itself reads them: same modules, same updates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peft_fixture
from descant.adapters.formats.read import read_adapter
from descant.contract.child_config import AdapterLimits
from descant.model.base_model import BaseModel

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CONFIGS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "target_modules": ["q_proj"]},
    "rank 3, all by list": {"r": 3, "lora_alpha": 7, "target_modules": ALL},
    "rank 64": {"r": 64, "lora_alpha": 16, "target_modules": ["down_proj", "o_proj"]},
    "no targets": {"r": 4},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "regex": {"r": 4, "target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj"},
    "regex with repeats": {"r": 4, "target_modules": r".*layers.*(gate|down)_proj"},
    "longer suffix": {"r": 4, "target_modules": ["self_attn.v_proj", "mlp.up_proj"]},
    "whole name": {"r": 4, "target_modules": ["model.layers.1.self_attn.q_proj"]},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "rslora": {"r": 16, "lora_alpha": 12, "use_rslora": True, "target_modules": ["q_proj"]},
    "rank pattern": {"r": 8, "target_modules": ALL, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}},
    "first key wins": {"r": 8, "target_modules": ALL, "rank_pattern": {".*[qk]_proj": 2, "q_proj": 6}},
    "regex keys": {"r": 8, "target_modules": ALL, "rank_pattern": {r"model.layers.\d.self_attn.[qk]_proj": 3}},
    "anchored key": {"r": 8, "target_modules": ALL, "rank_pattern": {r"^model.layers.0.mlp.up_proj": 3}},
    "alpha pattern": {"r": 8, "target_modules": ALL, "alpha_pattern": {"layers.0.mlp.down_proj": 3, "v_proj": 99}},
    "rslora, patterns": {
        "r": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 16},
        "alpha_pattern": {"q_proj": 12},
    },
    "exclude list": {"r": 4, "target_modules": ALL, "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "exclude regex": {"r": 4, "target_modules": ALL, "exclude_modules": r".*\.0\..*"},
    "all-linear but one": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "one layer": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers, pattern": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "layers, patterns": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "whole name despite layers": {
        "r": 4,
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "dropout": {"r": 4, "lora_dropout": 0.5, "target_modules": ["q_proj"]},
    "init gaussian": {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["q_proj"]},
    "init orthogonal": {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]},
    "init mica": {"r": 4, "init_lora_weights": "mica", "target_modules": ["q_proj"]},
    "init false": {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in CONFIGS), ("qwen2", "no targets"), ("qwen2", "all-linear"), ("qwen2", "head")],
)
def test_every_module_gets_the_update_that_peft_gives_it(family: str, name: str, tmp_path: Path) -> None:
    hf_base = peft_fixture.tiny_base(family)
    hf_base.save_pretrained(tmp_path / "base")
    directory = peft_fixture.save_peft(hf_base, tmp_path / "adapter", **CONFIGS[name])

    adapter = read_adapter("a", directory, BaseModel.open(tmp_path / "base"), AdapterLimits())

    expected = peft_fixture.peft_deltas(hf_base, directory)
    assert set(adapter.factors) == set(expected)
    for module, pair in adapter.factors.items():
        torch.testing.assert_close(pair.scaled_b().double() @ pair.a.double(), expected[module], rtol=1e-6, atol=1e-6)


def test_factors_are_those_of_the_file_and_scalings_are_apart(tmp_path: Path) -> None:
    hf_base = peft_fixture.tiny_base()
    hf_base.save_pretrained(tmp_path / "base")
    directory = peft_fixture.save_peft(hf_base, tmp_path / "adapter", r=3, lora_alpha=1, target_modules=["q_proj"])
    tensors = load_file(directory / peft_fixture.TENSORS)

    adapter = read_adapter("a", directory, BaseModel.open(tmp_path / "base"), AdapterLimits())

    for name, pair in adapter.factors.items():
        assert torch.equal(pair.a, tensors[f"{peft_fixture.PREFIX}{name}.lora_A.weight"])
        assert torch.equal(pair.b, tensors[f"{peft_fixture.PREFIX}{name}.lora_B.weight"])
        assert pair.scaling == torch.tensor(1 / 3, dtype=torch.float32).item()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (peft_fixture.PREFIX, ""),
        (peft_fixture.PREFIX, peft_fixture.PREFIX * 2),
        (".weight", ".default.weight"),
    ],
    ids=["no prefix", "prefix twice", "adapter name"],
)
def test_names_of_other_producers_mean_the_same_modules(old: str, new: str, tmp_path: Path) -> None:
    hf_base = peft_fixture.tiny_base()
    hf_base.save_pretrained(tmp_path / "base")
    directory = peft_fixture.save_peft(hf_base, tmp_path / "adapter", r=4, target_modules=ALL)
    base = BaseModel.open(tmp_path / "base")
    expected = read_adapter("a", directory, base, AdapterLimits()).factors

    found = read_adapter("a", peft_fixture.rename_tensors(directory, old, new), base, AdapterLimits()).factors

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].b, expected[name].b) for name in expected)


@pytest.mark.parametrize(
    ("saved", "written"), [("all-linear", "All-Linear"), (["q_proj", "v_proj"], None)], ids=["all-linear", "null"]
)
def test_short_forms_of_targets_mean_what_peft_makes_of_them(saved: Any, written: Any, tmp_path: Path) -> None:
    hf_base = peft_fixture.tiny_base()
    hf_base.save_pretrained(tmp_path / "base")
    directory = peft_fixture.save_peft(hf_base, tmp_path / "adapter", r=2, target_modules=saved)
    peft_fixture.edit_config(directory, target_modules=written)

    adapter = read_adapter("a", directory, BaseModel.open(tmp_path / "base"), AdapterLimits())

    assert set(adapter.factors) == set(peft_fixture.peft_deltas(hf_base, directory))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_other_dtypes_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    hf_base = peft_fixture.tiny_base()
    hf_base.save_pretrained(tmp_path / "base")
    directory = peft_fixture.save_peft(hf_base, tmp_path / "adapter", r=1, lora_alpha=1, target_modules=["lm_head"])
    a = torch.randn(1, 32, dtype=dtype)
    peft_fixture.edit_tensors(directory, lm_head__lora_A__weight=a)

    adapter = read_adapter("a", directory, BaseModel.open(tmp_path / "base"), AdapterLimits())

    assert torch.equal(adapter.factors["lm_head"].a, a.float())


@pytest.mark.parametrize("tied", [False, True])
def test_copies_of_the_base_s_own_embeddings_change_nothing(tied: bool, tmp_path: Path) -> None:
    hf_base = peft_fixture.tiny_base("qwen2", tie_word_embeddings=tied)
    hf_base.save_pretrained(tmp_path / "base")
    directory = peft_fixture.save_peft(hf_base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    embedding, head = hf_base.get_input_embeddings().weight, hf_base.get_output_embeddings().weight
    copies = {"model__embed_tokens__weight": embedding.clone(), "lm_head__weight": head.clone()}
    peft_fixture.edit_tensors(directory, **copies)

    adapter = read_adapter("a", directory, BaseModel.open(tmp_path / "base"), AdapterLimits())

    assert len(adapter.factors) == 2


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_the_head_of_a_tied_base_may_be_adapted(tmp_path: Path) -> None:
    hf_base = peft_fixture.tiny_base("qwen2", tie_word_embeddings=True)
    hf_base.save_pretrained(tmp_path / "base")
    directory = peft_fixture.save_peft(hf_base, tmp_path / "adapter", r=4, target_modules=["lm_head"])

    adapter = read_adapter("a", directory, BaseModel.open(tmp_path / "base"), AdapterLimits())

    assert list(adapter.factors) == ["lm_head"]
