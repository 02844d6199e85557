"""Configuration of the child processes. In a file of its own, so that the server imports none of their code."""

from __future__ import annotations

import msgspec

from descant.contract.engine import Dtype, EngineKind, EngineOptions


class ExecutorConfig(msgspec.Struct, frozen=True):
    """Configuration of the executor. `dummy_tokens_per_s` is the rate of the dummy engine."""

    engine: EngineKind
    model_dir: str
    options: EngineOptions
    dummy_tokens_per_s: float


class AdapterLimits(msgspec.Struct, frozen=True):
    """Limits on the content of adapters. `max_extent_bytes` None: only the arena's size limits a version."""

    max_rank: int = 1024  # of one module of one adapter; a sum may have more
    max_draft_heads: int = 16
    max_draft_layers: int = 8  # residual blocks of one head
    max_file_bytes: int = 8 << 30  # of all files with tensors together
    max_config_bytes: int = 4 << 20
    max_extent_bytes: int | None = None  # in the device arena
    pattern_budget_s: float = 5.0  # for all regular expressions of one adapter together


class WorkerConfig(msgspec.Struct, frozen=True):
    """Configuration of the worker. `dtype` is the dtype the model is served in; None: the checkpoint's."""

    model_dir: str
    store_dir: str
    dtype: Dtype | None
    limits: AdapterLimits
