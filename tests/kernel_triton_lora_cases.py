"""Triton's `add_lora` in every form of its launch, in the interpreter or on a GPU: run by `test_kernel_triton`."""

from dataclasses import dataclass, replace

import pytest
import torch
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from descant_kernels import LoraTables, PairLayout, Segments, lora, reference
from kernel_workloads import (
    DEVICE,
    POPULARITIES,
    assert_near,
    lora_case,
    normal,
    popular_slots,
    same_bits,
    segments_of,
)

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # not in the interpreter
RANKS = [[1, 3], [16, 16], [8, 0], [17, 5], [70, 33], [0, 64], [0, 0]]
UNTOUCHED = 6  # a resident slot without a rank in any module


@dataclass(frozen=True)
class Form:
    """A form of the launch, given by the launcher's limits. Wide tiles and parts are smaller than in the server."""

    fused_size: int
    split_rows: int
    wide_tile_rows: int
    few_programs: int = 0


FORMS = {
    "one launch": Form(fused_size=10**9, split_rows=10**9, wide_tile_rows=32),
    "two launches, parts apart": Form(fused_size=0, split_rows=10**9, wide_tile_rows=32),
    "two launches, parts together": Form(fused_size=0, split_rows=0, wide_tile_rows=10**9),
    "two launches, wide tiles": Form(fused_size=0, split_rows=0, wide_tile_rows=32),
    "two launches, wide tiles, parts apart": Form(fused_size=0, split_rows=0, wide_tile_rows=32, few_programs=10**9),
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Yield every form in turn."""
    take(FORMS[request.param], monkeypatch)
    return request.param


def take(form, monkeypatch):
    """Make the launcher use a form for all sizes."""
    monkeypatch.setattr(lora, "FUSED_WORK", form.fused_size)
    monkeypatch.setattr(lora, "FUSED_IN_SIZE", form.fused_size)
    monkeypatch.setattr(lora, "MAX_SPLIT_ROWS", form.split_rows)
    monkeypatch.setattr(lora, "WIDE_TILE_ROWS", form.wide_tile_rows)
    monkeypatch.setattr(lora, "FEW_PROGRAMS", form.few_programs)
    monkeypatch.setattr(lora, "PART_SIZE", 64)
    monkeypatch.setattr(lora, "EXPAND_BYTES", 128)


@pytest.fixture
def ordered_dots(monkeypatch):
    """Compute the interpreter's products with sums in order for any shape, which NumPy does not guarantee."""

    def dot(a, b, d, *_):
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(total.dtype) * b.data[k].astype(total.dtype)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter_builder, "create_dot", dot)


def workload(ranks, in_size, out_sizes, dtype=torch.float32, scaled=()):
    """Return adapters in an arena of NaN, padding included. Modules of slots in `scaled` have row scales."""
    case = lora_case(ranks, in_size, out_sizes, dtype)
    plain = case.tables
    size = plain.arena.numel()
    arena = torch.full((size + len(ranks) * case.out_size,), torch.nan, dtype=dtype, device=DEVICE)
    row_scales = [[-1] * (1 + len(out_sizes)) for _ in ranks]
    for slot, slot_ranks in enumerate(ranks):
        for module, (rank, out_size) in enumerate(zip(slot_ranks, out_sizes, strict=True), start=1):
            layout, offset = PairLayout.of(rank, in_size, out_size), plain.host_offsets[slot][module]
            if rank:
                for view, values in zip(layout.views(arena, offset), layout.views(plain.arena, offset), strict=True):
                    view.copy_(values)
            if slot in scaled:
                row_scales[slot][module] = size
                arena[size : size + out_size] = normal(out_size, dtype=dtype, seed=slot).abs()
            size += out_size
    return replace(case, tables=LoraTables.of(arena, plain.host_offsets, plain.host_ranks, row_scales))


def inputs(case, num_rows, dtype=torch.float32):
    """Return x, y and a bias."""
    x, y = normal(num_rows, case.in_size, dtype=dtype), normal(num_rows, case.out_size, dtype=dtype, seed=3)
    return x, y, normal(case.out_size, dtype=dtype, seed=4)


def added(case, segments, x, y, bias=None):
    """Return Triton's result on a copy of y."""
    result = y.clone()
    lora.add_lora(result, x, case.tables, segments, case.first_module, case.out_sizes, bias)
    return result


