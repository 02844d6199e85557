"""The requests of a load test: their times, lengths and adapters have the documented distributions."""

from __future__ import annotations

import math
import statistics
from itertools import islice
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from descant_client.errors import ConfigInvalid
from descant_client.loadtest.arrivals import Arrivals, AtOnce, Closed, Gamma, Steady, arrivals_of
from descant_client.loadtest.lengths import Constant, Lengths, Lognormal, Uniform, parse_lengths
from descant_client.loadtest.plan import Plan, check_plan
from descant_client.loadtest.popularity import Distinct, PowerLaw, matching
from descant_client.loadtest.workload import digest_of, draw_workload

NUM = 20_000
VOCAB_SIZE = 264
DIGEST = "0218151be32b31f79c0778a83a17cd9f6b421def1cb97432f7f77cb2b25be9c2"  # of PLAN
PLAN = Plan(num_requests=300, adapters=["a", "b", "c"], base_share=0.25, num_keys=3, seed=7)

lengths = st.one_of(
    st.builds(Constant, st.integers(1, 5000)),
    st.tuples(st.integers(1, 500), st.integers(0, 500)).map(lambda ends: Uniform(ends[0], sum(ends))),
    st.builds(Lognormal, st.floats(1, 500), st.floats(0, 2), st.one_of(st.none(), st.integers(500, 4000))),
)


def replace(plan: Plan, **changes: object) -> Plan:
    return msgspec.structs.replace(plan, **changes)


# ---- arrivals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0, 4.0])
def test_gamma_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    gaps = list(islice(Gamma(rate=5.0, cv=cv).gaps_s(Random(1)), NUM))

    mean = statistics.fmean(gaps)
    assert abs(mean - 0.2) < 5 * 0.2 * cv / math.sqrt(NUM)  # five standard errors of the mean
    assert statistics.pstdev(gaps) / mean == pytest.approx(cv, rel=0.1)


def test_with_a_variation_of_one_gaps_are_exponential() -> None:
    gaps = list(islice(Gamma(rate=2.0).gaps_s(Random(2)), NUM))

    for gap_s in (0.1, 0.5, 1.0, 2.0):  # P(longer than t) = exp(-rate * t)
        share = sum(gap > gap_s for gap in gaps) / NUM
        assert abs(share - math.exp(-2.0 * gap_s)) < 5 * 0.5 / math.sqrt(NUM)


@pytest.mark.parametrize(
    ("rate", "cv", "expected"),
    [(8.0, 1.0, Gamma(8.0)), (8.0, 0.0, Steady(8.0)), (math.inf, 1.0, AtOnce())],
)
def test_a_rate_and_a_variation_name_a_process(rate: float, cv: float, expected: Arrivals) -> None:
    assert arrivals_of(rate, cv) == expected


def test_a_duration_ends_the_schedule() -> None:
    workload = draw_workload(Plan(arrivals=Steady(4.0), duration_s=2.6), VOCAB_SIZE)

    assert [request.at_s for request in workload] == [i / 4 for i in range(1, 11)]


@pytest.mark.parametrize("arrivals", [AtOnce(), Closed(3)])
def test_what_has_no_schedule_is_there_from_the_start(arrivals: Arrivals) -> None:
    workload = draw_workload(Plan(arrivals=arrivals, num_requests=5), VOCAB_SIZE)

    assert [request.at_s for request in workload] == [0.0] * 5


# ---- lengths -------------------------------------------------------------------------------------------------------


@given(lengths, st.integers(0, 1000))
def test_every_length_is_one_that_the_distribution_allows(lengths: Lengths, seed: int) -> None:
    drawn = [lengths.draw(Random(seed + i)) for i in range(20)]

    match lengths:
        case Constant(num_tokens):
            assert set(drawn) == {num_tokens}
        case Uniform(low, high):
            assert all(low <= length <= high for length in drawn)
        case Lognormal(_, _, maximum):
            assert all(1 <= length <= (maximum or math.inf) for length in drawn)


def test_uniform_lengths_reach_both_ends_equally_often() -> None:
    rng = Random(3)
    drawn = [Uniform(3, 7).draw(rng) for _ in range(NUM)]

    for length in range(3, 8):
        assert abs(drawn.count(length) / NUM - 0.2) < 5 * 0.4 / math.sqrt(NUM)


