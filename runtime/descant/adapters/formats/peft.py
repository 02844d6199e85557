"""PEFT LoRA directories: `adapter_config.json` and `adapter_model.safetensors`.

The config determines the modules with factors. The file must hold exactly these factors, in the right shapes. PEFT
itself ignores tensors without a match and keeps random values for missing ones; here both are errors.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from descant.adapters.formats.files import open_tensors, read_tensor, tensor_names
from descant.adapters.formats.peft_config import TargetModule, read_config, select_targets
from descant.contract.child_config import AdapterLimits
from descant.model.base_model import BaseModel
from descant.versions.low_rank import Factors, LowRankAdapter, float32
from descant_client.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_BASE_COPY = re.compile(r"(?P<module>model\.embed_tokens|lm_head)(?:\.base_layer)?\.weight")

# Some producers omit the prefix, write it twice, or leave the adapter's name in the key.
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


def read_peft(
    adapter: str,
    directory: Path,
    base: BaseModel,
    limits: AdapterLimits,
    is_foreign: Callable[[str], bool] = lambda name: False,
) -> LowRankAdapter:
    """Read a PEFT LoRA directory for a base model.

    Args:
      is_foreign: whether a tensor of that name belongs to another format, which reads it.

    Raises:
        AdapterInvalid: the adapter is damaged, contradicts its config, is not finite, or belongs to another base.
        AdapterUnsupported: the adapter is more than plain LoRA; the error names the feature, the key or the tensor.
        AdapterTooLarge: the file is larger than the limit.
    """
    config = read_config(adapter, directory / CONFIG_FILE, limits)
    _check_files(adapter, directory, limits)
    with open_tensors(adapter, directory / TENSOR_FILE) as file:
        names = [name for name in tensor_names(adapter, file) if not is_foreign(name)]
        keys = _sort_keys(adapter, names, file, base)
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


def _sort_keys(adapter: str, names: Sequence[str], file: Any, base: BaseModel) -> dict[_Key, str]:
    """Return the tensor names by module and side. Other tensors than factors are refused by name."""
    keys: dict[_Key, str] = {}
    for name in names:
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
    """Accept a copy of the base's own embedding or head, which PEFT may save. Refuse any other tensor by name."""
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
    a = read_tensor(adapter, file, keys[_Key(module.name, "A")], (rank, module.in_features))
    b = read_tensor(adapter, file, keys[_Key(module.name, "B")], (module.out_features, rank))
    pair = Factors(a, b, float32(target.scaling))
    if not bool(pair.scaled_b().isfinite().all()):
        raise AdapterInvalid(adapter, f"lora_B of {module.name} times its scaling {target.scaling} is not finite")
    return pair
