"""Running a load test: the open loop waits for no answer, the closed loop waits for room, Ctrl-C leaves a report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from descant_client import Client, connect
from descant_client.errors import AdapterNotFound, ConfigInvalid
from descant_client.loadtest import Plan, Report, run
from descant_client.loadtest.arrivals import AtOnce, Closed, Gamma, Steady
from descant_client.loadtest.lengths import Constant, Uniform
from descant_client.loadtest.record import Tally
from descant_client.loadtest.workload import draw_workload
from descant_client.protocol import ChoiceEnd, Delta, Done, Hello, Limits, ModelInfo, ServerMessage, Usage
from descant_client.timings import Timings
from servers import LONG, dummy_config, serve

pytestmark = pytest.mark.anyio

DESCANT = (sys.executable, "-c", "from descant.cli import main; main()", "loadtest")
HELLO = Hello("1.0", "descant/9", "s", [], Limits(1, 1, 1, 1.0), ModelInfo("m", 512, 264, "float32", "cpu"))
DONE = Done("r", 1, [ChoiceEnd(0, "length", 1)], Usage(1, 1), Timings(0.0, 0.0, 0.0))
SHORT = 30.0  # limit of tests that wait for no real time


class FakeClock:
    """A clock that advances only in `sleep`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await anyio.lowlevel.checkpoint()


class FakeClient:
    """A client that holds every answer back until `release` is set, and records its requests."""

    hello = HELLO

    def __init__(self) -> None:
        self.release = anyio.Event()
        self.requests: list[dict[str, Any]] = []
        self.num_open = self.most_open = 0
        self.on_request: Callable[[], None] = lambda: None

    def generate(self, prompt: Any, **options: Any) -> FakeStream:
        self.requests.append({"prompt": prompt, **options})
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        self.on_request()
        return FakeStream(self, options["adapter"], options["max_tokens"])


class FakeStream:
    """A stream that delivers all its tokens at once and ends, or fails for the adapter `missing`."""

    def __init__(self, client: FakeClient, adapter: str | None, num_tokens: int) -> None:
        self._client = client
        self._adapter = adapter
        self._num_tokens = num_tokens

    def listen(self, listener: Callable[[ServerMessage], None]) -> None:
        self._listener = listener

    async def result(self) -> None:
        await self._client.release.wait()
        await anyio.lowlevel.checkpoint()
        self._client.num_open -= 1
        if self._adapter == "missing":
            raise AdapterNotFound("missing")
        self._listener(Delta("r", 0, 0, "a", [97] * self._num_tokens))
        self._listener(DONE)


async def run_on(client: FakeClient, plan: Plan, **options: Any) -> Report:
    clock = FakeClock()
    with anyio.fail_after(SHORT):
        return await run([cast("Client", client)], plan, clock=clock, sleep=clock.sleep, **options)


async def test_in_the_open_loop_arrivals_do_not_wait_for_answers() -> None:
    client, plan = FakeClient(), Plan(arrivals=Gamma(5.0, 2.0), num_requests=50)
    client.on_request = lambda: client.release.set() if len(client.requests) == 50 else None

    report = await run_on(client, plan)

    assert report.records is not None
    assert client.most_open == 50
    workload = draw_workload(plan, HELLO.model.vocab_size)
    assert [record.sent_s for record in report.records] == pytest.approx([one.at_s for one in workload])
    assert report.records[0].ttft_s == pytest.approx(workload[-1].at_s - workload[0].at_s)


async def test_what_is_sent_late_counts_from_its_time_and_does_not_delay_the_schedule() -> None:
    client, clock = FakeClient(), FakeClock()
    client.release.set()

    async def oversleep(seconds: float) -> None:
        await clock.sleep(3.0 if len(client.requests) == 1 else seconds)

    plan = Plan(arrivals=Steady(1.0), num_requests=6)
    report = await run([cast("Client", client)], plan, clock=clock, sleep=oversleep)

    assert report.records is not None
    assert [record.lateness_s for record in report.records] == [0.0, 2.0, 1.0, 0.0, 0.0, 0.0]
    assert [record.arrived_s for record in report.records] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert all(record.ttft_s is not None and record.ttft_s >= record.lateness_s for record in report.records)


async def test_the_closed_loop_keeps_as_many_in_flight_as_asked_for() -> None:
    client = FakeClient()
    client.on_request = lambda: client.release.set() if client.num_open == 4 else None

    report = await run_on(client, Plan(arrivals=Closed(4), num_requests=30))

    assert (client.most_open, len(client.requests), report.summary.num_completed) == (4, 30, 30)
    assert report.records is not None
    assert all(record.lateness_s == 0 for record in report.records)


async def test_the_closed_loop_sends_nothing_after_its_duration() -> None:
    client, clock = FakeClient(), FakeClock()
    client.release.set()

    def take_a_second() -> None:
        clock.now += 1.0

    client.on_request = take_a_second
    plan = Plan(arrivals=Closed(1), num_requests=30, duration_s=5.0, warmup_s=2.0)
    report = await run([cast("Client", client)], plan, clock=clock)

    assert (len(client.requests), report.summary.num_completed, report.is_complete) == (5, 3, True)


