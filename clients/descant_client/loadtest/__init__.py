"""An open-loop load generator over the client: requests drawn from a seed, latencies, a report.

`await run(clients, Plan(...))` returns a `Report`. TTFT and end-to-end time count from the scheduled arrival. They so
include the delay of requests that the generator sends late, which is also reported by itself, as lateness.
"""

from __future__ import annotations

from descant_client.loadtest.plan import Plan
from descant_client.loadtest.report import Report, decode_report, encode_report
from descant_client.loadtest.runner import run

__all__ = ["Plan", "Report", "decode_report", "encode_report", "run"]
