"""The requests of a load test, drawn from its seed before anything is sent."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import count, cycle
from random import Random

import msgspec

from descant_client.errors import ConfigInvalid
from descant_client.loadtest.arrivals import Closed
from descant_client.loadtest.plan import NOTHING_LEFT, Plan, check_plan


class PlannedRequest(msgspec.Struct, frozen=True):
    """One request, to be sent `at_s` seconds after the start with key number `key`.

    Random token ids are an array of unsigned ints, which takes a tenth of the memory of a list.
    """

    index: int
    at_s: float
    prompt: str | array[int]
    num_output_tokens: int
    adapter: str | None
    key: int
    seed: int


def draw_workload(plan: Plan, vocab_size: int) -> list[PlannedRequest]:
    """Return all requests in order of arrival. A pure function of its arguments.

    Each aspect is drawn from a generator of its own, so that plans that differ in one aspect agree in the others.

    Raises:
        ConfigInvalid: the plan is not valid.
    """
    check_plan(plan)
    prompts, adapters = _prompts(plan, vocab_size), _adapters(plan)
    lengths, keys, seeds = (_rng(plan, aspect) for aspect in ("output", "key", "seed"))
    return [
        PlannedRequest(
            index=index,
            at_s=at_s,
            prompt=next(prompts),
            num_output_tokens=plan.output_tokens.draw(lengths),
            adapter=next(adapters),
            key=keys.randrange(plan.num_keys),
            seed=seeds.getrandbits(63),
        )
        for index, at_s in _arrivals(plan)
    ]


def check_workload(plan: Plan, workload: Sequence[PlannedRequest], max_context: int) -> None:
    """Check that at least one request is measured, and that answers to random prompts fit into the context.

    The closed loop is not checked for measured requests: its arrival times are known only when requests are sent.

    Raises:
        ConfigInvalid: a parameter does not fit. The error names it.
    """
    if not workload:
        raise ConfigInvalid("duration", "no request arrives before it ends; nothing is left to measure.")
    if not isinstance(plan.arrivals, Closed) and all(plan.is_warmup(one.index, one.at_s) for one in workload):
        raise ConfigInvalid("warmup", NOTHING_LEFT)
    for one in workload:
        if not isinstance(one.prompt, str) and len(one.prompt) + one.num_output_tokens > max_context:
            reason = f"request {one.index} has {len(one.prompt)} tokens and asks for {one.num_output_tokens}; the "
            raise ConfigInvalid("output-tokens", reason + f"model's context holds {max_context}.")


def digest_of(workload: Sequence[PlannedRequest]) -> str:
    """Return the SHA-256, in hex, of all requests and their times: equal digests mean equal workloads."""
    digest = hashlib.sha256()
    for one in workload:
        prompt = one.prompt if isinstance(one.prompt, str) else one.prompt.tolist()
        fields = (one.index, one.at_s, prompt, one.num_output_tokens, one.adapter, one.key, one.seed)
        digest.update(msgspec.msgpack.encode(fields))
    return digest.hexdigest()


def _rng(plan: Plan, aspect: str) -> Random:
    return Random(f"{plan.seed}/{aspect}")  # seeding with text is the same on every machine


def _arrivals(plan: Plan) -> Iterator[tuple[int, float]]:
    """Yield the number and time of each request.

    Times are rounded to microseconds, because the last bit of a logarithm differs between machines.
    """
    at_s = 0.0
    gaps_s = plan.arrivals.gaps_s(_rng(plan, "arrivals"))
    for index in count() if plan.num_requests is None else range(plan.num_requests):
        at_s += next(gaps_s)
        if plan.duration_s is not None and at_s >= plan.duration_s:
            return
        yield index, round(at_s, 6)


def _prompts(plan: Plan, vocab_size: int) -> Iterator[str | array[int]]:
    """Yield prompts: those of the plan in turn, or random token ids.

    Ids are of the middle three quarters of the vocabulary, because special tokens are at its ends.
    """
    if plan.prompts:
        yield from cycle(plan.prompts)
    lengths, ids = _rng(plan, "prompt length"), _rng(plan, "prompt")
    lowest = vocab_size // 8
    usable = range(lowest, max(vocab_size * 7 // 8, lowest + 1))
    while True:
        yield array("I", ids.choices(usable, k=plan.prompt_tokens.draw(lengths)))


def _adapters(plan: Plan) -> Iterator[str | None]:
    bases = _rng(plan, "base")
    positions = plan.popularity.choices(len(plan.adapters), _rng(plan, "adapter"))
    while True:
        is_base = bases.random() < plan.base_share or not plan.adapters
        yield None if is_base else plan.adapters[next(positions)]
