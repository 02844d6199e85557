"""Rotating, writing, moving and copying cached positions on the CPU."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import descant_kernels as kernels
from descant_kernels import reference
from kernel_workloads import DTYPES, SIZES, assert_near, normal, same_bits


def caches(dtype=torch.float32, head_dim=8):
    shape = (6, 2, 4, head_dim)
    return normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=2)


def angles(num_tokens, half, seed=5):
    angle = normal(num_tokens, half, seed=seed) * 3
    return angle.cos(), angle.sin()


def at(cache, slots):
    return cache[slots // 4, :, slots % 4]


def test_the_rotation_is_that_of_llama():
    q, k, v = normal(6, 4, 32), normal(6, 2, 32, seed=1), normal(6, 2, 32, seed=2)
    cos, sin = angles(6, 16)
    double = [torch.cat((t, t), dim=-1)[None] for t in (cos, sin)]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *double)
    (keys, values), slots = caches(head_dim=32), torch.tensor([3, 9, 1, 0, 23, 16])

    kernels.rope_write_kv(q, k, v.clone(), cos, sin, keys, values, slots)

    for actual, theirs in zip((q, at(keys, slots)), expected, strict=True):
        torch.testing.assert_close(actual, theirs[0].transpose(0, 1), atol=1e-6, rtol=0)
    assert same_bits(at(values, slots), v)


@pytest.mark.parametrize("half", [1, 5, 16])
@pytest.mark.parametrize("slots", [[], [5], [0, 23, 7], [-1, 3, -1, 4], [-1, -1]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_write_kv_equals_the_reference_on_views_of_a_fused_projection(dtype, slots, half):
    qkv = normal(len(slots), 256, dtype=dtype)
    theirs = qkv.clone()
    views = [
        (t[:, :128].view(-1, 4, 32), t[:, 128:192].view(-1, 2, 32), t[:, 192:].view(-1, 2, 32)) for t in (qkv, theirs)
    ]
    actual, expected = caches(dtype, 32), caches(dtype, 32)

    kernels.rope_write_kv(*views[0], *angles(len(slots), half), *actual, torch.tensor(slots, dtype=torch.int64))

    reference.rope_write_kv(*views[1], *angles(len(slots), half), *expected, torch.tensor(slots, dtype=torch.int64))
    assert_near(views[0][0], views[1][0])
    assert_near(actual[0], expected[0])
    assert same_bits(actual[1], expected[1])
    assert same_bits(views[0][0][..., 2 * half :], views[1][0][..., 2 * half :])


@pytest.mark.parametrize("half", [5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rotation_of_a_row_does_not_depend_on_the_others(dtype, half):
    q, k, v = normal(22, 3, 32, dtype=dtype), normal(22, 2, 32, dtype=dtype, seed=1), normal(22, 2, 32, dtype=dtype)
    cos, sin = angles(22, half)
    together, slots = caches(dtype, 32), torch.arange(22)
    sizes = [size for size in SIZES if size <= 20]
    parts = [[t[2 : 2 + n].clone() for t in (q, k, v, cos, sin)] for n in sizes]

    kernels.rope_write_kv(q, k, v, cos, sin, *together, slots)

    for num_rows, part in zip(sizes, parts, strict=True):
        alone = caches(dtype, 32)
        kernels.rope_write_kv(*part, *alone, slots[2 : 2 + num_rows])
        assert same_bits(part[0], q[2 : 2 + num_rows])
        assert same_bits(at(alone[0], slots[2 : 2 + num_rows]), at(together[0], slots[2 : 2 + num_rows]))


def test_move_kv_reads_all_before_it_writes_any():
    k, v = caches()
    before = k.clone(), v.clone()

    kernels.move_kv(k, v, torch.tensor([1, 2, 9]), torch.tensor([2, 1, 3]))

    for cache, old in ((k, before[0]), (v, before[1])):
        assert same_bits(cache[0, :, 2], old[0, :, 1])
        assert same_bits(cache[0, :, 1], old[0, :, 2])
        assert same_bits(cache[0, :, 3], old[2, :, 1])
        assert same_bits(cache[1:], old[1:])
