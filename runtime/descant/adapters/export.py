"""Writes an adapter as PEFT's own files, from which PEFT makes the same tensors and scalings again."""

import re
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path

import msgspec
from safetensors.torch import save_file
from torch import Tensor

from descant.adapters.base import BaseModel
from descant.adapters.formats.peft import CONFIG_FILE, PICKLE_FILE, TENSOR_FILE
from descant.adapters.low_rank import Factors, LowRankAdapter
from descant_client.errors import AdapterInvalid

_ADAPTER_FILES = {CONFIG_FILE, TENSOR_FILE, PICKLE_FILE, "README.md"}
_PREFIX = "base_model.model."


class _Config(msgspec.Struct, frozen=True):
    """`adapter_config.json`: what decides the result, and what other tools look for."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str]
    base_model_name_or_path: str
    peft_type: str = "LORA"
    task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    inference_mode: bool = True
    modules_to_save: list[str] | None = None


def is_adapter(file_names: Set[str]) -> bool:
    """Return whether a directory of just these files is an adapter, which another may replace."""
    return CONFIG_FILE in file_names and file_names <= _ADAPTER_FILES


def check_exportable(name: str, adapter: LowRankAdapter) -> None:
    """Raise AdapterInvalid if PEFT has no form for the adapter: one that touches no module."""
    if not any(pair.rank for pair in adapter.factors.values()):
        raise AdapterInvalid(name, "it changes no module at all, and PEFT has no files for such an adapter")


def write_peft(adapter: LowRankAdapter, base: BaseModel, directory: Path) -> None:
    """Write config and tensors (float32) into an empty directory.

    Reading them again gives the adapter's very factors: `alpha = scaling * rank` is exact, as a scaling has 24 bits.

    Raises:
        OSError, SafetensorError: the directory cannot be written to.
    """
    # In the base's order, so that equal adapters make equal files.
    modules = [module.name for module in base.modules]
    factors = {
        name: adapter.factors[name] for name in modules if name in adapter.factors and adapter.factors[name].rank
    }
    config = msgspec.json.format(msgspec.json.encode(_make_config(factors, base)), indent=2)
    (directory / CONFIG_FILE).write_bytes(config + b"\n")
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.b.contiguous()
    save_file(tensors, directory / TENSOR_FILE, metadata={"format": "pt"})


def _make_config(factors: Mapping[str, Factors], base: BaseModel) -> _Config:
    ranks = {name: pair.rank for name, pair in factors.items()}
    alphas = {name: pair.scaling * pair.rank for name, pair in factors.items()}
    [(rank, _)], [(alpha, _)] = Counter(ranks.values()).most_common(1), Counter(alphas.values()).most_common(1)
    return _Config(
        r=rank,
        lora_alpha=_shortest(alpha),
        rank_pattern={_exactly(name): own for name, own in ranks.items() if own != rank},
        alpha_pattern={_exactly(name): _shortest(own) for name, own in alphas.items() if own != alpha},
        target_modules=list(factors),
        base_model_name_or_path=str(base.directory),
    )


def _shortest(alpha: float) -> float:
    """Return a whole number as an int, as PEFT writes it."""
    return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha


def _exactly(name: str) -> str:
    """Return the expression that means this module only."""
    return f"^{re.escape(name)}"
