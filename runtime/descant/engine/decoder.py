"""The decoder of all families: Llama, Mistral, Qwen2 and Qwen3 differ in their config only.

Shape letters: T packed new tokens of all rows, N rows of logits, H hidden size, I intermediate size, Hq and Hkv query
and key-value heads, D head size, V vocabulary. All math is in `descant_kernels`; no operation here mixes rows.

    residual ─┬─ norm ─ qkv ─ [q, k norm] ─ rope ─ write k, v ─ attention ─ o ─┬─ + ─┬─ norm ─ gate, up ─ down ─ + ─
              └────────────────────────────────────────────────────────────────┘     └──────────────────────────┘
Each linear is followed by `add_lora` if the batch has an adapter.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from descant.engine.batch import ForwardBatch
from descant.engine.kv_cache import KVCache
from descant.engine.weights import DecoderWeights, LayerWeights
from descant.model.arch import LORA_MODULES_PER_LAYER, DecoderConfig
from descant_kernels import (
    LoraTables,
    PackedLinear,
    Segments,
    add_lora,
    linear,
    paged_attention,
    rms_norm,
    rope_write_kv,
    silu_mul,
)

# Offsets of a layer's linears in the LoRA tables (`arch.lora_modules`).
_QKV, _O, _GATE_UP, _DOWN = 0, 3, 4, 6


class Decoder:
    """A decoder over a paged cache. Its only mutable state is the cache it writes."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, cache: KVCache, rope_tables: tuple[Tensor, Tensor]
    ) -> None:
        self._config = config
        self._weights = weights
        self._cache = cache
        self._cos, self._sin = rope_tables  # [max_context, D / 2] float32
        self._scale = config.head_dim**-0.5
        self._qkv_sizes = (config.q_size, config.kv_size, config.kv_size)
        self._gate_up_sizes = (config.intermediate_size, config.intermediate_size)

    def forward(self, batch: ForwardBatch, lora: LoraTables) -> Tensor:
        """Compute the new tokens and store their keys and values. Return normed hidden states, `[T, H]`."""
        config, weights = self._config, self._weights
        residual = F.embedding(batch.input_ids, weights.embedding)  # [T, H]
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]  # [T, D / 2]
        x = rms_norm(residual, weights.layers[0].input_norm, config.rms_norm_eps)
        for i, layer in enumerate(weights.layers):
            attended = self._attend(i, layer, x, cos, sin, batch, lora)
            x = rms_norm(attended, layer.post_norm, config.rms_norm_eps, residual)
            expanded = self._feed_forward(i, layer, x, batch, lora)
            next_norm = weights.layers[i + 1].input_norm if i + 1 < config.num_layers else weights.norm
            x = rms_norm(expanded, next_norm, config.rms_norm_eps, residual)
        return x

    def logits(self, hidden: Tensor, segments: Segments, lora: LoraTables) -> Tensor:
        """Return the logits of normed hidden states.

        Args:
          hidden: `[N, H]`. segments: of these N rows. Returns `[N, V]` float32.
        """
        first_module = LORA_MODULES_PER_LAYER * self._config.num_layers
        sizes = (self._config.vocab_size,)
        return _adapted_linear(hidden, self._weights.lm_head, segments, lora, first_module, sizes).float()

    def _attend(
        self, i: int, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, lora: LoraTables
    ) -> Tensor:
        config, first_module = self._config, LORA_MODULES_PER_LAYER * i
        qkv = _adapted_linear(x, layer.qkv, batch.segments, lora, first_module + _QKV, self._qkv_sizes)
        q, k, v = qkv.split(self._qkv_sizes, dim=1)
        q = q.unflatten(1, (config.num_heads, config.head_dim))  # [T, Hq, D]
        k = k.unflatten(1, (config.num_kv_heads, config.head_dim))  # [T, Hkv, D]
        v = v.unflatten(1, (config.num_kv_heads, config.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, config.rms_norm_eps)
        keys, values = self._cache.keys[i], self._cache.values[i]
        rope_write_kv(q, k, v, cos, sin, keys, values, batch.slot_mapping)
        attended = paged_attention(q, keys, values, batch.attention, self._scale, config.windows[i])
        return _adapted_linear(
            attended.flatten(1), layer.o, batch.segments, lora, first_module + _O, (config.hidden_size,)
        )

    def _feed_forward(self, i: int, layer: LayerWeights, x: Tensor, batch: ForwardBatch, lora: LoraTables) -> Tensor:
        first_module = LORA_MODULES_PER_LAYER * i
        gate_up = _adapted_linear(x, layer.gate_up, batch.segments, lora, first_module + _GATE_UP, self._gate_up_sizes)
        inner = silu_mul(gate_up)  # [T, I]
        sizes = (self._config.hidden_size,)
        return _adapted_linear(inner, layer.down, batch.segments, lora, first_module + _DOWN, sizes)


def _adapted_linear(
    x: Tensor, packed: PackedLinear, segments: Segments, lora: LoraTables, first_module: int, out_sizes: tuple[int, ...]
) -> Tensor:
    """Return the base linear plus each row's adapter: `[T, in]` → `[T, sum(out_sizes)]`."""
    y = linear(x, packed)
    if segments.has_adapter:
        add_lora(y, x, lora, segments, first_module, out_sizes)
    return y
