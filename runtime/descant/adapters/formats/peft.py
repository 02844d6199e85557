"""PEFT's LoRA directories: `adapter_config.json` and `adapter_model.safetensors`.

The config says which modules have factors; the file must hold exactly these and nothing else, in the right shapes.
PEFT itself drops what it does not match and keeps random values for what it misses; here both are errors.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from descant.adapters.base import BaseModel
from descant.adapters.formats.peft_config import TargetModule, read_config, select_targets
from descant.adapters.limits import AdapterLimits
from descant.adapters.low_rank import Factors, LowRankAdapter, float32
from descant_client.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_MAX_NAME_CHARS = 512
_BASE_COPY = re.compile(r"(?P<module>model\.embed_tokens|lm_head)(?:\.base_layer)?\.weight")

# Some producers leave the prefix out or write it twice, or leave the adapter's name in the key.
_PREFIX = re.compile(r"(?:base_model\.model\.)*")
_FACTOR = re.compile(r"(?P<module>[^\s]+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")

_FEATURES = (
    (re.compile(r"lora_magnitude_vector"), "DoRA"),
    (re.compile(r"lora_embedding_[AB]"), "LoRA on the input embedding"),
    (re.compile(r"lora_B\.(?:[^.]+\.)?bias$"), "a bias on lora_B"),
    (re.compile(r"trainable_tokens_"), "trained token embeddings"),
    (re.compile(r"lora_diag"), "KaSA"),
    (re.compile(r"\.bias$"), "trained biases"),
    (re.compile(r"(?:embed_tokens|lm_head)(?:\.\w+)*\.weight$"), "its own embedding or head"),
    (re.compile(r"modules_to_save"), "fully trained modules"),
)


class _Key(NamedTuple):
    module: str
    side: Literal["A", "B"]


def read_peft(adapter: str, directory: Path, base: BaseModel, limits: AdapterLimits) -> LowRankAdapter:
    """Read a PEFT LoRA directory for a base model.

    Raises:
        AdapterInvalid: damaged, contradicting its config, not finite, or made for another base.
        AdapterUnsupported: more than plain LoRA; names the feature, the key or the tensor.
        AdapterTooLarge: the file is larger than the limit.
    """
    config = read_config(adapter, directory / CONFIG_FILE, limits)
    _check_files(adapter, directory, limits)
    with _open(adapter, directory / TENSOR_FILE) as file:
        keys = _sort_keys(adapter, file.keys(), file, base)
        targets = select_targets(adapter, config, base.modules, limits)
        _check_completeness(adapter, keys, targets, base)
        factors = {target.module.name: _read_factors(adapter, file, keys, target) for target in targets}
    return LowRankAdapter(factors)


def _check_files(adapter: str, directory: Path, limits: AdapterLimits) -> None:
    path = directory / TENSOR_FILE
    if not path.is_file():
        if (directory / PICKLE_FILE).exists():
            raise AdapterUnsupported(adapter, f"{PICKLE_FILE}, a pickle (save it as {TENSOR_FILE})")
        raise AdapterInvalid(adapter, f"there is no {TENSOR_FILE}")
    if (num_bytes := path.stat().st_size) > limits.max_file_bytes:
        raise AdapterTooLarge(adapter, num_bytes, limits.max_file_bytes)


@contextmanager
def _open(adapter: str, path: Path) -> Iterator[Any]:
    """Open the tensors; what is wrong with the file at any time while it is open is the adapter's fault."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as exc:
        raise AdapterInvalid(adapter, f"{path.name} is no readable safetensors file: {exc}") from exc


def _sort_keys(adapter: str, names: Sequence[str], file: Any, base: BaseModel) -> dict[_Key, str]:
    """Tensor name by module and side. Whatever is not a factor is refused by name."""
    keys: dict[_Key, str] = {}
    for name in names:
        if len(name) > _MAX_NAME_CHARS:
            raise AdapterInvalid(adapter, f"a tensor's name has {len(name)} characters")
        bare = _PREFIX.sub("", name, count=1)
        if (match := _FACTOR.fullmatch(bare)) is None:
            _accept_or_refuse(adapter, name, bare, file, base)
            continue
        key = _Key(match["module"], "A" if match["side"] == "A" else "B")
        if key in keys:
            raise AdapterInvalid(adapter, f"tensors {keys[key]} and {name} both mean lora_{key.side} of {key.module}")
        keys[key] = name
    return keys


def _accept_or_refuse(adapter: str, name: str, bare: str, file: Any, base: BaseModel) -> None:
    """PEFT saves a head it adapted, and if asked to both embeddings; that is fine if they are the base's own."""
    if match := _BASE_COPY.fullmatch(bare):
        if base.holds(match["module"], file.get_tensor(name)):
            return
        raise AdapterUnsupported(adapter, f"its own embedding or head, other than the base's (tensor {name})")
    feature = next((feature for pattern, feature in _FEATURES if pattern.search(bare)), None)
    raise AdapterUnsupported(adapter, f"{feature} (tensor {name})" if feature else f"the unknown tensor {name}")


def _check_completeness(adapter: str, keys: dict[_Key, str], targets: list[TargetModule], base: BaseModel) -> None:
    modules = {module.name for module in base.modules}
    targeted = {target.module.name for target in targets}
    for key, name in sorted(keys.items()):
        if key.module not in modules:
            raise AdapterInvalid(adapter, f"tensor {name} is for {key.module}, which this base model does not have")
        if key.module not in targeted:
            raise AdapterInvalid(adapter, f"tensor {name} is for {key.module}, which its config does not target")
    for module in sorted(targeted):
        for side in ("A", "B"):
            if _Key(module, side) not in keys:
                raise AdapterInvalid(adapter, f"lora_{side} of {module}, which its config targets, is missing")


def _read_factors(adapter: str, file: Any, keys: dict[_Key, str], target: TargetModule) -> Factors:
    module, rank = target.module, target.rank
    a = _read_tensor(adapter, file, keys[_Key(module.name, "A")], (rank, module.in_features))
    b = _read_tensor(adapter, file, keys[_Key(module.name, "B")], (module.out_features, rank))
    pair = Factors(a, b, float32(target.scaling))
    if not bool(pair.scaled_b().isfinite().all()):
        raise AdapterInvalid(adapter, f"lora_B of {module.name} times its scaling {target.scaling} is not finite")
    return pair


def _read_tensor(adapter: str, file: Any, name: str, shape: tuple[int, int]) -> Tensor:
    """Read a tensor as float32, having checked its shape before any of it is read."""
    found = tuple(file.get_slice(name).get_shape())
    if found != shape:
        raise AdapterInvalid(
            adapter, f"tensor {name} has shape {list(found)}; its config and this base model need {list(shape)}"
        )
    tensor: Tensor = file.get_tensor(name)
    if not tensor.dtype.is_floating_point:
        raise AdapterInvalid(
            adapter, f"tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point"
        )
    values = tensor.to(torch.float32)
    if not bool(values.isfinite().all()):
        raise AdapterInvalid(adapter, f"tensor {name} holds values that are not finite")
    return values
