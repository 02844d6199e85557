"""The parameters of a load test, all in one value, which is part of the report."""

from __future__ import annotations

import math

import msgspec

from descant_client.errors import ConfigInvalid
from descant_client.loadtest.arrivals import Arrivals, AtOnce, Closed, Gamma, check_arrivals
from descant_client.loadtest.lengths import Lengths, Lognormal, Uniform, check_lengths
from descant_client.loadtest.popularity import Popularity, PowerLaw, check_popularity

MAX_TEMPERATURE = 100.0  # the limit of `protocol.SamplingParams`
NOTHING_LEFT = "it takes the whole test; nothing is left to measure."


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters of a load test. The same plan against the same model gives the same requests, byte for byte.

    Sending ends at the earlier of `num_requests` and `duration_s`. The first `warmup_requests` requests, and those that
    arrive in the first `warmup_s` seconds, are sent but not measured. Prompts are random token ids, or `prompts` in
    turn. The end of sequence is ignored, so that an answer has exactly the length drawn for it. An answer that ends
    before, at the end of the model's context, counts as failed.
    """

    arrivals: Arrivals = Gamma(rate=8.0)
    num_requests: int | None = None
    duration_s: float | None = None
    warmup_requests: int = 0
    warmup_s: float = 0.0
    adapters: list[str] = []  # the most popular first; empty: the base model only
    popularity: Popularity = PowerLaw()
    base_share: float = 0.0  # share of the requests without an adapter
    prompt_tokens: Lengths = Uniform(8, 64)
    prompts: list[str] = []
    output_tokens: Lengths = Lognormal(32.0, 0.5, 512)
    temperature: float = 1.0
    num_keys: int = 1  # API keys that the requests are spread over at random
    seed: int = 0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None

    def is_warmup(self, index: int, arrived_s: float) -> bool:
        """Return whether request number `index`, which arrived `arrived_s` after the start, is not measured."""
        return index < self.warmup_requests or arrived_s < self.warmup_s


def check_plan(plan: Plan) -> None:
    """Check all parameters.

    Raises:
        ConfigInvalid: a parameter is not valid. The error names it and states the valid values.
    """
    check_arrivals(plan.arrivals)
    check_popularity(plan.popularity)
    check_lengths(plan.prompt_tokens, "prompt-tokens")
    check_lengths(plan.output_tokens, "output-tokens")
    _check_extent(plan)
    if not 0 <= plan.base_share <= 1:
        raise ConfigInvalid("base-share", f"{plan.base_share:g} is no share of the requests, from 0 to 1.")
    if not 0 <= plan.temperature <= MAX_TEMPERATURE:
        raise ConfigInvalid("temperature", f"{plan.temperature:g} is no temperature, from 0 to {MAX_TEMPERATURE:g}.")
    if plan.num_keys < 1:
        raise ConfigInvalid("num-keys", "at least one key, or none at all, is needed to connect.")
    if not all(plan.prompts):
        raise ConfigInvalid("prompts", f"prompt {plan.prompts.index('')} is empty.")
    for key, limit in (("slo-ttft", plan.slo_ttft_s), ("slo-tpot", plan.slo_tpot_s)):
        if limit is not None and not 0 < limit < math.inf:
            raise ConfigInvalid(key, f"{limit:g} is no time in seconds above 0.")


def _check_extent(plan: Plan) -> None:
    if plan.num_requests is None and plan.duration_s is None:
        raise ConfigInvalid("requests", "give a number of requests, a duration, or both.")
    if plan.num_requests is None and isinstance(plan.arrivals, AtOnce | Closed):
        raise ConfigInvalid("requests", "without a finite rate the number of requests is needed.")
    if plan.num_requests is not None and plan.num_requests < 1:
        raise ConfigInvalid("requests", f"{plan.num_requests} requests; at least 1 is needed.")
    if plan.duration_s is not None and not 0 < plan.duration_s < math.inf:
        raise ConfigInvalid("duration", f"{plan.duration_s:g} is no time in seconds above 0.")
    if plan.warmup_requests < 0 or not 0 <= plan.warmup_s < math.inf:
        raise ConfigInvalid("warmup", "a number of requests or of seconds (such as 5s), from 0.")
    is_all_warmup = plan.num_requests is not None and plan.warmup_requests >= plan.num_requests
    if is_all_warmup or (plan.duration_s is not None and plan.warmup_s >= plan.duration_s):
        raise ConfigInvalid("warmup", NOTHING_LEFT)
