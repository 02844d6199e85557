"""PEFT's `adapter_config.json`: its checks, and the modules that it targets.

A setting that would change the adapter's output and is not implemented is refused by name. So is an unknown key, unless
its value turns it off.
"""

import math
from pathlib import Path
from typing import Any

import msgspec

from descant.adapters.formats.files import read_config_bytes
from descant.adapters.formats.patterns import Patterns
from descant.contract.child_config import AdapterLimits
from descant.model.arch import LoraModule
from descant_client.errors import AdapterInvalid, AdapterUnsupported

_FILE = "adapter_config.json"
_HEAD = "lm_head"
_EMBEDDING = "model.embed_tokens"
_DEFAULT_TARGETS = ["q_proj", "v_proj"]  # PEFT's defaults for every family of `arch`


class PeftConfig(msgspec.Struct, frozen=True):
    """The keys that determine the result of plain LoRA. Defaults are those of PEFT."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


class TargetModule(msgspec.Struct, frozen=True):
    """A module targeted by the config, with the rank of its tensors and the scaling of its update."""

    module: LoraModule
    rank: int
    scaling: float


# Keys without effect on inference, or without effect beyond that of another key.
_IGNORED = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",  # PEFT turns it off for every linear of the supported families
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "runtime_config",
    "megatron_core",  # a default, without effect unless megatron_config is set
    "qalora_group_size",  # a default, without effect unless use_qalora is set
}

_REFUSED = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "a bias on lora_B (lora_bias)",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "ensure_weight_tying": "tied adapters of embedding and head (ensure_weight_tying)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "kasa_config": "KaSA (kasa_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "use_qalora": "QA-LoRA (use_qalora)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "velora_config": "VeLoRA (velora_config)",
    "megatron_config": "Megatron layers (megatron_config)",
}

_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
"""Initializations that do not change the base. Others (PiSSA, OLoRA, ...) subtract from it when loaded."""


def read_config(adapter: str, path: Path, limits: AdapterLimits) -> PeftConfig:
    """Read and check a config.

    Raises:
        AdapterInvalid: the config is not readable or contradicts itself. AdapterUnsupported: it is not plain LoRA.
    """
    data = read_config_bytes(adapter, path, limits)
    try:
        keys = msgspec.json.decode(data, type=dict[str, Any])
        _refuse_features(adapter, keys)
        config = msgspec.json.decode(data, type=PeftConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise AdapterInvalid(adapter, f"{_FILE} cannot be read: {exc}") from exc
    _check_layers(adapter, config)
    return config


def select_targets(
    adapter: str, config: PeftConfig, modules: tuple[LoraModule, ...], limits: AdapterLimits
) -> list[TargetModule]:
    """Return the modules that the config targets, in the base's order, each with its rank and scaling.

    Raises:
        AdapterInvalid: no module is targeted, or a rank is out of range.
        AdapterUnsupported: the input embedding is targeted.
    """
    patterns = Patterns(adapter, [_EMBEDDING, *(module.name for module in modules)], limits.pattern_budget_s)
    names = _targeted_names(config, modules, patterns)
    if _EMBEDDING in names:
        raise AdapterUnsupported(adapter, f"LoRA on the input embedding ({_EMBEDDING})")
    rank_pattern, alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    rank_keys, alpha_keys = patterns.first_suffix_matches(rank_pattern), patterns.first_suffix_matches(alpha_pattern)
    targets: list[TargetModule] = []
    for module in modules:
        if module.name not in names:
            continue
        rank = rank_pattern[rank_keys[module.name]] if module.name in rank_keys else config.r
        alpha = alpha_pattern[alpha_keys[module.name]] if module.name in alpha_keys else config.lora_alpha
        if not 0 < rank <= limits.max_rank:
            raise AdapterInvalid(adapter, f"rank {rank} of {module.name}; 1 to {limits.max_rank} are allowed")
        targets.append(TargetModule(module, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    if not targets:
        raise AdapterInvalid(adapter, f"target_modules {config.target_modules!r} selects no linear of this base model")
    return targets


def _refuse_features(adapter: str, keys: dict[str, Any]) -> None:
    method = keys.get("peft_type")
    if method is None:
        raise AdapterInvalid(adapter, f"{_FILE} has no peft_type")
    if method != "LORA":
        raise AdapterUnsupported(adapter, f"the PEFT method {method}")
    for key, feature in _REFUSED.items():
        if not _is_off(keys.get(key)):
            raise AdapterUnsupported(adapter, feature)
    if keys.get("bias", "none") != "none":
        raise AdapterUnsupported(adapter, f"trained biases (bias {keys['bias']!r})")
    init = keys.get("init_lora_weights", True)
    if not isinstance(init, bool | None) and str(init).lower() not in _PLAIN_INITS:
        raise AdapterUnsupported(
            adapter, f"init_lora_weights {init!r}, which changes the base on loading (save it converted to plain LoRA)"
        )
    known = {*_IGNORED, *_REFUSED, *PeftConfig.__struct_fields__, "bias", "init_lora_weights"}
    for key in keys.keys() - known:
        if not _is_off(keys[key]):
            raise AdapterUnsupported(adapter, f"the unknown key {key!r} of {_FILE}")


def _is_off(value: object) -> bool:
    return not value or value == "none"


def _check_layers(adapter: str, config: PeftConfig) -> None:
    if config.layers_pattern and config.layers_to_transform in (None, []):
        raise AdapterInvalid(adapter, "layers_pattern needs layers_to_transform")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise AdapterInvalid(adapter, "layers_to_transform needs a list of target_modules, not a pattern")


def _targeted_names(config: PeftConfig, modules: tuple[LoraModule, ...], patterns: Patterns) -> set[str]:
    targets = config.target_modules if config.target_modules is not None else _DEFAULT_TARGETS
    names = {_EMBEDDING, *(module.name for module in modules)}
    if isinstance(targets, str):
        is_all = targets.lower() == "all-linear"
        selected = names - {_EMBEDDING, _HEAD} if is_all else patterns.full_matches(targets)
    else:
        selected = _listed(names, targets)
        if config.layers_to_transform not in (None, []):
            selected = _in_layers(config, selected, set(targets), patterns)
    return selected - _excluded_names(config, names, patterns)


def _excluded_names(config: PeftConfig, names: set[str], patterns: Patterns) -> set[str]:
    match config.exclude_modules:
        case None | "" | []:
            return set()
        case str(pattern):
            return patterns.full_matches(pattern)
        case entries:
            return _listed(names, entries)


def _listed(names: set[str], entries: list[str]) -> set[str]:
    """Return the names that are an entry or end with a dot and an entry."""
    whole = set(entries)
    return {name for name in names if any(suffix in whole for suffix in _suffixes(name))}


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _in_layers(config: PeftConfig, selected: set[str], exact: set[str], patterns: Patterns) -> set[str]:
    """Return the selected modules of the wanted layers, and those listed by whole name in any layer (as in PEFT)."""
    layers_pattern = config.layers_pattern or []
    indices = patterns.layer_indices([layers_pattern] if isinstance(layers_pattern, str) else layers_pattern)
    wanted = config.layers_to_transform
    layers = {wanted} if isinstance(wanted, int) else set(wanted or [])
    return {name for name in selected if name in exact or indices.get(name) in layers}
