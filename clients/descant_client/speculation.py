"""How far a request may run ahead of itself: `Speculation`. It makes answers come sooner and never changes a token."""

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
"""A node of a tree: of each head on the way to it, which of its candidates, 0 for the likeliest."""


class Speculation(Strict, frozen=True):
    """What is guessed and how much of it is verified in one step.

    Guesses come from the text itself (what followed when its last `max_ngram` to `min_ngram` tokens stood in it
    before; of a wide range, four lengths) and from draft heads: those of the adapter that `heads` names, else those of
    the request's adapter, for the base those that the server names. What is worth verifying is decided step by step, by
    how often guesses came true and what steps took; with `always` every guess is verified at any cost.
    """

    ngram: bool = True
    min_ngram: NgramLength = 2
    max_ngram: NgramLength = 4
    heads: bool | AdapterName = True
    max_depth: Annotated[int, msgspec.Meta(ge=1, le=MAX_DEPTH)] = 16  # tokens guessed one after the other
    max_width: Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)] = 2  # guesses for one place
    max_nodes: Annotated[int, msgspec.Meta(ge=1, le=MAX_NODES)] = 64  # guessed tokens of one step
    # Medusa's choices: what is made of the heads' candidates, whatever their likelihoods and max_width; None: the
    # likeliest tree.
    tree: Annotated[list[Way], msgspec.Meta(min_length=1, max_length=MAX_NODES)] | None = None
    always: bool = False

    def contradiction(self) -> str | None:
        """Return what cannot be in it; None: it is sound."""
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
        """How many candidates of each head it has a use for."""
        return self.max_width if self.tree is None else 1 + max(map(max, self.tree))


SpeculationChoice = Literal["off", "auto"] | Speculation
"""`auto` is what the server's configuration says, and `Speculation()` if that is `off` or `auto` itself."""


def named_heads(choice: SpeculationChoice | None) -> str | None:
    """Return the adapter whose draft heads are named, if any is."""
    heads = choice.heads if isinstance(choice, Speculation) else False
    return heads if isinstance(heads, str) else None
