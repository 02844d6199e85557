# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton turns launch arguments into constexpr and takes options such as num_warps; its annotations do not allow that.
"""Triton kernels of `sample_nodes` and `walk_tree`. Nothing is read back from the device.

The vocabulary is cut into splits of one fixed size. A program finds the best token of one row's split, noise included;
a second launch finds the best of the splits. Maxima and lowest ids do not depend on the order in which programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from descant_kernels import reference
from descant_kernels.batch import NodeNoise, Walk

SPLIT_SIZE = 1024
"""Tokens per program: with a vocabulary of 128,000, one row occupies a whole GPU."""

_MIX_1 = tl.constexpr(reference.MIX_1)
_MIX_2 = tl.constexpr(reference.MIX_2)
_TOKEN_STRIDE = tl.constexpr(reference.TOKEN_STRIDE)
_SEED_SALT_A = tl.constexpr(reference.SEED_SALT_A)
_SEED_SALT_B = tl.constexpr(reference.SEED_SALT_B)
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _mix(x):
    """Return `mix` of the contract, on uint32."""
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def _node_keys(seed, choice, output_index):
    """Return `a` and `b` of the contract from int64 scalars: the words that all tokens of a row share."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    choice, output_index = choice.to(tl.uint32), output_index.to(tl.uint32)
    a = _mix(_mix(_mix(_mix(low + _SEED_SALT_A) + high) + choice) + output_index)
    b = _mix(_mix(_mix(_mix(high + _SEED_SALT_B) ^ low) ^ choice) ^ output_index)
    return a, b


