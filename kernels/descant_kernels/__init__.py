"""The public ops: contracts here, implementations by device.

CPU tensors go to the `cpu` modules (fast, and every row bitwise independent of the rest of its batch). CUDA tensors go
to the Triton kernel where one exists, and else to `reference`, the specification of the ops in plain torch.
`gumbel_noise` is the same torch code on every device.

Shape letters: T packed tokens of all sequences, S sequences, G segments, R rank, H hidden size, I intermediate size,
Hq and Hkv heads, D head size, V vocabulary, N rows of logits, M positions to move. Ops allocate their result
unless marked "in place".
The caller guarantees shapes and dtypes. A wrong one is a bug, caught by `assert` at best.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

from torch import Tensor

from descant_kernels import cpu, cpu_attention, cpu_linear, cpu_lora, cpu_sample, reference
from descant_kernels.batch import AttentionBatch, LoraTables, NodeNoise, PackedLinear, Segments, Walk
from descant_kernels.pair import PairLayout
from descant_kernels.probe import Invariance, probe_invariance

__all__ = [
    "AttentionBatch",
    "Invariance",
    "LoraTables",
    "NodeNoise",
    "PackedLinear",
    "PairLayout",
    "Segments",
    "Walk",
    "add_lora",
    "gelu_mul",
    "gumbel_noise",
    "linear",
    "move_kv",
    "pack_linear",
    "paged_attention",
    "probe_invariance",
    "rms_norm",
    "rope_write_kv",
    "sample_nodes",
    "silu_mul",
    "walk_tree",
]


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Return a weight in the layout that `linear` multiplies fastest. If that is its own layout, the result aliases it.

    Args:
      weight: `[out, in]`, float32, bfloat16 or float16. bias: `[out]` of the same dtype, or None.
    """
    return _implementation("linear", weight).pack_linear(weight, bias)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Return `x @ weight.T + bias`.

    Args:
      x: `[T, in]` of the weight's dtype; T may be 0. Returns `[T, out]` of the same dtype.
    """
    return _implementation("linear", x).linear(x, packed)


def add_lora(
    y: Tensor,
    x: Tensor,
    tables: LoraTables,
    segments: Segments,
    first_module: int,
    out_sizes: tuple[int, ...],
    bias: Tensor | None = None,
) -> None:
    """Add every row's adapter output to a group of projections that share their input. In place on `y`.

    Semantics, for segment g with slot s >= 0, slice j and module m = first_module + j, where ranks[s, m] > 0:
      A, B = PairLayout.of(ranks[s, m], in, out_j).views(arena, offsets[s, m]) → `[R, in]`, `[out_j, R]`
      y[indptr[g]:indptr[g+1], slice j] += (x[indptr[g]:indptr[g+1]] @ A.T) @ B.T
    and where the module has a row scale, with delta for the added product (DoRA, Liu et al. 2024):
      y = scale * (y - bias + delta) + bias

    Args:
      y: `[T, sum(out_sizes)]`, dtype of the model. x: `[T, in]`, same dtype. tables, segments: see their classes.
      first_module: index of slice 0 in the tables' second axis. out_sizes: width of each slice of y.
      bias: `[sum(out_sizes)]` of the same dtype, already added to y; None = zeros. Only row scales need it.
    Ranks are true ranks, 1 to any size, and may differ between adapters and slices. Products accumulate in float32.
    """
    if not segments.has_adapter:
        return
    _implementation("lora", y).add_lora(y, x, tables, segments, first_module, out_sizes, bias)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Return the attention of new tokens over their sequences' paged cache, for prefill, decode and tree verify.

    Semantics, for new token j of sequence s with n_s new tokens, p = context_lens[s] - n_s + j:
      out[row] = softmax(cap(scale * q[row] @ K.T)) @ V over positions max(0, p - window + 1) .. p, per head;
      cap(x) = soft_cap * tanh(x / soft_cap), or x; query head h reads kv head h // (Hq / Hkv). Tree nodes: see
      `AttentionBatch`; positions then count along the node's own path, and the result equals that of plain decode of
      this path.

    Args:
      q: `[T, Hq, D]`. k_cache, v_cache: `[num_blocks, Hkv, block_size, D]`, same dtype, the new tokens' keys and
      values already written. window: number of positions attended to, the token itself included; None = all.
      soft_cap: None = none.
    Returns `[T, Hq, D]` of q's dtype. Softmax and sums are float32. Cache content outside a sequence's visible
    positions, NaN included, never affects the result.
    """
    return _implementation("attention", q).paged_attention(q, k_cache, v_cache, batch, scale, window, soft_cap)


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Rotate queries and keys by position and store keys and values. In place on `q` and the caches.

    Semantics, halves convention, x1 and x2 the halves of the first 2·d components of a head (the rest is unchanged):
      x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin, in float32; then, for slot = slot_mapping[t] >= 0,
      k_cache[slot // block_size, :, slot % block_size] = k[t], and v_cache likewise = v[t].

    Args:
      q: `[T, Hq, D]`. k, v: `[T, Hkv, D]`; the content of `k` afterwards is unspecified. cos, sin: `[T, d]` float32,
      contiguous, d <= D / 2 (d = D / 2 rotates whole heads). k_cache, v_cache: `[num_blocks, Hkv, block_size, D]`, same
      dtype, contiguous. slot_mapping: `[T]` int64, no slot twice; -1 = do not store. Each head of q, k and v is
      contiguous.
    """
    _implementation("kv", k).rope_write_kv(q, k, v, cos, sin, k_cache, v_cache, slot_mapping)


def move_kv(k_cache: Tensor, v_cache: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    """Move cached positions, as if all were read before any is written. In place on the caches.

    Args:
      k_cache, v_cache: `[num_blocks, Hkv, block_size, D]`. src_slots, dst_slots: `[M]` int64; no destination twice.
    """
    _implementation("kv", k_cache).move_kv(k_cache, v_cache, src_slots, dst_slots)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Return the root mean square norm of x, or of residual + x, over the last axis. In place on `residual`, if given.

    Semantics: with a residual, residual += x, in place, and then x = residual;
      returns weight * (x * rsqrt(mean(x²) + eps)).to(dtype): the inner part in float32, the weight last, as in Llama.

    Args:
      x: `[..., H]`, any leading axes. weight: `[H]`. residual: like x, contiguous, or None.
    """
    return _implementation("fused", x).rms_norm(x, weight, eps, residual)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, in the tensor's dtype.

    Args:
      gate_up: `[T, 2 * I]`, gate first. Returns `[T, I]`.
    """
    return _implementation("fused", gate_up).silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Return `gelu(gate) * up` with the tanh approximation (Hendrycks and Gimpel 2016), in the tensor's dtype.

    Args:
      gate_up: `[T, 2 * I]`, gate first. Returns `[T, I]`.
    """
    return _implementation("fused", gate_up).gelu_mul(gate_up)


def gumbel_noise(seeds: Tensor, choices: Tensor, output_indices: Tensor, vocab_size: int) -> Tensor:
    """Return Gumbel(0, 1) noise from a counter hash: a pure function of (seed, choice, output_index, token_id).

    Semantics, in wrapping unsigned 32-bit arithmetic, `>>` a logical shift:
      mix(x): x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16
      a = mix(mix(mix(mix(low32(seed) + 0x9E3779B9) + high32(seed)) + choice) + output_index)
      b = mix(mix(mix(mix(high32(seed) + 0x85EBCA6B) ^ low32(seed)) ^ choice) ^ output_index)
      x = token_id * 0x9E3779B1 + a; x ^= x >> 16; x *= 0x7FEB352D; x += b; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16
      u = ((x >> 9) + 0.5) * 2**-23, exact in float32 and never 0 or 1; noise = -log(-log(u))

    Args:
      seeds, choices, output_indices: `[N]` int64. Returns `[N, vocab_size]` float32, between -2.82 and 16.64.
    """
    return reference.gumbel_noise(seeds, choices, output_indices, vocab_size)


def sample_nodes(logits: Tensor, noise: NodeNoise) -> Tensor:
    """Sample one token per row: argmax(logits + noise) over the surviving tokens, a draw from softmax(logits).

    Rows that are not `sampled` get no noise. Ties go to the lowest id.

    Args:
      logits: `[N, V]` float32, processed, excluded tokens -inf. noise: see `NodeNoise` and `gumbel_noise`.
    Returns `[N]` int64.
    """
    return _implementation("sample", logits).sample_nodes(logits, noise)


def walk_tree(
    parents: Tensor, cu_nodes: Tensor, draft_tokens: Tensor, sampled_tokens: Tensor, max_nodes: int | None = None
) -> Walk:
    """Walk each sequence's draft tree as far as the target's samples match it.

    Semantics: start at node 0; while the token sampled at the current node is a child's draft token, go to that
    child (the lowest index if two have it); emit the token sampled at every visited node.

    Args:
      parents: `[N]` int64, index of each node's parent among its sequence's nodes, smaller than its own; -1 for node 0.
      cu_nodes: `[S + 1]` int64, no sequence empty. draft_tokens: `[N]` int64; that of node 0 (the last known token)
      is ignored. sampled_tokens: `[N]` int64. max_nodes: width of the result; no sequence has more nodes. None reads
      it from `cu_nodes`, which blocks until the device is done (so never inside a CUDA graph).
    Returns a `Walk`.
    """
    if max_nodes is None:
        max_nodes = max(cu_nodes.diff().tolist(), default=0)
    return _implementation("sample", parents).walk_tree(parents, cu_nodes, draft_tokens, sampled_tokens, max_nodes)


_CPU_MODULES: dict[str, ModuleType] = {
    "attention": cpu_attention,
    "fused": cpu,
    "kv": cpu,
    "linear": cpu_linear,
    "lora": cpu_lora,
    "sample": cpu_sample,
}
_TRITON_TOPICS = _CPU_MODULES.keys() - {"linear"}


def _implementation(topic: str, tensor: Tensor) -> ModuleType:
    if tensor.device.type == "cpu":
        return _CPU_MODULES[topic]
    return _triton_module(topic) or reference


@functools.cache
def _triton_module(topic: str) -> ModuleType | None:
    """Return the module of Triton kernels for a topic, None without one or without Triton. Imported on first use."""
    if topic not in _TRITON_TOPICS or importlib.util.find_spec("triton") is None:
        return None
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns about every kernel if this is not set
    return importlib.import_module(f"descant_kernels.{topic}")
