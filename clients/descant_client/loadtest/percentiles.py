"""Percentiles, defined once: linear interpolation between the two closest ranks.

Of n values in order, x_0 to x_(n-1), the q-th percentile lies at position p = q/100 * (n-1): x_p where p is whole,
else on the straight line between its neighbors. NumPy's default, and `statistics.quantiles(method="inclusive")`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """A sample in short; durations are seconds."""

    num: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def percentile(ordered: Sequence[float], q: float) -> float:
    """Return the q-th percentile, 0 <= q <= 100, of values in ascending order, of which there is at least one."""
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
