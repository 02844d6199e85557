"""Sends the requests of a plan and measures the answers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from itertools import count
from math import inf

import anyio
from anyio.abc import TaskGroup

from descant_client.client import Client
from descant_client.errors import ConfigInvalid, DescantError
from descant_client.loadtest.arrivals import Closed
from descant_client.loadtest.plan import NOTHING_LEFT, Plan
from descant_client.loadtest.record import Record, Recorder, Tally
from descant_client.loadtest.report import Report, build_report
from descant_client.loadtest.workload import PlannedRequest, check_workload, draw_workload
from descant_client.stream import Stream


async def run(
    clients: Sequence[Client],
    plan: Plan,
    *,
    tally: Tally | None = None,
    stop: anyio.Event | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
) -> Report:
    """Send the plan's requests through the clients, wait for all answers, and return the report with all records.

    `clients[i]` belongs to key number `i % plan.num_keys`; the requests of a key go to its clients in turn. A request
    that fails is counted, and the test goes on. Setting `stop` ends the test: open requests are cancelled, and the
    report is that of an incomplete test. Cancelling the call cancels them too, without a report. `tally` is kept up to
    date during the test.

    Raises:
        ConfigInvalid: the plan is not valid, its answers do not fit into the model's context, no request of it is
            measured, or a key has no client.
    """
    if len(clients) < plan.num_keys:
        raise ConfigInvalid("connections", f"{len(clients)} for {plan.num_keys} keys; each needs at least one.")
    hello = clients[0].hello
    workload = draw_workload(plan, hello.model.vocab_size)
    check_workload(plan, workload, hello.model.max_context)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    test = _Run(clients, plan, tally or Tally(), clock, sleep)
    await test.carry_out(workload, stop or anyio.Event())
    records = test.records()
    if test.is_complete and all(record.is_warmup for record in records):
        raise ConfigInvalid("warmup", NOTHING_LEFT)
    return build_report(
        plan=plan,
        hello=hello,
        workload=workload,
        records=records,
        num_connections=len(clients),
        started_at=started_at,
        is_complete=test.is_complete,
    )


class _Run:
    """One run of a plan: its start time, the clients of each key, and the recorders of the requests sent."""

    def __init__(
        self,
        clients: Sequence[Client],
        plan: Plan,
        tally: Tally,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.is_complete = False
        self._plan = plan
        self._tally = tally
        self._clock = clock
        self._sleep = sleep
        self._clients_of_key = [clients[key :: plan.num_keys] for key in range(plan.num_keys)]
        self._turns = [count() for _ in range(plan.num_keys)]
        self._is_closed_loop = isinstance(plan.arrivals, Closed)
        self._room = anyio.Semaphore(plan.arrivals.concurrency if isinstance(plan.arrivals, Closed) else 0)
        self._used: set[str] = set()
        self._noted: list[tuple[Recorder, bool]] = []  # and whether the request is warm-up
        self._started_s = clock()

    def records(self) -> list[Record]:
        """Return the records of all requests sent, in order."""
        return [recorder.record(is_warmup) for recorder, is_warmup in self._noted]

    async def carry_out(self, workload: Sequence[PlannedRequest], stop: anyio.Event) -> None:
        """Send all requests and wait for the answers, or until `stop` is set."""
        self._tally.num_planned = len(workload)
        self._started_s = self._clock()
        async with anyio.create_task_group() as outer:
            outer.start_soon(_cancel_when, stop, outer)
            async with anyio.create_task_group() as answers:
                await (self._send_on_room if self._is_closed_loop else self._send_on_time)(workload, answers)
            self.is_complete = True
            outer.cancel_scope.cancel()

    def _now_s(self) -> float:
        return self._clock() - self._started_s

    async def _send_on_time(self, workload: Sequence[PlannedRequest], answers: TaskGroup) -> None:
        for request in workload:
            await self._sleep(max(0.0, request.at_s - self._now_s()))
            self._send(request, request.at_s, answers)

    async def _send_on_room(self, workload: Sequence[PlannedRequest], answers: TaskGroup) -> None:
        end_s = inf if self._plan.duration_s is None else self._plan.duration_s
        for request in workload:
            await self._room.acquire()
            if self._now_s() >= end_s:
                return
            self._send(request, self._now_s(), answers)

    def _send(self, request: PlannedRequest, arrived_s: float, answers: TaskGroup) -> None:
        """Hand a request to its connection without waiting, and start a task that waits for the answer."""
        is_first_use = request.adapter is not None and request.adapter not in self._used
        if request.adapter is not None:
            self._used.add(request.adapter)
        recorder = Recorder(request, arrived_s, is_first_use, self._tally, self._now_s)
        self._noted.append((recorder, self._plan.is_warmup(request.index, arrived_s)))
        clients = self._clients_of_key[request.key]
        stream = clients[next(self._turns[request.key]) % len(clients)].generate(
            request.prompt,
            adapter=request.adapter,
            max_tokens=request.num_output_tokens,
            seed=request.seed,
            ignore_eos=True,
            temperature=self._plan.temperature,
        )
        stream.listen(recorder.on_message)
        recorder.on_sent()
        answers.start_soon(self._await_end, stream, recorder)

    async def _await_end(self, stream: Stream, recorder: Recorder) -> None:
        try:
            await stream.result()
            recorder.on_answered()
        except DescantError as error:
            recorder.on_failed(error.code, str(error))
        finally:
            if self._is_closed_loop:
                self._room.release()


async def _cancel_when(stop: anyio.Event, tasks: TaskGroup) -> None:
    await stop.wait()
    tasks.cancel_scope.cancel()
