"""Distributions of the lengths of prompts and answers in tokens, and their notation on the command line."""

from __future__ import annotations

import math
from random import Random

import msgspec

from descant_client.errors import ConfigInvalid

_FORMS = "N, uniform:LOW:HIGH or lognormal:MEDIAN,SIGMA[,MAX]; such as 128, uniform:8:64 or lognormal:32,0.5,256"

MAX_TOKENS = 1 << 20  # beyond any model's context
MAX_SIGMA = 10.0


class Constant(msgspec.Struct, frozen=True, tag=True):
    """Always `num_tokens`."""

    num_tokens: int

    def draw(self, rng: Random) -> int:
        """Draw a number of tokens, at least 1."""
        return self.num_tokens


class Uniform(msgspec.Struct, frozen=True, tag=True):
    """Every whole number from `low` to `high`, both included, with equal probability."""

    low: int
    high: int

    def draw(self, rng: Random) -> int:
        """Draw a number of tokens, at least 1."""
        return rng.randint(self.low, self.high)


class Lognormal(msgspec.Struct, frozen=True, tag=True):
    """`median` times e to the power of a normal variable of deviation `sigma`, rounded, at least 1, at most `maximum`.

    A larger value becomes `maximum`. None: `MAX_TOKENS`.
    """

    median: float
    sigma: float
    maximum: int | None = None

    def draw(self, rng: Random) -> int:
        """Draw a number of tokens, at least 1."""
        drawn = max(1, round(rng.lognormvariate(math.log(self.median), self.sigma)))
        return min(drawn, MAX_TOKENS if self.maximum is None else self.maximum)


Lengths = Constant | Uniform | Lognormal


def parse_lengths(text: str, key: str) -> Lengths:
    """Return the distribution described by `text`, such as `uniform:8:64`.

    Raises:
        ConfigInvalid: the text or a number in it is not valid. The error names `key` and states the valid forms.
    """
    lengths = _parse(text)
    if lengths is None:
        raise ConfigInvalid(key, f"{text!r} is no distribution of lengths; give {_FORMS}.")
    check_lengths(lengths, key)
    return lengths


def check_lengths(lengths: Lengths, key: str) -> None:
    """Check the numbers of a distribution. Raises ConfigInvalid at `key`."""
    match lengths:
        case Constant(num_tokens) if not 1 <= num_tokens <= MAX_TOKENS:
            raise ConfigInvalid(key, f"{num_tokens} tokens; at least 1 is needed, and at most {MAX_TOKENS}.")
        case Uniform(low, high) if not 1 <= low <= high <= MAX_TOKENS:
            raise ConfigInvalid(key, f"uniform:{low}:{high} needs 1 <= LOW <= HIGH <= {MAX_TOKENS}.")
        case Lognormal(median, sigma, _) if not (1 <= median <= MAX_TOKENS and 0 <= sigma <= MAX_SIGMA):
            reason = f"needs a median from 1 to {MAX_TOKENS} and a sigma from 0 to {MAX_SIGMA:g}."
            raise ConfigInvalid(key, f"lognormal:{median:g},{sigma:g} {reason}")
        case Lognormal(_, _, int(maximum)) if maximum > MAX_TOKENS:
            raise ConfigInvalid(key, f"lognormal: the maximum {maximum} is above {MAX_TOKENS}.")
        case Lognormal(median, _, int(maximum)) if maximum < median:
            raise ConfigInvalid(key, f"lognormal: the maximum {maximum} is below the median {median:g}.")
        case _:
            return


def _parse(text: str) -> Lengths | None:
    kind, colon, rest = text.partition(":")
    try:
        match kind, rest.split(":" if kind == "uniform" else ","):
            case _, _ if not colon:
                return Constant(int(text))
            case "constant", [num_tokens]:
                return Constant(int(num_tokens))
            case "uniform", [low, high]:
                return Uniform(int(low), int(high))
            case "lognormal", [median, sigma]:
                return Lognormal(float(median), float(sigma))
            case "lognormal", [median, sigma, maximum]:
                return Lognormal(float(median), float(sigma), int(maximum))
            case _:
                return None
    except ValueError:
        return None
