"""When requests arrive: processes of an open loop, and the closed loop.

An open loop sends on a schedule drawn beforehand, whatever the server does. Each process yields the gaps, in seconds,
before each request; the first gap comes before the first request.
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

    cv 1 is a Poisson process, larger is burstier (shape 1/cv², scale cv²/rate, as in S-LoRA's traces and vLLM's
    `--burstiness`, which is 1/cv²).
    """

    rate: float
    cv: float = 1.0

    def gaps(self, rng: Random) -> Iterator[float]:
        """Yield gaps without end."""
        shape, scale = 1.0 / self.cv**2, self.cv**2 / self.rate
        while True:
            yield rng.gammavariate(shape, scale)


class Steady(msgspec.Struct, frozen=True, tag=True):
    """Equal gaps of 1/`rate` seconds."""

    rate: float

    def gaps(self, rng: Random) -> Iterator[float]:
        """Yield gaps without end."""
        return repeat(1.0 / self.rate)


class AtOnce(msgspec.Struct, frozen=True, tag=True):
    """Every request at the start."""

    def gaps(self, rng: Random) -> Iterator[float]:
        """Yield gaps without end."""
        return repeat(0.0)


class Closed(msgspec.Struct, frozen=True, tag=True):
    """The closed loop: `concurrency` requests in flight; each that ends lets the next one start.

    There is no schedule: a request arrives when it is sent, so a slow server is also asked for less.
    """

    concurrency: int

    def gaps(self, rng: Random) -> Iterator[float]:
        """Yield gaps without end."""
        return repeat(0.0)


Arrivals = Gamma | Steady | AtOnce | Closed


def arrivals_of(rate: float, cv: float = 1.0) -> Arrivals:
    """Return the process of a rate and a coefficient of variation: cv 0 is steady, an infinite rate all at once."""
    if rate == math.inf:
        return AtOnce()
    return Gamma(rate, cv) if cv else Steady(rate)


def check_arrivals(arrivals: Arrivals) -> None:
    """Check the numbers of a process. Raises ConfigInvalid, which says what is right."""
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
