"""How far a request may run ahead of itself: `Speculation`. It makes answers come sooner and never changes a token."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from descant_client.wire import Strict

AdapterName = Annotated[str, msgspec.Meta(min_length=1)]
NgramLength = Annotated[int, msgspec.Meta(ge=1, le=16)]


class Speculation(Strict, frozen=True):
    """What is guessed and how much of it is verified in one step.

    Guesses come from the text itself (what followed when its last `max_ngram` to `min_ngram` tokens stood in it
    before) and from draft heads: those of the adapter that `heads` names, else those of the request's adapter, for the
    base those that the server names. What is worth verifying is decided step by step, by how often guesses came true
    and what steps took; with `always` every guess is verified at any cost.
    """

    ngram: bool = True
    min_ngram: NgramLength = 2
    max_ngram: NgramLength = 4
    heads: bool | AdapterName = True
    max_depth: Annotated[int, msgspec.Meta(ge=1, le=32)] = 16  # tokens guessed one after the other
    max_width: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2  # guesses for one place
    max_nodes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 64  # guessed tokens of one step
    always: bool = False

    def contradiction(self) -> str | None:
        """Return what cannot be in it; None: it is sound."""
        return "min_ngram is greater than max_ngram." if self.min_ngram > self.max_ngram else None


SpeculationChoice = Literal["off", "auto"] | Speculation
"""`auto` is what the server's configuration says, and `Speculation()` if that is `off` or `auto` itself."""
