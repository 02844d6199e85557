"""Export of adapters: factors as PEFT files, which PEFT loads with the same tensors and scalings, and draft heads as
Medusa files, beside them or alone.
"""

import re
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path

import msgspec
from safetensors.torch import save_file
from torch import Tensor

from descant.adapters.formats import medusa
from descant.adapters.formats.peft import CONFIG_FILE, PICKLE_FILE, TENSOR_FILE
from descant.model.base_model import BaseModel
from descant.versions.draft_heads import DraftHeads
from descant.versions.low_rank import Factors, LowRankAdapter
from descant_client.errors import AdapterInvalid

_HEADS_FILES = {medusa.CONFIG_FILE, medusa.TENSOR_FILE}
_ADAPTER_FILES = {CONFIG_FILE, TENSOR_FILE, PICKLE_FILE, "README.md"} | _HEADS_FILES
_PREFIX = "base_model.model."


class _Config(msgspec.Struct, frozen=True):
    """The content of `adapter_config.json`: keys that determine the result, and keys that other tools expect."""

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
    """Return whether a directory of exactly these files is an adapter, which another adapter may replace."""
    return file_names <= _ADAPTER_FILES and (CONFIG_FILE in file_names or file_names >= _HEADS_FILES)


def check_exportable(name: str, adapter: LowRankAdapter) -> None:
    """Raise AdapterInvalid if no format holds the adapter: it has no draft heads and touches no module."""
    if adapter.heads is None and not _touches_any(adapter):
        raise AdapterInvalid(name, "it changes no module at all, and PEFT has no files for such an adapter")


def write_adapter(adapter: LowRankAdapter, base: BaseModel, directory: Path) -> None:
    """Write an adapter that passes `check_exportable` into an empty directory. `read_adapter` reads it back.

    Raises:
        OSError, SafetensorError: the directory cannot be written to.
    """
    if _touches_any(adapter):
        write_peft(adapter, base, directory)
    if adapter.heads is not None:
        _write_heads(adapter.heads, base, directory)


def write_peft(adapter: LowRankAdapter, base: BaseModel, directory: Path) -> None:
    """Write config and float32 tensors of the factors, of which there is at least one, into an empty directory.

    Reading them back yields equal factors: `alpha = scaling * rank` is exact, because a scaling has 24 bits.

    Raises:
        OSError, SafetensorError: the directory cannot be written to.
    """
    # In the base's order, so that equal adapters yield equal files.
    modules = [module.name for module in base.modules]
    factors = {
        name: adapter.factors[name] for name in modules if name in adapter.factors and adapter.factors[name].rank
    }
    _write_json(directory / CONFIG_FILE, _make_config(factors, base))
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.b.contiguous()
    save_file(tensors, directory / TENSOR_FILE, metadata={"format": "pt"})


def _write_heads(heads: DraftHeads, base: BaseModel, directory: Path) -> None:
    shape = heads.shape
    version = 1 if shape.has_lm_heads else 2
    config = medusa.MedusaConfig(shape.num_heads, shape.num_layers, version, str(base.directory))
    _write_json(directory / medusa.CONFIG_FILE, config)
    save_file(medusa.name_tensors(heads), directory / medusa.TENSOR_FILE, metadata={"format": "pt"})


def _write_json(path: Path, config: msgspec.Struct) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")


def _touches_any(adapter: LowRankAdapter) -> bool:
    return any(pair.rank for pair in adapter.factors.values())


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
    """Return a whole number as an int, as in files of PEFT."""
    return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha


def _exactly(name: str) -> str:
    """Return the pattern that matches this module only."""
    return f"^{re.escape(name)}"
