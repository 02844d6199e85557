"""Packed linear on the CPU: correct, and every row independent of its batch."""

import pytest
import torch

import descant_kernels as kernels
from descant_kernels import cpu_linear
from kernel_workloads import DTYPES, SIZES, assert_near, normal, same_bits

SHAPES = [(128, 384), (37, 51), (1, 1), (896, 16), (4864, 64), (16, 259)]


def packed(in_size, out_size, dtype, bias=True):
    weight = normal(out_size, in_size, seed=1) / in_size**0.5
    return kernels.pack_linear(weight.to(dtype), normal(out_size, dtype=dtype, seed=2) if bias else None)


@pytest.mark.parametrize("num_rows", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_multiplies_and_adds_the_bias(dtype, num_rows):
    x = normal(num_rows, 37, dtype=dtype)
    weight, bias = normal(51, 37, dtype=dtype, seed=1), normal(51, dtype=dtype, seed=2)

    actual = kernels.linear(x, kernels.pack_linear(weight, bias))

    assert_near(actual, (x.float() @ weight.float().T + bias.float()).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_in_any_batch(dtype, shape):
    layer = packed(*shape, dtype)
    x = normal(130, shape[0], dtype=dtype)
    together = kernels.linear(x, layer)

    for num_rows in (1, 2, 3, 7, 8, 33, 129):
        for first in (0, 1):
            part = kernels.linear(x[first : first + num_rows].clone(), layer)
            assert same_bits(part, together[first : first + num_rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_permuting_rows_permutes_the_result(dtype):
    layer = packed(128, 384, dtype, bias=False)
    x = normal(33, 128, dtype=dtype)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))

    assert same_bits(kernels.linear(x[order], layer), kernels.linear(x, layer)[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype):
    layer = packed(37, 51, dtype)

    out = kernels.linear(torch.empty(0, 37, dtype=dtype), layer)

    assert out.shape == (0, 51)
    assert out.dtype == dtype == layer.dtype


def test_the_probe_agrees_with_the_minimums_in_use():
    report = kernels.probe_invariance(torch.float32, [(128, 384)])

    assert report.ok
    assert report.linear
    assert report.attention


def test_the_probe_notices_minimums_that_are_too_small(monkeypatch):
    monkeypatch.setattr("descant_kernels.probe.BMM_ROWS", 1)

    assert not kernels.probe_invariance(torch.float16).ok


@pytest.mark.parametrize("scale", [0.0, 1e-7, 2.0**-9, 60.0, 1e6])
def test_bfloat16_weights_of_any_size_keep_their_values(scale):
    weight = (normal(51, 37, seed=1) * scale).bfloat16()
    x = normal(5, 37, dtype=torch.bfloat16)

    actual = kernels.linear(x, kernels.pack_linear(weight))

    expected = x.float() @ weight.float().T
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_weights_that_float16_would_lose_are_not_written_as_float16():
    assert cpu_linear._survives_as_half(torch.tensor([[-60000.0, 1.0]]).bfloat16())
    assert not cpu_linear._survives_as_half(torch.tensor([[-70000.0, 1.0]]).bfloat16())
    assert not cpu_linear._survives_as_half(torch.tensor([[1e-4, -1e-5]]).bfloat16())
    assert cpu_linear._survives_as_half(torch.zeros(2, 2).bfloat16())
