"""Rotary embedding tables: cosine and sine of every position, with the order of operations of Transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from descant.model.arch import DecoderConfig, RopeConfig


def rope_tables(config: DecoderConfig, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, `[num_positions, D / 2]` float32, scaled as the kind of rope requires."""
    inv_freq, scale = inverse_frequencies(config)
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inv_freq[None, :]
    return (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)


def inverse_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Return radians per position of each component pair, `[D / 2]` float32, and the factor on cos and sin."""
    rope, dim = config.rope, config.head_dim
    match rope.kind:
        case "default":
            return _plain(rope.theta, dim), 1.0
        case "linear":
            return _plain(rope.theta, dim) / _given(rope.factor), 1.0
        case "dynamic":
            return _plain(_ntk_theta(rope, dim), dim), 1.0
        case "llama3":
            return _llama3(rope, _plain(rope.theta, dim)), 1.0
        case "yarn":
            return _yarn(rope, dim), _yarn_attention_factor(rope)


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _ntk_theta(rope: RopeConfig, dim: int) -> float:
    """Return theta of NTK scaling, which has no effect up to `max_position_embeddings`, the longest served context."""
    factor = _given(rope.factor)
    return rope.theta * (factor - (factor - 1)) ** (dim / (dim - 2))


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Return Llama 3.1's frequencies: long wavelengths stretched by `factor`, short ones kept, others interpolated."""
    factor, context = _given(rope.factor), _given(rope.original_max_position_embeddings)
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    wavelength = 2 * math.pi / inv_freq
    is_long, is_short = wavelength > context / low, wavelength < context / high
    scaled = torch.where(is_long, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where(~is_long & ~is_short, between, scaled)


def _yarn(rope: RopeConfig, dim: int) -> Tensor:
    """Return YaRN's frequencies (arXiv 2309.00071): slow components are interpolated, fast ones kept.

    Slow means few turns within the trained context.
    """
    low = _yarn_component(rope, dim, rope.beta_fast or 32.0)
    high = _yarn_component(rope, dim, rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    periods = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    keep = 1 - ramp
    return 1.0 / (_given(rope.factor) * periods) * (1 - keep) + 1.0 / periods * keep


def _yarn_component(rope: RopeConfig, dim: int, num_rotations: float) -> float:
    """Return the index of the component that turns `num_rotations` times within the trained context."""
    context = _given(rope.original_max_position_embeddings)
    return (dim * math.log(context / (num_rotations * 2 * math.pi))) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _given(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(factor, rope.mscale) / _yarn_mscale(factor, rope.mscale_all_dim)
    return _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _given(value: float | None) -> float:
    assert value is not None, "arch checks that the parameters of the kind exist"
    return value
