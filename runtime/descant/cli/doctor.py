"""`descant doctor`: versions and devices of this machine, and whether batching changes no bit on it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch
from rich.console import Console

from descant.__about__ import __version__
from descant_kernels import probe_invariance

PACKAGES = ("torch", "triton", "safetensors", "tokenizers", "msgspec", "websockets", "uvicorn", "starlette")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def examine(console: Console) -> bool:
    """Print the findings. Return whether, for every dtype, this CPU computes a row independently of its batch."""
    say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
    say(f"descant {__version__}, Python {platform.python_version()}, {sys.platform} {platform.machine()}")
    say(", ".join(f"{name} {_version_of(name)}" for name in PACKAGES))
    say(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, CUDA: {_cuda()}")
    is_invariant = True
    for dtype in DTYPES:
        found = probe_invariance(dtype)
        is_invariant = is_invariant and found.ok
        verdict = (
            "each row is computed bit for bit independently of its batch" if found.ok else "NOT independent of batch"
        )
        name = str(dtype).removeprefix("torch.")
        say(f"{name}: {verdict} ({found})")
    return is_invariant


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cuda() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
