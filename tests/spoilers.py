"""Ways to spoil a saved adapter."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def change_tensors(directory: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply a function to every tensor."""
    tensors = load_file(directory / TENSORS)
    save_file({name: change(tensor).contiguous() for name, tensor in tensors.items()}, directory / TENSORS)


def truncate(directory: Path) -> None:
    """Keep the first half of the tensors' file."""
    path = directory / TENSORS
    os.truncate(path, path.stat().st_size // 2)


def flip_header(directory: Path) -> None:
    """Overwrite the header with bytes that are no JSON."""
    data = bytearray((directory / TENSORS).read_bytes())
    data[8:40] = b"\xff" * 32
    (directory / TENSORS).write_bytes(data)


def lie_about_the_header(directory: Path) -> None:
    """Claim a header of exabytes."""
    data = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes((2**62).to_bytes(8, "little") + data[8:])


def empty(directory: Path) -> None:
    """Leave a file of no bytes."""
    (directory / TENSORS).write_bytes(b"")


def write_pickle(directory: Path) -> None:
    """Put a pickle under the name of a safetensors file."""
    (directory / TENSORS).write_bytes(pickle.dumps({"weights": [1.0]}))


def write_torch_pickle(directory: Path) -> None:
    """Likewise, as torch saves it."""
    torch.save({"weights": torch.zeros(3)}, directory / TENSORS)


def make_nan(directory: Path) -> None:
    """Put one NaN into every tensor."""
    change_tensors(
        directory, lambda tensor: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 3, torch.nan, tensor)
    )


def make_infinite(directory: Path) -> None:
    """Leave no finite value."""
    change_tensors(directory, lambda tensor: tensor * torch.inf)


def no_config(directory: Path) -> None:
    """Remove the config."""
    (directory / CONFIG).unlink()


def garbled_config(directory: Path) -> None:
    """Make the config no JSON."""
    (directory / CONFIG).write_text("{not json")


def deep_config(directory: Path) -> None:
    """Make the config a hundred thousand lists in each other."""
    (directory / CONFIG).write_text("[" * 100_000)


def no_tensors(directory: Path) -> None:
    """Remove the tensors."""
    (directory / TENSORS).unlink()


def no_file_but_a_pipe(directory: Path) -> None:
    """Put a pipe that nobody writes to in place of the tensors."""
    (directory / TENSORS).unlink()
    os.mkfifo(directory / TENSORS)


def config_is_a_pipe(directory: Path) -> None:
    """Likewise of the config."""
    (directory / CONFIG).unlink()
    os.mkfifo(directory / CONFIG)
