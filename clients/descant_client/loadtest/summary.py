"""The arithmetic from records to summaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from descant_client.loadtest.percentiles import Spread, spread_of
from descant_client.loadtest.record import Record

BASE, COLD, WARM = "base", "cold", "warm"

Kind = TypeVar("Kind", str, int)


class Objectives(msgspec.Struct, frozen=True):
    """The latency limits of a good request; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def are_met(self, record: Record) -> bool:
        """Return whether a request completed within every limit. A single token has no TPOT and so meets its limit."""
        if not record.is_completed:
            return False
        pairs = ((record.ttft_s, self.ttft_s), (record.tpot_s, self.tpot_s))
        return all(value is None or limit is None or value <= limit for value, limit in pairs)


class ErrorCount(msgspec.Struct, frozen=True):
    """The number of errors with one code, and the sentence of the first of them."""

    code: str
    num: int
    example: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of the measured requests of a test, or of a group of them. Latencies are of completed requests.

    The window is from the first arrival to the last end. Rates are over the window; those of a group are over the
    window of the whole test, so that the groups add up.
    """

    num_requests: int
    num_completed: int
    num_failed: int
    num_unfinished: int  # the test ended first
    window_s: float
    requests_per_s: float  # completed requests
    output_tokens_per_s: float  # all tokens received, those of failed requests included
    num_output_tokens: int
    num_cached_tokens: int  # of prompts, from the prefix cache
    num_preemptions: int
    tokens_per_delivery: float | None  # above 1, ITL is between chunks and not between tokens
    goodput_per_s: float | None  # requests within all objectives; None: the test has no objectives
    slo_attainment: float | None  # their share of all requests
    ttft_s: Spread | None
    tpot_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread | None
    queue_s: Spread | None  # in the server, until first scheduled
    lateness_s: Spread | None  # of sending, for all requests
    errors: list[ErrorCount]


def window_of(records: Sequence[Record]) -> float:
    """Return the seconds from the first arrival to the last end. An unfinished request ends at its last token."""
    if not records:
        return 0.0
    ends = [one.ended_s if one.ended_s is not None else (one.delivered_s or [one.sent_s])[-1] for one in records]
    return max(ends) - min(one.arrived_s for one in records)


def summarize(records: Sequence[Record], objectives: Objectives, window_s: float) -> Summary:
    """Return the summary of measured records, without those of the warm-up, over a window of `window_s` seconds."""
    completed = [one for one in records if one.is_completed]
    failed = [one for one in records if one.failure is not None]
    num_tokens = sum(one.num_output_tokens for one in records)
    num_deliveries = sum(len(one.delivered_s) for one in records)
    has_objectives = objectives != Objectives()
    num_good = sum(objectives.are_met(one) for one in records)
    return Summary(
        num_requests=len(records),
        num_completed=len(completed),
        num_failed=len(failed),
        num_unfinished=len(records) - len(completed) - len(failed),
        window_s=window_s,
        requests_per_s=_rate(len(completed), window_s),
        output_tokens_per_s=_rate(num_tokens, window_s),
        num_output_tokens=num_tokens,
        num_cached_tokens=sum(one.num_cached_tokens for one in records),
        num_preemptions=sum(one.num_preemptions for one in records),
        tokens_per_delivery=num_tokens / num_deliveries if num_deliveries else None,
        goodput_per_s=_rate(num_good, window_s) if has_objectives else None,
        slo_attainment=num_good / len(records) if has_objectives and records else None,
        ttft_s=spread_of(one.ttft_s for one in completed),
        tpot_s=spread_of(one.tpot_s for one in completed),
        itl_s=spread_of(gap for one in completed for gap in one.gaps_s()),
        e2e_s=spread_of(one.e2e_s for one in completed),
        queue_s=spread_of(one.queue_s for one in completed),
        lateness_s=spread_of(one.lateness_s for one in records),
        errors=_errors(failed),
    )


def adapter_class(record: Record) -> str:
    """Return `base` (no adapter), `cold` (the first request of the test for its adapter) or `warm` (any later one).

    A warm request may still wait for a load: the one that the cold request began, or one after an eviction.
    """
    if record.adapter is None:
        return BASE
    return COLD if record.is_first_use else WARM


def grouped(records: Sequence[Record], kind_of: Callable[[Record], Kind]) -> dict[Kind, list[Record]]:
    """Return the records by kind, kinds in ascending order."""
    return {
        kind: [one for one in records if kind_of(one) == kind] for kind in sorted({kind_of(one) for one in records})
    }


def _rate(amount: float, window_s: float) -> float:
    return amount / window_s if window_s > 0 else 0.0


def _errors(failed: Sequence[Record]) -> list[ErrorCount]:
    """Count errors by code, the most frequent first."""
    errors = [one.failure for one in failed if one.failure is not None]
    examples = dict(reversed(errors))
    return [ErrorCount(code, num, examples[code]) for code, num in Counter(code for code, _ in errors).most_common()]
