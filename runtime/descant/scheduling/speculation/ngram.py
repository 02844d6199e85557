"""`NgramIndex`: guesses the next tokens of a text from the text itself, as a `DraftTree` for speculative decoding.

This is prompt lookup: if the last few tokens have occurred before, the tokens that followed then are a cheap guess at
the next ones. A guess runs no model and may be wrong; verification keeps the right part of it. If the occurrences
disagree, the guesses become branches of one tree, most recent first.

An n-gram is entered only once a token follows it, so the end of the text never matches itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice
from typing import NamedTuple

MAX_OCCURRENCES = 8  # of an n-gram that are used, the most recent ones
MAX_LENGTHS = 4  # lengths of n-grams that are kept: each takes some 100 bytes per token
TOKEN_BITS = 32


class DraftTree(NamedTuple):
    """A tree of tokens, parents first. `parents[i]` is the node before node i, -1 for the sequence's last token."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def of(cls, nodes: Iterable[tuple[int, int]]) -> DraftTree:
        """Return the tree with these nodes, at least one: the parent and the token of each, in order."""
        parents, token_ids = zip(*nodes, strict=True)
        return cls(token_ids, parents)

    def beginning(self, num_nodes: int) -> DraftTree | None:
        """Return the tree of the first `num_nodes` nodes; None if there are none."""
        return DraftTree(self.token_ids[:num_nodes], self.parents[:num_nodes]) if num_nodes > 0 else None


class NgramIndex:
    """The positions of each n-gram of a text. It grows with the text and never rescans it.

    N-grams and positions are integers: containers, one for each token of each sequence, would make every run of the
    garbage collector slow.
    """

    def __init__(self, min_n: int, max_n: int) -> None:
        assert 1 <= min_n <= max_n, f"no n-gram is between {min_n} and {max_n} tokens long"
        self._tokens: list[int] = []
        self._window = 0  # the last max_n tokens as one number, the last one lowest
        # Per length, the longest first: a mask for the window; the position after the latest occurrence of each n-gram;
        # and, for each such position, the position after the occurrence before, 0 if there is none.
        self._kinds: list[tuple[int, int, dict[int, int], list[int]]] = [
            (n, (1 << TOKEN_BITS * n) - 1, {}, []) for n in _lengths(min_n, max_n)
        ]

    @property
    def num_tokens(self) -> int:
        """Number of tokens taken so far."""
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append the next tokens of the text."""
        for token in token_ids:
            self.take(token)

    def take(self, token_id: int) -> bool | None:
        """Append the next token. Return whether `propose` would have begun with it; None if it had proposed nothing."""
        tokens, window = self._tokens, self._window
        end, found = len(tokens), 0
        for n, mask, latest, earlier in self._kinds:
            ngram = window & mask
            before = latest.get(ngram, 0)
            earlier.append(before)
            found = found or before
            if n <= end:
                latest[ngram] = end
        tokens.append(token_id)
        self._window = (window << TOKEN_BITS | token_id) & self._kinds[0][1]
        return tokens[found] == token_id if found else None

    def propose(self, max_depth: int, max_width: int, max_nodes: int) -> DraftTree | None:
        """Return the continuations of the longest known n-gram at the end; None if there is none, or no room.

        The first of at most `max_width` branches gets its nodes first; later ones get the rest of `max_nodes`.
        """
        if min(max_depth, max_width, max_nodes) < 1:
            return None
        nodes: dict[tuple[int, int], int] = {}
        num_branches = 0
        for start in self._matches():
            num_branches += _grow(nodes, self._continuation(start, max_depth), max_nodes)
            if num_branches == max_width:
                break
        return DraftTree.of(nodes) if nodes else None

    def _matches(self) -> list[int]:
        """Return the positions after earlier occurrences of the longest n-gram at the end, most recent first."""
        for n, mask, latest, earlier in self._kinds:
            position = latest.get(self._window & mask, 0) if n <= len(self._tokens) else 0
            starts: list[int] = []
            while position and len(starts) < MAX_OCCURRENCES:
                starts.append(position)
                position = earlier[position]
            if starts:
                return starts
        return []

    def _continuation(self, start: int, depth: int) -> Iterable[int]:
        """Return `depth` tokens from `start` on. Beyond the end of the text they repeat from `start`."""
        return islice(cycle(self._tokens[start : start + depth]), depth)


def _lengths(min_n: int, max_n: int) -> list[int]:
    """Return the lengths to keep, the longest first: all of the range, or `MAX_LENGTHS` spread over it."""
    most = min(MAX_LENGTHS, max_n - min_n + 1)
    return [max_n - round(i * (max_n - min_n) / max(1, most - 1)) for i in range(most)]


def _grow(nodes: dict[tuple[int, int], int], branch: Iterable[int], max_nodes: int) -> bool:
    """Merge a branch into a trie, which maps parent and token to a node. Return whether it added any node."""
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
