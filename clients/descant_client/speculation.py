"""The settings of speculative decoding: `Speculation`. They change the speed of an answer, never a token of it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from descant_client.wire import Strict

AdapterName = Annotated[str, msgspec.Meta(min_length=1)]
NgramLength = Annotated[int, msgspec.Meta(ge=1, le=16)]
MAX_WIDTH = 8
MAX_DEPTH = 32
MAX_NODES = 64
Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_WIDTH)]
Way = Annotated[list[Rank], msgspec.Meta(min_length=1, max_length=MAX_DEPTH)]
"""A node of a draft tree, given by its path: for each head on it, the rank of a candidate, 0 for the likeliest."""


class Speculation(Strict, frozen=True):
    """Sources of drafts, and limits of the draft verified in one step.

    With `ngram`, drafts are tokens that followed an earlier occurrence of the text's last `max_ngram` to `min_ngram`
    tokens (of more than four lengths, four spread over the range). With `heads`, drafts come from draft heads: those of
    the adapter that `heads` names, else those of the request's adapter; for the base, those that the server's
    configuration names. Each step verifies the part of its draft that is expected to save time, by the acceptance of
    earlier drafts and the measured cost of steps. With `always`, every draft is verified whole, regardless of cost.
    """

    ngram: bool = True
    min_ngram: NgramLength = 2
    max_ngram: NgramLength = 4
    heads: bool | AdapterName = True
    max_depth: Annotated[int, msgspec.Meta(ge=1, le=MAX_DEPTH)] = 16  # drafted tokens one after the other
    max_width: Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)] = 2  # drafted tokens for one position
    max_nodes: Annotated[int, msgspec.Meta(ge=1, le=MAX_NODES)] = 64  # drafted tokens of one step
    # Medusa's choices: the tree made of the heads' candidates, regardless of their likelihoods and of max_width.
    # None: the likeliest tree.
    tree: Annotated[list[Way], msgspec.Meta(min_length=1, max_length=MAX_NODES)] | None = None
    always: bool = False

    def contradiction(self) -> str | None:
        """Return a sentence about a contradiction between the fields; None if there is none."""
        if self.min_ngram > self.max_ngram:
            return "min_ngram is greater than max_ngram."
        known = {(), *map(tuple, self.tree or ())}
        for way in self.tree or ():
            if tuple(way[:-1]) not in known:
                return f"tree has {way} and not {way[:-1]}, which leads there."
        if self.tree is not None and len(known) <= len(self.tree):
            return "tree has a way twice."
        return None

    @property
    def num_candidates(self) -> int:
        """Number of candidates that each draft head has to propose."""
        return self.max_width if self.tree is None else 1 + max(map(max, self.tree))


SpeculationChoice = Literal["off", "auto"] | Speculation
"""`auto` is the server's configured choice, and `Speculation()` if that is `off` or `auto`."""


def named_heads(choice: SpeculationChoice | None) -> str | None:
    """Return the name of the adapter in `heads`; None if it names none."""
    heads = choice.heads if isinstance(choice, Speculation) else False
    return heads if isinstance(heads, str) else None
