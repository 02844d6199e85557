"""The arena: loaded versions lie where the tables point, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from descant.engine import arena as arena_module
from descant.engine.arena import Arena
from descant.model.arch import LoraModule
from descant.versions.extent import extent_bytes
from descant.versions.low_rank import Factors, LowRankAdapter
from descant.versions.store import write_version
from descant_client.errors import AdapterInvalid
from descant_kernels import PairLayout, Segments, add_lora

MODULES = (LoraModule("q", 6, 4), LoraModule("k", 6, 2), LoraModule("head", 6, 10))


def stored(directory: Path, ranks: dict[int, int], seed: int, scaling: float = 1.0) -> tuple[Path, dict[int, Factors]]:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        index: Factors(
            torch.randn(rank, MODULES[index].in_features, generator=generator),
            torch.randn(MODULES[index].out_features, rank, generator=generator),
            scaling,
        )
        for index, rank in ranks.items()
    }
    adapter = LowRankAdapter({MODULES[index].name: pair for index, pair in factors.items()})
    return write_version(directory, adapter, MODULES).path, factors


def resident(arena: Arena, slot: int, index: int) -> tuple[Tensor, Tensor]:
    tables, module = arena.tables(), MODULES[index]
    rank, start = int(tables.ranks[slot, index]), int(tables.offsets[slot, index])
    return PairLayout.of(rank, module.in_features, module.out_features).views(tables.arena, start)


def assert_resident(arena: Arena, slot: int, factors: dict[int, Factors], dtype: torch.dtype = torch.float32) -> None:
    for index, pair in factors.items():
        a, b = resident(arena, slot, index)
        assert torch.equal(a, pair.a.to(dtype))
        assert torch.equal(b, pair.scaled_b().to(dtype))


@pytest.mark.parametrize("scaling", [1.0, 0.30000001192092896])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_version_lies_where_the_tables_say(dtype: torch.dtype, scaling: float, tmp_path: Path) -> None:
    path, factors = stored(tmp_path, {0: 3, 2: 5}, seed=0, scaling=scaling)
    arena = Arena(MODULES, num_adapter_slots=4, num_bytes=8192, dtype=dtype)

    arena.load(2, 768, path)

    assert arena.tables().host_ranks[2] == [3, 0, 5]
    assert int(arena.tables().offsets[2, 0]) * dtype.itemsize == 768
    assert_resident(arena, 2, factors, dtype)


def test_a_staged_version_says_what_it_takes(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3, 2: 5}, seed=0)

    staged = Arena(MODULES, num_adapter_slots=1, num_bytes=8192, dtype=torch.bfloat16).stage(path)

    assert staged.num_bytes == extent_bytes([3, 0, 5], MODULES, 2)


def test_host_and_device_tables_agree(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3, 2: 5}, seed=0)
    arena = Arena(MODULES, num_adapter_slots=3, num_bytes=8192, dtype=torch.float32)

    arena.load(1, 256, path)

    tables = arena.tables()
    assert tables.ranks.tolist() == tables.host_ranks
    assert tables.offsets.tolist() == tables.host_offsets


def test_versions_side_by_side_do_not_touch_each_other(tmp_path: Path) -> None:
    (one, kept), (two, _) = stored(tmp_path, {0: 3}, seed=0), stored(tmp_path, {0: 2, 1: 1}, seed=1)
    size = extent_bytes([3, 0, 0], MODULES, 4)
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=8192, dtype=torch.float32)

    arena.load(0, 0, one)
    arena.load(1, size, two)

    assert_resident(arena, 0, kept)


def test_an_extent_aligns_every_module() -> None:
    assert extent_bytes([0, 0, 0], MODULES, 4) == 0
    assert extent_bytes([1, 1, 0], MODULES, 4) == (128 + 128) * 4
    assert extent_bytes([3, 0, 5], MODULES, 2) == (128 + 192) * 2


def test_an_unloaded_slot_has_no_ranks(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3}, seed=0)
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=8192, dtype=torch.float32)
    arena.load(0, 0, path)

    arena.unload(0)

    assert not arena.tables().ranks.any()
    assert not any(map(any, arena.tables().host_ranks))


def test_tables_change_by_becoming_a_new_object_on_the_same_tensors(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3}, seed=0)
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=8192, dtype=torch.float32)
    before = arena.tables()

    arena.load(0, 0, path)

    assert arena.tables() is not before
    assert arena.tables().ranks.data_ptr() == before.ranks.data_ptr()
    assert before.host_ranks[0] == [0, 0, 0]


@pytest.mark.parametrize("at_once_bytes", [4, 100, 1 << 20])
@pytest.mark.parametrize("offset", [0, 256, 768, 1024, 1280, 2048, 4096])
def test_a_version_moves_to_any_place_even_one_it_overlaps(
    offset: int, at_once_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "_MAX_PIECE_BYTES", at_once_bytes)
    path, factors = stored(tmp_path, {0: 9, 2: 5}, seed=0, scaling=0.5)
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=8192, dtype=torch.float32)
    arena.load(1, 1024, path)
    before = arena.tables()

    arena.move(1, offset)

    assert arena.tables() is not before
    assert arena.tables().offsets[1, 0] * 4 == offset
    assert arena.tables().offsets.data_ptr() == before.offsets.data_ptr()
    assert arena.tables().offsets.tolist() == arena.tables().host_offsets
    assert before.host_offsets[1][0] * 4 == 1024
    assert_resident(arena, 1, factors)


def test_a_move_leaves_its_neighbors_alone(tmp_path: Path) -> None:
    (one, kept), (two, moved) = stored(tmp_path, {0: 3}, seed=0), stored(tmp_path, {0: 2, 1: 1}, seed=1)
    arena = Arena(MODULES, num_adapter_slots=3, num_bytes=8192, dtype=torch.float32)
    arena.load(0, 0, one)
    arena.load(1, 1024, two)
    arena.load(2, 2048, one)

    arena.move(1, 512)

    assert_resident(arena, 0, kept)
    assert_resident(arena, 1, moved)
    assert_resident(arena, 2, kept)


def test_an_emptied_slot_moves_nothing(tmp_path: Path) -> None:
    (one, kept), (two, _) = stored(tmp_path, {0: 3}, seed=0), stored(tmp_path, {0: 2, 1: 1}, seed=1)
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=8192, dtype=torch.float32)
    arena.load(0, 0, one)
    arena.load(1, 1024, two)
    arena.unload(1)

    arena.move(1, 0)

    assert_resident(arena, 0, kept)


def test_a_version_moves_only_within_the_arena(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3}, seed=0)
    arena = Arena(MODULES, num_adapter_slots=1, num_bytes=1024, dtype=torch.float32)
    arena.load(0, 0, path)

    with pytest.raises(AssertionError):
        arena.move(0, 768)
    with pytest.raises(AssertionError):
        arena.move(0, 4)


def test_a_damaged_version_leaves_the_slot_empty(tmp_path: Path) -> None:
    (path, _), (other, _) = stored(tmp_path, {0: 3}, seed=0), stored(tmp_path, {1: 3}, seed=1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=8192, dtype=torch.float32)
    arena.load(0, 0, other)

    with pytest.raises(AdapterInvalid):
        arena.load(0, 0, path)

    assert not arena.tables().ranks.any()


def test_a_missing_version_is_invalid(tmp_path: Path) -> None:
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=8192, dtype=torch.float32)

    with pytest.raises(AdapterInvalid):
        arena.load(0, 0, tmp_path / "versions" / "0.safetensors")


def test_an_extent_outside_the_arena_is_our_own_fault(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3}, seed=0)
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=512, dtype=torch.float32)

    with pytest.raises(AssertionError):
        arena.load(0, 256, path)


def test_the_kernel_adds_what_was_loaded(tmp_path: Path) -> None:
    path, factors = stored(tmp_path, {0: 3, 1: 2}, seed=0)
    arena = Arena(MODULES, num_adapter_slots=2, num_bytes=8192, dtype=torch.float32)
    arena.load(1, 256, path)
    x, y = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)), torch.zeros(5, 6)

    add_lora(y, x, arena.tables(), Segments.of([2, 3], [-1, 1]), 0, (4, 2))

    expected = torch.cat([x @ pair.a.T @ pair.b.T for pair in factors.values()], dim=1)
    torch.testing.assert_close(y[2:], expected[2:])
    assert not y[:2].any()
