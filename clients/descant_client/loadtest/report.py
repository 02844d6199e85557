"""The report of a load test, and its form in a file."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata

import msgspec

from descant_client.loadtest.plan import Plan
from descant_client.loadtest.record import Record
from descant_client.loadtest.summary import Objectives, Summary, adapter_class, grouped, summarize, window_of
from descant_client.loadtest.workload import PlannedRequest, digest_of
from descant_client.protocol import Hello, ModelInfo

SCHEMA_VERSION = 1


class Machine(msgspec.Struct, frozen=True):
    """The machine that sent the load."""

    python: str
    platform: str
    num_cpus: int | None
    descant: str  # the version of the package with this client


class ServerInfo(msgspec.Struct, frozen=True):
    """The server, as described by its hello."""

    server: str
    protocol: str
    features: list[str]
    model: ModelInfo


class WorkloadInfo(msgspec.Struct, frozen=True):
    """The requests drawn from the plan. Tests with equal digests send the same requests at the same times."""

    digest: str
    num_requests: int
    num_output_tokens: int
    num_connections: int


class ClassSummary(msgspec.Struct, frozen=True):
    """The summary of a class of requests: `base`, `cold` or `warm` (`summary.adapter_class`)."""

    name: str
    summary: Summary


class KeySummary(msgspec.Struct, frozen=True):
    """The summary of the requests of one API key. Keys are numbered in the given order and never written."""

    key: int
    summary: Summary


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a load test. Times are in seconds; `started_at` is UTC in ISO 8601.

    `is_complete` is False if the test was interrupted. Requests then in flight count as unfinished.
    """

    schema: int = SCHEMA_VERSION
    is_complete: bool
    started_at: str
    machine: Machine
    server: ServerInfo
    plan: Plan
    workload: WorkloadInfo
    summary: Summary
    adapter_classes: list[ClassSummary]
    keys: list[KeySummary]  # empty with a single key
    records: list[Record] | None = None  # of all requests, the warm-up's included


def build_report(
    *,
    plan: Plan,
    hello: Hello,
    workload: Sequence[PlannedRequest],
    records: Sequence[Record],
    num_connections: int,
    started_at: str,
    is_complete: bool,
) -> Report:
    """Return the report of a test, with its records in it."""
    measured = [one for one in records if not one.is_warmup]
    objectives = Objectives(plan.slo_ttft_s, plan.slo_tpot_s)
    window_s = window_of(measured)
    by_class = grouped(measured, adapter_class)
    by_key = grouped(measured, lambda one: one.key) if plan.num_keys > 1 else {}
    return Report(
        is_complete=is_complete,
        started_at=started_at,
        machine=this_machine(),
        server=ServerInfo(hello.server, hello.protocol, hello.features, hello.model),
        plan=plan,
        workload=_workload_info(workload, num_connections),
        summary=summarize(measured, objectives, window_s),
        adapter_classes=[
            ClassSummary(name, summarize(group, objectives, window_s)) for name, group in by_class.items()
        ],
        keys=[KeySummary(key, summarize(group, objectives, window_s)) for key, group in by_key.items()],
        records=list(records),
    )


def encode_report(report: Report, *, with_records: bool) -> bytes:
    """Return a report as JSON, indented, ending with a newline."""
    kept = report if with_records else msgspec.structs.replace(report, records=None)
    return msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n"


def decode_report(data: bytes) -> Report:
    """Read a report from JSON. Raises msgspec.DecodeError; its subclass ValidationError for JSON that is no report."""
    return msgspec.json.decode(data, type=Report)


def this_machine() -> Machine:
    """Return a description of this machine."""
    try:
        version = metadata.version("descant")
    except metadata.PackageNotFoundError:  # run from a source tree
        version = "unknown"
    return Machine(platform.python_version(), platform.platform(), os.cpu_count(), version)


def _workload_info(workload: Sequence[PlannedRequest], num_connections: int) -> WorkloadInfo:
    num_output_tokens = sum(one.num_output_tokens for one in workload)
    return WorkloadInfo(digest_of(workload), len(workload), num_output_tokens, num_connections)
