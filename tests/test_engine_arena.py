"""The arena: what is loaded lies where the tables say, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from descant.adapters.low_rank import Factors, LowRankAdapter
from descant.adapters.store import write_version
from descant.engine.arch import LoraModule
from descant.engine.arena import ALIGNMENT_BYTES, Arena, extent_bytes
from descant_client.errors import AdapterInvalid
from descant_kernels import Segments, add_lora

MODULES = (LoraModule("q", 6, 4), LoraModule("k", 6, 2), LoraModule("head", 6, 10))


def stored(directory: Path, ranks: dict[int, int], seed: int) -> tuple[Path, dict[int, Factors]]:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        index: Factors(
            torch.randn(rank, MODULES[index].in_features, generator=generator),
            torch.randn(MODULES[index].out_features, rank, generator=generator),
        )
        for index, rank in ranks.items()
    }
    adapter = LowRankAdapter({MODULES[index].name: pair for index, pair in factors.items()})
    return write_version(directory, adapter, MODULES)[1], factors


def resident(arena: Arena, slot: int, index: int) -> tuple[Tensor, Tensor]:
    tables, module = arena.tables(), MODULES[index]
    rank, start = int(tables.ranks[slot, index]), int(tables.offsets[slot, index])
    middle, end = start + rank * module.in_features, start + rank * (module.in_features + module.out_features)
    return tables.arena[start:middle].view(rank, -1), tables.arena[middle:end].view(-1, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_version_lies_where_the_tables_say(dtype: torch.dtype, tmp_path: Path) -> None:
    path, factors = stored(tmp_path, {0: 3, 2: 5}, seed=0)
    arena = Arena(MODULES, num_slots=4, num_bytes=4096, dtype=dtype)

    arena.load(2, 640, path)

    assert arena.tables().host_ranks[2] == [3, 0, 5]
    assert int(arena.tables().offsets[2, 0]) * dtype.itemsize == 640
    for index, pair in factors.items():
        a, b = resident(arena, 2, index)
        assert torch.equal(a, pair.a.to(dtype))
        assert torch.equal(b, pair.b.to(dtype))


def test_host_and_device_tables_agree(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3, 2: 5}, seed=0)
    arena = Arena(MODULES, num_slots=3, num_bytes=4096, dtype=torch.float32)

    arena.load(1, 64, path)

    tables = arena.tables()
    assert tables.ranks.tolist() == tables.host_ranks
    assert tables.offsets.tolist() == tables.host_offsets


def test_versions_side_by_side_do_not_touch_each_other(tmp_path: Path) -> None:
    (one, kept), (two, _) = stored(tmp_path, {0: 3}, seed=0), stored(tmp_path, {0: 2, 1: 1}, seed=1)
    size = extent_bytes([3, 0, 0], MODULES, 4)
    arena = Arena(MODULES, num_slots=2, num_bytes=4096, dtype=torch.float32)

    arena.load(0, 0, one)
    arena.load(1, size, two)

    assert torch.equal(resident(arena, 0, 0)[0], kept[0].a)
    assert torch.equal(resident(arena, 0, 0)[1], kept[0].b)


def test_an_extent_aligns_every_module() -> None:
    assert extent_bytes([0, 0, 0], MODULES, 4) == 0
    assert extent_bytes([1, 1, 0], MODULES, 4) == 2 * ALIGNMENT_BYTES
    assert extent_bytes([3, 0, 5], MODULES, 2) == 64 + 192


def test_an_unloaded_slot_has_no_ranks(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3}, seed=0)
    arena = Arena(MODULES, num_slots=2, num_bytes=4096, dtype=torch.float32)
    arena.load(0, 0, path)

    arena.unload(0)

    assert not arena.tables().ranks.any()
    assert not any(map(any, arena.tables().host_ranks))


def test_tables_change_by_becoming_a_new_object_on_the_same_tensors(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3}, seed=0)
    arena = Arena(MODULES, num_slots=2, num_bytes=4096, dtype=torch.float32)
    before = arena.tables()

    arena.load(0, 0, path)

    assert arena.tables() is not before
    assert arena.tables().ranks.data_ptr() == before.ranks.data_ptr()
    assert before.host_ranks[0] == [0, 0, 0]


def test_a_damaged_version_leaves_the_slot_empty(tmp_path: Path) -> None:
    (path, _), (other, _) = stored(tmp_path, {0: 3}, seed=0), stored(tmp_path, {1: 3}, seed=1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    arena = Arena(MODULES, num_slots=2, num_bytes=4096, dtype=torch.float32)
    arena.load(0, 0, other)

    with pytest.raises(AdapterInvalid):
        arena.load(0, 0, path)

    assert not arena.tables().ranks.any()


def test_a_missing_version_is_invalid(tmp_path: Path) -> None:
    arena = Arena(MODULES, num_slots=2, num_bytes=4096, dtype=torch.float32)

    with pytest.raises(AdapterInvalid):
        arena.load(0, 0, tmp_path / "versions" / "0.safetensors")


def test_an_extent_outside_the_arena_is_our_own_fault(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {0: 3}, seed=0)
    arena = Arena(MODULES, num_slots=2, num_bytes=128, dtype=torch.float32)

    with pytest.raises(AssertionError):
        arena.load(0, 64, path)


def test_the_kernel_adds_what_was_loaded(tmp_path: Path) -> None:
    path, factors = stored(tmp_path, {0: 3, 1: 2}, seed=0)
    arena = Arena(MODULES, num_slots=2, num_bytes=4096, dtype=torch.float32)
    arena.load(1, 128, path)
    x, y = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)), torch.zeros(5, 6)

    add_lora(y, x, arena.tables(), Segments.of([2, 3], [-1, 1]), 0, (4, 2))

    expected = torch.cat([x @ pair.a.T @ pair.b.T for pair in factors.values()], dim=1)
    torch.testing.assert_close(y[2:], expected[2:])
    assert not y[:2].any()
