"""Distributions of requests over adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import cycle
from random import Random

import msgspec

from descant_client.errors import ConfigInvalid


class PowerLaw(msgspec.Struct, frozen=True, tag=True):
    """S-LoRA's power law: of n adapters in order, P(one of the first k) = (k/n)^alpha.

    alpha 1 is uniform; a smaller alpha favors the first adapters (of 200 adapters, the first gets 20 % at 0.3 and 59 %
    at 0.1). The draw is that of `benchmarks/trace.py` of S-LoRA: floor(n * u^(1/alpha)) of a uniform u.
    """

    alpha: float = 1.0

    def choices(self, num_adapters: int, rng: Random) -> Iterator[int]:
        """Yield positions below `num_adapters` without end."""
        exponent, last = 1.0 / self.alpha, num_adapters - 1
        while True:
            yield min(last, int(num_adapters * rng.random() ** exponent))  # rounding may make the power 1


class Distinct(msgspec.Struct, frozen=True, tag=True):
    """Each adapter in turn, so that requests for one adapter are as far apart as possible."""

    def choices(self, num_adapters: int, rng: Random) -> Iterator[int]:
        """Yield positions below `num_adapters` without end."""
        return cycle(range(num_adapters))


Popularity = PowerLaw | Distinct


def check_popularity(popularity: Popularity) -> None:
    """Check the exponent of a power law. Raises ConfigInvalid, which states the valid range."""
    if isinstance(popularity, PowerLaw) and not 0 < popularity.alpha < math.inf:
        reason = f"{popularity.alpha:g} is no exponent: 1 is uniform, towards 0 the first adapter gets everything."
        raise ConfigInvalid("alpha", reason)


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that match a shell pattern such as `demo-*`, in their order.

    Raises:
        ConfigInvalid: no name matches.
    """
    fitting = [name for name in names if fnmatchcase(name, pattern)]
    if not fitting:
        known = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ConfigInvalid("adapter-pattern", f"{pattern!r} fits none of the server's adapters ({known or 'none'}).")
    return fitting
