"""`NgramIndex`: what a sequence's own text suggests will come next, as a `DraftTree` for speculative decoding.

This is prompt lookup: where the last few tokens have occurred before, what followed then is a cheap guess at what
follows now. A guess costs no model and may be wrong; whoever verifies it keeps what is right. Where the occurrences
disagree, the guesses become branches of one tree, most recent first.

An n-gram is entered only once a token follows it. So the end of the text never matches itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice
from typing import NamedTuple

KEPT_OCCURRENCES = 4  # of an n-gram, the most recent ones


class DraftTree(NamedTuple):
    """Nodes in an order in which parents come first; parents[i] is the node before node i, -1 for the sequence's
    last known token."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]

    def beginning(self, num_nodes: int) -> DraftTree | None:
        """Return the tree of its first nodes; None if that is none."""
        return DraftTree(self.token_ids[:num_nodes], self.parents[:num_nodes]) if num_nodes > 0 else None


class NgramIndex:
    """Where each n-gram of a sequence's tokens has occurred; grows with it, never rescans."""

    def __init__(self, min_n: int, max_n: int) -> None:
        assert 1 <= min_n <= max_n, f"no n-gram is between {min_n} and {max_n} tokens long"
        self._lengths = range(max_n, min_n - 1, -1)
        self._tokens: list[int] = []
        self._last: list[tuple[int, ...]] = []  # the n-grams that the text ends with, the longest first
        self._followers: dict[tuple[int, ...], tuple[int, ...]] = {}  # positions just after an n-gram, last first

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far."""
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take the tokens that come next."""
        tokens, followers = self._tokens, self._followers
        for token in token_ids:
            end = len(tokens)
            for ngram in self._last:
                followers[ngram] = (end, *followers.get(ngram, ())[: KEPT_OCCURRENCES - 1])
            tokens.append(token)
            self._last = [tuple(tokens[-n:]) for n in self._lengths if n <= end + 1]

    def following(self) -> int | None:
        """Return the token that `propose` begins with; None if it has nothing to say."""
        starts = self._matches()
        return self._tokens[starts[0]] if starts else None

    def propose(self, max_depth: int, max_width: int, max_nodes: int) -> DraftTree | None:
        """Return what followed the longest known n-gram that the text ends with; None if there is none or no room.

        The first of at most `max_width` branches gets its nodes first; later ones get what is left of `max_nodes`.
        """
        if min(max_depth, max_width, max_nodes) < 1:
            return None
        nodes: dict[tuple[int, int], int] = {}
        num_branches = 0
        for start in self._matches():
            num_branches += grow(nodes, self._continuation(start, max_depth), max_nodes)
            if num_branches == max_width:
                break
        if not nodes:
            return None
        return DraftTree(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes))

    def _matches(self) -> tuple[int, ...]:
        """Return where the text went on after the longest n-gram that it also ends with, most recent first."""
        for ngram in self._last:
            if ngram in self._followers:
                return self._followers[ngram]
        return ()

    def _continuation(self, start: int, depth: int) -> Iterable[int]:
        """Return `depth` tokens from `start` on. Past the end of the text the copy reads itself, so it repeats."""
        return islice(cycle(self._tokens[start : start + depth]), depth)


def grow(nodes: dict[tuple[int, int], int], branch: Iterable[int], max_nodes: int) -> bool:
    """Merge a branch into a trie, which maps parent and token to a node, in order. Return whether it added any."""
    num_before = len(nodes)
    parent = -1
    for token in branch:
        node = nodes.get((parent, token))
        if node is None:
            if len(nodes) == max_nodes:
                break
            node = nodes[parent, token] = len(nodes)
        parent = node
    return len(nodes) > num_before
