"""Draft heads in the store and the arena: their values survive loads, moves and unloads of any slot."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from descant.engine import arena as arena_module
from descant.engine.arena import Arena, StagedVersion
from descant.engine.host_cache import HostCache
from descant.model.arch import LoraModule
from descant.versions import store
from descant.versions.draft_heads import DraftHeads, HeadsShape
from descant.versions.extent import extent_bytes
from descant.versions.low_rank import Factors, LowRankAdapter
from descant_client.errors import AdapterInvalid
from medusa_fixture import assert_same, random_heads, some

MODULES = (LoraModule("q", 6, 4), LoraModule("k", 6, 2), LoraModule("head", 6, 10))
DTYPES = [torch.float32, torch.bfloat16]
UNIT = 64 * 4  # bytes: alignment of a float32 extent


class Version(NamedTuple):
    path: Path
    heads: DraftHeads | None
    ranks: list[int]


def stored(
    directory: Path, ranks: list[int], heads: tuple[int, int, bool] | None, seed: int = 0, scaling: float = 0.5
) -> Version:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(
            torch.randn(rank, in_size, generator=generator), torch.randn(out_size, rank, generator=generator), scaling
        )
        for (name, in_size, out_size), rank in zip(MODULES, ranks, strict=True)
        if rank
    }
    drawn = heads and random_heads(heads[0], heads[1], v1=heads[2], seed=seed, hidden=6, vocab=10)
    return Version(store.write_version(directory, LowRankAdapter(factors, drawn), MODULES).path, drawn, ranks)


def arena_of(dtype: torch.dtype = torch.float32, num_slots: int = 3, num_bytes: int = 64 * UNIT) -> Arena:
    arena = Arena(MODULES, num_adapter_slots=num_slots, num_bytes=num_bytes, dtype=dtype)
    arena.tables().arena.fill_(float("nan"))
    return arena


KINDS = {
    "alone v1": ([0, 0, 0], (2, 1, True)),
    "alone v2": ([0, 0, 0], (3, 2, False)),
    "lora and v1": ([3, 0, 5], (1, 3, True)),
    "lora and v2": ([0, 9, 0], (2, 1, False)),
}
kinds = pytest.mark.parametrize(("ranks", "heads"), KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("dtype", DTYPES)
@kinds
def test_heads_of_a_loaded_version_are_the_stored_ones(
    ranks: list[int], heads: tuple[int, int, bool], dtype: torch.dtype, tmp_path: Path
) -> None:
    version, arena = stored(tmp_path, ranks, heads), arena_of(dtype)

    arena.load(1, 3 * UNIT, version.path)

    assert_same(arena.heads(1), version.heads, dtype)
    assert arena.tables().host_ranks[1] == arena.tables().ranks[1].tolist() == ranks
    assert arena.heads(0) is arena.heads(2) is None


@kinds
def test_heads_are_views_of_the_arena_where_a_pair_may_begin(
    ranks: list[int], heads: tuple[int, int, bool], tmp_path: Path
) -> None:
    arena = arena_of()
    arena.load(1, 3 * UNIT, stored(tmp_path, ranks, heads).path)

    found = some(arena.heads(1))

    flat = arena.tables().arena
    starts = [(tensor.data_ptr() - flat.data_ptr()) // 4 for tensor in found.tensors()]
    assert all(tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for tensor in found.tensors())
    assert all(start % 64 == 0 for start in starts)
    assert starts[0] * 4 == 3 * UNIT + extent_bytes(ranks, MODULES, 4)


@pytest.mark.parametrize("itemsize", [2, 4])
@kinds
def test_an_extent_is_as_large_as_its_parts_in_whole_units(
    ranks: list[int], heads: tuple[int, int, bool], itemsize: int, tmp_path: Path
) -> None:
    num_heads, num_layers, v1 = heads
    parts = [num_heads * num_layers * 36, num_heads * num_layers * 6, num_heads * 60 if v1 else 0]
    units = sum(-(-part // 64) for part in parts)
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]

    staged = arena_of(dtype).stage(stored(tmp_path, ranks, heads).path)

    expected = extent_bytes(ranks, MODULES, itemsize) + units * 64 * itemsize
    assert staged.num_bytes == extent_bytes(ranks, MODULES, itemsize, HeadsShape(*heads)) == expected


@pytest.mark.parametrize("at_once_bytes", [100, 1 << 20])
@pytest.mark.parametrize("offset", [0, 1, 3, 5, 8, 20])
@kinds
def test_heads_move_with_their_version_even_to_a_place_it_overlaps(
    ranks: list[int],
    heads: tuple[int, int, bool],
    offset: int,
    at_once_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arena_module, "_MAX_PIECE_BYTES", at_once_bytes)
    version, arena = stored(tmp_path, ranks, heads), arena_of()
    arena.load(1, 4 * UNIT, version.path)

    arena.move(1, offset * UNIT)

    found = assert_same(arena.heads(1), version.heads)
    start = found.weight.data_ptr() - arena.tables().arena.data_ptr()
    assert start == offset * UNIT + extent_bytes(ranks, MODULES, 4)


def test_an_emptied_slot_has_no_heads(tmp_path: Path) -> None:
    arena = arena_of()
    arena.load(1, 0, stored(tmp_path, [0, 0, 0], (2, 1, True)).path)

    arena.unload(1)
    arena.move(1, UNIT)

    assert arena.heads(1) is None


def test_a_slot_has_the_heads_of_its_latest_version_only(tmp_path: Path) -> None:
    arena, version = arena_of(), stored(tmp_path, [0, 0, 0], (2, 1, True))
    arena.load(1, 0, version.path)

    arena.commit(1, 0, arena.stage(stored(tmp_path, [3, 0, 0], None).path))
    assert arena.heads(1) is None

    arena.load(1, 0, version.path)
    assert_same(arena.heads(1), version.heads)
    assert arena.tables().host_ranks[1] == [0, 0, 0]


def test_a_version_that_comes_through_the_host_cache_has_its_heads(tmp_path: Path) -> None:
    arena, version = arena_of(torch.bfloat16), stored(tmp_path, [3, 0, 5], (2, 1, True))
    cache: HostCache[StagedVersion] = HostCache(1 << 20)
    cache.stage("digest", 0, lambda: arena.stage(version.path), None)

    for slot, offset in ((0, 0), (2, 20)):
        staged = cache.take("digest")
        assert staged is not None
        arena.commit(slot, offset * UNIT, staged)

    assert_same(arena.heads(0), version.heads, torch.bfloat16)
    assert_same(arena.heads(2), version.heads, torch.bfloat16)


STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 40)), max_size=25)


@given(STEPS, st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_slot_keeps_its_heads_through_loads_moves_and_unloads(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int]], dtype: torch.dtype
) -> None:
    directory, unit = tmp_path_factory.getbasetemp() / "walk", 64 * dtype.itemsize
    versions = [stored(directory, *kind, seed=seed) for seed, kind in enumerate([*KINDS.values(), ([3, 0, 0], None)])]
    arena = arena_of(dtype, num_slots=4, num_bytes=64 * unit)
    staged = [arena.stage(version.path) for version in versions]
    held: dict[int, tuple[int, int]] = {}  # version and first unit, by slot

    for slot, which, at in steps:  # a slot that is loaded is moved, or emptied if it is in the way of others
        index = held[slot][0] if slot in held else which
        size = staged[index].num_bytes // unit
        others = [(staged[one].num_bytes // unit, start) for other, (one, start) in held.items() if other != slot]
        if any(start < at + size and at < start + length for length, start in others):
            arena.unload(slot)
            held.pop(slot, None)
            continue
        arena.move(slot, at * unit) if slot in held else arena.commit(slot, at * unit, staged[index])
        held[slot] = (index, at)

    for slot in range(4):
        heads = versions[held[slot][0]].heads if slot in held else None
        assert (arena.heads(slot) is None) == (heads is None)
        if heads is not None:
            assert_same(arena.heads(slot), heads, dtype)
        assert arena.tables().host_ranks[slot] == (versions[held[slot][0]].ranks if slot in held else [0, 0, 0])


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_stored_file_says_what_heads_it_has(tmp_path: Path) -> None:
    version = stored(tmp_path, [0, 2, 0], (2, 3, True))

    with safe_open(version.path, framework="pt") as file:
        metadata = file.metadata()

    assert (metadata["format"], metadata["modules"]) == ("descant-version-4", '{"1":[2,0.5]}')
    assert metadata["heads"] == "[2,3,true]"


LIES = {
    "none": "",
    "one head less": "[1,1,true]",
    "one head more": "[3,1,true]",
    "no LM heads": "[2,1,false]",
    "other spaces": "[2, 1,true]",
    "absurdly many": "[4611686018427387904,4611686018427387904,true]",
    "beyond 64 bits": "[1" + "0" * 99 + ",1,true]",
    "no heads": "[0,1,true]",
    "negative": "[-2,-1,true]",
    "half negative": "[-2,1,true]",
    "too short": "[2,1]",
    "too long": "[2,1,true,0]",
    "null": "null",
    "an object": "{}",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("heads", LIES.values(), ids=LIES)
def test_a_version_whose_heads_are_not_what_it_says_is_invalid(heads: str, tmp_path: Path) -> None:
    path = stored(tmp_path, [0, 0, 0], (2, 1, True)).path
    metadata = {"format": store.FORMAT, "base": store.base_fingerprint(MODULES), "modules": "{}", "heads": heads}
    save_file(load_file(path), path, metadata=metadata)

    with pytest.raises(AdapterInvalid, match=path.stem):
        store.read_extent(path, MODULES)


def test_a_version_without_heads_has_the_digest_it_had_before_there_were_any(tmp_path: Path) -> None:
    factors = {"k": Factors(torch.ones(1, 6), torch.ones(2, 1), 0.5)}

    digest = store.write_version(tmp_path, LowRankAdapter(factors), MODULES).digest

    assert digest == "7846552a44252af6ac280ed5a707851bbc3dcd17d83fd916d56b1950c0211435"
