"""Medusa directories: `config.json` with `medusa_num_heads`, and safetensors files with the tensors of the heads.

`{i}.{j}.linear.weight` and `.bias` are residual block j of head i. `{i}.{num_layers}.weight` is its own LM head: either
all heads have one (v1), or none has (v2). With an `adapter_config.json` in the directory the heads belong to a LoRA
adapter, and its tensor file may hold them too. All other files may hold only tensors of heads.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import msgspec
from torch import Tensor

from descant.adapters.formats import peft
from descant.adapters.formats.files import check_shape, open_tensors, read_config_bytes, read_tensor, tensor_names
from descant.contract.child_config import AdapterLimits
from descant.model.base_model import BaseModel
from descant.versions.draft_heads import DraftHeads, HeadsLayout, HeadsShape
from descant_client.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported

CONFIG_FILE = "config.json"
TENSOR_FILE = "medusa_lm_head.safetensors"

_Part = Literal["linear.weight", "linear.bias", "weight"]
_NUMBER = "(?:0|[1-9][0-9]{0,3})"
_NAME = re.compile(
    rf"(?:medusa_heads?\.)?(?P<head>{_NUMBER})\.(?P<layer>{_NUMBER})\.(?P<part>linear\.weight|linear\.bias|weight)"
)
_PICKLE_FILES = ("medusa_lm_head.pt", "medusa_lm_head.bin", "pytorch_model.bin")
_VERSIONS = (1.0, 2.0)


class MedusaConfig(msgspec.Struct, frozen=True):
    """The keys that are read.

    Other keys are ignored: heads only draft, so no key could change a token. Whether heads have LM heads of their own
    follows from the tensors, not from `version`.
    """

    medusa_num_heads: int
    medusa_num_layers: int
    version: float = 1.0
    base_model_name_or_path: str | None = None


class _Key(NamedTuple):
    head: int
    layer: int
    part: _Part

    def __str__(self) -> str:
        return f"{self.head}.{self.layer}.{self.part}"


class _Place(NamedTuple):
    path: Path
    name: str


def read_config(adapter: str, directory: Path, limits: AdapterLimits) -> MedusaConfig | None:
    """Read and check a directory's config. Return None if it is missing or is not a config of heads.

    Raises:
        AdapterInvalid: the config is not readable, a value has another type, or heads or layers are zero or too many.
        AdapterUnsupported: the version is neither 1 nor 2.
    """
    path = directory / CONFIG_FILE
    if not path.exists():
        return None
    data = read_config_bytes(adapter, path, limits)
    try:
        if "medusa_num_heads" not in msgspec.json.decode(data, type=dict[str, Any]):
            return None
        config = msgspec.json.decode(data, type=MedusaConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise AdapterInvalid(adapter, f"{CONFIG_FILE} cannot be read: {exc}") from exc
    bounds = {"medusa_num_heads": limits.max_draft_heads, "medusa_num_layers": limits.max_draft_layers}
    for key, most in bounds.items():
        if not 1 <= getattr(config, key) <= most:
            raise AdapterInvalid(adapter, f"{key} {getattr(config, key)}; 1 to {most} are allowed")
    if config.version not in _VERSIONS:
        raise AdapterUnsupported(adapter, f"Medusa version {config.version:g}")
    return config


def is_head_tensor(name: str) -> bool:
    """Return whether a tensor of this name is part of a head."""
    return _NAME.fullmatch(name) is not None


def read_heads(
    adapter: str, directory: Path, config: MedusaConfig, base: BaseModel, limits: AdapterLimits
) -> DraftHeads:
    """Read the heads of a directory for a base model, float32.

    Raises:
        AdapterInvalid: the heads are damaged, contradict their config, are not finite, or belong to another base.
        AdapterUnsupported: there is an unknown tensor, or the heads are in a pickle.
        AdapterTooLarge: the files are larger than the limit.
    """
    files = sorted(directory.glob("*.safetensors"))
    num_bytes = sum(path.stat().st_size for path in files if path.is_file())
    if num_bytes > limits.max_file_bytes:
        raise AdapterTooLarge(adapter, num_bytes, limits.max_file_bytes)
    places: dict[_Key, _Place] = {}
    for path in files:
        for key, name in _find_tensors(adapter, path, config, base):
            if key in places:
                raise AdapterInvalid(adapter, f"tensors {places[key].name} and {name} both mean {key}")
            places[key] = _Place(path, name)
    has_lm_heads = any(key.part == "weight" for key in places)
    shape = HeadsShape(config.medusa_num_heads, config.medusa_num_layers, has_lm_heads)
    _check_completeness(adapter, directory, places, shape)
    heads = HeadsLayout(shape, base.config.hidden_size, base.config.vocab_size).empty()
    for path in files:
        with open_tensors(adapter, path) as file:
            for key, place in places.items():
                if place.path == path:
                    _part_of(heads, key).copy_(read_tensor(adapter, file, place.name, _dims(key, base)))
    return heads


def name_tensors(heads: DraftHeads) -> dict[str, Tensor]:
    """Return the tensors of heads by their names in a file."""
    return {str(key): _part_of(heads, key) for key in _keys(heads.shape)}


def _keys(shape: HeadsShape) -> list[_Key]:
    parts: list[_Part] = ["linear.weight", "linear.bias"]
    heads, layers = range(shape.num_heads), range(shape.num_layers)
    blocks = [_Key(head, layer, part) for head in heads for layer in layers for part in parts]
    return blocks + ([_Key(head, shape.num_layers, "weight") for head in heads] if shape.has_lm_heads else [])


def _find_tensors(adapter: str, path: Path, config: MedusaConfig, base: BaseModel) -> Iterator[tuple[_Key, str]]:
    """Yield the tensors of heads in a file, after a check of their shapes. Other tensors are refused by name."""
    is_shared = path.name == peft.TENSOR_FILE and (path.parent / peft.CONFIG_FILE).exists()
    with open_tensors(adapter, path) as file:
        for name in tensor_names(adapter, file):
            if match := _NAME.fullmatch(name):
                key = _Key(int(match["head"]), int(match["layer"]), cast(_Part, match["part"]))
                _check_key(adapter, name, key, config)
                check_shape(adapter, file, name, _dims(key, base))
                yield key, name
            elif not is_shared:  # in a shared file, the PEFT reader checks it
                raise AdapterUnsupported(adapter, f"the unknown tensor {name}")


def _check_key(adapter: str, name: str, key: _Key, config: MedusaConfig) -> None:
    num_heads, num_layers = config.medusa_num_heads, config.medusa_num_layers
    if key.head >= num_heads:
        raise AdapterInvalid(adapter, f"tensor {name} is for head {key.head}; its config has {num_heads} heads")
    if key.layer != num_layers if key.part == "weight" else key.layer >= num_layers:
        raise AdapterInvalid(adapter, f"tensor {name} does not fit medusa_num_layers {num_layers} of its config")


def _check_completeness(adapter: str, directory: Path, places: dict[_Key, _Place], shape: HeadsShape) -> None:
    if not places:
        for name in _PICKLE_FILES:
            if (directory / name).exists():
                raise AdapterUnsupported(adapter, f"{name}, a pickle (save it as {TENSOR_FILE})")
        raise AdapterInvalid(adapter, f"there are no tensors of the heads that its {CONFIG_FILE} announces")
    for key in _keys(shape):
        if key not in places:
            reason = "; other heads have an LM head of their own" if key.part == "weight" else ""
            raise AdapterInvalid(adapter, f"tensor {key} is missing{reason}")


def _dims(key: _Key, base: BaseModel) -> tuple[int, ...]:
    hidden = base.config.hidden_size
    match key.part:
        case "linear.weight":
            return hidden, hidden
        case "linear.bias":
            return (hidden,)
        case "weight":
            return base.config.vocab_size, hidden


def _part_of(heads: DraftHeads, key: _Key) -> Tensor:
    match key.part:
        case "linear.weight":
            return heads.weight[key.head, key.layer]
        case "linear.bias":
            return heads.bias[key.head, key.layer]
        case "weight":
            assert heads.lm_heads is not None, "only v1 has keys of LM heads"
            return heads.lm_heads[key.head]
