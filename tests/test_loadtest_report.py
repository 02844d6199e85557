"""From records to numbers: percentiles, latencies, rates, groups, errors, and the report file."""

from __future__ import annotations

import io
import statistics
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from descant_client.loadtest.percentiles import percentile, spread_of
from descant_client.loadtest.plan import Plan
from descant_client.loadtest.record import Record, Recorder, Tally
from descant_client.loadtest.report import Report, build_report, decode_report, encode_report
from descant_client.loadtest.summary import Objectives, adapter_class, summarize, window_of
from descant_client.loadtest.view import print_report, showing, status_line
from descant_client.loadtest.workload import PlannedRequest, draw_workload
from descant_client.protocol import (
    Accepted,
    ChoiceEnd,
    Delta,
    Done,
    Hello,
    Limits,
    ModelInfo,
    Progress,
    ServerMessage,
    Usage,
)
from descant_client.timings import Timings

HELLO = Hello(
    "1.0", "descant/9", "secret-session", [], Limits(1, 1, 1, 1.0), ModelInfo("m", 512, 264, "float32", "cpu")
)
values = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60)


def answered(index: int, arrived_s: float, delivered_s: list[float], **changes: Any) -> Record:
    """Return the record of a request sent 0.5 s late and answered in full, one token per delivery, with `changes`."""
    fields = {
        "index": index,
        "arrived_s": arrived_s,
        "sent_s": arrived_s + 0.5,
        "accepted_s": arrived_s + 0.6,
        "delivered_s": delivered_s,
        "delivered_tokens": [1] * len(delivered_s),
        "num_output_tokens": len(delivered_s),
        "ended_s": delivered_s[-1] + 0.25,
        "queue_s": 0.125,
        "finish_reason": "length",
    }
    return Record(**(fields | changes))


def failed(index: int, arrived_s: float, code: str = "adapter_not_found", **changes: Any) -> Record:
    return Record(
        index=index,
        arrived_s=arrived_s,
        sent_s=arrived_s,
        ended_s=arrived_s + 1,
        error_code=code,
        error=f"sentence {index}",
        **changes,
    )


# ---- percentiles ---------------------------------------------------------------------------------------------------


@given(values)
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    ordered = sorted(values)
    expected = statistics.quantiles(values, n=100, method="inclusive")

    assert [percentile(ordered, q) for q in range(1, 100)] == pytest.approx(expected, abs=1e-6)
    assert (percentile(ordered, 0), percentile(ordered, 100)) == (ordered[0], ordered[-1])


def test_a_spread_says_everything_about_a_sample_and_none_about_no_sample() -> None:
    spread = spread_of([None, *range(100, -1, -1), None])

    assert spread is not None
    assert msgspec.structs.astuple(spread) == (101, 50, 50, 90, 95, 99, 100)
    assert spread_of([None]) is None
    alone = spread_of([7.0])
    assert alone is not None
    assert set(msgspec.structs.astuple(alone)[1:]) == {7.0}


# ---- one request ---------------------------------------------------------------------------------------------------


def test_latencies_count_from_the_scheduled_arrival_and_gaps_between_deliveries() -> None:
    record = answered(0, 10.0, [12.0, 12.5, 14.0], delivered_tokens=[1, 3, 1], num_output_tokens=5)

    assert (record.ttft_s, record.e2e_s, record.lateness_s) == (2.0, 4.25, 0.5)
    assert record.tpot_s == 2.0 / 4
    assert record.gaps_s() == [0.5, 1.5]


def test_a_single_token_has_no_time_per_token_and_no_gap() -> None:
    record = answered(0, 0.0, [1.0])

    assert (record.tpot_s, record.gaps_s()) == (None, [])


