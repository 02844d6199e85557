"""The Triton kernels against the reference, in the interpreter or on a GPU: run by `test_kernel_triton`."""

import pytest
import torch

from descant_kernels import Segments, fused, kv, lora, reference
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
RANKS = [[1, 1], [3, 3], [8, 0], [16, 16], [33, 33], [70, 5], [0, 0]]


@pytest.mark.parametrize("num_rows", [3, 33])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_lora_equals_the_reference(dtype, popularity, num_rows):
    case = lora_case(RANKS, 48, (40, 16), dtype)
    segments = segments_of(popular_slots(popularity, num_rows, len(RANKS)))
    x, y = normal(num_rows, 48, dtype=dtype), normal(num_rows, 56, dtype=dtype, seed=3)
    expected = y.clone()

    lora.add_lora(y, x, case.tables, segments, 1, case.out_sizes)

    reference.add_lora(expected, x, case.tables, segments, 1, case.out_sizes)
    assert_near(y, expected)


@pytest.mark.parametrize("sizes", [(2500, (70,)), (37, (5, 130, 1)), (1024, (16,)), (9000, (16,))])
def test_add_lora_splits_long_reductions_and_takes_odd_widths(sizes):
    case = lora_case([[5] * len(sizes[1])] * 2, *sizes, torch.float32)
    segments = Segments.of([2, 1, 18], [1, -1, 0], device=DEVICE)
    x, y = normal(21, sizes[0]), normal(21, case.out_size, seed=3)
    expected = y.clone()

    lora.add_lora(y, x, case.tables, segments, 1, case.out_sizes)

    reference.add_lora(expected, x, case.tables, segments, 1, case.out_sizes)
    assert_near(y, expected)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (5, 100), (1, 7), (4, 3, 16), (2, 2, 2, 8), (0, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_equals_the_reference(dtype, shape, with_residual):
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1)
    residuals = [normal(*shape, dtype=dtype, seed=2) if with_residual else None for _ in range(2)]

    actual = fused.rms_norm(x, weight, 1e-5, residuals[0])

    assert_near(actual, reference.rms_norm(x, weight, 1e-5, residuals[1]))
    assert not with_residual or same_bits(residuals[0], residuals[1])


def test_rms_norm_takes_heads_out_of_a_fused_projection():
    heads, weight = normal(5, 96)[:, 16:80].view(5, 4, 16), normal(16, seed=1)

    assert_near(fused.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize(("kv_heads", "head_dim", "block_size"), [(2, 8, 4), (3, 10, 16), (1, 64, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_equals_the_reference(dtype, kv_heads, head_dim, block_size):
    qkv = normal(5, 3 * kv_heads * head_dim, dtype=dtype)
    k, v = (part.view(5, kv_heads, head_dim) for part in qkv.chunk(3, dim=1)[1:])
    num_slots = 4 if block_size == 1 else 5
    slots = torch.tensor([3, -1, 0, 5 * block_size, 6 * block_size - 1][:num_slots], device=DEVICE)
    shape = (6, kv_heads, block_size, head_dim)
    actual, expected = [[torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in "kv"] for _ in "ae"]

    kv.write_kv(k[: len(slots)], v[: len(slots)], *actual, slots)

    reference.write_kv(k[: len(slots)], v[: len(slots)], *expected, slots)
    assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))
