"""Descant: a server for one base language model with many LoRA adapters. Importing it imports nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from descant.__about__ import __version__

if TYPE_CHECKING:
    from descant.local import local

__all__ = ["__version__", "local"]


def __getattr__(name: str) -> Any:
    if name == "local":
        return import_module("descant.local").local
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
