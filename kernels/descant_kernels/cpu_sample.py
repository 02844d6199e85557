"""CPU paths of sampling: `sample_nodes`, with noise only for the tokens that can win, and `walk_tree`."""

import itertools

import torch
from torch import Tensor

from descant_kernels.batch import NodeNoise, Walk
from descant_kernels.reference import MIX_1, MIX_2, TOKEN_STRIDE, node_keys

NEAR = 2.0
"""Distance below the best logit within which scores are computed first."""

MOST_NOISE = 17.0
"""Upper bound on the noise, 16.636, with a margin for the rounding of large scores: no logit further below a score can
win."""


def sample_nodes(logits: Tensor, noise: NodeNoise) -> Tensor:
    """See `descant_kernels.sample_nodes`. A row that holds a NaN gets an unspecified valid id."""
    best = logits.argmax(dim=-1)
    if not noise.any_sampled or len(best) == 0:
        return best
    drawn = noise.sampled.nonzero().squeeze(1)
    logits = logits if len(drawn) == len(logits) else logits.index_select(0, drawn)
    keys = [_wrap_32(key)[drawn] for key in node_keys(noise.seeds, noise.choices, noise.output_indices)]
    rows, _, scores = _scores(logits, logits >= logits.amax(dim=-1, keepdim=True) - NEAR, keys)
    least = _highest_of(rows, scores, len(drawn))[:, None] - MOST_NOISE
    rows, token_ids, scores = _scores(logits, logits >= least, keys)
    top = _highest_of(rows, scores, len(drawn))
    winners = torch.where(scores == top[rows], token_ids, logits.shape[1])
    lowest = torch.full_like(drawn, logits.shape[1]).scatter_reduce_(0, rows, winners, "amin")
    return best.index_copy_(0, drawn, torch.where(lowest < logits.shape[1], lowest, best[drawn]))


def _scores(logits: Tensor, contends: Tensor, keys: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, token id and score (logit plus noise) of each contending token."""
    rows, token_ids = contends.nonzero(as_tuple=True)
    a, b = (key[rows] for key in keys)
    return rows, token_ids, logits[rows, token_ids].add_(_gumbel(token_ids.int(), a, b))


def _highest_of(rows: Tensor, scores: Tensor, num_rows: int) -> Tensor:
    return torch.full((num_rows,), -torch.inf).scatter_reduce_(0, rows, scores, "amax")


def _gumbel(token_ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `gumbel_noise` of single tokens, in wrapping int32. Arithmetic shifts copy the sign, so it is masked."""
    x = token_ids.mul_(_signed(TOKEN_STRIDE)).add_(a)
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(MIX_1)).add_(b)
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(MIX_2))
    # The last step of the mixer leaves the upper half alone: only bits 9 to 15 need it.
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).bitwise_right_shift_(9).bitwise_and_(0x7FFFFF)
    return x.float().add_(0.5).mul_(2.0**-23).log_().neg_().log_().neg_()


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _wrap_32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).int()


def walk_tree(parents: Tensor, cu_nodes: Tensor, draft_tokens: Tensor, sampled_tokens: Tensor, max_nodes: int) -> Walk:
    """See `descant_kernels.walk_tree`."""
    bounds = cu_nodes.tolist()
    sampled = sampled_tokens.tolist()
    edges = list(zip(parents.tolist(), draft_tokens.tolist(), strict=True))
    paths: list[list[int]] = []
    for start, end in itertools.pairwise(bounds):
        # Later entries of a dict win, so iterate backwards: of two equal children the lowest index counts.
        child = {edges[node]: node - start for node in range(end - 1, start, -1)}
        path = [0]
        while (node := child.get((path[-1], sampled[start + path[-1]]))) is not None:
            path.append(node)
        paths.append(path)
    nodes = [path + [-1] * (max_nodes - len(path)) for path in paths]
    tokens = [
        [sampled[start + node] for node in path] + [-1] * (max_nodes - len(path))
        for start, path in zip(bounds, paths, strict=False)
    ]
    return Walk(
        counts=torch.tensor([len(path) for path in paths], dtype=torch.int64),
        nodes=torch.tensor(nodes, dtype=torch.int64).reshape(len(paths), max_nodes),
        tokens=torch.tensor(tokens, dtype=torch.int64).reshape(len(paths), max_nodes),
    )
