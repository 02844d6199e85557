"""What the child processes are told at their start; apart from them, so that the server imports none of their code."""

from __future__ import annotations

import msgspec

from descant.config import DType, EngineKind


class ExecutorConfig(msgspec.Struct, frozen=True):
    """See `config.ModelConfig` and `config.AdapterConfig`."""

    engine: EngineKind
    model_dir: str
    dtype: DType | None
    device: str
    kv_bytes: int
    num_adapter_slots: int
    adapter_bytes: int
    max_num_batched_tokens: int
    num_threads: int | None
    dummy_tokens_per_s: float


class WorkerConfig(msgspec.Struct, frozen=True):
    """`dtype` is what the model is served in; None: the checkpoint's."""

    model_dir: str
    store_dir: str
    dtype: DType | None
    max_rank: int
    max_file_bytes: int
    max_extent_bytes: int  # the arena's size