async def test_what_is_sent_is_the_workload() -> None:
    client = FakeClient()
    client.release.set()
    plan = Plan(arrivals=AtOnce(), num_requests=20, adapters=["a", "b"], base_share=0.3, temperature=0.5)

    await run_on(client, plan)

    assert client.requests == [
        {
            "prompt": one.prompt,
            "adapter": one.adapter,
            "max_tokens": one.num_output_tokens,
            "seed": one.seed,
            "ignore_eos": True,
            "temperature": 0.5,
        }
        for one in draw_workload(plan, HELLO.model.vocab_size)
    ]


async def test_a_failing_adapter_is_counted_and_the_rest_goes_on() -> None:
    client = FakeClient()
    client.release.set()

    report = await run_on(client, Plan(arrivals=AtOnce(), num_requests=40, adapters=["a", "missing"]))

    num_missing = sum(request["adapter"] == "missing" for request in client.requests)
    assert [(error.code, error.num) for error in report.summary.errors] == [("adapter_not_found", num_missing)]
    assert report.summary.num_completed == 40 - num_missing > 0
    assert report.records is not None
    assert sum(record.is_first_use for record in report.records) == 2


async def test_stopping_reports_what_there_is() -> None:
    client, stop, tally = FakeClient(), anyio.Event(), Tally()
    client.on_request = lambda: stop.set() if len(client.requests) == 3 else None

    report = await run_on(client, Plan(arrivals=Steady(1.0), num_requests=50), stop=stop, tally=tally)

    assert not report.is_complete
    assert report.workload.num_requests == tally.num_planned == 50
    assert report.summary.num_unfinished == report.summary.num_requests == len(client.requests) < 50


async def test_cancelling_ends_the_run_without_a_report() -> None:
    client = FakeClient()
    with anyio.CancelScope() as scope:
        client.on_request = scope.cancel
        await run_on(client, Plan(arrivals=AtOnce(), num_requests=2))
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("plan", "key"),
    [
        (Plan(num_requests=100, warmup_s=1e6), "warmup"),
        (Plan(duration_s=1.0, warmup_requests=500), "warmup"),
        (Plan(arrivals=AtOnce(), num_requests=10, warmup_s=5.0), "warmup"),
        (Plan(arrivals=Gamma(0.1), duration_s=0.01), "duration"),
        (Plan(num_requests=4, prompt_tokens=Constant(200), output_tokens=Constant(313)), "output-tokens"),
    ],
)
async def test_a_workload_of_which_nothing_could_be_measured_is_not_sent(plan: Plan, key: str) -> None:
    client = FakeClient()

    with pytest.raises(ConfigInvalid) as caught:
        await run_on(client, plan)

    assert (caught.value.key, client.requests) == (key, [])


async def test_a_closed_loop_that_was_over_before_its_warm_up_is_no_result() -> None:
    client = FakeClient()
    client.release.set()

    with pytest.raises(ConfigInvalid, match="nothing is left to measure"):
        await run_on(client, Plan(arrivals=Closed(2), num_requests=5, warmup_s=60.0))


async def test_every_key_needs_a_connection() -> None:
    with pytest.raises(ConfigInvalid, match="1 for 2 keys"):
        await run_on(FakeClient(), Plan(num_requests=2, num_keys=2))


async def test_a_keys_requests_go_to_its_connections_in_turn() -> None:
    clients = [FakeClient() for _ in range(4)]
    for client in clients:
        client.release.set()
    plan = Plan(arrivals=AtOnce(), num_requests=41, num_keys=2)

    report = await run(cast("list[Client]", clients), plan)

    seeds = {key: [one.seed for one in draw_workload(plan, 264) if one.key == key] for key in range(2)}
    for number, client in enumerate(clients):
        assert [request["seed"] for request in client.requests] == seeds[number % 2][number // 2 :: 2]
    assert [one.summary.num_completed for one in report.keys] == [len(seeds[0]), len(seeds[1])]


# ---- a real server -------------------------------------------------------------------------------------------------


async def test_against_a_server_every_answer_has_its_length_and_errors_have_codes(tmp_path: Path) -> None:
    plan = Plan(
        arrivals=AtOnce(),
        num_requests=40,
        warmup_requests=8,
        adapters=["one", "two", "s3://nowhere"],
        base_share=0.25,
        prompt_tokens=Uniform(1, 40),
        output_tokens=Uniform(1, 30),
    )
    with anyio.fail_after(LONG):
        async with serve(dummy_config(tmp_path)) as (_, uri), connect(uri) as one, connect(uri) as other:
            report = await run([one, other], plan)

    assert report.records is not None
    assert report.is_complete
    for request, record in zip(draw_workload(plan, report.server.model.vocab_size), report.records, strict=True):
        if request.adapter == "s3://nowhere":
            assert (record.error_code, record.delivered_s) == ("adapter_unsupported", [])
            continue
        assert (record.finish_reason, record.num_prompt_tokens) == ("length", len(request.prompt))
        assert record.num_output_tokens == sum(record.delivered_tokens) == request.num_output_tokens
        assert record.accepted_s is not None
        assert record.ended_s is not None
        times = [record.arrived_s, record.sent_s, record.accepted_s, *record.delivered_s, record.ended_s]
        assert times == sorted(times)
        assert record.queue_s is not None
    assert report.summary.num_requests == 32
    assert [error.code for error in report.summary.errors] == ["adapter_unsupported"]
