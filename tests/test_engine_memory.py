"""Device memory: its division, and transfers to and from the device while steps run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import tiny_models
from descant.contract.engine import EngineOptions
from descant.engine import memory
from descant.engine.arena import Arena, StagedVersion
from descant.engine.batch import PendingTokens
from descant.engine.draws import draw_later
from descant.engine.memory import MemoryShares, divide_memory, memory_shares, run_largest_step, usable_bytes
from descant.engine.sampling import Sampler, SamplingRow
from descant.engine.uploads import Download, Mark, pack, unpack, upload
from descant.engine.weights import DecoderWeights, load_weights
from descant.model.arch import LoraModule, from_hf
from descant.versions.draft_heads import DraftHeads
from descant.versions.low_rank import Factors, LowRankAdapter
from descant.versions.store import write_version
from descant_client.errors import ConfigInvalid
from descant_client.protocol import SamplingParams

CPU = torch.device("cpu")
MIB = 2**20

# ---- shares -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_kv_bytes", "num_adapter_bytes", "expected"),
    [
        (None, None, MemoryShares(900 * MIB, 100 * MIB)),
        (None, 300 * MIB, MemoryShares(700 * MIB, 300 * MIB)),
        (None, 0, MemoryShares(1000 * MIB, 0)),
        (950 * MIB, None, MemoryShares(950 * MIB, 50 * MIB)),
        (500 * MIB, None, MemoryShares(500 * MIB, 100 * MIB)),
        (400 * MIB, 600 * MIB, MemoryShares(400 * MIB, 600 * MIB)),
    ],
)
def test_what_is_given_is_kept_and_the_rest_is_shared(
    num_kv_bytes: int | None, num_adapter_bytes: int | None, expected: MemoryShares
) -> None:
    assert divide_memory(1000 * MIB, 2 * MIB, num_kv_bytes, num_adapter_bytes) == expected


@pytest.mark.parametrize("num_free_bytes", [2 * MIB, 2 * MIB + 1, 7_654_321, 10**11 + 7])
def test_shares_never_exceed_what_is_free_and_hold_a_block(num_free_bytes: int) -> None:
    shares = divide_memory(num_free_bytes, 2 * MIB, None, None)

    assert shares.num_kv_bytes >= 2 * MIB
    assert shares.num_adapter_bytes % 64 == 0 <= shares.num_adapter_bytes
    assert shares.num_kv_bytes + shares.num_adapter_bytes == num_free_bytes


@pytest.mark.parametrize(
    ("num_free_bytes", "sizes", "field", "advice"),
    [
        (2 * MIB - 1, (None, None), "model.memory_fraction", "one block of the cache takes 2 MiB"),
        (-5 * MIB, (None, None), "model.memory_fraction", "Raise the fraction"),
        (100 * MIB, (None, 99 * MIB), "model.memory_fraction", "adapters take 99 MiB"),
        (100 * MIB, (101 * MIB, None), "model.kv_bytes", "Lower kv_bytes"),
        (100 * MIB, (60 * MIB, 41 * MIB), "model.kv_bytes", "need 101 MiB, and 100 MiB are left"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(
    num_free_bytes: int, sizes: tuple[int | None, int | None], field: str, advice: str
) -> None:
    with pytest.raises(ConfigInvalid, match=advice) as refusal:
        divide_memory(num_free_bytes, 2 * MIB, *sizes)

    assert field in str(refusal.value)


def test_free_is_the_fraction_without_others_and_the_largest_step() -> None:
    assert usable_bytes(80_000, 1_000, 20_000, 0.9) == 51_000
    assert usable_bytes(80_000, 1_000, 79_500, 1.0) == -500
    for fraction in (0.0, 1.01, -1.0):
        with pytest.raises(ConfigInvalid, match="memory_fraction"):
            usable_bytes(80_000, 0, 0, fraction)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DecoderWeights]:
    directory = tmp_path_factory.mktemp("model")
    tiny_models.save_model(directory, tiny_models.tiny_config("qwen3", max_position_embeddings=40))
    config = from_hf(directory)
    return config, load_weights(directory, config, torch.float32, CPU)


@pytest.mark.parametrize("num_tokens", [7, 40, 100])
def test_the_largest_step_has_as_many_tokens_as_are_allowed(model: tuple[Any, DecoderWeights], num_tokens: int) -> None:
    probs = run_largest_step(*model, num_tokens, 16, torch.float32, CPU)

    assert probs.shape == (num_tokens, tiny_models.VOCAB_SIZE)


def test_a_gpu_is_measured_only_for_sizes_that_are_left_out(
    model: tuple[Any, DecoderWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []
    monkeypatch.setattr(memory, "free_bytes", lambda step, device, fraction: measured.append(fraction) or 1000 * MIB)
    one_block = 2 * 2 * 24 * 16 * 4

    def shares(device: str, **sizes: Any) -> MemoryShares:
        options = replace(EngineOptions(), **sizes)
        return memory_shares(options, *model, torch.float32, torch.device(device))

    given = {"num_kv_bytes": 5 * MIB, "num_adapter_bytes": 3 * MIB}
    left_out = {"num_kv_bytes": None, "num_adapter_bytes": None}
    assert shares("cuda", **given) == shares("cpu", **given) == MemoryShares(5 * MIB, 3 * MIB)
    assert shares("cpu", **left_out) == MemoryShares(256 * MIB, 256 * MIB)
    assert measured == []
    assert shares("cuda", **left_out) == MemoryShares(900 * MIB, 100 * MIB)
    assert shares("cuda", **left_out, num_blocks=7) == MemoryShares(7 * one_block, 100 * MIB)
    assert measured == [0.9, 0.9]


# ---- transfers ----------------------------------------------------------------------------------------------------


def test_packed_tensors_come_out_as_they_went_in() -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.randn(3, 5),
        torch.arange(6, dtype=torch.int32).view(3, 2).T,
        torch.empty(0, 3, dtype=torch.int32),
        torch.tensor([2**62, -1]),
    ]

    packed, starts = pack(tensors)
    views = unpack(packed, starts, tensors)

    assert all(start % 16 == 0 for start in starts)
    assert all(
        torch.equal(view, tensor) and view.dtype == tensor.dtype for view, tensor in zip(views, tensors, strict=True)
    )


def test_on_the_cpu_nothing_is_copied() -> None:
    tensors = [torch.zeros(3), torch.ones(2)]

    assert all(a is b for a, b in zip(upload(tensors, CPU), tensors, strict=True))
    assert all(a is b for a, b in zip(Download(tensors).block_until_copied(), tensors, strict=True))


# ---- sampled tokens -----------------------------------------------------------------------------------------------


def test_a_draw_without_the_host_is_bitwise_the_samplers() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 5
    logits[2, 7] = torch.nan
    logits[3, 7] = -torch.inf
    temperatures, num_logprobs = (0.0, 0.7, 1.0, 0.0, 1.0, 9.0), (-1, 3, 2, 0, 0, 1)
    rows = [
        SamplingRow(SamplingParams(temperature=t), 2**63 + i, i, 5 * i, [], [], n)
        for i, (t, n) in enumerate(zip(temperatures, num_logprobs, strict=True))
    ]
    pending = PendingTokens(2, 6, CPU)

    draw = draw_later(logits.clone(), rows, pending.put)

    expected = Sampler(50).sample(logits.clone(), rows)
    assert draw.tokens() == expected
    kept = pending.tokens[list(draw.sources)].tolist()
    assert [kept[i] for i in (0, 1, 4, 5)] == [expected[i].token_id for i in (0, 1, 4, 5)]


@pytest.mark.parametrize(
    "change",
    [
        *({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5}, {"logit_bias": {3: 1.0}}),
        *({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}),
    ],
)
def test_filters_and_penalties_need_the_host(change: dict[str, Any]) -> None:
    assert SamplingRow(SamplingParams(**change), 0, 0, 0, [], []).needs_host
    assert not SamplingRow(SamplingParams(temperature=0.8), 0, 0, 0, [], []).needs_host


def test_lanes_of_pending_tokens_are_used_in_turn() -> None:
    pending = PendingTokens(2, 3, CPU)

    sources = [list(pending.put(torch.tensor(tokens))) for tokens in ([5, 6], [7, 8, 9], [4])]

    assert sources == [[0, 1], [3, 4, 5], [0]]
    filled = pending.fill_in(torch.tensor([11, 12, 13]), torch.tensor([-1, 4, 0]))
    assert filled.tolist() == [11, 8, 4]


# ---- adapters that arrive beside the steps --------------------------------------------------------------------------


@dataclass
class FakeMark:
    """A point in a device's work that passes when a test sets it."""

    name: str
    has_passed: bool = False

    def query(self) -> bool:
        return self.has_passed


