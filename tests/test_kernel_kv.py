"""Writing, moving and copying cached positions on the CPU."""

import pytest
import torch

import descant_kernels as kernels
from descant_kernels import reference
from kernel_workloads import DTYPES, normal, same_bits


def caches(dtype=torch.float32):
    return normal(6, 2, 4, 8, dtype=dtype, seed=1), normal(6, 2, 4, 8, dtype=dtype, seed=2)


@pytest.mark.parametrize("slots", [[], [5], [0, 23, 7], [-1, 3, -1, 4], [-1, -1]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_equals_the_reference(dtype, slots):
    k, v = normal(len(slots), 2, 8, dtype=dtype), normal(len(slots), 2, 8, dtype=dtype, seed=4)
    actual, expected = caches(dtype), caches(dtype)

    kernels.write_kv(k, v, *actual, torch.tensor(slots, dtype=torch.int64))

    reference.write_kv(k, v, *expected, torch.tensor(slots, dtype=torch.int64))
    assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))


def test_write_kv_takes_views_of_a_fused_projection():
    qkv = normal(3, 64)
    k, v = qkv[:, 32:48].view(3, 2, 8), qkv[:, 48:].view(3, 2, 8)
    actual, expected = caches(), caches()
    slots = torch.tensor([9, 2, 17])

    kernels.write_kv(k, v, *actual, slots)
    kernels.write_kv(k.contiguous(), v.contiguous(), *expected, slots)

    assert same_bits(actual[0], expected[0])
    assert same_bits(actual[0][2, :, 1], k[0])


def test_move_kv_reads_all_before_it_writes_any():
    k, v = caches()
    before = k.clone(), v.clone()

    kernels.move_kv(k, v, torch.tensor([1, 2, 9]), torch.tensor([2, 1, 3]))

    for cache, old in ((k, before[0]), (v, before[1])):
        assert same_bits(cache[0, :, 2], old[0, :, 1])
        assert same_bits(cache[0, :, 1], old[0, :, 2])
        assert same_bits(cache[0, :, 3], old[2, :, 1])
        assert same_bits(cache[1:], old[1:])


def test_copy_blocks_reads_all_before_it_writes_any():
    cache, _ = caches()
    before = cache.clone()

    kernels.copy_blocks(cache, torch.tensor([0, 1, 5]), torch.tensor([1, 0, 2]))

    assert same_bits(cache, before[[1, 0, 5, 3, 4, 5]])