def test_lognormal_lengths_have_the_median_and_the_deviation_asked_for() -> None:
    rng = Random(4)
    drawn = [Lognormal(400.0, 0.5).draw(rng) for _ in range(NUM)]

    assert statistics.median(drawn) == pytest.approx(400, rel=0.03)
    assert statistics.pstdev(math.log(length) for length in drawn) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("32", Constant(32)),
        ("constant:32", Constant(32)),
        ("uniform:8:64", Uniform(8, 64)),
        ("lognormal:32,0.5", Lognormal(32.0, 0.5)),
        ("lognormal:32,0.5,256", Lognormal(32.0, 0.5, 256)),
    ],
)
def test_distributions_have_words(text: str, expected: Lengths) -> None:
    assert parse_lengths(text, "output-tokens") == expected


@pytest.mark.parametrize(
    "text", ["", "many", "uniform:8", "uniform:8:64:2", "uniform:8,64", "normal:3,1", "lognormal:"]
)
def test_other_words_are_refused_with_the_right_ones(text: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"output-tokens.*uniform:8:64 or lognormal:32,0\.5,256"):
        parse_lengths(text, "output-tokens")


@pytest.mark.parametrize(
    "text",
    [
        *("0", "uniform:0:4", "uniform:9:8", "lognormal:0,1", "lognormal:9,-1", "lognormal:9,1,8"),
        *("lognormal:32,1000", "lognormal:32,nan", "lognormal:1e300,1", "lognormal:9,1,9999999"),
        *("9999999", "uniform:1:9999999"),
    ],
)
def test_impossible_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid, match="prompt-tokens"):
        parse_lengths(text, "prompt-tokens")


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 2.0])
def test_the_first_k_of_n_adapters_get_the_share_of_the_power_law(alpha: float) -> None:
    n = 50
    drawn = list(islice(PowerLaw(alpha).choices(n, Random(5)), NUM))

    assert set(drawn) <= set(range(n))
    for k in (1, 2, 10, 49):
        share = sum(position < k for position in drawn) / NUM
        assert abs(share - (k / n) ** alpha) < 5 * 0.5 / math.sqrt(NUM)


def test_no_power_reaches_beyond_the_last_adapter() -> None:
    class AlmostOne(Random):
        def random(self) -> float:
            return 1.0 - 2.0**-53

    assert next(PowerLaw(1e9).choices(3, AlmostOne())) == 2


def test_distinct_adapters_take_turns_also_around_requests_without_one() -> None:
    workload = draw_workload(replace(PLAN, popularity=Distinct()), VOCAB_SIZE)

    used = [request.adapter for request in workload if request.adapter is not None]
    assert used == [PLAN.adapters[i % 3] for i in range(len(used))]
    assert 0.15 < 1 - len(used) / len(workload) < 0.35


@pytest.mark.parametrize("changes", [{"base_share": 1.0}, {"adapters": []}])
def test_the_base_model_alone_can_be_asked(changes: dict[str, object]) -> None:
    assert {request.adapter for request in draw_workload(replace(PLAN, **changes), VOCAB_SIZE)} == {None}


def test_a_pattern_picks_names_in_their_order_and_says_when_it_fits_none() -> None:
    assert matching(["demo-b", "other", "demo-a"], "demo-*") == ["demo-b", "demo-a"]
    with pytest.raises(ConfigInvalid, match=r"'x-\*' fits none of the server's adapters .demo-b, other."):
        matching(["demo-b", "other"], "x-*")


# ---- the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"arrivals": Gamma(1e-6, 1e3)},
        {"arrivals": Gamma(1e9, 1e-3)},
        {"arrivals": Gamma(1e-6, 1e-3)},
        {"output_tokens": Lognormal(2.0**20, 10.0)},
    ],
)
def test_at_the_ends_of_what_is_allowed_everything_is_finite(changes: dict[str, object]) -> None:
    for request in draw_workload(replace(PLAN, **changes), VOCAB_SIZE):
        assert math.isfinite(request.at_s)
        assert 1 <= request.num_output_tokens <= 2**20


