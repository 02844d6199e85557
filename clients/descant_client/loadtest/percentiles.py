"""Percentiles by linear interpolation between the two closest ranks.

Of n values in order, x_0 to x_(n-1), the q-th percentile is at position p = q/100 * (n-1): x_p if p is whole, else
interpolated linearly between the neighbors of p. This is NumPy's default, and
`statistics.quantiles(method="inclusive")`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """Size, mean, percentiles and maximum of a sample. Durations are in seconds."""

    num: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def percentile(ordered: Sequence[float], q: float) -> float:
    """Return the q-th percentile, 0 <= q <= 100, of at least one value. The values are in ascending order."""
    position = q / 100 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Return the spread of the values that are not None; None if there are none."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p90, p95, p99 = (percentile(ordered, q) for q in (50, 90, 95, 99))
    return Spread(len(ordered), statistics.fmean(ordered), p50, p90, p95, p99, ordered[-1])
