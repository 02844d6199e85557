"""`TokenTree`: what a row verifies in one step, its last known token and a draft of what may follow.

The target samples at every node, and the row goes on along the nodes whose tokens it would have sampled itself. So a
draft can only make a row faster: its tokens are those of plain decoding (each node has the noise, the penalties and the
attention that its position would have had).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from descant.contract.plan import TokenDraft, unpack_ints
from descant.engine.sampling import SampledToken
from descant_kernels import walk_tree


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Nodes, parents first; node 0 is the row's last known token, node i the draft's token i - 1."""

    draft_ids: tuple[int, ...]  # tokens of the nodes from 1 on
    parents: tuple[int, ...]  # of all nodes, -1 for node 0
    paths: tuple[tuple[int, ...], ...]  # of all nodes: the nodes from node 0 to the node itself

    @classmethod
    def of(cls, draft: TokenDraft | None) -> TokenTree:
        """Return the tree of a draft; of none, node 0 alone."""
        if draft is None:
            return _NO_DRAFT
        parents = (-1, *(parent + 1 for parent in unpack_ints(draft.parents)))
        paths: list[tuple[int, ...]] = [(0,)]
        for node, parent in enumerate(parents[1:], start=1):
            paths.append((*paths[parent], node))
        return cls(tuple(unpack_ints(draft.token_ids)), parents, tuple(paths))

    @property
    def num_drafted(self) -> int:
        """Nodes beside node 0."""
        return len(self.draft_ids)

    @property
    def depths(self) -> NDArray[np.int64]:
        """Nodes between node 0 and each node, `[num_nodes]`: the position relative to node 0's."""
        return np.array([len(path) - 1 for path in self.paths], dtype=np.int64)

    def path_tokens(self, node: int) -> list[int]:
        """Return the draft's tokens on the way to a node, its own included."""
        return [self.draft_ids[one - 1] for one in self.paths[node][1:]]


_NO_DRAFT = TokenTree((), (-1,), ((0,),))


def ancestors(trees: Sequence[TokenTree], first_slots: Sequence[int]) -> NDArray[np.int32]:
    """Cache positions on each node's path, `[nodes of all trees, greatest depth + 1]`, padded with -1.

    Args:
      first_slots: the position of each tree's node 0; node i lies i behind it, whatever its depth.
    """
    width = max(len(path) for tree in trees for path in tree.paths)
    table = np.full((sum(len(tree.paths) for tree in trees), width), -1, dtype=np.int32)
    row = 0
    for tree, first in zip(trees, first_slots, strict=True):
        for path in tree.paths:
            table[row, : len(path)] = path
            table[row, : len(path)] += first
            row += 1
    return table


@dataclass(frozen=True, slots=True)
class Accepted:
    """How far a tree was followed: the nodes, root first, and the token sampled at each."""

    nodes: tuple[int, ...]
    tokens: tuple[SampledToken, ...]


def accept(trees: Sequence[TokenTree], sampled: Sequence[SampledToken]) -> list[Accepted]:
    """Follow each tree as far as the target agrees with it.

    Args:
      sampled: one token per node of all trees, in their order. A node whose logits were bad ends its path.
    """
    if len(sampled) == len(trees):
        return [Accepted((0,), (token,)) for token in sampled]
    counts = [len(tree.paths) for tree in trees]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    walk = walk_tree(
        torch.tensor([parent for tree in trees for parent in tree.parents], dtype=torch.int64),
        torch.from_numpy(bounds.astype(np.int64)),
        torch.tensor([token for tree in trees for token in (-1, *tree.draft_ids)], dtype=torch.int64),
        torch.tensor([token.token_id for token in sampled], dtype=torch.int64),
        max(counts),
    )
    accepted: list[Accepted] = []
    for start, count, path in zip(bounds.tolist(), walk.counts.tolist(), walk.nodes.tolist(), strict=False):
        nodes = tuple(path[:count])
        accepted.append(Accepted(nodes, tuple(sampled[start + node] for node in nodes)))
    return accepted
