"""Models and adapters with random weights, as ordinary files. The cost of a step does not depend on the values.

Prompts are token ids. The tokenizer has a word for each id, so that the server has text to send.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from descant.model.arch import LoraModule, from_hf, lora_modules

FILES_VERSION = 1  # part of every directory's name: raise it when other files are written


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 model: biases on q, k and v, tied embeddings. Sizes in elements."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 32_768

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def modules(self) -> tuple[LoraModule, ...]:
        """The modules that adapters change: every linear but the head."""
        return tuple(
            LoraModule(name.removesuffix(".weight"), size[1], size[0])
            for name, size in tensor_shapes(self).items()
            if name.endswith("_proj.weight")
        )

    @property
    def num_parameters(self) -> int:
        """Number of parameters that a decode step reads, the tied embedding counted once."""
        return sum(_numel(shape) for shape in tensor_shapes(self).values())


QWEN_05B = Shape("qwen2.5-0.5b", 896, 4864, 24, 14, 2, 151_936)
CHECK = Shape("check", 896, 1216, 3, 14, 2, 1024, 512)
"""Small enough to run in float32 at once, with the heads of the real one."""


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its name in the checkpoint."""
    hidden, inner, kv = shape.hidden_size, shape.intermediate_size, shape.kv_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    layers = {f"model.layers.{i}.{name}": size for i in range(shape.num_hidden_layers) for name, size in layer.items()}
    return {"model.embed_tokens.weight": (shape.vocab_size, hidden), **layers, "model.norm.weight": (hidden,)}


def num_adapter_parameters(modules: Sequence[LoraModule], rank: int) -> int:
    """Return the elements of A and B of all modules together."""
    return sum(rank * (module.in_features + module.out_features) for module in modules)


def floor_tokens_per_s(num_rows: int, num_bytes: int, bandwidth: float) -> float:
    """Return the tokens per second of a decode step that only reads `num_bytes`, with a token for each row."""
    return num_rows * bandwidth / num_bytes


def checkpoint(cache: Path, shape: Shape) -> Path:
    """Return the directory of a bfloat16 checkpoint, written if it is not there yet."""
    return _once(cache, shape.name, asdict(shape), lambda path: write_checkpoint(path, shape))


def markov_checkpoint(cache: Path, shape: Shape) -> Path:
    """Return a checkpoint of the same cost in which each token determines the next: attention adds zero."""
    content = asdict(shape) | {"attends": False}
    return _once(cache, f"{shape.name}-markov", content, lambda path: write_checkpoint(path, shape, attends=False))


def adapters(cache: Path, model_dir: Path, rank: int, num: int) -> list[Path]:
    """Return directories of bfloat16 PEFT adapters for all seven projections, each written if it is not there yet."""
    modules = projections(model_dir)
    return [
        _once(
            cache,
            f"adapter-r{rank}-{seed}",
            {"model": model_dir.name, "rank": rank, "seed": seed},
            lambda path, seed=seed: write_adapter(path, modules, rank, seed, torch.bfloat16),
        )
        for seed in range(num)
    ]


def projections(model_dir: Path) -> tuple[LoraModule, ...]:
    """Return the modules of a model that adapters change: every linear but the head."""
    return lora_modules(from_hf(model_dir))[:-1]


def write_config(directory: Path, shape: Shape) -> None:
    """Write `config.json`. There is no end token."""
    sizes = {key: value for key, value in asdict(shape).items() if key != "name"}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        **sizes,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def write_checkpoint(directory: Path, shape: Shape, *, attends: bool = True) -> None:
    """Write config, tokenizer and random weights into a directory that exists.

    Unless it `attends`, the outputs of attention are zero.
    """
    write_config(directory, shape)
    vocabulary = {f"t{i}": i for i in range(shape.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _random_tensor(name, size, generator) for name, size in tensor_shapes(shape).items()}
    if not attends:
        tensors |= {name: torch.zeros_like(one) for name, one in tensors.items() if "o_proj" in name}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def write_adapter(directory: Path, modules: Sequence[LoraModule], rank: int, seed: int, dtype: torch.dtype) -> None:
    """Write a PEFT adapter that changes a model's answers. Replaces files in `directory`, which exists."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        prefix = f"base_model.model.{module.name}"
        a = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
        b = torch.randn(module.out_features, rank, generator=generator) * 0.1
        tensors |= {f"{prefix}.lora_A.weight": a.to(dtype), f"{prefix}.lora_B.weight": b.to(dtype)}
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({module.name.rpartition(".")[2] for module in modules})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def random_prompts(num: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return prompts of token ids without common prefixes, so that no cache can save work."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(num)]


def _random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return a random tensor. Its values are large, to keep logits apart, so that greedy answers can be compared."""
    values = torch.randn(size, generator=generator)
    if "embed_tokens" in name:
        values *= 0.03
    elif "norm" in name:
        values = 1.0 + 0.1 * values
    else:
        values *= 1.7 * size[-1] ** -0.5
    return values.to(torch.bfloat16)


def _once(cache: Path, name: str, content: dict[str, object], write: Callable[[Path], None]) -> Path:
    """Return a directory of the cache, complete or not yet there. `content` is the data that its files depend on."""
    digest = hashlib.sha256(json.dumps([FILES_VERSION, content], sort_keys=True).encode()).hexdigest()[:8]
    path = cache / f"{name}-{digest}"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            made = Path(unfinished) / "made"
            made.mkdir()
            write(made)
            os.rename(made, path)
    return path


def _numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()
