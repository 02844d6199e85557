"""Triton's norms and gated activations, in the interpreter or on a GPU: run by `test_kernel_triton`."""

import pytest
import torch

from descant_kernels import fused, reference
from kernel_workloads import DEVICE, assert_near, normal, same_bits

# The interpreter computes with numpy, which warns where exp(-gate) or gate³ is infinite, as is expected here.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # not in the interpreter
TOKEN_ROWS = [(3, 64), (5, 100), (1, 7), (9, 1), (2, 4099), (2, 16_384)]
OTHER_ROWS = [(7,), (4, 3, 16), (2, 2, 2, 8), (0, 8), (3, 0, 8), (1, 70_000, 2)]
WIDE_ROWS = [(2, 16_385), (1, 40_000)]
GATED = {"silu": (fused.silu_mul, reference.silu_mul), "gelu": (fused.gelu_mul, reference.gelu_mul)}


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", TOKEN_ROWS + OTHER_ROWS + WIDE_ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_equals_the_reference(dtype, shape, with_residual):
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1)
    streams = [normal(*shape, dtype=dtype, seed=2) for _ in range(2)]

    actual = fused.rms_norm(x, weight, 1e-5, streams[0] if with_residual else None)

    assert_near(actual, reference.rms_norm(x, weight, 1e-5, streams[1] if with_residual else None))
    assert actual.is_contiguous()
    assert same_bits(streams[0], streams[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_takes_heads_out_of_a_fused_projection(dtype):
    qkv, weight = normal(5, 8 * 16, dtype=dtype), normal(16, dtype=dtype, seed=1)
    q, k, with_gaps = qkv[:, :64].view(5, 4, 16), qkv[:, 64:96].view(5, 2, 16), qkv.view(5, 4, 32)[..., 3:19]

    for heads in (q, k, with_gaps):
        assert_near(fused.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("x", [normal(12, 6).T, normal(6, 40)[:, 3:20], normal(3, 33_000)[:, 1:17_000]])
def test_rms_norm_takes_strided_rows(x):
    weight, residual = normal(x.shape[1], seed=1), normal(*x.shape, seed=2)
    expected = reference.rms_norm(x, weight, 1e-6, residual.clone())

    assert_near(fused.rms_norm(x, weight, 1e-6, residual), expected)


@pytest.mark.parametrize("size", [1000, 17_000])
@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_rms_norm_sums_in_float32_and_adds_eps(magnitude, size):
    x, weight = (normal(3, size) * magnitude).half(), normal(size, dtype=torch.float16, seed=1)

    assert_near(fused.rms_norm(x, weight, 1e-8), reference.rms_norm(x, weight, 1e-8))


@pytest.mark.parametrize("size", [1000, 17_000])
def test_rms_norm_rounds_where_the_reference_does(size):
    x, weight, *streams = (normal(3, size, dtype=torch.float16, seed=seed) for seed in (0, 1, 2, 2))

    actual = fused.rms_norm(x, weight[0], 1e-5, streams[0])

    # Rounding once less would change a tenth of the results or more.
    assert (actual == reference.rms_norm(x, weight[0], 1e-5, streams[1])).float().mean() > 0.98


@pytest.mark.parametrize("size", [16, 100, 4099, 16_385])
def test_a_norm_does_not_depend_on_the_other_rows(size):
    x, weight, residual = normal(11, size), normal(size, seed=1), normal(11, size, seed=2)
    together = fused.rms_norm(x, weight, 1e-5, residual.clone())

    for rows in (slice(0, 1), slice(4, 7)):
        alone = fused.rms_norm(x[rows].clone(), weight, 1e-5, residual[rows].clone())
        assert same_bits(alone, together[rows])


@pytest.mark.parametrize("size", [1, 7, 64, 1300, 2433])
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_products_equal_the_reference(dtype, activation, size):
    gate_up = normal(5, 2 * size, dtype=dtype) * 3
    actual, expected = (op(gate_up) for op in GATED[activation])

    assert_near(actual, expected)


@pytest.mark.parametrize("activation", GATED)
def test_gated_products_round_the_activated_gate_first(activation):
    # Both factors have many digits, so rounding once only would change about a third of the products.
    gate_up = normal(20, 600, dtype=torch.float16) + 3
    actual, expected = (op(gate_up) for op in GATED[activation])

    assert (actual == expected).float().mean() > 0.99


@pytest.mark.parametrize("activation", GATED)
def test_activations_are_right_to_a_few_units_in_the_last_place(activation):
    gates = torch.linspace(-6, 6, 500, device=DEVICE)[None]
    actual, expected = (op(torch.cat((gates, torch.ones_like(gates)), dim=1)) for op in GATED[activation])

    torch.testing.assert_close(actual, expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("activation", GATED)
def test_gated_products_take_strided_rows(activation):
    wide, flipped = normal(4, 200), normal(60, 4).T

    for gate_up in (wide[:, 10:70], wide[::2, :60], flipped):
        actual, expected = (op(gate_up) for op in GATED[activation])
        assert_near(actual, expected)
        assert actual.is_contiguous()


@pytest.mark.parametrize("activation", GATED)
def test_gated_products_survive_large_numbers(activation):
    gates = torch.tensor([[-3e38, -1e13, -200.0, -0.0, 200.0, 1e13, 3e38]], device=DEVICE)

    out = GATED[activation][0](torch.cat((gates, torch.ones_like(gates)), dim=1))

    assert out.tolist() == gates.clamp(min=0.0).tolist()


@pytest.mark.parametrize("activation", GATED)
def test_no_rows_give_no_products(activation):
    assert GATED[activation][0](torch.empty(0, 8, device=DEVICE)).shape == (0, 4)
