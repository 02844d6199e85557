"""The architecture of a base model, read from its Transformers files. All quirks of their configs are normalized here.

Configs of Transformers 4 and 5 are supported. A key or value that could change the numbers and is not implemented is
refused by name, and so is an unknown key: a model is served exactly or not at all. Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from descant.contract.engine import Dtype
from descant.model.config_reader import ConfigReader, read_json

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

LORA_MODULES_PER_LAYER = 7


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """The rotary embedding. Fields are those of Transformers' `rope_parameters`; None where the kind lacks them."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None  # llama3, yarn
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    attention_factor: float | None = None  # yarn, like all below
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a decoder. Sizes are in elements, `max_context` in tokens."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    windows: tuple[int | None, ...]  # per layer: positions seen, the token itself included; None = all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head
    tie_word_embeddings: bool
    dtype: Dtype  # of the checkpoint
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json, each once

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def max_context(self) -> int:
        """Maximum tokens of a sequence. YaRN extends `max_position_embeddings` if that is the trained length."""
        if self.rope.kind != "yarn":
            return self.max_position_embeddings
        reach = (self.rope.original_max_position_embeddings or 0) * (self.rope.factor or 1.0)
        return max(self.max_position_embeddings, int(reach))


class LoraModule(NamedTuple):
    """A linear that adapters may change, with its name in the checkpoint without `.weight`."""

    name: str
    in_features: int
    out_features: int


