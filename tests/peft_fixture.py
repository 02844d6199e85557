"""Tiny base models and PEFT adapters with random weights, made by Transformers and PEFT themselves."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

_SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "eos_token_id": None,
    "bos_token_id": None,
}
CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def tiny_base(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Write a float32 base with large random weights, so that every adapter changes its output."""
    torch.default_generator.manual_seed(0)
    shape = _SHAPE | changes
    model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    return model.eval()


def save_peft(base: PreTrainedModel, directory: Path, seed: int = 1, **config: Any) -> Path:
    """Save a new PEFT adapter with random B in `directory`, without training."""
    torch.default_generator.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory, save_embedding_layers="lm_head" in (config.get("target_modules") or ()))
    return directory


def peft_deltas(base: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    """Return PEFT's own change of each module's weight, float64, by module name."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), directory).double()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix(PREFIX): layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def edit_config(directory: Path, **changes: Any) -> Path:
    """Overwrite keys of a saved adapter's config."""
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def edit_tensors(directory: Path, **changes: Tensor | None) -> Path:
    """Overwrite, add or (None) remove tensors of a saved adapter; `__` in a name stands for a dot."""
    tensors = load_file(directory / TENSORS)
    for key, value in changes.items():
        name = PREFIX + key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / TENSORS)
    return directory


def rename_tensors(directory: Path, old: str, new: str) -> Path:
    """Replace `old` by `new` in every tensor's name."""
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(directory / TENSORS).items()}
    save_file(tensors, directory / TENSORS)
    return directory
