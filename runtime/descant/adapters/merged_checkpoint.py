"""Export of base and adapter as one Hugging Face checkpoint: W + B @ A * scaling, with the files of the base.

Sums are computed in float32 and rounded once, to the tensor's dtype. Only one file's tensors are in memory at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from descant.model.base_model import BaseModel
from descant.model.checkpoint import tensor_files
from descant.model.config_reader import read_json
from descant.versions.low_rank import Factors, LowRankAdapter
from descant_client.errors import AdapterInvalid, ModelInvalid

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_CONFIG_FILE, _INDEX_FILE = "config.json", "model.safetensors.index.json"
_NOT_COPIED = {_CONFIG_FILE, "adapter_config.json"}
_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".md", ".model", ".tiktoken"}  # excludes weights, pickles and code
_COPIED_NAMES = {"LICENSE", "NOTICE"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_ROWS = 4096  # rows of one weight in float32 at once


def write_merged(name: str, adapter: LowRankAdapter, base: BaseModel, directory: Path) -> None:
    """Write base and adapter, merged, into an empty directory. Errors name the adapter `name`.

    An adapted head that is tied to the embedding is written as a separate tensor. Draft heads are left out, because the
    format of a checkpoint does not include them.

    Raises:
        AdapterInvalid: the adapter touches no module, or a sum leaves the range of its dtype.
        ModelInvalid: the base cannot be read, or lacks a tensor.
        OSError, SafetensorError: the directory cannot be written.
    """
    factors = {f"{module}.weight": pair for module, pair in adapter.factors.items() if pair.rank}
    if not factors:
        raise AdapterInvalid(name, "it changes no module at all: merged, the base would stay as it is")
    files = tensor_files(base.directory)
    places = {tensor: path for path in files for tensor in _tensor_names(base, path)}
    is_untied = base.config.tie_word_embeddings and _HEAD in factors
    if is_untied and _HEAD not in places and _EMBEDDING in places:
        places[_HEAD] = places[_EMBEDDING]
    if missing := factors.keys() - places.keys():
        raise ModelInvalid(str(base.directory), f"tensor {min(missing)} is missing.")
    for path in files:
        tensors, metadata = _read_tensors(base, path)
        if places.get(_HEAD) == path and _HEAD not in tensors:
            tensors[_HEAD] = tensors[_EMBEDDING]
        for tensor in sorted(tensors.keys() & factors.keys()):
            tensors[tensor] = _merge(name, tensor, tensors[tensor], factors[tensor], base)
        save_file(tensors, directory / path.name, metadata=metadata)
    if files[0].name != "model.safetensors":
        _write_index(base, directory, places)
    _write_config(base, directory, is_untied)
    _copy_others(base, directory)


def _merge(name: str, tensor: str, weight: Tensor, pair: Factors, base: BaseModel) -> Tensor:
    if weight.shape != (pair.b.shape[0], pair.a.shape[1]) or weight.dtype not in _DTYPES:
        found = f"{list(weight.shape)} {str(weight.dtype).removeprefix('torch.')}"
        raise ModelInvalid(str(base.directory), f"tensor {tensor} is {found}, which is not what its config says.")
    merged = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _MAX_ROWS):
        rows = slice(start, start + _MAX_ROWS)
        merged[rows] = weight[rows].float() + (pair.b[rows] @ pair.a) * pair.scaling
    if not bool(merged.isfinite().all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise AdapterInvalid(name, f"merged into the base's {tensor}, it leaves the range of {dtype}")
    return merged


# ---- reading the base -----------------------------------------------------------------------------------------------


def _tensor_names(base: BaseModel, path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as exc:
        raise ModelInvalid(str(base.directory), f"{path.name} cannot be read: {exc}") from exc


def _read_tensors(base: BaseModel, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {"format": "pt"}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise ModelInvalid(str(base.directory), f"{path.name} cannot be read: {exc}") from exc


def _read_bytes(base: BaseModel, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ModelInvalid(str(base.directory), f"{path.name} cannot be read: {exc}") from exc


# ---- writing other files --------------------------------------------------------------------------------------------


def _write_index(base: BaseModel, directory: Path, places: Mapping[str, Path]) -> None:
    """Write the base's index with the new places of all tensors."""
    index = read_json(base.directory / _INDEX_FILE, str(base.directory))
    num_bytes = sum(_num_data_bytes(directory / name) for name in {path.name for path in places.values()})
    metadata = {**(index.get("metadata") or {}), "total_size": num_bytes}
    if _HEAD not in index["weight_map"]:
        metadata.pop("total_parameters", None)  # wrong if the head became a separate tensor; optional
    weight_map = {name: places[name].name for name in sorted(places)}
    _write_json(directory / _INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _num_data_bytes(path: Path) -> int:
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return path.stat().st_size - header


def _write_config(base: BaseModel, directory: Path, is_untied: bool) -> None:
    config = read_json(base.directory / _CONFIG_FILE, str(base.directory))
    _write_json(directory / _CONFIG_FILE, config | {"tie_word_embeddings": False} if is_untied else config)


def _copy_others(base: BaseModel, directory: Path) -> None:
    """Copy generation config, tokenizer, README and license. Links, as in the Hub's cache, are followed."""
    for path in base.directory.iterdir():
        is_wanted = path.suffix in _COPIED_SUFFIXES or path.name in _COPIED_NAMES
        is_wanted = is_wanted and not path.name.startswith(".") and not path.name.endswith(".index.json")
        if is_wanted and path.name not in _NOT_COPIED and path.is_file():
            (directory / path.name).write_bytes(_read_bytes(base, path))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
