"""`add_lora` on the CPU: correct for every mixture of adapters, and every row independent of its batch."""

import pytest
import torch

import descant_kernels as kernels
from descant_kernels import LoraTables, Segments, cpu_lora, reference
from kernel_workloads import (
    DTYPES,
    POPULARITIES,
    RANKS,
    SIZES,
    assert_near,
    lora_case,
    normal,
    popular_slots,
    same_bits,
    segments_of,
)

MIXED_RANKS = [[rank, rank, rank] for rank in RANKS] + [[8, 0, 16], [0, 0, 0], [0, 0, 5]]


def added(case, x, slots):
    y = normal(len(slots), case.out_size, dtype=x.dtype, seed=3)
    kernels.add_lora(y, x, case.tables, segments_of(slots), case.first_module, case.out_sizes)
    return y


@pytest.mark.parametrize("num_rows", SIZES)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_the_reference(dtype, popularity, num_rows):
    case = lora_case(MIXED_RANKS, 48, (32, 16, 16), dtype)
    slots = popular_slots(popularity, num_rows, len(MIXED_RANKS))
    x = normal(num_rows, 48, dtype=dtype)
    expected = normal(num_rows, case.out_size, dtype=dtype, seed=3)

    actual = added(case, x, slots)

    reference.add_lora(expected, x, case.tables, segments_of(slots), case.first_module, case.out_sizes)
    assert_near(actual, expected)


@pytest.mark.parametrize("sizes", [(37, (51,)), (1, (1,)), (3, (5, 2)), (896, (33, 7, 64)), (4864, (16,))])
@pytest.mark.parametrize("rank", [*RANKS, 1024])
def test_any_rank_and_any_width_work(rank, sizes):
    in_size, out_sizes = sizes
    case = lora_case([[rank] * len(out_sizes)] * 2, in_size, out_sizes, torch.float32)
    x, slots = normal(12, in_size), [0] * 9 + [1, -1, 0]
    expected = normal(12, case.out_size, seed=3)

    actual = added(case, x, slots)

    reference.add_lora(expected, x, case.tables, segments_of(slots), 1, out_sizes)
    assert_near(actual, expected)


@pytest.mark.parametrize("sizes", [(48, (32, 16, 16)), (37, (51, 3, 8)), (896, (33, 7, 64))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_in_any_batch(dtype, sizes):
    case = lora_case(MIXED_RANKS, *sizes, dtype)
    slots = [*range(len(MIXED_RANKS)), *[2] * 30, *[4] * 8, -1, 0, *[3] * 9]
    x = normal(len(slots), sizes[0], dtype=dtype)
    together = added(case, x, slots)

    y = normal(len(slots), case.out_size, dtype=dtype, seed=3)
    for row, slot in enumerate(slots):
        one = Segments.of([1], [slot])
        kernels.add_lora(y[row : row + 1], x[row : row + 1].clone(), case.tables, one, 1, case.out_sizes)

    assert same_bits(together, y)


def test_how_rows_are_cut_into_segments_does_not_matter():
    case = lora_case([[8], [16]], 64, (40,), torch.float32)
    x = normal(40, 64)
    results = []
    for lengths in ([40], [1] * 40, [7, 9, 24], [33, 7]):
        y = torch.zeros(40, 40)
        kernels.add_lora(y, x, case.tables, Segments.of(lengths, [1] * len(lengths)), 1, (40,))
        results.append(y)

    assert all(same_bits(y, results[0]) for y in results)


def test_rows_without_an_adapter_keep_their_bits():
    case = lora_case(MIXED_RANKS, 48, (32, 16, 16), torch.float32)
    slots = [-1, 3, 7, -1, 2]  # slot 7 is resident and touches no module

    actual = added(case, normal(5, 48), slots)

    untouched = normal(5, case.out_size, seed=3)
    assert same_bits(actual[[0, 2, 3]], untouched[[0, 2, 3]])
    assert not torch.equal(actual[1], untouched[1])


def test_y_may_be_part_of_a_wider_tensor():
    case = lora_case([[8, 8]], 16, (24, 16), torch.float32)
    wide = torch.zeros(3, 60)
    x = normal(3, 16)
    y = torch.zeros(3, 40)

    kernels.add_lora(wide[:, 10:50], x, case.tables, Segments.of([3], [0]), 1, (24, 16))
    kernels.add_lora(y, x, case.tables, Segments.of([3], [0]), 1, (24, 16))

    assert same_bits(wide[:, 10:50], y)
    assert not wide[:, :10].any()


def test_rows_past_the_last_segment_keep_their_bits():
    case = lora_case([[8]], 16, (24,), torch.float32)
    y = torch.zeros(5, 24)

    kernels.add_lora(y, normal(5, 16), case.tables, Segments.of([2], [0]), 1, (24,))

    assert y[:2].all()
    assert not y[2:].any()


@pytest.mark.parametrize(("max_bytes", "max_entries"), [(2000, 100), (1 << 20, 2)])
def test_index_tables_stay_within_their_budget(monkeypatch, max_bytes, max_entries):
    case = lora_case([[8]] * 6, 64, (64,), torch.float32)
    x, cache = normal(1, 64), cpu_lora.UpdateCache(max_bytes, max_entries)
    expected = [added(case, x, [slot]) for slot in range(6)]

    monkeypatch.setattr(cpu_lora, "_cache", cache)

    for _ in range(2):
        assert all(same_bits(added(case, x, [slot]), expected[slot]) for slot in range(6))
        assert 0 < cache.num_bytes <= max_bytes
        assert 0 < len(cache) <= max_entries


def test_tiles_cover_each_row_with_an_adapter_once():
    segments = Segments.of([5, 40, 0, 3, 16], [2, -1, 1, 0, 3])

    rows = [(row, slot) for first, n, slot in segments.tiles.tolist() for row in range(first, first + n)]

    assert rows == [(r, 2) for r in range(5)] + [(r, 0) for r in (45, 46, 47)] + [(r, 3) for r in range(48, 64)]
    assert segments.has_adapter
    assert not Segments.of([5], [-1]).has_adapter


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_scales_apply_to_base_and_update_but_not_to_the_bias(dtype, bias):
    case = lora_case([[8, 8], [3, 0], [16, 16]], 48, (24, 16), dtype)
    arena = torch.cat((case.tables.arena, normal(40, dtype=dtype, seed=8).abs()))
    at = case.tables.arena.numel()
    scales = [[-1, at, at + 24], [-1, at, -1], [-1, -1, -1]]
    tables = LoraTables.of(arena, case.tables.host_offsets, case.tables.host_ranks, scales)
    x, y = normal(7, 48, dtype=dtype), normal(7, 40, dtype=dtype, seed=3)
    biases = normal(40, dtype=dtype, seed=4) if bias else None
    segments, expected = Segments.of([2, 1, 1, 3], [0, -1, 2, 1]), y.clone()

    kernels.add_lora(y, x, tables, segments, 1, (24, 16), biases)

    reference.add_lora(expected, x, tables, segments, 1, (24, 16), biases)
    assert_near(y, expected)