def expected_of(case, segments, x, y, bias=None):
    """Return the reference's result on a copy of y."""
    result = y.clone()
    reference.add_lora(result, x, case.tables, segments, case.first_module, case.out_sizes, bias)
    return result


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mixture_equals_the_reference(dtype, popularity, form):
    case = workload(RANKS, 48, (40, 16), dtype, scaled=(1, 3))
    num_rows = 9 if popularity in ("distinct", "uniform") else 37
    x, y, bias = inputs(case, num_rows, dtype)
    segments = segments_of(popular_slots(popularity, num_rows, len(RANKS)))

    assert_near(added(case, segments, x, y, bias), expected_of(case, segments, x, y, bias))


@pytest.mark.parametrize("sizes", [(1, (1,)), (3, (5, 2)), (37, (130, 1, 7)), (129, (16, 64)), (300, (70,))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes_equal_the_reference(dtype, sizes, form):
    case = workload([[5] * len(sizes[1]), [20] * len(sizes[1])], *sizes, dtype=dtype, scaled=(1,))
    segments = Segments.of([2, 1, 33], [1, -1, 0], device=DEVICE)
    x, y, bias = inputs(case, 36, dtype)

    assert_near(added(case, segments, x, y, bias), expected_of(case, segments, x, y, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_very_different_ranks_share_a_launch(dtype, form):
    case = workload([[0, 1], [1024, 3], [16, 1000], [70, 0]], 40, (24, 16), dtype)
    segments = Segments.of([1, 3, 33, 2, 1], [0, 1, 2, -1, 3], device=DEVICE)
    x, y, _ = inputs(case, 40, dtype)

    assert_near(added(case, segments, x, y), expected_of(case, segments, x, y))


@pytest.mark.parametrize(("length", "sizes"), [(20, (1024, (16,))), (20, (3000, (20, 3))), (520, (2500, (16,)))])
def test_long_inputs_and_segments_as_served_equal_the_reference(length, sizes):
    case = workload([[5] * len(sizes[1]), [70] * len(sizes[1])], *sizes)
    segments = Segments.of([2, 1, length], [1, -1, 0], device=DEVICE)
    x, y, _ = inputs(case, length + 3)

    assert_near(added(case, segments, x, y), expected_of(case, segments, x, y))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_scales_scale_what_is_not_bias(dtype, with_bias, form):
    case = workload([[8, 8], [33, 0], [0, 16], [4, 4]], 32, (24, 70), dtype, scaled=(0, 1, 2))
    segments = Segments.of([2, 1, 1, 3, 33], [0, -1, 2, 3, 1], device=DEVICE)
    x, y, bias = inputs(case, 40, dtype)
    bias = bias if with_bias else None

    assert_near(added(case, segments, x, y, bias), expected_of(case, segments, x, y, bias))


def test_a_row_without_an_adapter_is_left_alone(form):
    case = workload(RANKS, 48, (40, 16), scaled=range(len(RANKS)))
    segments = Segments.of([3, 2, 1, 33], [-1, UNTOUCHED, 2, 0], device=DEVICE)
    x, y, bias = inputs(case, 43)  # four rows are in no segment

    actual = added(case, segments, x, y, bias)

    assert same_bits(actual[:5], y[:5])
    assert same_bits(actual[5, 40:], y[5, 40:])  # slot 2 has no rank in slice 1
    assert same_bits(actual[39:], y[39:])
    assert (actual[5, :40] != y[5, :40]).all()
    assert (actual[6:39] != y[6:39]).all()


@pytest.mark.parametrize("sizes", [(48, (40, 16)), (200, (70,))])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("ordered_dots")
def test_a_row_alone_has_the_bits_it_has_in_any_batch(dtype, sizes, form):
    case = workload([ranks[: len(sizes[1])] for ranks in RANKS], *sizes, dtype=dtype, scaled=(3,))
    slots = [*range(len(RANKS)), -1, *[3] * 33, *[4] * 3, 1]
    x, y, bias = inputs(case, len(slots), dtype)

    together = added(case, segments_of(slots), x, y, bias)

    for row in (1, 4, 25, 44):
        alone = added(case, segments_of([slots[row]]), x[row : row + 1].clone(), y[row : row + 1], bias)
        assert same_bits(alone[0], together[row])


@pytest.mark.parametrize("sizes", [(48, (40, 16)), (300, (20, 70))])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("ordered_dots")
def test_all_forms_give_the_same_bits(dtype, sizes, monkeypatch):
    case = workload(RANKS, *sizes, dtype=dtype, scaled=(3,))
    x, y, bias = inputs(case, 44, dtype)
    results = []

    for form in FORMS.values():
        take(form, monkeypatch)
        segments = Segments.of([1, 2, 37, 1, 3], [0, 3, 4, -1, 1], device=DEVICE)
        results.append(added(case, segments, x, y, bias))

    assert all(same_bits(result, results[0]) for result in results)


def test_x_and_y_may_be_parts_of_wider_tensors(form):
    case = workload([[8, 20]], 33, (24, 17))
    segments = Segments.of([33], [0], device=DEVICE)
    wide_x, wide_y = normal(33, 50), normal(33, 60, seed=3)
    x, y, before = wide_x[:, 9:42], wide_y[:, 11:52], wide_y.clone()

    lora.add_lora(y, x, case.tables, segments, 1, case.out_sizes)

    assert_near(y, expected_of(case, segments, x, before[:, 11:52]))
    assert same_bits(wide_y[:, :11], before[:, :11])
    assert same_bits(wide_y[:, 52:], before[:, 52:])


def test_a_program_without_rows_reads_no_adapter(form):
    case = workload([[8, 8], [8, 8]], 32, (24, 16))
    case.tables.offsets[1] = 2**40  # so far outside that reading there would crash the process
    segments = Segments.of([2, 1], [0, -1], device=DEVICE)
    padding = torch.tensor([[0, 0, 1]] * 3, dtype=torch.int32, device=DEVICE)
    x, y, _ = inputs(case, 3)

    actual = added(case, replace(segments, tiles=torch.cat((segments.tiles, padding))), x, y)

    assert same_bits(actual, added(case, segments, x, y))


@pytest.mark.usefixtures("ordered_dots")
def test_host_integers_may_be_bounds_as_in_a_cuda_graph(form):
    case = workload(RANKS, 200, (40, 16))
    bounds = replace(case.tables, host_ranks=[[100] * 3] * len(RANKS))
    segments = Segments.of([2, 1, 1], [3, -1, 4], device=DEVICE)
    padding = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    as_captured = replace(
        segments, tiles=torch.cat((segments.tiles, padding)), host_indptr=(0, 1, 2, 3, 4), host_slots=(0,) * 4
    )
    x, y, _ = inputs(case, 4)

    actual = added(replace(case, tables=bounds), as_captured, x, y)

    assert same_bits(actual, added(case, segments, x, y))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_cuda_graph_follows_its_tables_and_tiles(form):
    case = workload(RANKS, 600, (40, 16), scaled=(3,))
    x, y, bias = inputs(case, 4)
    segments = Segments.of([1, 1, 1, 1], [0, 0, 0, 0], device=DEVICE)
    bounds = replace(case.tables, host_ranks=[[100] * 3] * len(RANKS))
    captured = replace(case, tables=bounds)
    out = added(captured, segments, x, y, bias)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(added(captured, segments, x, y, bias))
    real = Segments.of([2, 1, 1], [3, -1, 4], device=DEVICE)

    segments.tiles.copy_(torch.cat((real.tiles, torch.zeros(2, 3, dtype=torch.int32, device=DEVICE))))
    graph.replay()

    assert same_bits(out, added(case, real, x, y, bias))


def test_only_the_sizes_of_the_model_choose_the_number_of_launches():
    assert lora.is_fused(256, (256, 128, 128))
    assert lora.is_fused(512, (512,))
    assert not lora.is_fused(896, (896,))
    assert not lora.is_fused(4096, (16,))


def test_wide_tiles_cover_the_rows_that_tiles_cover():
    segments = Segments.of([5, 130, 0, 3, 70], [2, -1, 1, 0, 3], device=DEVICE)

    wide = lora.wide_tiles(segments)

    assert wide is not None
    covered = [
        [(row, slot) for first, num_rows, slot in tiles.tolist() for row in range(first, first + num_rows)]
        for tiles in (wide, segments.tiles)
    ]
    assert covered[0] == covered[1]
    assert wide[:, 1].tolist() == [5, 3, 32, 32, 6]
    assert lora.wide_tiles(Segments.of([31, 31], [0, 1], device=DEVICE)) is None
