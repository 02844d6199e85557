"""`TokenTree`: the tokens that a row verifies in one step, its last known token and a draft of the following ones.

The target samples at every node, and a row follows the nodes with the tokens that the target sampled. So a draft can
only make a row faster: its tokens are those of plain decode, because each node has the noise, penalties and attention
of its position.
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
    """The nodes of a draft, parents first. Node 0 is the row's last known token, node i the draft's token i - 1."""

    draft_ids: tuple[int, ...]  # tokens of the nodes from 1 on
    parents: tuple[int, ...]  # of all nodes, -1 for node 0
    paths: tuple[tuple[int, ...], ...]  # of all nodes: the nodes from node 0 to the node itself

    @classmethod
    def of(cls, draft: TokenDraft | None) -> TokenTree:
        """Return the tree of a draft; without a draft, node 0 alone."""
        if draft is None:
            return _NO_DRAFT
        parents = (-1, *(parent + 1 for parent in unpack_ints(draft.parents)))
        paths: list[tuple[int, ...]] = [(0,)]
        for node, parent in enumerate(parents[1:], start=1):
            paths.append((*paths[parent], node))
        return cls(tuple(unpack_ints(draft.token_ids)), parents, tuple(paths))

    @property
    def num_drafted(self) -> int:
        """Number of nodes besides node 0."""
        return len(self.draft_ids)

    @property
    def depths(self) -> NDArray[np.int64]:
        """Depth of each node, `[num_nodes]`: its position relative to that of node 0."""
        return np.array([len(path) - 1 for path in self.paths], dtype=np.int64)

    def path_tokens(self, node: int) -> list[int]:
        """Return the draft's tokens on the path to a node, its own included."""
        return [self.draft_ids[one - 1] for one in self.paths[node][1:]]


_NO_DRAFT = TokenTree((), (-1,), ((0,),))


def ancestors(trees: Sequence[TokenTree], first_slots: Sequence[int]) -> NDArray[np.int32]:
    """Return the cache positions on each node's path, `[nodes of all trees, greatest depth + 1]`, padded with -1.

    Args:
      first_slots: the cache position of each tree's node 0. Node i is at offset i from it, at any depth.
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
    """The accepted path of a tree: its nodes, root first, and the token sampled at each."""

    nodes: tuple[int, ...]
    tokens: tuple[SampledToken, ...]


def accept(trees: Sequence[TokenTree], sampled: Sequence[SampledToken]) -> list[Accepted]:
    """Return the accepted path of each tree: as far as the target's samples match the draft.

    Args:
      sampled: one token per node of all trees, in their order. A node with bad logits ends its path.
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