@dataclass
class FakeUploader:
    """An uploader that copies at once and logs the order of the device's work."""

    log: list[str] = field(default_factory=list)
    marks: list[FakeMark] = field(default_factory=list)

    def stage(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        return data.to(dtype)

    def copy(self, target: Tensor, staged: Tensor, after: Sequence[Mark]) -> Mark:
        target.copy_(staged)
        names = ",".join(cast("FakeMark", mark).name for mark in after)
        self.log.append(f"copy after {names}" if after else "copy")
        return self._new_mark("arrival")

    def order_after(self, mark: Mark) -> None:
        if mark is not None:
            self.log.append(f"wait for {cast('FakeMark', mark).name}")

    def mark(self) -> Mark:
        return self._new_mark("work")

    def _new_mark(self, what: str) -> Mark:
        self.marks.append(FakeMark(f"{what} {len(self.marks)}"))
        return cast("Mark", self.marks[-1])


ALIGNMENT_BYTES = 256  # of float32 extents
SIZE = 16 * ALIGNMENT_BYTES  # room for a version of the tests


def arena_and_log(tmp_path: Path) -> tuple[Arena, FakeUploader, StagedVersion]:
    modules, uploader = (LoraModule("q", 64, 64),), FakeUploader()
    arena = Arena(modules, num_adapter_slots=4, num_bytes=4 * SIZE, dtype=torch.float32, uploader=uploader)
    adapter = LowRankAdapter({"q": Factors(torch.ones(4, 64), torch.ones(64, 4), 1.0)})
    staged = arena.stage(write_version(tmp_path, adapter, modules).path)
    assert SIZE // 4 < staged.num_bytes <= SIZE
    return arena, uploader, staged


def test_a_step_waits_once_for_what_its_own_slots_hold(tmp_path: Path) -> None:
    arena, uploader, staged = arena_and_log(tmp_path)
    for slot in range(3):
        arena.commit(slot, SIZE * slot, staged)
    uploader.log.clear()

    arena.begin_use([1])
    arena.begin_use([1, 2])
    arena.begin_use([])

    assert uploader.log == ["wait for arrival 1", "wait for arrival 2"]


def test_an_extent_is_overwritten_after_the_steps_that_read_it(tmp_path: Path) -> None:
    arena, uploader, staged = arena_and_log(tmp_path)
    for slot in range(2):
        arena.commit(slot, SIZE * slot, staged)
    arena.end_use([0])
    arena.end_use([1])
    arena.unload(0)
    uploader.log.clear()

    arena.commit(2, 0, staged)
    arena.commit(3, 2 * SIZE, staged)
    uploader.marks[3].has_passed = True
    arena.end_use([1])
    arena.commit(0, SIZE - ALIGNMENT_BYTES, staged)

    assert uploader.log == ["copy after work 2", "copy", "copy after work 6"]


def test_draft_heads_alone_are_overwritten_after_the_steps_that_read_them(tmp_path: Path) -> None:
    modules, uploader = (LoraModule("head", 16, 16),), FakeUploader()
    arena = Arena(modules, num_adapter_slots=2, num_bytes=SIZE, dtype=torch.float32, uploader=uploader)
    heads = LowRankAdapter({}, DraftHeads(torch.ones(1, 1, 16, 16), torch.ones(1, 1, 16), None))
    staged = arena.stage(write_version(tmp_path, heads, modules).path)
    arena.commit(0, ALIGNMENT_BYTES, staged)
    arena.end_use([0])

    arena.unload(0)
    arena.commit(1, staged.num_bytes, staged)

    assert uploader.log == ["copy", "copy after work 1"]


def test_a_step_without_adapters_keeps_nothing(tmp_path: Path) -> None:
    arena, uploader, staged = arena_and_log(tmp_path)
    arena.commit(0, 0, staged)

    arena.end_use([])
    arena.end_use([3])

    assert [mark.name for mark in uploader.marks] == ["arrival 0"]


def test_a_move_waits_for_arrivals_and_is_waited_for(tmp_path: Path) -> None:
    arena, uploader, staged = arena_and_log(tmp_path)
    arena.commit(0, 0, staged)
    arena.commit(1, SIZE, staged)
    uploader.log.clear()

    arena.move(0, 2 * SIZE)
    arena.begin_use([0])
    arena.commit(2, 0, staged)
    arena.commit(3, 3 * SIZE, staged)

    assert uploader.log == ["wait for arrival 1", "copy after work 2", "copy"]
