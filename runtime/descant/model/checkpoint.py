"""The safetensors files of a model directory, single or sharded. Every tensor is checked and taken exactly once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from descant.model.config_reader import read_json
from descant_client.errors import ModelInvalid

ProgressCallback = Callable[[float], None]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # a derived table in old files


class Checkpoint:
    """The named tensors of a checkpoint. `take` those of the model, then `finish`, which refuses leftovers."""

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device, on_progress: ProgressCallback
    ) -> None:
        self.model = str(directory)
        self._dtype = dtype
        self._device = device
        self._on_progress = on_progress
        self._files = {}  # tensor name -> open file
        for path in tensor_files(directory):
            self._open(path)
        self._num_tensors = len(self._files)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor in the serving dtype, on the serving device.

        Raises:
            ModelInvalid: the tensor is missing, has another shape, is not floating point or cannot be read.
        """
        file = self._files.pop(name, None)
        if file is None:
            raise self._refuse(name, "is missing.")
        if (stored := tuple(file.get_slice(name).get_shape())) != shape:
            raise self._refuse(name, f"has shape {list(stored)}, its config asks for {list(shape)}.")
        tensor = _read(file, name, self.model)
        if tensor.dtype not in _FLOATS:
            raise self._refuse(name, f"has dtype {str(tensor.dtype).removeprefix('torch.')}, which is not supported.")
        self._on_progress(1 - len(self._files) / self._num_tensors)
        return tensor.to(device=self._device, dtype=self._dtype)

    def take_stacked(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """Return several tensors concatenated along axis 0. Raises ModelInvalid as `take`."""
        return torch.cat([self.take(name, shape) for name, shape in zip(names, shapes, strict=True)])

    def take_copy(self, name: str, original: Tensor) -> None:
        """Take a tensor that may be a stored copy of `original`, as with tied embeddings.

        Raises:
            ModelInvalid: the copy differs from `original`, or as `take`.
        """
        if name in self._files and not torch.equal(self.take(name, tuple(original.shape)), original):
            raise self._refuse(name, "differs from the tensor that it is tied to.")

    def finish(self) -> None:
        """Raise ModelInvalid if a tensor was not taken."""
        for name in sorted(self._files):
            if not _HARMLESS.fullmatch(name):
                raise self._refuse(name, "is not part of the model its config describes.")
        self._files.clear()
        self._on_progress(1.0)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            names = list(file.keys())
        except (OSError, SafetensorError) as exc:
            raise ModelInvalid(self.model, f"{path.name} cannot be read: {exc}") from exc
        for name in names:
            if name in self._files:
                raise self._refuse(name, "is stored in two files.")
            self._files[name] = file

    def _refuse(self, name: str, reason: str) -> ModelInvalid:
        return ModelInvalid(self.model, f"tensor {name} {reason}")


def tensor_files(directory: Path) -> list[Path]:
    """Return the paths of a model directory's safetensors files. Those named by an index may not exist.

    Raises:
        ModelInvalid: the directory has neither file nor index, or the index cannot be read.
    """
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        raise ModelInvalid(str(directory), "it has neither model.safetensors nor model.safetensors.index.json.")
    weight_map = read_json(index, str(directory)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise ModelInvalid(str(directory), f"{index.name} has no weight_map of files in this directory.")
    return [directory / name for name in sorted(set(weight_map.values()))]


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _read(file: safe_open, name: str, model: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except (OSError, SafetensorError, ValueError) as exc:
        raise ModelInvalid(model, f"tensor {name} cannot be read: {exc}") from exc
