"""Norm and gated activations on the CPU: correct, and every row independent of its batch."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

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


@pytest.mark.parametrize("activation", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("width", [1, 13, 64, 2433])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activations_equal_the_reference_row_by_row(dtype, width, activation):
    gated = getattr(kernels, activation)
    gate_up = normal(40, 2 * width, dtype=dtype) * 5
    together = gated(gate_up)

    assert_near(together, getattr(reference, activation)(gate_up))
    for num_rows in SIZES:
        assert same_bits(gated(gate_up[2 : 2 + num_rows].clone()), together[2 : 2 + num_rows])


@pytest.mark.parametrize("activation", ["silu_mul", "gelu_mul"])
def test_gated_activations_survive_large_numbers(activation):
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]])

    assert getattr(kernels, activation)(gate_up).tolist() == [[0.0, 200.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype):
    empty = torch.empty(0, 4, 8, dtype=dtype)

    assert kernels.rms_norm(empty, torch.ones(8, dtype=dtype), 1e-5).shape == (0, 4, 8)
    assert kernels.silu_mul(empty[:, 0]).shape == kernels.gelu_mul(empty[:, 0]).shape == (0, 4)