def test_the_same_plan_is_the_same_workload_byte_for_byte() -> None:
    first, second = (draw_workload(PLAN, VOCAB_SIZE) for _ in range(2))

    assert first == second
    assert digest_of(first) == digest_of(second) == DIGEST
    assert len({request.seed for request in first}) == len(first)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"num_requests": 299},
        {"arrivals": Gamma(8.1)},
        {"adapters": ["a", "b", "d"]},
        {"popularity": PowerLaw(0.9)},
        {"base_share": 0.3},
        {"prompt_tokens": Constant(9)},
        {"prompts": ["hello"]},
        {"output_tokens": Constant(9)},
        {"num_keys": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_changes_the_requests_changes_the_digest(changes: dict[str, object]) -> None:
    changed = draw_workload(replace(PLAN, **changes), VOCAB_SIZE)

    assert digest_of(changed) != digest_of(draw_workload(PLAN, VOCAB_SIZE))


@pytest.mark.parametrize("changes", [{"arrivals": AtOnce()}, {"adapters": []}, {"prompt_tokens": Constant(9)}])
def test_changing_one_aspect_leaves_the_others(changes: dict[str, object]) -> None:
    plain, changed = (draw_workload(plan, VOCAB_SIZE) for plan in (PLAN, replace(PLAN, **changes)))

    for one, other in zip(plain, changed, strict=True):
        assert (one.num_output_tokens, one.key, one.seed) == (other.num_output_tokens, other.key, other.seed)


@given(st.integers(1, 300_000), st.integers(0, 1000))
def test_prompts_are_tokens_of_the_vocabulary(vocab_size: int, seed: int) -> None:
    plan = Plan(num_requests=5, prompt_tokens=Uniform(1, 20), seed=seed)

    for request in draw_workload(plan, vocab_size):
        assert not isinstance(request.prompt, str)
        assert 1 <= len(request.prompt) <= 20
        assert all(0 <= token_id < vocab_size for token_id in request.prompt)
        assert vocab_size < 16 or all(vocab_size // 8 <= token_id < vocab_size * 7 / 8 for token_id in request.prompt)


def test_given_prompts_are_sent_in_turn() -> None:
    workload = draw_workload(replace(PLAN, num_requests=5, prompts=["one", "two"]), VOCAB_SIZE)

    assert [request.prompt for request in workload] == ["one", "two", "one", "two", "one"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_requests": None}, "requests"),
        ({"num_requests": 0}, "requests"),
        ({"num_requests": None, "duration_s": 1.0, "arrivals": Closed(2)}, "requests"),
        ({"duration_s": 0.0}, "duration"),
        ({"arrivals": Gamma(0.0)}, "rate"),
        ({"arrivals": Steady(math.nan)}, "rate"),
        ({"arrivals": Gamma(1e-320)}, "rate"),
        ({"arrivals": Gamma(1.0, -1.0)}, "cv"),
        ({"arrivals": Gamma(1.0, 1e-200)}, "cv"),
        ({"arrivals": Gamma(1.0, 1e200)}, "cv"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 101.0}, "temperature"),
        ({"warmup_s": math.inf}, "warmup"),
        ({"arrivals": Closed(0)}, "concurrency"),
        ({"popularity": PowerLaw(0.0)}, "alpha"),
        ({"base_share": 1.5}, "base-share"),
        ({"warmup_requests": 300}, "warmup"),
        ({"warmup_s": math.nan}, "warmup"),
        ({"warmup_s": 2.0, "duration_s": 2.0}, "warmup"),
        ({"output_tokens": Constant(0)}, "output-tokens"),
        ({"prompts": ["a", ""]}, "prompts"),
        ({"num_keys": 0}, "num-keys"),
        ({"slo_ttft_s": 0.0}, "slo-ttft"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_by_name(changes: dict[str, object], key: str) -> None:
    check_plan(PLAN)
    with pytest.raises(ConfigInvalid) as caught:
        check_plan(replace(PLAN, **changes))
    assert caught.value.key == key


def test_a_plan_survives_being_written_down() -> None:
    plan = replace(PLAN, popularity=Distinct(), arrivals=Closed(4), output_tokens=Uniform(1, 2))

    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