def test_a_recorder_notes_each_delivery_once_and_only_those_with_tokens() -> None:
    tally, now = Tally(), iter(range(1, 100))
    recorder = Recorder(PlannedRequest(3, 0.0, "x", 4, "a", 1, 9), 0.0, True, tally, lambda: float(next(now)))
    end = Done("r", 9, [ChoiceEnd(0, "length", 4)], Usage(7, 4, 2), Timings(0.5, 1.0, 2.0, num_preemptions=3))
    heard: list[ServerMessage] = [
        Progress("r", "preparing_adapter"),  # received at 2; the request was sent at 1
        Accepted("r", 9, 7),
        Delta("r", 0, 0, "", [1]),
        Delta("r", 0, 1, "text alone", []),
        Delta("r", 0, 1, "bc", [2, 3]),
        Accepted("r", 9, 7),  # a reconnect repeats it
        Delta("r", 0, 0, "a", [1]),
        Delta("r", 0, 3, "d", [4]),
        end,
    ]

    recorder.on_sent()
    for message in heard:
        recorder.on_message(message)
    recorder.on_answered()

    assert recorder.record(is_warmup=True) == Record(
        index=3,
        arrived_s=0.0,
        sent_s=1.0,
        adapter="a",
        key=1,
        is_warmup=True,
        is_first_use=True,
        accepted_s=3.0,
        ended_s=10.0,
        delivered_s=[4.0, 6.0, 9.0],
        delivered_tokens=[1, 2, 1],
        num_planned_tokens=4,
        num_prompt_tokens=7,
        num_output_tokens=4,
        num_cached_tokens=2,
        num_preemptions=3,
        queue_s=0.5,
        finish_reason="length",
    )
    assert (tally.num_sent, tally.num_in_flight, tally.num_tokens, tally.ttfts_s) == (1, 0, 4, [4.0])


@pytest.mark.parametrize(
    ("num_tokens", "finish_reason", "fails", "code"),
    [
        (4, "length", False, None),
        (4, "cancelled", False, "cancelled"),
        (3, "length", False, "short"),
        (4, "length", True, "connection_lost"),  # after the end was received
        (2, None, True, "connection_lost"),
    ],
)
def test_whether_an_answer_is_whole_is_the_same_while_a_test_runs_and_afterwards(
    num_tokens: int, finish_reason: Any, fails: bool, code: str | None
) -> None:
    tally = Tally()
    recorder = Recorder(PlannedRequest(0, 0.0, "x", 4, None, 0, 9), 0.0, False, tally, lambda: 1.0)
    recorder.on_sent()
    recorder.on_message(Delta("r", 0, 0, "a", [1] * num_tokens))
    if finish_reason is not None:
        recorder.on_message(Done("r", 9, [ChoiceEnd(0, finish_reason, 4)], Usage(7, 4), Timings(0.5, 1.0, 2.0)))

    if fails:
        recorder.on_failed("connection_lost", "gone")
    else:
        recorder.on_answered()

    record = recorder.record(is_warmup=False)
    summary = summarize([record], Objectives(), 1.0)
    assert (record.failure and record.failure[0]) == code
    assert (tally.num_completed, tally.num_failed) == (summary.num_completed, summary.num_failed)
    assert summary.num_completed == (code is None)
    assert record.finish_reason is None or record.error_code is None


# ---- many requests -------------------------------------------------------------------------------------------------


RECORDS = [
    answered(0, 1.0, [2.0, 3.0, 4.0]),
    answered(1, 2.0, [6.0, 6.5]),
    failed(2, 3.0),
    failed(3, 4.0),
    failed(4, 8.0, "overloaded"),
    answered(5, 5.0, [6.0], finish_reason="cancelled"),
    Record(index=6, arrived_s=6.0, sent_s=6.0, delivered_s=[7.0], delivered_tokens=[2], num_output_tokens=2),
]


def test_a_summary_adds_up() -> None:
    window_s = window_of(RECORDS)
    summary = summarize(RECORDS, Objectives(ttft_s=1.0, tpot_s=1.0), window_s)

    assert window_s == 9.0 - 1.0  # from the first arrival to the end of the failure that ended last
    assert (summary.num_requests, summary.num_completed, summary.num_failed, summary.num_unfinished) == (7, 2, 4, 1)
    assert (summary.requests_per_s, summary.output_tokens_per_s) == (2 / 8, 8 / 8)
    assert (summary.goodput_per_s, summary.slo_attainment) == (1 / 8, 1 / 7)
    assert summary.tokens_per_delivery == 8 / 7
    means = [spread and spread.mean for spread in (summary.ttft_s, summary.tpot_s, summary.itl_s, summary.e2e_s)]
    assert means == [2.5, 0.75, pytest.approx(2.5 / 3), (3.25 + 4.75) / 2]
    assert summary.queue_s is not None
    assert summary.lateness_s is not None
    assert (summary.queue_s.num, summary.lateness_s.num) == (2, 7)
    assert (summary.queue_s.mean, summary.lateness_s.mean) == (0.125, 3 * 0.5 / 7)
    assert [(error.code, error.num, error.example) for error in summary.errors] == [
        ("adapter_not_found", 2, "sentence 2"),
        ("overloaded", 1, "sentence 4"),
        ("cancelled", 1, "The answer ended with finish reason cancelled."),
    ]


