"""The engine on a CUDA device gives the same tokens as on the CPU: with graphs or not, queued or step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from descant.adapters.prepare import AdapterWorker
from descant.contract.plan import NO_ADAPTER, RowResult, unpack_ints
from descant.contract.version import AdapterVersion
from descant.engine.runner import Engine
from descant_client.errors import ConfigInvalid
from descant_client.protocol import SamplingParams
from engine_driver import GREEDY, engine_for
from test_engine_graphs import MIXED, RANDOM, RANKS, admits, generate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FILTERED = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1)
NO_ADAPTERS = (NO_ADAPTER,) * 5


@dataclass
class Model:
    """A checkpoint and its adapters."""

    directory: Path
    versions: list[AdapterVersion]

    def engine(self, slots: tuple[int, ...] = (0, 1, 2), **options: Any) -> Engine:
        """An engine with version i in `slots[i]`."""
        engine = engine_for(self.directory, num_blocks=40, **options)
        self.place(engine, slots)
        return engine

    def place(self, engine: Engine, slots: tuple[int, ...]) -> None:
        for at, (slot, version) in enumerate(zip(slots, self.versions, strict=True)):
            engine.load_adapter(slot, at * 2**17, version.path)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp(request.param)
    config = tiny_models.tiny_config(request.param, max_position_embeddings=64)
    tiny_models.save_model(directory / "base", config)
    worker = AdapterWorker(directory / "base", directory / "store", "float32")
    adapters = [tiny_models.save_adapter(directory / f"r{rank}", directory / "base", rank, r=rank) for rank in RANKS]
    return Model(directory / "base", [worker.prepare(path.name, path) for path in adapters])


@pytest.fixture(scope="module")
def cpu(model: Model) -> Engine:
    return model.engine()


@pytest.fixture(scope="module")
def gpu(model: Model) -> Iterator[Engine]:
    yield model.engine(device="cuda")
    torch.cuda.empty_cache()


def tokens(results: list[tuple[RowResult, ...]]) -> list[list[list[int]]]:
    """Return token ids by step and row; fail on any error."""
    assert all(row.error is None for rows in results for row in rows)
    return [[unpack_ints(row.token_ids) for row in rows] for rows in results]


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, FILTERED])
@pytest.mark.parametrize("slots", [MIXED, NO_ADAPTERS])
def test_the_gpu_says_what_the_cpu_says(
    cpu: Engine, gpu: Engine, slots: tuple[int, ...], sampling: SamplingParams
) -> None:
    admitted = admits(sampling, slots=slots)

    assert tokens(generate(gpu, admitted, slots, 20)) == tokens(generate(cpu, admitted, slots, 20))


@pytest.mark.parametrize("slots", [MIXED, NO_ADAPTERS, (1,)])
def test_a_replayed_step_says_what_a_launched_one_says(
    gpu: Engine, slots: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted = admits(RANDOM, num_logprobs=2, slots=slots)
    assert gpu._graphs is not None
    replayed = generate(gpu, admitted, slots, 20)

    monkeypatch.setattr(gpu, "_graphs", None)
    launched = generate(gpu, admitted, slots, 20)

    assert tokens(replayed) == tokens(launched)


def test_adapters_change_between_replays_of_the_same_graph(model: Model, cpu: Engine, gpu: Engine) -> None:
    slots, admitted = (0, 1, 2), admits(slots=(0, 1, 2))
    before, captured = tokens(generate(gpu, admitted, slots, 10)), set(gpu._graphs._graphs if gpu._graphs else ())

    for engine in (gpu, cpu):
        model.place(engine, (1, 2, 0))
        engine.move_adapter(1, 3 * 2**17)
    after = [tokens(generate(engine, admitted, slots, 10)) for engine in (gpu, cpu)]
    for engine in (gpu, cpu):
        model.place(engine, (0, 1, 2))

    assert after[0] == after[1] != before
    assert tokens(generate(gpu, admitted, slots, 10)) == before
    assert set(gpu._graphs._graphs if gpu._graphs else ()) == captured != set()


def test_an_adapter_placed_while_a_step_runs_does_not_change_that_step(model: Model, gpu: Engine) -> None:
    slots, admitted = (0, 1, 2), admits(slots=(0, 1, 2))
    before = tokens(generate(gpu, admitted, slots, 10))
    staged = [gpu.stage_adapter(version.path) for version in model.versions]

    for _ in range(20):  # uploads to other extents while the last step of the previous run may still be running
        results = generate(gpu, admitted, slots, 10)
        for slot, version in enumerate(staged):
            gpu.place_adapter(slot, (3 + slot) * 2**17 // 2, version)
        assert tokens(results) == before
    model.place(gpu, (0, 1, 2))


def test_queued_steps_say_what_steps_one_by_one_say_on_the_gpu(model: Model, gpu: Engine) -> None:
    one_by_one = model.engine(device="cuda", max_steps_in_flight=1)
    admitted = admits(RANDOM, num_logprobs=1)

    assert gpu.limits.max_steps_in_flight == 2
    assert generate(gpu, admitted, num_steps=20) == generate(one_by_one, admitted, num_steps=20)


def test_sizes_that_are_left_out_fill_the_device_and_no_more(model: Model) -> None:
    left_out = {"num_kv_bytes": None, "num_adapter_bytes": None, "num_blocks": None, "device": "cuda"}
    free_before, total = torch.cuda.mem_get_info()

    engine = engine_for(model.directory, memory_fraction=0.2, **left_out)

    free_after, _ = torch.cuda.mem_get_info()
    assert engine.info.num_adapter_bytes > 0
    assert 0.1 * total < free_before - free_after < 0.25 * total
    del engine
    torch.cuda.empty_cache()
    with pytest.raises(ConfigInvalid, match="memory_fraction"):
        engine_for(model.directory, memory_fraction=1e-6, **left_out)
