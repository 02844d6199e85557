"""Base and adapter as one checkpoint: Transformers loads it, and it equals the adapted model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_models
from descant.actors.worker import Worker
from descant.adapters.prepare import AdapterWorker
from descant.contract.version import AdapterVersion
from descant.contract.worker import Exported, ExportMerged
from descant_client.errors import AdapterInvalid, InvalidRequest, ModelInvalid

WITH_HEAD = [*tiny_models.EVERY_MODULE, "lm_head"]
PROMPT = tiny_models.random_prompt(23)
INDEX = "model.safetensors.index.json"


def save_base(directory: Path, family: str = "llama", shard_size: str = "5GB", **changes: Any) -> Path:
    tiny_models.save_model(directory, tiny_models.tiny_config(family, **changes), max_shard_size=shard_size)
    return directory


def adapt(base: Path, **changes: Any) -> tuple[AdapterWorker, AdapterVersion]:
    """A worker on the base, and a version of a random adapter for it."""
    tiny_models.save_adapter(base.parent / "adapter", base, **changes)
    worker = AdapterWorker(base, base.parent / "store", "float32")
    return worker, worker.prepare("mine", base.parent / "adapter")


def load_strictly(directory: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, notes = loaded
    assert not any(notes.values()), notes
    return model.eval()


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"], ids=["one file", "many files"])
@pytest.mark.parametrize("targets", [tiny_models.EVERY_MODULE, WITH_HEAD], ids=["layers", "head too"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_the_checkpoint_is_the_adapted_model(
    family: str, tied: bool, targets: list[str], shard_size: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, shard_size, tie_word_embeddings=tied)
    worker, version = adapt(base, target_modules=targets, r=3, lora_alpha=5)
    expected = tiny_models.reference_logits(tiny_models.load_adapted(base, tmp_path / "adapter"), PROMPT)

    worker.export_merged("mine", version, tmp_path / "merged")

    model = load_strictly(tmp_path / "merged")
    torch.testing.assert_close(tiny_models.reference_logits(model, PROMPT), expected, rtol=1e-4, atol=1e-4)
    is_tied = tied and targets is not WITH_HEAD
    assert model.config.tie_word_embeddings is is_tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_peft_s_own_in_the_checkpoint_s_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    worker, version = adapt(base, target_modules=WITH_HEAD, r=3, lora_alpha=5)
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()

    worker.export_merged("mine", version, tmp_path / "merged")

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype is dtype
        assert torch.equal(tensor, expected[name]), name


def test_weights_of_many_rows_are_merged_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base")
    worker, version = adapt(base, target_modules=WITH_HEAD)
    worker.export_merged("mine", version, tmp_path / "whole")
    monkeypatch.setattr("descant.adapters.merged_checkpoint._MAX_ROWS", 7)

    worker.export_merged("mine", version, tmp_path / "parts")

    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_files_stay_as_they_were_sharded(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shard_size="60KB", tie_word_embeddings=True)
    worker, version = adapt(base, target_modules=["lm_head"])

    worker.export_merged("mine", version, tmp_path / "merged")

    before, after = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("base", "merged"))
    head_file = before["weight_map"]["model.embed_tokens.weight"]
    assert after["weight_map"] == before["weight_map"] | {"lm_head.weight": head_file}
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] + 199 * 48 * 4
    for name in set(before["weight_map"].values()) - {head_file}:
        torch.testing.assert_close(load_file(tmp_path / "merged" / name), load_file(base / name), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_tied_base_that_stores_its_head_too_is_merged_right(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    worker, version = adapt(base, target_modules=["q_proj", "lm_head"])
    expected = tiny_models.reference_logits(tiny_models.load_adapted(base, tmp_path / "adapter"), PROMPT)

    worker.export_merged("mine", version, tmp_path / "merged")

    logits = tiny_models.reference_logits(load_strictly(tmp_path / "merged"), PROMPT)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_belongs_to_the_model_is_copied_and_nothing_else(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    worker, version = adapt(base)
    copied = [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.model",
        "LICENSE",
    ]
    left = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "optimizer.pt",
        "code.py",
        ".hidden",
    ]
    for name in (*copied, *left, "old.safetensors", "pytorch_model.bin.index.json", "LICENSE.pkl"):
        (base / name).write_text(name)
    (base / ".git").mkdir()
    (base / "onnx.json").mkdir()
    (base / "linked.json").symlink_to(base / "tokenizer.json")
    os.mkfifo(base / "pipe.json")

    worker.export_merged("mine", version, tmp_path / "merged")

    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {*own, *copied, "linked.json"}
    assert (tmp_path / "merged" / "linked.json").read_text() == "tokenizer.json"
    assert not (tmp_path / "merged" / "linked.json").is_symlink()


def test_the_base_is_untouched(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    worker, version = adapt(base)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in base.iterdir()}

    for place in (base, base / "merged"):
        with pytest.raises(InvalidRequest, match="belongs to the server"):
            worker.export_merged("mine", version, place)
    worker.export_merged("mine", version, tmp_path / "merged")

    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in base.iterdir()} == before


def test_a_checkpoint_replaces_nothing_but_an_empty_directory(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    worker, version = adapt(base)
    (tmp_path / "empty").mkdir()

    worker.export_merged("mine", version, tmp_path / "empty")
    for place in ("empty", "adapter"):
        with pytest.raises(InvalidRequest, match="choose another path"):
            worker.export_merged("mine", version, tmp_path / place)

    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_checkpoint_is_told_by_place_and_size(tmp_path: Path) -> None:
    worker, version = adapt(save_base(tmp_path / "base"))

    reply = Worker(worker).handle(ExportMerged("mine", version, str(tmp_path / "merged")))

    sizes = [path.stat().st_size for path in (tmp_path / "merged").iterdir()]
    assert reply == Exported(str(tmp_path / "merged"), sum(sizes))


def test_a_sum_beyond_the_checkpoint_s_dtype_is_invalid(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(base)
    worker, version = adapt(base, lora_alpha=10_000_000)

    with pytest.raises(AdapterInvalid, match=r"mine.*proj\.weight.*float16"):
        worker.export_merged("mine", version, tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("spoil", ["lacks a tensor", "is cut off", "is gone"])
def test_a_base_that_cannot_be_read_is_said_to_be_so(spoil: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    worker, version = adapt(base)
    file = base / "model.safetensors"
    match spoil:
        case "lacks a tensor":
            tensors = load_file(file)
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, file)
        case "is cut off":
            os.truncate(file, file.stat().st_size // 2)
        case _:
            file.unlink()

    with pytest.raises(ModelInvalid):
        worker.export_merged("mine", version, tmp_path / "merged")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "store"]
