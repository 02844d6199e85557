"""Small random Transformers models and PEFT adapters, saved as users save theirs: the outside judges of our tokens."""

from __future__ import annotations

import copy
import hashlib
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 199
EVERY_MODULE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A config of two layers and no end token. `changes` are keys of the family's config."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    return _CONFIGS[family](**values | changes)


def save_model(directory: Path, config: PretrainedConfig, seed: int = 0, **options: Any) -> Any:
    """Save a random float32 model and return it, ready for `reference_logits`. `options` go to `save_pretrained`."""
    torch.default_generator.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights this large keep the logits apart; the usual 0.02 would leave near ties everywhere.
            if "embed_tokens" in name:
                parameter.normal_(std=0.03)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.1)
            else:
                parameter.normal_(std=1.7 * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory, **options)
    return model.eval()


def save_adapter(directory: Path, model_dir: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random LoRA for the model in `model_dir`. `changes` are keys of PEFT's `LoraConfig`."""
    from peft import LoraConfig, get_peft_model

    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": EVERY_MODULE, "init_lora_weights": False}
    torch.default_generator.manual_seed(seed)
    adapted = get_peft_model(load_model(model_dir), LoraConfig(**values | changes))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory


def load_model(model_dir: Path) -> Any:
    """Return a new copy of the model in a directory, as Transformers loads it in float32."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.glob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    return copy.deepcopy(_load_once(model_dir, digest.digest()))


@lru_cache(4)
def _load_once(model_dir: Path, digest: bytes) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager", dtype=torch.float32).eval()


def load_adapted(model_dir: Path, adapter_dir: Path) -> Any:
    """The model in a directory with one adapter, as PEFT loads it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_model(model_dir), adapter_dir).eval()


@torch.no_grad()
def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Logits after every position, `[len(token_ids), V]` float32, from one pass without a cache."""
    return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()


@torch.no_grad()
def greedy(model: Any, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """The likeliest continuation, without a cache."""
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def random_prompt(length: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids drawn evenly."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()