@pytest.mark.parametrize(
    ("objectives", "num_good"),
    [(Objectives(ttft_s=0.9), 0), (Objectives(ttft_s=4.0), 2), (Objectives(tpot_s=0.5), 1), (Objectives(4.0, 0.4), 0)],
)
def test_good_requests_meet_every_objective(objectives: Objectives, num_good: int) -> None:
    assert summarize(RECORDS, objectives, 1.0).goodput_per_s == num_good


def test_without_objectives_there_is_no_goodput_and_without_requests_no_rate() -> None:
    assert summarize(RECORDS, Objectives(), 1.0).goodput_per_s is None
    nothing = summarize([], Objectives(1.0), window_of([]))
    assert (nothing.requests_per_s, nothing.ttft_s, nothing.slo_attainment, nothing.errors) == (0.0, None, None, [])


def report_of(records: list[Record], plan: Plan, **changes: Any) -> Report:
    fields = {"hello": HELLO, "num_connections": 2, "started_at": "2026-01-01T00:00:00+00:00", "is_complete": True}
    workload = draw_workload(plan, HELLO.model.vocab_size)
    return build_report(**{"plan": plan, "workload": workload, "records": records, **fields, **changes})


GROUPED = [
    answered(0, 0.0, [99.0], is_warmup=True, adapter="a", is_first_use=True),
    answered(1, 1.0, [2.0], adapter="a", key=1),
    answered(2, 2.0, [5.0], adapter="b", is_first_use=True),
    answered(3, 3.0, [4.0], key=1),
    answered(4, 4.0, [6.0], adapter="b"),
]


def test_a_report_leaves_the_warm_up_out_and_tells_groups_apart() -> None:
    report = report_of(GROUPED, Plan(num_requests=5, num_keys=2))

    assert report.summary.window_s == 6.25 - 1.0
    assert [adapter_class(record) for record in GROUPED] == ["cold", "warm", "cold", "base", "warm"]
    means = {one.name: one.summary.ttft_s and one.summary.ttft_s.mean for one in report.adapter_classes}
    assert means == {"base": 1.0, "cold": 3.0, "warm": 1.5}
    assert [(one.key, one.summary.num_requests) for one in report.keys] == [(0, 2), (1, 2)]
    groups = [*report.adapter_classes, *report.keys]
    assert sum(one.summary.output_tokens_per_s for one in groups) == pytest.approx(
        2 * report.summary.output_tokens_per_s
    )


@pytest.mark.parametrize("with_records", [False, True])
def test_a_report_survives_being_written_down(with_records: bool) -> None:
    report = report_of(GROUPED, Plan(num_requests=5))
    data = encode_report(report, with_records=with_records)

    assert decode_report(data) == (report if with_records else msgspec.structs.replace(report, records=None))
    assert b"secret-session" not in data


def test_a_report_prints_its_numbers_and_what_went_wrong_and_that_it_was_interrupted() -> None:
    console = Console(file=io.StringIO(), width=120)
    report = report_of(
        [*GROUPED, failed(9, 1.0, "[bold]\x1b")], Plan(num_requests=5, slo_ttft_s=1.0), is_complete=False
    )

    print_report(report, console)

    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("Interrupted", "4 of 5 measured requests", "TTFT", "1500.00", "cold", "1 × [bold]", "40.0 %"):
        assert part in text
    assert "\x1b" not in text


def test_the_status_line_tells_how_it_stands() -> None:
    tally = Tally()
    tally.num_planned, tally.num_sent, tally.num_completed, tally.num_failed, tally.num_tokens = 9, 7, 3, 1, 50
    assert "TTFT" not in status_line(tally, 0.0)

    tally.ttfts_s = [0.3, 0.1, 0.2]
    line = status_line(tally, 2.0)

    assert line == "2 s · sent 7/9 · in flight 3 · done 3 · errors 1 · 25 tokens/s · TTFT p50 200 ms p99 298 ms"


@pytest.mark.anyio
@pytest.mark.parametrize("is_terminal", [True, False])
async def test_a_running_test_is_shown_in_a_terminal_and_nowhere_else(is_terminal: bool) -> None:
    paper = io.StringIO()
    with anyio.fail_after(60):
        async with showing(Tally(), Console(file=paper, force_terminal=is_terminal)):
            while is_terminal and "sent 0/0" not in paper.getvalue():
                await anyio.lowlevel.checkpoint()

    assert is_terminal or paper.getvalue() == ""
