"""Safe reading of untrusted adapter files, for every format: sizes are limited and pickles are never read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from descant.contract.child_config import AdapterLimits
from descant_client.errors import AdapterInvalid

_MAX_NAME_CHARS = 512


def read_config_bytes(adapter: str, path: Path, limits: AdapterLimits) -> bytes:
    """Return a config file's content. Raises AdapterInvalid if it is missing, not readable or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_config_bytes + 1)
    except FileNotFoundError as exc:
        raise AdapterInvalid(adapter, f"there is no {path.name}") from exc
    except OSError as exc:
        raise AdapterInvalid(adapter, f"{path.name} cannot be read: {exc}") from exc
    if len(data) > limits.max_config_bytes:
        raise AdapterInvalid(adapter, f"{path.name} has more than {limits.max_config_bytes} bytes")
    return data


@contextmanager
def open_tensors(adapter: str, path: Path) -> Iterator[Any]:
    """Open a safetensors file. While it is open, its errors are raised as AdapterInvalid."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as exc:
        raise AdapterInvalid(adapter, f"{path.name} is no readable safetensors file: {exc}") from exc


def tensor_names(adapter: str, file: Any) -> list[str]:
    """Return the names in an open file. Raises AdapterInvalid if one is too long to be repeated in an error."""
    names: list[str] = file.keys()
    for name in names:
        if len(name) > _MAX_NAME_CHARS:
            raise AdapterInvalid(adapter, f"a tensor's name has {len(name)} characters")
    return names


def check_shape(adapter: str, file: Any, name: str, shape: Sequence[int]) -> None:
    """Raise AdapterInvalid unless a tensor has this shape. Its data is not read."""
    found = list(file.get_slice(name).get_shape())
    if found != list(shape):
        raise AdapterInvalid(
            adapter, f"tensor {name} has shape {found}; its config and this base model need {list(shape)}"
        )


def read_tensor(adapter: str, file: Any, name: str, shape: Sequence[int]) -> Tensor:
    """Read a tensor as float32, after a check of its shape.

    Raises:
        AdapterInvalid: the tensor has another shape, is not floating point, or has values that are not finite.
    """
    check_shape(adapter, file, name, shape)
    tensor: Tensor = file.get_tensor(name)
    if not tensor.dtype.is_floating_point:
        raise AdapterInvalid(
            adapter, f"tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point"
        )
    values = tensor.to(torch.float32)
    if not bool(values.isfinite().all()):
        raise AdapterInvalid(adapter, f"tensor {name} holds values that are not finite")
    return values
