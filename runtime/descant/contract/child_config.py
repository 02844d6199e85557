"""What the child processes are told at their start; apart from them, so that the server imports none of their code."""

from __future__ import annotations

import msgspec

from descant.contract.engine import Dtype, EngineKind, EngineOptions
from descant.contract.limits import AdapterLimits


class ExecutorConfig(msgspec.Struct, frozen=True):
    """Which engine to run, on what; `dummy_tokens_per_s` is the dummy's pace."""

    engine: EngineKind
    model_dir: str
    options: EngineOptions
    dummy_tokens_per_s: float


class WorkerConfig(msgspec.Struct, frozen=True):
    """`dtype` is what the model is served in; None: the checkpoint's."""

    model_dir: str
    store_dir: str
    dtype: Dtype | None
    limits: AdapterLimits
