"""Configuration of the child processes. In a file of its own, so that the server imports none of their code."""

from __future__ import annotations

import msgspec

from descant.contract.engine import Dtype, EngineKind, EngineOptions
from descant.contract.limits import AdapterLimits


class ExecutorConfig(msgspec.Struct, frozen=True):
    """Configuration of the executor. `dummy_tokens_per_s` is the rate of the dummy engine."""

    engine: EngineKind
    model_dir: str
    options: EngineOptions
    dummy_tokens_per_s: float


class WorkerConfig(msgspec.Struct, frozen=True):
    """Configuration of the worker. `dtype` is the dtype the model is served in; None: the checkpoint's."""

    model_dir: str
    store_dir: str
    dtype: Dtype | None
    limits: AdapterLimits
