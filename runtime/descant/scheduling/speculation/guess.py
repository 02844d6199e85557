"""`Guess`: a token tree with the likelihood of each of its nodes, and pure functions on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from descant.scheduling.speculation.ngram import DraftTree

_SECOND_CHOICE = 0.5  # likelihood of a later continuation, relative to the rest that the first one leaves


class Guess(NamedTuple):
    """`probabilities[i]` is the probability that the text goes through node i. It is at most that of its parent."""

    tree: DraftTree
    probabilities: tuple[float, ...]


def second_chance(hit_rate: float) -> float:
    """Return the likelihood of another continuation, if the first one is right with probability `hit_rate`."""
    return (1.0 - hit_rate) * _SECOND_CHOICE


def of_text(tree: DraftTree, hit_rate: float) -> Guess:
    """Return the guess of a tree that an index proposes, if its next token is right with probability `hit_rate`."""
    probabilities: list[float] = []
    has_child: set[int] = set()
    for parent in tree.parents:
        before = probabilities[parent] if parent >= 0 else 1.0
        is_first = parent not in has_child
        has_child.add(parent)
        probabilities.append(before * (hit_rate if is_first else second_chance(hit_rate)))
    return Guess(tree, tuple(probabilities))


def of_heads(
    token_ids: Sequence[Sequence[int]],
    probabilities: Sequence[Sequence[float]],
    max_width: int,
    max_nodes: int,
) -> Guess | None:
    """Return the likeliest tree of the heads' candidates (Medusa, Cai et al. 2024), grown from the likeliest node on.

    Args:
      token_ids, probabilities: the candidates of each head, the likeliest first. The head is the depth in the tree.
    """
    nodes: list[int] = []
    parents: list[int] = []
    weights: list[float] = []
    # Likelihood, order of arrival, parent, depth, rank among the head's candidates.
    waiting: list[tuple[float, int, int, int, int]] = []
    count = 0

    def offer(before: float, parent: int, depth: int, rank: int) -> None:
        nonlocal count
        if depth < len(token_ids) and rank < min(max_width, len(token_ids[depth])):
            heappush(waiting, (-before * probabilities[depth][rank], count, parent, depth, rank))
            count += 1

    offer(1.0, -1, 0, 0)
    while waiting and len(nodes) < max_nodes:
        weight, _, parent, depth, rank = heappop(waiting)
        nodes.append(token_ids[depth][rank])
        parents.append(parent)
        weights.append(-weight)
        before = weights[parent] if parent >= 0 else 1.0
        offer(before, parent, depth, rank + 1)
        offer(-weight, len(nodes) - 1, depth + 1, 0)
    return Guess(DraftTree(tuple(nodes), tuple(parents)), tuple(weights)) if nodes else None


def of_ways(
    ways: Iterable[Sequence[int]],
    token_ids: Sequence[Sequence[int]],
    probabilities: Sequence[Sequence[float]],
    max_nodes: int,
) -> Guess | None:
    """Return a tree of a given shape (Medusa's choices) of the heads' candidates, the shallow nodes first.

    Args:
      ways: for each node, the rank of the candidate of each head on its path. Nodes of missing heads are left out.
      token_ids, probabilities: as for `of_heads`.
    """
    nodes: dict[tuple[int, ...], int] = {}
    weights: list[float] = []
    for way in sorted(ways, key=len):
        depth, rank = len(way) - 1, way[-1]
        if depth >= len(token_ids) or len(nodes) == max_nodes:
            break
        is_reached = depth == 0 or tuple(way[:-1]) in nodes
        if is_reached and rank < len(token_ids[depth]):
            before = weights[nodes[tuple(way[:-1])]] if depth else 1.0
            nodes[tuple(way)] = len(weights)
            weights.append(before * probabilities[depth][rank])
    if not nodes:
        return None
    trie = ((nodes.get(way[:-1], -1), token_ids[len(way) - 1][way[-1]]) for way in nodes)
    return Guess(DraftTree.of(trie), tuple(weights))


def merged(guesses: Iterable[Guess]) -> Guess:
    """Return one guess with the nodes of all, at least one. A shared node gets its highest likelihood."""
    nodes: dict[tuple[int, int], int] = {}  # parent and token → node
    weights: list[float] = []
    for guess in guesses:
        places: list[int] = []
        for token_id, parent, weight in zip(*guess.tree, guess.probabilities, strict=True):
            key = (places[parent] if parent >= 0 else -1, token_id)
            node = nodes.setdefault(key, len(nodes))
            places.append(node)
            if node == len(weights):
                weights.append(weight)
            else:
                weights[node] = max(weights[node], weight)
    return Guess(DraftTree.of(nodes), tuple(weights))


def discounted(guess: Guess, share: float) -> Guess:
    """Return the guess with all likelihoods multiplied by `share`, from 0 to 1."""
    return Guess(guess.tree, tuple(share * likelihood for likelihood in guess.probabilities))


def pruned(guess: Guess, least: float, max_nodes: int) -> Guess | None:
    """Return the `max_nodes` likeliest nodes of those at least as likely as `least`; None if there is none."""
    order = sorted(range(len(guess.probabilities)), key=lambda node: (-guess.probabilities[node], node))
    kept = sorted(node for node in order[:max_nodes] if guess.probabilities[node] >= least)
    if not kept:
        return None
    places = {node: place for place, node in enumerate(kept)}  # a parent is as likely and comes first, so it is kept
    places[-1] = -1
    token_ids, parents = guess.tree
    tree = DraftTree(tuple(token_ids[node] for node in kept), tuple(places[parents[node]] for node in kept))
    return Guess(tree, tuple(guess.probabilities[node] for node in kept))
