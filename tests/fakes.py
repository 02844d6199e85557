"""Stand-ins for tests of the scheduler: sinks, versions, a step loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from descant.contract.version import AdapterVersion
from descant.scheduling.placement.loads import AdapterLoad
from descant.scheduling.policy import Policy
from descant.scheduling.rows import PlannedStep
from descant.scheduling.sequence import Sequence, SequenceRequest, SequenceTable, Stopper
from descant.scheduling.speculation.drafting import Drafter
from descant_client.errors import DescantError
from descant_client.protocol import SamplingParams
from fake_engine import EngineDied, FakeEngine


@dataclass
class FakeSink:
    """Keeps what it is told. It has room until `budget` tokens are unread."""

    budget: int = 10**9
    unread: int = 0
    token_ids: list[int] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)

    def put(self, sequence: Sequence, num_new: int) -> bool:
        assert not self.ended, "tokens after the end"
        self.token_ids += sequence.output_ids[len(sequence.output_ids) - num_new :]
        self.unread += num_new
        return self.unread <= self.budget

    def end(self, sequence: Sequence) -> None:
        assert not self.ended, "ended twice"
        self.ended.append(sequence)


def version(digest: str, num_bytes: int = 64) -> AdapterVersion:
    """Return an adapter version that exists only on paper."""
    return AdapterVersion(digest=digest, path=f"{digest}.safetensors", num_bytes=num_bytes, max_rank=8, num_modules=1)


def make_sequence(number: int, prompt_ids: list[int], **fields: Any) -> Sequence:
    """Return a sequence that no policy knows; `fields` are more of `SequenceRequest`'s."""
    defaults: dict[str, Any] = {"request_id": "r", "sampling": SamplingParams(), "seed": 0, "sink": FakeSink()}
    return Sequence(number, SequenceRequest(prompt_ids=prompt_ids, **(defaults | fields)))


class Loop:
    """What the scheduler actor does, without waiting: a policy and an engine with as many steps as it takes."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 64,
        adapter_bytes: int = 1024,
        max_queued: int | None = None,
    ) -> None:
        self.engine = engine or FakeEngine()
        self.adapter_bytes = adapter_bytes
        self.table = SequenceTable()
        self.clock = 0.0
        self.budgets: dict[str, Any] = {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_queued": max_queued,
        }
        self.lives: list[bool] = []  # of executors that died: were they of use?
        self.loads: list[AdapterLoad] = []  # started, not done
        self.in_flight: deque[PlannedStep] = deque()
        self.load_error: Callable[[AdapterLoad], DescantError | None] = lambda load: None
        self.restart_policy()

    def restart_policy(self) -> None:
        """Start a new policy on the table, with a new executor."""
        self.policy = Policy(self.table, **self.budgets, now=lambda: self.clock)
        self._start_executor()

    def submit(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int | None = 8,
        n: int = 1,
        request_id: str | None = None,
        seed: int = 0,
        sinks: list[FakeSink] | None = None,
        stop: frozenset[int] = frozenset(),
        stopper: Stopper | None = None,
        adapter: AdapterVersion | None = None,
        scope: str = "",
        num_logprobs: int = -1,
        num_prompt_logprobs: int = -1,
        drafter: Drafter | None = None,
        **fields: Any,
    ) -> list[Sequence]:
        """Submit a request and return its choices; `fields` are more of `SequenceRequest`'s."""
        sequences = [
            Sequence(
                (sequence_id := self.table.next_id()),
                SequenceRequest(
                    request_id=request_id or str(sequence_id - choice),
                    prompt_ids=prompt_ids,
                    sampling=SamplingParams(),
                    seed=seed,
                    sink=sinks[choice] if sinks else FakeSink(),
                    choice=choice,
                    max_tokens=max_tokens,
                    stop_token_ids=stop,
                    num_logprobs=num_logprobs,
                    num_prompt_logprobs=num_prompt_logprobs,
                    adapter=adapter,
                    cache_scope=scope,
                    **fields,
                ),
                stopper=stopper,
                drafter=drafter,
            )
            for choice in range(n)
        ]
        self.policy.submit(sequences)
        return sequences

    def start_loads(self) -> None:
        """Move what is to be moved and take the loads that are due."""
        work = self.policy.adapters.take_work()
        for move in work.moves:
            self.engine.arena.move(move)
        self.loads += work.loads
        for version in work.prefetches:
            self.policy.adapters.on_prefetch_done(version.digest)

    def finish_load(self, index: int = 0) -> None:
        """Carry out a started load."""
        load = self.loads.pop(index)
        if (error := self.load_error(load)) is not None:
            self.policy.adapters.on_load_failed(load, error)
        else:
            self.engine.arena.load(load)
            self.policy.adapters.on_placed(load)
        self.start_loads()

    def crash(self, reason: str = "killed") -> None:
        """Lose the executor, whatever it is doing, and start another."""
        self.lives.append(self.policy.on_executor_lost(reason))
        self._start_executor()

    def launch(self) -> bool:
        """Plan and launch a step. False: nothing to run now."""
        planned = self.policy.plan()
        self.start_loads()
        if planned is None:
            return False
        self.engine.launch(planned.plan)
        self.in_flight.append(planned)
        return True

    def collect(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Run and apply the oldest step; `meanwhile` happens in between."""
        planned = self.in_flight.popleft()
        try:
            result = self.engine.collect()
        except EngineDied as exc:
            self.crash(str(exc))
        else:
            meanwhile()
            self.policy.apply(planned, result)

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Launch all the steps there can be and apply the first of them. False: nothing to run."""
        self.clock += 1.0
        while self.launch():
            pass
        if not self.in_flight:
            return False
        self.collect(meanwhile)
        return True

    def run(self, max_steps: int = 1000) -> None:
        """Step, with every load done at once, until nothing can run. Fails if that takes more than `max_steps`."""
        for _ in range(max_steps):
            while self.loads:
                self.finish_load()
            if not self.step() and not self.loads:
                return
        raise AssertionError(f"still running after {max_steps} steps")

    def _start_executor(self) -> None:
        self.engine.restart()
        self.loads.clear()
        self.in_flight.clear()
        self.policy.on_executor_up(self.engine.limits, self.adapter_bytes)
