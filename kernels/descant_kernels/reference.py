"""Every op in plain torch, slow and obvious: the specification that the fast paths are tested against.

Contracts are in `descant_kernels.__init__`. The ops run on any device, loop over tokens and read scalars back.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from descant_kernels.batch import AttentionBatch, LoraTables, NodeNoise, PackedLinear, Segments, Walk
from descant_kernels.pair import PairLayout

LOW_32_BITS = 0xFFFFFFFF
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B
TOKEN_STRIDE = 0x9E3779B1
SEED_SALT_A = 0x9E3779B9
SEED_SALT_B = 0x85EBCA6B


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """See `descant_kernels.pack_linear`. The weight is not changed."""
    out_features, in_features = weight.shape
    return PackedLinear(lambda x: F.linear(x, weight, bias), int, weight.dtype, in_features, out_features)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """See `descant_kernels.linear`."""
    return packed.product(x)


def add_lora(
    y: Tensor,
    x: Tensor,
    tables: LoraTables,
    segments: Segments,
    first_module: int,
    out_sizes: tuple[int, ...],
    bias: Tensor | None = None,
) -> None:
    """See `descant_kernels.add_lora`."""
    indptr, slots = segments.indptr.tolist(), segments.slots.tolist()
    in_size = x.shape[1]
    for start, end, slot in zip(indptr[:-1], indptr[1:], slots, strict=True):
        column = 0
        for module, out_size in enumerate(out_sizes, first_module):
            rank = int(tables.ranks[slot, module]) if slot >= 0 else 0
            if rank:
                layout = PairLayout.of(rank, in_size, out_size)
                a, b = layout.views(tables.arena, int(tables.offsets[slot, module]))
                target = y[start:end, column : column + out_size]
                adapted = target.float() + (x[start:end].float() @ a.float().T) @ b.float().T
                scale_offset = int(tables.row_scales[slot, module])
                if scale_offset >= 0:
                    scale = tables.arena[scale_offset : scale_offset + out_size].float()
                    unscaled = 0.0 if bias is None else bias[column : column + out_size].float()
                    adapted = scale * (adapted - unscaled) + unscaled
                target.copy_(adapted)
            column += out_size


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """See `descant_kernels.paged_attention`."""
    out = torch.zeros_like(q)
    group, block_size = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    cu_seqlens_q = batch.cu_seqlens_q.tolist()
    for sequence, (start, end) in enumerate(itertools.pairwise(cu_seqlens_q)):
        for row in range(start, end):
            seen = torch.tensor(visible_positions(batch, sequence, row, window), device=q.device)
            blocks = batch.block_tables[sequence].long()[seen // block_size]
            keys = k_cache[blocks, :, seen % block_size].float().repeat_interleave(group, dim=1)
            values = v_cache[blocks, :, seen % block_size].float().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,nhd->hn", q[row].float() * scale, keys)
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            out[row] = torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), values).to(q.dtype)
    return out


def visible_positions(batch: AttentionBatch, sequence: int, row: int, window: int | None) -> list[int]:
    """Return the cache positions that a query row sees, in path order."""
    last_row = int(batch.cu_seqlens_q[sequence + 1])
    prefix = -1 if batch.prefix_lens is None else int(batch.prefix_lens[sequence])
    if batch.ancestors is not None and prefix >= 0:
        path = [*range(prefix), *(node for node in batch.ancestors[row].tolist() if node >= 0)]
    else:
        path = list(range(int(batch.context_lens[sequence]) - last_row + row + 1))
    return path if window is None else path[-window:]


def rope_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `descant_kernels.rope_write_kv`."""
    rope(q, cos, sin)
    rope(k, cos, sin)
    block_size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[token]
            v_cache[slot // block_size, :, slot % block_size] = v[token]


def move_kv(k_cache: Tensor, v_cache: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    """See `descant_kernels.move_kv`. Advanced indexing reads all positions before it writes."""
    block_size = k_cache.shape[2]
    for cache in (k_cache, v_cache):
        moved = cache[src_slots // block_size, :, src_slots % block_size]
        cache[dst_slots // block_size, :, dst_slots % block_size] = moved


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """See `descant_kernels.rms_norm`."""
    if residual is not None:
        residual.add_(x)
        x = residual
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def rope(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads `[T, n, D]` in place, as specified by `descant_kernels.rope_write_kv`."""
    half = cos.shape[1]
    cos, sin = cos[:, None].float(), sin[:, None].float()
    x1, x2 = heads[..., :half].float(), heads[..., half : 2 * half].float()
    rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    heads[..., : 2 * half] = rotated.to(heads.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `descant_kernels.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.float()).to(gate.dtype) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See `descant_kernels.gelu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate.float(), approximate="tanh").to(gate.dtype) * up


def mix_32(x: Tensor) -> Tensor:
    """Apply a bijection of 32-bit integers, held in int64, that spreads every input bit over all output bits.

    The multipliers are those of the public-domain "lowbias32" (Chris Wellons, Hash Prospector).
    """
    x = ((x ^ (x >> 16)) * MIX_1) & LOW_32_BITS
    x = ((x ^ (x >> 15)) * MIX_2) & LOW_32_BITS
    return x ^ (x >> 16)


def node_keys(seeds: Tensor, choices: Tensor, output_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two 32-bit words that all tokens of a node share, `a` and `b` of the contract; int64 `[N]` each."""
    low, high = seeds & LOW_32_BITS, (seeds >> 32) & LOW_32_BITS
    a = mix_32((low + SEED_SALT_A) & LOW_32_BITS)
    b = mix_32((high + SEED_SALT_B) & LOW_32_BITS)
    for word_a, word_b in ((high, low), (choices, choices), (output_indices, output_indices)):
        a = mix_32((a + word_a) & LOW_32_BITS)
        b = mix_32((b ^ word_b) & LOW_32_BITS)
    return a, b


def gumbel_noise(seeds: Tensor, choices: Tensor, output_indices: Tensor, vocab_size: int) -> Tensor:
    """See `descant_kernels.gumbel_noise`."""
    a, b = node_keys(seeds, choices, output_indices)
    token_ids = torch.arange(vocab_size, device=seeds.device)
    x = (token_ids * TOKEN_STRIDE + a[:, None]) & LOW_32_BITS
    x = ((x ^ (x >> 16)) * MIX_1 + b[:, None]) & LOW_32_BITS
    x = ((x ^ (x >> 15)) * MIX_2) & LOW_32_BITS
    x = x ^ (x >> 16)
    uniform = ((x >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def sample_nodes(logits: Tensor, noise: NodeNoise) -> Tensor:
    """See `descant_kernels.sample_nodes`."""
    gumbel = gumbel_noise(noise.seeds, noise.choices, noise.output_indices, logits.shape[1])
    return torch.where(noise.sampled[:, None], logits + gumbel, logits).argmax(dim=-1)


def walk_tree(parents: Tensor, cu_nodes: Tensor, draft_tokens: Tensor, sampled_tokens: Tensor, max_nodes: int) -> Walk:
    """See `descant_kernels.walk_tree`."""
    bounds = cu_nodes.tolist()
    shape = (len(bounds) - 1, max_nodes)
    nodes = torch.full(shape, -1, dtype=torch.int64)
    tokens = torch.full(shape, -1, dtype=torch.int64)
    counts = torch.zeros(shape[0], dtype=torch.int64)
    for sequence, (start, end) in enumerate(itertools.pairwise(bounds)):
        node: int | None = 0
        while node is not None:
            token = int(sampled_tokens[start + node])
            nodes[sequence, counts[sequence]] = node
            tokens[sequence, counts[sequence]] = token
            counts[sequence] += 1
            children = [n for n in range(end - start) if int(parents[start + n]) == node]
            node = next((n for n in children if int(draft_tokens[start + n]) == token), None)
    return Walk(counts.to(parents.device), nodes.to(parents.device), tokens.to(parents.device))
