"""A load test in a terminal: its totals while it runs, and its report as tables."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from descant_client.loadtest.percentiles import Spread, percentile
from descant_client.loadtest.record import Tally
from descant_client.loadtest.report import Report
from descant_client.loadtest.summary import Summary
from descant_client.terminal import printable

_REFRESH_S = 0.25


@asynccontextmanager
async def showing(
    tally: Tally, console: Console, *, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[None]:
    """Show the totals of a test for the length of the block. Show nothing on a console that is no terminal."""
    if not console.is_terminal:
        yield
        return
    async with anyio.create_task_group() as tasks:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            tasks.start_soon(_refresh, live, tally, clock)
            yield
            tasks.cancel_scope.cancel()


def status_line(tally: Tally, elapsed_s: float) -> str:
    """Return one line about a running test. Sorts `tally.ttfts_s` in place, so that the next sort is cheap."""
    tally.ttfts_s.sort()
    ttft = ""
    if tally.ttfts_s:
        p50, p99 = (1000 * percentile(tally.ttfts_s, q) for q in (50, 99))
        ttft = f" · TTFT p50 {p50:.0f} ms p99 {p99:.0f} ms"
    rate = tally.num_tokens / elapsed_s if elapsed_s > 0 else 0.0
    return (
        f"{elapsed_s:.0f} s · sent {tally.num_sent}/{tally.num_planned} · in flight {tally.num_in_flight} · "
        f"done {tally.num_completed} · errors {tally.num_failed} · {rate:.0f} tokens/s{ttft}"
    )


def print_report(report: Report, console: Console) -> None:
    """Print a report without its records."""
    summary = report.summary
    if not report.is_complete:
        console.print("Interrupted: these are the results until then.", style="bold red")
    for line in _lines(report):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    console.print(_latencies(summary))
    groups = [(one.name, one.summary) for one in report.adapter_classes]
    groups += [(f"key {one.key}", one.summary) for one in report.keys]
    if len(groups) > 1:
        console.print(_groups(groups))
    for error in summary.errors:
        line = Text(f"{error.num} × {printable(error.code)}", style="bold red")
        console.print(line.append(f"  {printable(error.example)}", style="not bold default"), soft_wrap=True)


async def _refresh(live: Live, tally: Tally, clock: Callable[[], float]) -> None:
    began_s = clock()
    while True:
        live.update(Text(status_line(tally, clock() - began_s)), refresh=True)
        await anyio.sleep(_REFRESH_S)


def _lines(report: Report) -> list[str]:
    summary, model = report.summary, report.server.model
    lines = [
        f"{report.server.server} with {model.id} on {model.device} ({model.dtype}), seed {report.plan.seed}, "
        f"workload {report.workload.digest[:12]}",
        f"{summary.num_completed} of {summary.num_requests} measured requests completed in {summary.window_s:.2f} s: "
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output tokens/s",
    ]
    if summary.goodput_per_s is not None and summary.slo_attainment is not None:
        share = 100 * summary.slo_attainment
        lines.append(f"goodput {summary.goodput_per_s:.2f} requests/s, {share:.1f} % within the objectives")
    return lines


def _latencies(summary: Summary) -> Table:
    table = Table("ms", *("mean", "p50", "p90", "p95", "p99", "max"))
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "TTFT": summary.ttft_s,
        "TPOT": summary.tpot_s,
        "ITL": summary.itl_s,
        "end to end": summary.e2e_s,
        "queue": summary.queue_s,
        "lateness": summary.lateness_s,
    }
    for label, spread in rows.items():
        table.add_row(label, *(_cells(spread) if spread else ["–"] * 6))
    return table


def _cells(spread: Spread) -> list[str]:
    values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max)
    return [f"{1000 * value:.2f}" for value in values]


def _groups(groups: list[tuple[str, Summary]]) -> Table:
    table = Table("requests", "sent", "failed", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, summary in groups:
        ttft, tpot = summary.ttft_s, summary.tpot_s
        latencies = (ttft and ttft.p50, ttft and ttft.p99, tpot and tpot.p50)
        cells = ["–" if value is None else f"{1000 * value:.2f}" for value in latencies]
        rate = f"{summary.output_tokens_per_s:.1f}"
        table.add_row(label, str(summary.num_requests), str(summary.num_failed), rate, *cells)
    return table
