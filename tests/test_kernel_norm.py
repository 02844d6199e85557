"""rms_norm, rope and silu_mul on the CPU: right, and every row independent of its batch."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import descant_kernels as kernels
from descant_kernels import reference
from kernel_workloads import DTYPES, SIZES, assert_near, normal, same_bits

WIDTHS = [1, 7, 64, 100, 896, 4099]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_that_of_llama(dtype, width):
    x, norm = normal(5, width, dtype=dtype), LlamaRMSNorm(width, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(normal(width, seed=1))

        assert_near(kernels.rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_adds_to_the_residual_stream(dtype):
    x, weight = normal(5, 64, dtype=dtype), normal(64, dtype=dtype, seed=1)
    residual = normal(5, 64, dtype=dtype, seed=2)
    total = residual + x

    out = kernels.rms_norm(x, weight, 1e-5, residual)

    assert same_bits(residual, total)
    assert_near(out, reference.rms_norm(total, weight, 1e-5))


def test_rms_norm_takes_any_leading_axes():
    heads, weight = normal(5, 96)[:, 16:80].view(5, 4, 16), normal(16, seed=1)

    out = kernels.rms_norm(heads, weight, 1e-6)

    assert same_bits(out.reshape(20, 16), kernels.rms_norm(heads.reshape(20, 16), weight, 1e-6))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_a_row_does_not_depend_on_the_others(dtype, width):
    x, weight, residual = normal(40, width, dtype=dtype), normal(width, dtype=dtype), normal(40, width, dtype=dtype)
    together = kernels.rms_norm(x, weight, 1e-5, residual.clone())

    for num_rows in SIZES:
        part = slice(2, 2 + num_rows)
        alone = kernels.rms_norm(x[part].clone(), weight, 1e-5, residual[part].clone())
        assert same_bits(alone, together[part])


def angles(num_tokens, half, seed=5):
    angle = normal(num_tokens, half, seed=seed) * 3
    return angle.cos(), angle.sin()


def test_rope_is_that_of_llama():
    q, k = normal(6, 4, 32), normal(6, 2, 32, seed=1)
    cos, sin = angles(6, 16)
    double = [torch.cat((t, t), dim=-1)[None] for t in (cos, sin)]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *double)

    kernels.rope(q, k, cos, sin)

    for actual, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(actual, theirs[0].transpose(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("half", [1, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_equals_the_reference_also_for_part_of_a_head(dtype, half):
    qkv = normal(7, 200, dtype=dtype)
    q, k = qkv[:, :128].view(7, 4, 32), qkv[:, 128:192].view(7, 2, 32)
    expected = q.clone(), k.clone()
    cos, sin = angles(7, half)

    kernels.rope(q, k, cos, sin)

    reference.rope(*expected, cos, sin)
    assert_near(q, expected[0])
    assert_near(k, expected[1])
    assert same_bits(q[..., 2 * half :], expected[0][..., 2 * half :])


@pytest.mark.parametrize("half", [5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_a_row_does_not_depend_on_the_others(dtype, half):
    q, k = normal(40, 3, 32, dtype=dtype), normal(40, 1, 32, dtype=dtype, seed=1)
    cos, sin = angles(40, half)
    parts = [[t[2 : 2 + n].clone() for t in (q, k, cos, sin)] for n in SIZES]

    kernels.rope(q, k, cos, sin)

    for num_rows, part in zip(SIZES, parts, strict=True):
        kernels.rope(*part)
        assert same_bits(part[0], q[2 : 2 + num_rows])
        assert same_bits(part[1], k[2 : 2 + num_rows])


@pytest.mark.parametrize("width", [1, 13, 64, 2433])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_equals_the_reference_row_by_row(dtype, width):
    gate_up = normal(40, 2 * width, dtype=dtype) * 5
    together = kernels.silu_mul(gate_up)

    assert_near(together, reference.silu_mul(gate_up))
    for num_rows in SIZES:
        assert same_bits(kernels.silu_mul(gate_up[2 : 2 + num_rows].clone()), together[2 : 2 + num_rows])


def test_silu_mul_survives_large_numbers():
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]])

    assert kernels.silu_mul(gate_up).tolist() == [[0.0, 200.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype):
    empty = torch.empty(0, 4, 8, dtype=dtype)

    kernels.rope(empty, empty, torch.empty(0, 4), torch.empty(0, 4))

    assert kernels.rms_norm(empty, torch.ones(8, dtype=dtype), 1e-5).shape == (0, 4, 8)
    assert kernels.silu_mul(empty[:, 0]).shape == (0, 4)