@triton.jit
def _uniform(token_ids, a, b):
    """Return `u` of the contract: 24 bits, exact in float32."""
    x = token_ids.to(tl.uint32) * _TOKEN_STRIDE + a
    x = (x ^ (x >> 16)) * _MIX_1 + b
    x = (x ^ (x >> 15)) * _MIX_2
    x = x ^ (x >> 16)
    return ((x >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23


@triton.jit
def _gumbel(token_ids, a, b):
    """Return the noise of tokens. `tl.log` is accurate to one unit in the last place, also for `u` next to 1."""
    return -tl.log(-tl.log(_uniform(token_ids, a, b)))


@triton.jit
def _best_of_split_kernel(
    # Pointers
    logits_ptr,
    seeds_ptr,
    choices_ptr,
    output_indices_ptr,
    sampled_ptr,
    scores_ptr,
    ids_ptr,
    # Sizes
    vocab_size,
    # Strides
    logits_stride,
    # Meta
    BLOCK: tl.constexpr,
):
    """Store to scores[row, split] the best score in the split, and to ids[row, split] the lowest token that has it."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    token_ids = split * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * logits_stride + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
    score = tl.where(logits == logits, logits, float("-inf"))  # a NaN never wins
    best = tl.max(score, axis=0)
    # Filters exclude all tokens of most splits: like greedy rows, those need no noise.
    if tl.load(sampled_ptr + row) & (best > float("-inf")):
        seed, choice = tl.load(seeds_ptr + row), tl.load(choices_ptr + row)
        a, b = _node_keys(seed, choice, tl.load(output_indices_ptr + row))
        score += _gumbel(token_ids, a, b)
        best = tl.max(score, axis=0)
    # The split's first token is in the vocabulary, so the lowest id is too, even if all scores are -inf.
    partial = row * tl.num_programs(1) + split
    tl.store(scores_ptr + partial, best)
    tl.store(ids_ptr + partial, tl.min(tl.where(score == best, token_ids, _NO_ID), axis=0))


@triton.jit
def _best_of_row_kernel(
    # Pointers
    scores_ptr,
    ids_ptr,
    out_ptr,
    # Sizes
    num_splits,
    # Meta
    BLOCK: tl.constexpr,
):
    """Store to out[row] the token of the best split, the lowest of equals."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK)
    mask = split < num_splits
    score = tl.load(scores_ptr + row * num_splits + split, mask=mask, other=float("-inf"))
    token_ids = tl.load(ids_ptr + row * num_splits + split, mask=mask, other=_NO_ID)
    winner = tl.min(tl.where(score == tl.max(score, axis=0), token_ids, _NO_ID), axis=0)
    tl.store(out_ptr + row, winner)


def sample_nodes(logits: Tensor, noise: NodeNoise) -> Tensor:
    """See `descant_kernels.sample_nodes`. NaN counts as -inf; a row without any number gets token 0."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "a row of logits must be contiguous"
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    num_splits = triton.cdiv(vocab_size, SPLIT_SIZE)
    scores = torch.empty(num_rows, num_splits, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, num_splits, dtype=torch.int32, device=logits.device)
    _best_of_split_kernel[(num_rows, num_splits)](
        *(logits, noise.seeds, noise.choices, noise.output_indices, noise.sampled, scores, ids),
        *(vocab_size, logits.stride(0)),
        BLOCK=SPLIT_SIZE,
    )
    _best_of_row_kernel[(num_rows,)](
        *(scores, ids, out, num_splits), BLOCK=triton.next_power_of_2(num_splits), num_warps=1
    )
    return out


@triton.jit
def _walk_tree_kernel(
    # Pointers
    parents_ptr,
    cu_nodes_ptr,
    draft_tokens_ptr,
    sampled_tokens_ptr,
    counts_ptr,
    nodes_ptr,
    tokens_ptr,
    # Sizes
    width,
    # Meta
    BLOCK: tl.constexpr,
):
    """Walk one sequence's tree. Store the visited nodes and the tokens sampled there, padded with -1 to the width."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_nodes_ptr + sequence)
    num_nodes = tl.load(cu_nodes_ptr + sequence + 1) - start
    lane = tl.arange(0, BLOCK)
    is_node = lane < tl.minimum(num_nodes, width)
    parents = tl.load(parents_ptr + start + lane, mask=is_node, other=-1)
    draft_tokens = tl.load(draft_tokens_ptr + start + lane, mask=is_node, other=-1)
    count = 0
    node = tl.where(num_nodes > 0, 0, BLOCK)  # BLOCK = no node; a padding sequence has none
    while node < BLOCK:
        token = tl.load(sampled_tokens_ptr + start + node)
        tl.store(nodes_ptr + sequence * width + count, node)
        tl.store(tokens_ptr + sequence * width + count, token)
        count += 1
        # A child comes after its parent, so the walk ends for any input.
        is_next = is_node & (lane > node) & (parents == node) & (draft_tokens == token)
        node = tl.min(tl.where(is_next, lane, BLOCK), axis=0)
    tl.store(counts_ptr + sequence, count)
    is_padding = (lane >= count) & (lane < width)
    padding = tl.full((BLOCK,), -1, dtype=tl.int64)
    tl.store(nodes_ptr + sequence * width + lane, padding, mask=is_padding)
    tl.store(tokens_ptr + sequence * width + lane, padding, mask=is_padding)


def walk_tree(parents: Tensor, cu_nodes: Tensor, draft_tokens: Tensor, sampled_tokens: Tensor, max_nodes: int) -> Walk:
    """See `descant_kernels.walk_tree`. A padding sequence, one without nodes, has count 0.

    Args:
      max_nodes: width of the result; no sequence has more nodes. It comes from the host, so nothing is read back.
    """
    num_sequences, device = cu_nodes.shape[0] - 1, parents.device
    walk = Walk(
        counts=torch.empty(num_sequences, dtype=torch.int64, device=device),
        nodes=torch.empty(num_sequences, max_nodes, dtype=torch.int64, device=device),
        tokens=torch.empty(num_sequences, max_nodes, dtype=torch.int64, device=device),
    )
    if num_sequences and max_nodes:
        _walk_tree_kernel[(num_sequences,)](
            *(parents, cu_nodes, draft_tokens, sampled_tokens, walk.counts, walk.nodes, walk.tokens, max_nodes),
            BLOCK=triton.next_power_of_2(max_nodes),
            num_warps=1,
        )
    return walk
