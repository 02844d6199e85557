"""Time of one scheduler step, plan and apply, with an engine that takes no time.

    python benchmarks/scheduler.py [--num-steps 300]

Every sequence decodes one token per step. Prompts have 512 tokens, blocks 16. The table shows microseconds per step.
Waiting sequences are spread over principals, which share the running set equally.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time

from descant.contract.plan import EngineLimits, RowResult, StepPlan, StepResult, pack_ints
from descant.contract.version import AdapterVersion
from descant.scheduling.policy import Policy
from descant.scheduling.sequence import Sequence, SequenceRequest, SequenceTable
from descant_client.protocol import SamplingParams

LIMITS = EngineLimits(num_blocks=65536, block_size=16, max_context=131072, vocab_size=32000, num_adapter_slots=64)
NUM_PROMPT_TOKENS = 512
MAX_TOKENS = 10**6
NUM_ADAPTERS = 32


class NullSink:
    """A sink that always has room."""

    def put(self, sequence: Sequence, num_new: int) -> bool:
        """Take no notice."""
        return True

    def end(self, sequence: Sequence) -> None:
        """Take no notice."""


def answer(plan: StepPlan, policy: Policy, table: SequenceTable) -> StepResult:
    """Return the result of an engine that samples the same token everywhere."""
    token, rows = pack_ints([7]), []
    for row in plan.rows:
        sequence = table.get(row.row)
        assert sequence is not None, "nothing finishes here"
        end = sequence.device.num_computed + row.num_new_tokens
        rows.append(RowResult(row.row, end, token if end == sequence.num_tokens else b""))
    return StepResult(plan.epoch, plan.step, tuple(rows))


def start(num_seqs: int, num_waiting: int, num_principals: int) -> tuple[Policy, SequenceTable]:
    """Return a policy with that many sequences past their prompts, most of them with adapters, and others waiting."""
    rng = random.Random(0)
    table = SequenceTable()
    policy = Policy(table, max_num_seqs=num_seqs, max_num_batched_tokens=8192, now=time.perf_counter)
    policy.on_executor_up(LIMITS, 1 << 30)
    adapters = [None, *(AdapterVersion(str(i), "", 1 << 20, 8, 28) for i in range(NUM_ADAPTERS))]
    for i in range(num_seqs + num_waiting):
        prompt_ids = [rng.randrange(32000) for _ in range(NUM_PROMPT_TOKENS + i % 16)]
        adapter, sink = rng.choice(adapters), NullSink()
        request = SequenceRequest(
            request_id=str(i),
            prompt_ids=prompt_ids,
            sampling=SamplingParams(),
            seed=i,
            sink=sink,
            adapter=adapter,
            max_tokens=MAX_TOKENS,
            principal=str(i % num_principals),
        )
        policy.submit([Sequence(table.next_id(), request)])
    while loads := policy.adapters.take_work().loads:  # only so many at once
        for load in loads:
            policy.adapters.on_placed(load)
    while sum(sequence.num_output_tokens > 0 for sequence in table) < num_seqs:
        planned = policy.plan()
        assert planned is not None, "there is something to prefill"
        policy.apply(planned, answer(planned.plan, policy, table))
    return policy, table


def measure(num_steps: int, *sizes: int) -> tuple[list[float], list[float]]:
    """Return the microseconds of plan and of apply, one entry per step; `sizes` are those of `start`."""
    policy, table = start(*sizes)
    plan_us, apply_us = [], []
    for _ in range(num_steps):
        begin = time.perf_counter()
        planned = policy.plan()
        plan_us.append((time.perf_counter() - begin) * 1e6)
        assert planned is not None, "every sequence decodes"
        result = answer(planned.plan, policy, table)
        begin = time.perf_counter()
        policy.apply(planned, result)
        apply_us.append((time.perf_counter() - begin) * 1e6)
    return plan_us, apply_us


def main() -> None:
    """Print one line per number of sequences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=300)
    num_steps = parser.parse_args().num_steps
    gc.freeze()
    heads = ("running", "waiting", "principals", "median us", "min us", "plan us", "apply us")
    print("{:>9} {:>9} {:>10} {:>10} {:>8} {:>8} {:>9}   (plan, apply: medians)".format(*heads))
    for sizes in ((1, 0, 1), (64, 0, 1), (256, 0, 1), (256, 4000, 1), (256, 4000, 8), (256, 4000, 1000)):
        plan_us, apply_us = measure(num_steps, *sizes)
        total = [a + b for a, b in zip(plan_us, apply_us, strict=True)]
        medians = statistics.median(total), min(total), statistics.median(plan_us), statistics.median(apply_us)
        print("{:>9} {:>9} {:>10} {:>10.1f} {:>8.1f} {:>8.1f} {:>9.1f}".format(*sizes, *medians))


if __name__ == "__main__":
    main()
