"""The decoder's weights, read from a checkpoint and packed for multiplication."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from descant.model.arch import DecoderConfig
from descant.model.checkpoint import Checkpoint, ProgressCallback
from descant_kernels import PackedLinear, pack_linear


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """The weights of one layer. Letters: see `decoder`."""

    input_norm: Tensor  # [H]
    qkv: PackedLinear  # [Hq*D + 2*Hkv*D, H]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: PackedLinear  # [H, Hq*D]
    post_norm: Tensor  # [H]
    gate_up: PackedLinear  # [2*I, H]
    down: PackedLinear  # [H, I]


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """The weights of all layers, embedding and head. With tied embeddings `lm_head` is the packed embedding."""

    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    lm_head: PackedLinear  # [V, H]
    num_parameters: int


def load_weights(
    directory: Path | str,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: ProgressCallback = lambda fraction: None,
) -> DecoderWeights:
    """Read every tensor of a model directory. Values are not checked for NaN.

    Args:
      on_progress: called with the fraction of tensors that are read.

    Raises:
        ModelInvalid: a tensor is missing, unexpected, misshaped or unreadable; the reason names it.
    """
    reader = _DecoderReader(config, Checkpoint(Path(directory), dtype, device, on_progress))
    weights = reader.decoder()
    reader.checkpoint.finish()
    return weights


class _DecoderReader:
    """A reader of decoder tensors by name, with checked shapes."""

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._config = config
        self._num_parameters = 0

    def decoder(self) -> DecoderWeights:
        config = self._config
        embedding = self._tensor("model.embed_tokens", config.vocab_size, config.hidden_size)
        layers = tuple(self._layer(f"model.layers.{i}") for i in range(config.num_layers))
        norm = self._tensor("model.norm", config.hidden_size)
        if config.tie_word_embeddings:
            self.checkpoint.take_copy("lm_head.weight", embedding)
            lm_head = pack_linear(embedding)
        else:
            lm_head = self._linear(["lm_head"], [config.vocab_size], config.hidden_size, has_bias=False)
        return DecoderWeights(embedding, layers, norm, lm_head, self._num_parameters)

    def _layer(self, prefix: str) -> LayerWeights:
        config, attention, mlp = self._config, f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv_names = [f"{attention}.{name}_proj" for name in "qkv"]
        qkv_sizes = [config.q_size, config.kv_size, config.kv_size]
        hidden, inner = config.hidden_size, config.intermediate_size
        return LayerWeights(
            input_norm=self._tensor(f"{prefix}.input_layernorm", hidden),
            qkv=self._linear(qkv_names, qkv_sizes, hidden, config.qkv_bias),
            q_norm=self._tensor(f"{attention}.q_norm", config.head_dim) if config.qk_norm else None,
            k_norm=self._tensor(f"{attention}.k_norm", config.head_dim) if config.qk_norm else None,
            o=self._linear([f"{attention}.o_proj"], [hidden], config.q_size, config.o_bias),
            post_norm=self._tensor(f"{prefix}.post_attention_layernorm", hidden),
            gate_up=self._linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], [inner, inner], hidden, config.mlp_bias),
            down=self._linear([f"{mlp}.down_proj"], [hidden], inner, config.mlp_bias),
        )

    def _tensor(self, name: str, *shape: int) -> Tensor:
        return self._count(self.checkpoint.take(f"{name}.weight", shape))

    def _linear(self, names: list[str], out_sizes: list[int], in_size: int, has_bias: bool) -> PackedLinear:
        weight = self.checkpoint.take_stacked(
            [f"{name}.weight" for name in names], [(out_size, in_size) for out_size in out_sizes]
        )
        bias = None
        if has_bias:
            bias = self.checkpoint.take_stacked([f"{name}.bias" for name in names], [(size,) for size in out_sizes])
            self._count(bias)
        return pack_linear(self._count(weight), bias)

    def _count(self, tensor: Tensor) -> Tensor:
        self._num_parameters += tensor.numel()
        return tensor
