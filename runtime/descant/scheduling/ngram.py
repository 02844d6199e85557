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


class NgramIndex:
    """Where each n-gram of a sequence's tokens has occurred; grows with it, never rescans."""

    def __init__(self, min_n: int, max_n: int) -> None:
        assert 1 <= min_n <= max_n, f"no n-gram is between {min_n} and {max_n} tokens long"
        self._lengths = range(min_n, max_n + 1)
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], tuple[int, ...]] = {}  # positions just after an n-gram, last first

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far."""
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take the tokens that come next."""
        for token in token_ids:
            self._enter(len(self._tokens))
            self._tokens.append(token)

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

    def _enter(self, end: int) -> None:
        """Enter the n-grams that end just before position `end`."""
        for n in self._lengths:
            if n > end:
                break
            ngram = tuple(self._tokens[end - n : end])
            self._followers[ngram] = (end, *self._followers.get(ngram, ())[: KEPT_OCCURRENCES - 1])

    def _matches(self) -> tuple[int, ...]:
        """Return where the text went on after the longest n-gram that it also ends with, most recent first."""
        end = len(self._tokens)
        for n in reversed(self._lengths):
            if n <= end and (starts := self._followers.get(tuple(self._tokens[end - n :]))):
                return starts
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
