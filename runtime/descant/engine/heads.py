"""The proposals of draft heads after the tokens that a step sampled (Cai et al. 2024, Medusa).

Unlike all other products, theirs may give a row different bits in different batches, because proposals are verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from descant.contract.plan import HeadCandidates
from descant.engine.arena import Arena
from descant.engine.batch import ScheduledRow
from descant.engine.tree import Accepted
from descant.versions.draft_heads import DraftHeads

_MAX_LOGIT_ROWS = 64


def propose(
    rows: Sequence[ScheduledRow],
    walks: Sequence[Accepted],
    hidden: Tensor,
    arena: Arena,
    logits: Callable[[Tensor, int], Tensor],
) -> dict[int, HeadCandidates]:
    """Run the requested heads at the last accepted node of each row. Return the proposals by row.

    Args:
      hidden: `[nodes of all rows, H]`. logits: the base's LM head with an adapter, `[M, H]` and a slot → `[M, V]`.
    """
    groups: dict[tuple[int, int], list[tuple[ScheduledRow, int]]] = {}
    first = 0
    for row, walk in zip(rows, walks, strict=True):
        if row.planned.num_candidates:
            key = row.planned.heads_slot, row.planned.num_candidates
            groups.setdefault(key, []).append((row, first + walk.nodes[-1]))
        first += len(row.tree.paths)
    proposed: dict[int, HeadCandidates] = {}
    for (slot, num_candidates), group in groups.items():
        heads, adapter_slot = arena.heads(slot), group[0][0].adapter_slot
        assert heads is not None, "the plan was checked"
        last = hidden[torch.tensor([node for _, node in group], device=hidden.device)]
        found = candidates_of(last, heads, lambda x, slot=adapter_slot: logits(x, slot), num_candidates)
        proposed |= {row.state.row: one for (row, _), one in zip(group, found, strict=True)}
    return proposed


def candidates_of(
    hidden: Tensor, heads: DraftHeads, base_logits: Callable[[Tensor], Tensor], num_candidates: int
) -> list[HeadCandidates]:
    """Return every row's candidates, `num_candidates` per head. Rows are split so that the logits stay small.

    Args:
      hidden: `[N, H]`, the normed hidden states from which the last tokens were sampled; heads have the same dtype.
      base_logits: the base's LM head, `[M, H]` → `[M, V]`.
    """
    max_rows = max(1, _MAX_LOGIT_ROWS // len(heads.weight))
    if len(hidden) > max_rows:
        parts = hidden.split(max_rows)
        return [one for part in parts for one in candidates_of(part, heads, base_logits, num_candidates)]
    x = hidden.expand(len(heads.weight), -1, -1)  # [heads, N, H]
    for layer in range(heads.weight.shape[1]):
        update = torch.baddbmm(heads.bias[:, layer, None], x, heads.weight[:, layer].transpose(1, 2))
        x = x + F.silu(update)
    if heads.lm_heads is None:
        logits = base_logits(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # [heads, N, V]
    else:
        logits = torch.bmm(x, heads.lm_heads.transpose(1, 2)).float()
    best = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
    probs = (best.values - logits.logsumexp(dim=-1, keepdim=True)).exp()
    probs = probs.nan_to_num(0.0)  # of damaged heads
    host_ids, host_probs = best.indices.cpu().numpy().astype("<i4"), probs.cpu().numpy().astype("<f4")
    return [_packed(host_ids[:, row], host_probs[:, row]) for row in range(len(hidden))]


def _packed(ids: np.ndarray, probs: np.ndarray) -> HeadCandidates:
    return HeadCandidates(ids.shape[1], np.ascontiguousarray(ids).tobytes(), np.ascontiguousarray(probs).tobytes())
