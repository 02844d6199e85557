"""`Drafter`: guesses the next tokens of a sequence from its own text and from the draft heads of its adapter.

The reliability of guesses is measured on the text alone: each new token is compared with the guess for its position,
whether or not that guess was verified. So a text that begins to repeat itself is detected soon.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from descant.contract.plan import HeadCandidates, unpack_floats, unpack_ints
from descant.scheduling.speculation.guess import Guess, merged, of_heads, of_text, of_ways, pruned, second_chance
from descant.scheduling.speculation.ngram import NgramIndex
from descant_client.speculation import Speculation

_KEPT = 0.95  # share of the weight of earlier observations that is kept with each new token
_LEAST_RATE = 1e-6  # above 0, so that its logarithm exists
_MAX_AWAITED = 256  # first choices of heads that cannot be compared with the text yet
_NUM_LIKELIHOODS = 8  # of the likeliest nodes that are remembered
_NEW_SHARE = 0.2  # weight of the latest candidates in the average of likelihoods
_SILENT_LOOKS = 4  # looks at the text without a guess that make it wait for one token more,
_MAX_PATIENCE = 3  # up to this many more than one
AUTO = Speculation()


class TokenText(Protocol):
    """The part of a sequence that drafting reads."""

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and output."""
        ...

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the ids of positions `start` to `stop`."""
        ...


class _Record:
    """Ratio of hits to expected hits, in which older observations weigh less."""

    def __init__(self, hits: float, expected: float) -> None:
        self._hits, self._expected = hits, expected

    def add(self, hits: float, expected: float = 1.0) -> None:
        self._hits = _KEPT * self._hits + hits
        self._expected = _KEPT * self._expected + expected

    def drift(self) -> None:
        """Move a rate below 1 a little towards 1, so that bad experience fades."""
        if self._hits < self._expected:
            self.add(2.0 * (1.0 - _KEPT), 2.0 * (1.0 - _KEPT))

    @property
    def rate(self) -> float:
        return min(1.0, max(_LEAST_RATE, self._hits / self._expected))


class Drafter:
    """Guesses for one sequence, and counts the results of verified guesses."""

    def __init__(self, settings: Speculation = AUTO) -> None:
        self.settings = settings
        self.num_drafts = 0  # drafts that were verified
        self.num_drafted = 0  # tokens on the longest path through each
        self.num_accepted = 0  # tokens of drafts that became output: each is a step saved
        self._index = NgramIndex(settings.min_ngram, max(settings.min_ngram, settings.max_ngram))
        self._num_silent = 0  # consecutive looks at the text without a guess
        self._text_record = _Record(1.0, 2.0)
        self._candidates: tuple[int, list[list[int]], list[list[float]]] | None = None  # position; tokens by head
        self._awaited = deque[tuple[int, int, int, float]](maxlen=_MAX_AWAITED)  # position, head, token, likelihood
        self._head_records: list[_Record] = []
        self.head_likelihoods: list[float] = []  # of the likeliest nodes that heads propose, of late
        self._acceptance = _Record(2.0, 2.0)
        self._num_expected = 0.0  # expected number of accepted tokens of the draft in flight; 0: not to be compared

    def read(self, sequence: TokenText, max_tokens: int) -> int:
        """Read at most `max_tokens` tokens that the text has gained since the last call; return their number.

        After several reads without a guess, nothing is read until a few tokens are new: this takes less time.
        """
        num_tokens, index = sequence.num_tokens, self._index
        if self._awaited:
            self._judge_heads(sequence)
        self._acceptance.drift()
        if not self.settings.ngram:
            return 0
        known = index.num_tokens
        patience = min(self._num_silent // _SILENT_LOOKS, _MAX_PATIENCE)
        if num_tokens - known <= patience and not self.settings.always:
            return 0
        new = sequence.tokens(known, min(num_tokens, known + max_tokens))
        num_prompt = max(0, sequence.num_prompt_tokens - known)
        index.extend(new[:num_prompt])
        for token_id in new[num_prompt:]:
            is_hit = index.take(token_id)
            if is_hit is not None:
                self._text_record.add(is_hit)
        return len(new)

    def guess(self, sequence: TokenText, max_nodes: int, least: float = 0.0) -> Guess | None:
        """Return a guess of the next tokens; None if there is none, or the text is not completely read.

        Args:
          least: likelihood below which nodes may be left out.
        """
        max_nodes = min(max_nodes, self.settings.max_nodes)
        repeated = self._text_guess(sequence, max_nodes, least)
        proposed = self._heads_guess(sequence, max_nodes)
        if repeated is None or proposed is None:
            return repeated or proposed
        return pruned(merged((repeated, proposed)), 0.0, max_nodes)  # each alone may have `max_nodes`

    @property
    def acceptance_share(self) -> float:
        """Accepted tokens of recent drafts as a share of the expected ones, from 0 to 1."""
        return self._acceptance.rate

    def expect(self, num_tokens: float) -> None:
        """Set the expected number of accepted tokens of the draft to verify. 0: do not compare it with the result."""
        self._num_expected = num_tokens

    def heads_gain(self, least: float) -> float:
        """Return the expected tokens of the heads' latest nodes, less the cost of verifying them, `least` each."""
        share, likelihoods = self.acceptance_share, self.head_likelihoods or [1.0]
        return sum(max(0.0, share * likelihood - least) for likelihood in likelihoods)

    def share_head_likelihoods(self, known: list[float]) -> list[float]:
        """Return `head_likelihoods`. If no head has proposed anything yet, start from `known`."""
        self.head_likelihoods = self.head_likelihoods or known
        return self.head_likelihoods

    def take_candidates(self, position: int, candidates: HeadCandidates) -> None:
        """Keep the heads' proposals for the tokens from `position` on. They are void once the next token is known."""
        width = candidates.num_candidates
        try:
            ids, likelihoods = unpack_ints(candidates.token_ids), unpack_floats(candidates.probabilities)
        except ValueError:
            return
        is_whole = width > 0 and bool(ids) and len(ids) % width == 0 and len(ids) == len(likelihoods)
        if not is_whole or not all(0 <= likelihood <= 1 for likelihood in likelihoods):
            return  # of no use; only speed depends on them
        starts = range(0, len(ids), width)
        self._candidates = (
            position,
            [ids[at : at + width] for at in starts],
            [likelihoods[at : at + width] for at in starts],
        )
        self._head_records += [_Record(2.0, 2.0) for _ in range(len(self._head_records), len(starts))]
        self._awaited.extend((position + head, head, ids[at], likelihoods[at]) for head, at in enumerate(starts))
        guess = self._heads_tree(_NUM_LIKELIHOODS)
        nodes = guess.probabilities if guess is not None else ()
        latest = [*nodes, *[0.0] * _NUM_LIKELIHOODS][:_NUM_LIKELIHOODS]
        before = self.head_likelihoods or latest
        self.head_likelihoods = [old + _NEW_SHARE * (new - old) for old, new in zip(before, latest, strict=True)]

    def learn(self, depth: int, num_accepted: int) -> None:
        """Record a verified draft: the length of its longest path, and the number of accepted tokens.

        `on_gained` counts the accepted tokens that became output before the text ended.
        """
        self.num_drafts += 1
        self.num_drafted += depth
        if self._num_expected:
            self._acceptance.add(num_accepted, self._num_expected)
            self._num_expected = 0.0

    def on_gained(self, num_tokens: int) -> None:
        """Count tokens of a verified draft that became part of the output."""
        self.num_accepted += num_tokens

    def forget_text(self) -> None:
        """Free the text and the proposals of a finished sequence. The counts stay."""
        self._index = NgramIndex(1, 1)
        self._awaited.clear()
        self._candidates = None

    def _judge_heads(self, sequence: TokenText) -> None:
        """Compare earlier first choices of heads with the tokens that are known by now."""
        later: list[tuple[int, int, int, float]] = []
        for position, head, token_id, likelihood in self._awaited:
            if position < sequence.num_tokens:
                self._head_records[head].add([token_id] == sequence.tokens(position, position + 1), likelihood)
            else:
                later.append((position, head, token_id, likelihood))
        self._awaited.clear()
        self._awaited.extend(later)

    def _text_guess(self, sequence: TokenText, max_nodes: int, least: float) -> Guess | None:
        settings, rate = self.settings, self._text_record.rate
        if not settings.ngram or self._index.num_tokens < sequence.num_tokens:
            return None
        if rate < least:
            return None
        depth = settings.max_depth if least <= 0 or rate >= 1 else int(math.log(least) / math.log(rate))
        width = 1 if second_chance(rate) < least else settings.max_width
        tree = self._index.propose(min(settings.max_depth, depth), width, max_nodes)
        self._num_silent = 0 if tree is not None else self._num_silent + 1
        return None if tree is None else of_text(tree, rate)

    def _heads_guess(self, sequence: TokenText, max_nodes: int) -> Guess | None:
        is_of_now = self._candidates is not None and self._candidates[0] == sequence.num_tokens
        return self._heads_tree(max_nodes) if is_of_now else None

    def _heads_tree(self, max_nodes: int) -> Guess | None:
        """Return the latest proposals of the heads as a guess."""
        assert self._candidates is not None, "the heads have proposed something"
        _, ids, likelihoods = self._candidates
        ids, weighed = ids[: self.settings.max_depth], likelihoods[: self.settings.max_depth]
        if not self.settings.always:
            rates = [record.rate for record in self._head_records]
            weighed = [[rate * likelihood for likelihood in one] for rate, one in zip(rates, weighed, strict=False)]
        if self.settings.tree is not None:
            return of_ways(self.settings.tree, ids, weighed, max_nodes)
        return of_heads(ids, weighed, self.settings.max_width, max_nodes)


def depth_of(parents: Iterable[int]) -> int:
    """Return the number of nodes on the longest path through a tree."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths)
