"""Medusa heads with random weights, and their directories, written without any code under test."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peft_fixture
from descant.versions.draft_heads import DraftHeads

CONFIG, TENSORS = "config.json", "medusa_lm_head.safetensors"
HIDDEN, VOCAB = 32, 96  # of `peft_fixture.tiny_base`


def random_heads(
    num_heads: int, num_layers: int, *, v1: bool, seed: int = 0, hidden: int = HIDDEN, vocab: int = VOCAB
) -> DraftHeads:
    """Return random heads with all values different."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_heads, num_layers, hidden, hidden, generator=generator)
    bias = torch.randn(num_heads, num_layers, hidden, generator=generator)
    return DraftHeads(weight, bias, torch.randn(num_heads, vocab, hidden, generator=generator) if v1 else None)


def named(heads: DraftHeads, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors with the names of Medusa's checkpoints."""
    num_heads, num_layers, _ = heads.bias.shape
    tensors: dict[str, Tensor] = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors[f"{prefix}{head}.{layer}.linear.weight"] = heads.weight[head, layer].clone()
            tensors[f"{prefix}{head}.{layer}.linear.bias"] = heads.bias[head, layer].clone()
        if heads.lm_heads is not None:
            tensors[f"{prefix}{head}.{num_layers}.weight"] = heads.lm_heads[head].clone()
    return tensors


def save_config(directory: Path, heads: DraftHeads, **changes: Any) -> None:
    """Write a config for the heads; a key whose value is `...` is left out."""
    num_heads, num_layers, _ = heads.bias.shape
    keys = {"medusa_num_heads": num_heads, "medusa_num_layers": num_layers, "base_model_name_or_path": "some/base"}
    config = {key: value for key, value in (keys | changes).items() if value is not ...}
    (directory / CONFIG).write_text(json.dumps(config))


def save_heads(directory: Path, heads: DraftHeads, prefix: str = "", file: str = TENSORS, **changes: Any) -> Path:
    """Write heads into a directory, which is created or already has other files."""
    directory.mkdir(exist_ok=True)
    save_config(directory, heads, **changes)
    save_file(named(heads, prefix), directory / file)
    return directory


def add_to_lora_file(directory: Path, heads: DraftHeads, prefix: str = "") -> Path:
    """Write heads into the file of a LoRA adapter."""
    save_config(directory, heads)
    path = directory / peft_fixture.TENSORS
    save_file(load_file(path) | named(heads, prefix), path)
    return directory


def edit_tensors(directory: Path, changes: dict[str, Tensor | None], file: str = TENSORS) -> Path:
    """Overwrite, add or (None) remove tensors of a file."""
    tensors = load_file(directory / file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / file)
    return directory


def some(heads: DraftHeads | None) -> DraftHeads:
    """Return the heads, and check that there are some."""
    assert heads is not None
    return heads


def assert_same(
    found: DraftHeads | None, expected: DraftHeads | None, dtype: torch.dtype = torch.float32
) -> DraftHeads:
    """Check that every value of `found` is the expected one, rounded to `dtype`. Return `found`."""
    found, heads = some(found), some(expected)
    assert (found.lm_heads is None) == (heads.lm_heads is None)
    for ours, theirs in zip(found.tensors(), heads.tensors(), strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.to(dtype))
    return found
