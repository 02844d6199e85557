"""Arrival processes: those of an open loop, and the closed loop.

An open loop sends on a schedule drawn beforehand, independent of the server. A process yields the gaps before requests,
in seconds; the first gap comes before the first request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from random import Random

import msgspec

from descant_client.errors import ConfigInvalid

# Beyond these the arithmetic of gaps leaves the range of floats.
MIN_RATE = 1e-6  # per second
MIN_CV, MAX_CV = 1e-3, 1e3


class Gamma(msgspec.Struct, frozen=True, tag=True):
    """Gamma-distributed gaps: `rate` requests per second on average, coefficient of variation `cv`.

    cv 1 is a Poisson process, a larger cv is burstier. The shape is 1/cv² and the scale cv²/rate, as in S-LoRA's
    traces; vLLM's `--burstiness` is the shape.
    """

    rate: float
    cv: float = 1.0

    def gaps_s(self, rng: Random) -> Iterator[float]:
        """Yield gaps without end."""
        shape, scale = 1.0 / self.cv**2, self.cv**2 / self.rate
        while True:
            yield rng.gammavariate(shape, scale)


class Steady(msgspec.Struct, frozen=True, tag=True):
    """Equal gaps of 1/`rate` seconds."""

    rate: float

    def gaps_s(self, rng: Random) -> Iterator[float]:
        """Yield gaps without end."""
        return repeat(1.0 / self.rate)


class AtOnce(msgspec.Struct, frozen=True, tag=True):
    """All requests at the start."""

    def gaps_s(self, rng: Random) -> Iterator[float]:
        """Yield gaps without end."""
        return repeat(0.0)


class Closed(msgspec.Struct, frozen=True, tag=True):
    """The closed loop: `concurrency` requests in flight; the next one is sent when one ends.

    There is no schedule: a request arrives when it is sent, so a slow server gets fewer requests.
    """

    concurrency: int

    def gaps_s(self, rng: Random) -> Iterator[float]:
        """Yield gaps without end."""
        return repeat(0.0)


Arrivals = Gamma | Steady | AtOnce | Closed


def arrivals_of(rate: float, cv: float = 1.0) -> Arrivals:
    """Return the process of a rate and a coefficient of variation: steady for cv 0, all at once for rate infinity."""
    if rate == math.inf:
        return AtOnce()
    return Gamma(rate, cv) if cv else Steady(rate)


def check_arrivals(arrivals: Arrivals) -> None:
    """Check the numbers of a process. Raises ConfigInvalid, which states the valid range."""
    match arrivals:
        case Gamma(rate, _) | Steady(rate) if not MIN_RATE <= rate < math.inf:
            reason = f"{rate:g} is not a number of requests per second above 0, from {MIN_RATE:g} (or inf)."
            raise ConfigInvalid("rate", reason)
        case Gamma(_, cv) if not MIN_CV <= cv <= MAX_CV:
            reason = f"{cv:g} is no coefficient of variation: 1 is Poisson, 0 steady, 4 bursty, {MAX_CV:g} the most."
            raise ConfigInvalid("cv", reason)
        case Closed(concurrency) if concurrency < 1:
            raise ConfigInvalid("concurrency", f"{concurrency} requests in flight; at least 1 is needed.")
        case _:
            return
