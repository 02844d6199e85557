"""`Drafter`: what a sequence may say next, guessed from what it has said, and whether guessing pays.

A draft is verified beside the sequence's last token, at the price of its nodes in the step's products. So its depth
follows what was accepted: twice as deep after a draft that came true as a whole, no deeper than what came true plus one
after any other. Drafts that come to nothing make pauses, each twice as long as the one before, until one comes true.
"""

from __future__ import annotations

from typing import Protocol

from descant.scheduling.ngram import DraftTree, NgramIndex

MIN_NGRAM, MAX_NGRAM = 2, 4  # tokens that must have been said before for what followed them to be guessed again
MAX_WIDTH = 2  # continuations that differ
FIRST_DEPTH, MAX_DEPTH = 4, 16
MAX_PAUSE = 64  # steps


class Spoken(Protocol):
    """A sequence, as far as drafting goes."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        ...

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the ids of positions `start` to `stop`."""
        ...


class Drafter:
    """Guesses for one sequence, by looking up its last tokens in its own text (Saxena 2023, prompt lookup)."""

    def __init__(self) -> None:
        self.num_drafted = 0  # depth of all drafts that were verified
        self.num_accepted = 0  # tokens of drafts that came true: each is a step saved
        self._index = NgramIndex(MIN_NGRAM, MAX_NGRAM)
        self._depth = FIRST_DEPTH
        self._pause = 0  # steps without a draft after one that came to nothing
        self._num_steps_left = 0  # of the present pause

    def draft(self, sequence: Spoken, max_nodes: int) -> DraftTree | None:
        """Return a guess of at most `max_nodes` nodes; None: there is none, or it would not pay."""
        self._index.extend(sequence.tokens(self._index.num_tokens, sequence.num_tokens))
        if self._num_steps_left:
            self._num_steps_left -= 1
            return None
        return self._index.propose(self._depth, MAX_WIDTH, max_nodes)

    def learn(self, depth: int, num_accepted: int) -> None:
        """A draft of so many tokens was verified, and so many of them came true."""
        self.num_drafted += depth
        self.num_accepted += num_accepted
        if num_accepted == depth:
            self._depth = min(MAX_DEPTH, 2 * self._depth)
        else:
            self._depth = num_accepted + 1
        self._pause = 0 if num_accepted else min(MAX_PAUSE, 2 * self._pause or 1)
        self._num_steps_left = self._pause


def depth_of(tree: DraftTree) -> int:
    """Return the number of nodes on the longest way through a tree."""
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths)