def lora_modules(config: DecoderConfig) -> tuple[LoraModule, ...]:
    """Return every module in LoRA table order: q k v o gate up down of layer i from index 7 * i, then `lm_head`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    per_layer = (
        ("self_attn.q_proj", hidden, config.q_size),
        ("self_attn.k_proj", hidden, config.kv_size),
        ("self_attn.v_proj", hidden, config.kv_size),
        ("self_attn.o_proj", config.q_size, hidden),
        ("mlp.gate_proj", hidden, inner),
        ("mlp.up_proj", hidden, inner),
        ("mlp.down_proj", inner, hidden),
    )
    layers = [
        LoraModule(f"model.layers.{i}.{name}", in_features, out_features)
        for i in range(config.num_layers)
        for name, in_features, out_features in per_layer
    ]
    return (*layers, LoraModule("lm_head", hidden, config.vocab_size))


def from_hf(directory: Path | str) -> DecoderConfig:
    """Read `config.json` and, if it exists, `generation_config.json` of a model directory.

    Raises:
        ModelInvalid: no readable config, or a key or value that this engine does not implement; the reason names it.
    """
    path = Path(directory)
    reader = ConfigReader(str(directory), read_json(path / "config.json", str(directory)))
    family = _read_family(reader)
    config = _read_decoder(reader, family, _generation_eos(path))
    reader.refuse_leftovers()
    _check_shape(config, reader)
    return config


# ---- differences between families ---------------------------------------------------------------------------------


class _Defaults(NamedTuple):
    """The values of keys that config.json omits."""

    family: Family
    architecture: str
    max_position_embeddings: int
    num_kv_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: hidden_size / num_attention_heads
    bos_token_id: int | None
    eos_token_id: int | None


_FAMILIES = {
    defaults.family: defaults
    for defaults in (
        _Defaults("llama", "LlamaForCausalLM", 2048, None, None, 1, 2),
        _Defaults("mistral", "MistralForCausalLM", 131_072, 8, None, 1, 2),
        _Defaults("qwen2", "Qwen2ForCausalLM", 32_768, 32, None, None, None),
        _Defaults("qwen3", "Qwen3ForCausalLM", 32_768, 32, 128, None, None),
    )
}

_ROPE_KEYS: dict[RopeKind, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(field.name for field in fields(RopeConfig))
    - {"theta", "kind", "low_freq_factor", "high_freq_factor"},
}
_ROPE_OPTIONAL = _ROPE_KEYS["yarn"] - {"factor"}


# ---- reading ------------------------------------------------------------------------------------------------------


def _read_family(reader: ConfigReader) -> _Defaults:
    model_type = reader.take("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise reader.refuse(f"model_type {model_type!r} is not supported; these are: {', '.join(_FAMILIES)}.")
    family = _FAMILIES[model_type]
    architectures = reader.take("architectures", [family.architecture])
    if architectures != [family.architecture]:
        raise reader.refuse(f"architectures {architectures!r} is not supported; only {family.architecture} is.")
    return family


def _read_decoder(reader: ConfigReader, family: _Defaults, generation_eos: object) -> DecoderConfig:
    hidden_size, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    num_layers, max_positions = reader.integer("num_hidden_layers"), _max_positions(reader, family)
    own_kv = None if reader.is_null("num_key_value_heads") else family.num_kv_heads
    own_head_dim = None if reader.is_null("head_dim") else family.head_dim
    qkv_bias, o_bias = _read_attention_bias(reader, family.family)
    eos = reader.take("eos_token_id", None if reader.is_null("eos_token_id") else family.eos_token_id)
    bos = reader.take("bos_token_id", None if reader.is_null("bos_token_id") else family.bos_token_id)
    return DecoderConfig(
        family=family.family,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", own_kv or num_heads),
        head_dim=reader.integer("head_dim", own_head_dim or hidden_size // num_heads),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=_read_rope(reader, max_positions),
        max_position_embeddings=max_positions,
        windows=_read_windows(reader, family.family, num_layers),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=family.family == "llama" and reader.flag("mlp_bias", False),
        qk_norm=family.family == "qwen3",
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        dtype=_read_dtype(reader),
        bos_token_id=bos,
        eos_token_ids=_token_ids(reader, generation_eos, eos),
    )


def _max_positions(reader: ConfigReader, family: _Defaults) -> int:
    return reader.integer("max_position_embeddings", family.max_position_embeddings)


def _read_attention_bias(reader: ConfigReader, family: Family) -> tuple[bool, bool]:
    if family == "qwen2":  # its config has no key for its biases
        return True, False
    bias = reader.flag("attention_bias", False)
    if bias and family == "mistral":
        raise reader.refuse("attention_bias true is not supported for model_type 'mistral'.")
    return bias, bias


def _read_windows(reader: ConfigReader, family: Family, num_layers: int) -> tuple[int | None, ...]:
    window = None
    if family == "mistral":
        window = None if reader.is_null("sliding_window") else reader.integer("sliding_window", 4096)
        first_layer = 0
    elif family in ("qwen2", "qwen3"):
        size = None if reader.is_null("sliding_window") else reader.integer("sliding_window", 4096)
        window = size if reader.flag("use_sliding_window", False) else None
        first_layer = reader.count("max_window_layers", 28)
    else:
        first_layer = num_layers
    by_default = ["sliding_attention" if window and i >= first_layer else "full_attention" for i in range(num_layers)]
    kinds = reader.take("layer_types", by_default)
    is_known = isinstance(kinds, list) and all(kind in ("sliding_attention", "full_attention") for kind in kinds)
    if not is_known or len(kinds) != num_layers or (window is None and "sliding_attention" in kinds):
        raise reader.refuse(f"layer_types {kinds!r} does not fit {num_layers} layers and their sliding_window.")
    if family in ("llama", "mistral") and kinds != by_default:
        raise reader.refuse(f"layer_types {kinds!r} is not supported for model_type {family!r}.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _read_rope(reader: ConfigReader, max_positions: int) -> RopeConfig:
    key = "rope_parameters"
    values = reader.take(key)  # Transformers 5
    scaling = reader.take("rope_scaling")  # Transformers 4
    if scaling is not None:
        if values is not None and values != scaling:
            raise reader.refuse("rope_scaling and rope_parameters contradict each other.")
        key, values = "rope_scaling", scaling
    if not isinstance(values or {}, dict):
        raise reader.refuse(f"{key} is {values!r}, not an object.")
    rope = ConfigReader(reader.model, dict(values or {}))
    outer_theta = reader.number("rope_theta", 10_000.0)
    legacy_kind = rope.take("type", "default")
    kind: RopeKind = rope.take("rope_type", legacy_kind)
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise reader.refuse(f"{key}.rope_type {kind!r} is not supported; these are: {', '.join(_ROPE_KEYS)}.")
    theta = rope.number("rope_theta", outer_theta)
    if kind in ("llama3", "yarn"):
        original = rope.integer("original_max_position_embeddings", max_positions)
        known: dict[str, Any] = {"original_max_position_embeddings": original}
    else:
        known = {}
    if kind == "yarn" and rope.is_null("factor"):
        known["factor"] = max_positions / known["original_max_position_embeddings"]
    for name in sorted(_ROPE_KEYS[kind] - known.keys()):
        if name == "truncate":
            known[name] = rope.flag(name, True)
        elif (value := rope.take(name)) is not None:
            known[name] = _rope_number(reader, f"{key}.{name}", value)
        elif name not in _ROPE_OPTIONAL:
            raise reader.refuse(f"{key} of type {kind!r} has no {name}.")
    rope.refuse_leftovers()
    return RopeConfig(theta=theta, kind=kind, **known)


def _rope_number(reader: ConfigReader, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise reader.refuse(f"{name} is {value!r}, not a number.")
    return float(value)


def _read_dtype(reader: ConfigReader) -> Dtype:
    legacy = reader.take("torch_dtype", "float32")  # Transformers 4
    match reader.take("dtype", legacy):
        case "float32" | "bfloat16" | "float16" as dtype:
            return dtype
        case other:
            raise reader.refuse(f"dtype {other!r} is not supported; float32, bfloat16 and float16 are.")


def _generation_eos(directory: Path) -> object:
    path = directory / "generation_config.json"
    return read_json(path, str(directory)).get("eos_token_id") if path.exists() else None


def _token_ids(reader: ConfigReader, *sources: object) -> tuple[int, ...]:
    ids = [token for source in sources if source is not None for token in _as_list(source)]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise reader.refuse(f"eos_token_id {ids!r} is not made of token ids.")
    return tuple(dict.fromkeys(ids))


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_shape(config: DecoderConfig, reader: ConfigReader) -> None:
    if config.num_heads % config.num_kv_heads:
        raise reader.refuse(
            f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads {config.num_kv_heads}."
        )
    if config.head_dim % 2:
        raise reader.refuse(f"head_dim {config.head_dim} is odd.")
