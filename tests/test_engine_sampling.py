"""Sampling: Transformers' filters, OpenAI's penalties, the requested distribution, independent rows."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from descant.contract.plan import LogprobRows, unpack_floats, unpack_ints
from descant.engine import sampling
from descant.engine.sampling import Sampler, SamplingRow
from descant_client.protocol import SamplingParams

VOCAB = 3000
GREEDY = SamplingParams(temperature=0.0)


def logits_of(num_rows: int, seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def row(params: SamplingParams = GREEDY, seed: int = 0, output_index: int = 0, **more: Any) -> SamplingRow:
    history = {"prompt_ids": (), "output_ids": ()} | more
    return SamplingRow(params, seed, choice=0, output_index=output_index, **history)


def processed(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    scores = logits.clone()
    Sampler(logits.shape[1])._process(scores, rows, {})
    return scores


def token_ids(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    return [token.token_id for token in Sampler(logits.shape[1]).sample(logits.clone(), rows)]


FILTERS: dict[str, tuple[SamplingParams, list[LogitsProcessor]]] = {
    "top-k 1": (SamplingParams(top_k=1), [TopKLogitsWarper(1)]),
    "top-k 40": (SamplingParams(top_k=40), [TopKLogitsWarper(40)]),
    "top-k beyond the vocabulary": (SamplingParams(top_k=10_000), [TopKLogitsWarper(10_000)]),
    "top-p 0.01": (SamplingParams(top_p=0.01), [TopPLogitsWarper(0.01)]),
    "top-p 0.7": (SamplingParams(top_p=0.7), [TopPLogitsWarper(0.7)]),
    "min-p 0.05": (SamplingParams(min_p=0.05), [MinPLogitsWarper(0.05)]),
    "min-p 1": (SamplingParams(min_p=1.0), [MinPLogitsWarper(1.0)]),
    "typical 0.3": (SamplingParams(typical_p=0.3), [TypicalLogitsWarper(0.3)]),
    "typical 0.95": (SamplingParams(typical_p=0.95), [TypicalLogitsWarper(0.95)]),
    "temperature 0.3": (SamplingParams(temperature=0.3), [TemperatureLogitsWarper(0.3)]),
    "all": (
        SamplingParams(temperature=1.7, top_k=500, top_p=0.9, min_p=0.01, typical_p=0.8),
        [
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(500),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.01),
            TypicalLogitsWarper(0.8),
        ],
    ),
}


@pytest.mark.parametrize("num_candidates", [(1,), (2, 50), (1024, 16_384)], ids=str)
@pytest.mark.parametrize(("params", "warpers"), FILTERS.values(), ids=FILTERS)
def test_a_filter_keeps_what_transformers_keeps(
    params: SamplingParams,
    warpers: list[LogitsProcessor],
    num_candidates: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "_CANDIDATES", num_candidates)
    logits = logits_of(8, seed=1)
    expected = logits.clone()
    for warper in warpers:
        expected = warper(torch.zeros(8, 1, dtype=torch.int64), expected)

    assert torch.equal(processed(logits, [row(params)] * 8), expected)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_the_sign_of_logits_does_not_matter(shift: float) -> None:
    logits = logits_of(4, seed=1).round(decimals=2)
    rows = [row(SamplingParams(top_p=0.8))] * 4

    found = processed(logits + shift, rows)

    expected = TopPLogitsWarper(0.8)(torch.zeros(4, 1), logits + shift)
    assert torch.equal(found.isfinite().sum(-1), expected.isfinite().sum(-1))
    assert torch.equal(found.amax(-1), logits.amax(-1) + shift)


def test_of_equal_scores_the_lowest_ids_survive_top_p() -> None:
    found = processed(torch.zeros(1, 10), [row(SamplingParams(top_p=0.35))])

    assert found.isfinite().nonzero()[:, 1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_random_settings_keep_what_transformers_keeps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    temperature, top_p, min_p, typical_p = (torch.rand(4, generator=generator) * 0.9 + 0.05).tolist()
    params = SamplingParams(temperature=temperature, top_k=seed + 1, top_p=top_p, min_p=min_p, typical_p=typical_p)
    expected = logits = logits_of(4, seed)
    warpers = TopKLogitsWarper(seed + 1), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)
    for warper in (TemperatureLogitsWarper(temperature), *warpers, TypicalLogitsWarper(typical_p)):
        expected = warper(torch.zeros(4, 1), expected)

    assert torch.equal(processed(logits, [row(params)] * 4).isfinite(), expected.isfinite())


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, history = logits_of(1, seed=1), torch.randint(VOCAB, (50,), generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=0.0, repetition_penalty=penalty)

    expected = RepetitionPenaltyLogitsProcessor(penalty)(history[None], logits)

    found = processed(logits, [row(params, prompt_ids=history[:30], output_ids=history[30:].to(torch.int32))])
    assert torch.equal(found, expected)


def test_presence_and_frequency_penalties_see_the_output_only() -> None:
    logits = torch.zeros(1, 6)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)

    found = processed(logits, [row(params, prompt_ids=[0, 1, 1], output_ids=[1, 2, 2, 2])])

    assert found.tolist() == [[0.0, -0.75, -1.25, 0.0, 0.0, 0.0]]


def test_bias_is_added_after_penalties_and_before_temperature() -> None:
    params = SamplingParams(temperature=0.5, repetition_penalty=2.0, logit_bias={1: 3.0, 2: -1.0})

    found = processed(torch.tensor([[4.0, 4.0, 4.0]]), [row(params, output_ids=[1])])

    assert found.tolist() == [[8.0, 10.0, 6.0]]


def test_greedy_takes_the_highest_penalized_and_biased_score() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.0, 3.9]])
    params = SamplingParams(temperature=0.0, presence_penalty=2.0, logit_bias={3: 0.5}, typical_p=0.1, top_k=1)

    assert token_ids(logits, [row(params, output_ids=[1])]) == [3]


def test_greedy_takes_no_noise_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0]])

    assert {token_ids(logits, [row(seed=seed)])[0] for seed in range(20)} == {1}


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = logits_of(1, seed=4) * 1e3

    assert token_ids(logits, [row(SamplingParams(temperature=1e-38))]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_tokens_follow_the_distribution(temperature: float) -> None:
    logits, draws = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0]), 20_000
    params = SamplingParams(temperature=temperature)
    rows = [row(params, seed=i % 7, output_index=i) for i in range(draws)]

    counts = torch.tensor(token_ids(logits.repeat(draws, 1), rows)).bincount(minlength=6).double()

    expected = (logits.double() / temperature).softmax(-1) * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # the 99.9 % quantile at 5 degrees of freedom


def test_a_token_depends_on_seed_choice_and_index_alone() -> None:
    logits = torch.zeros(1, VOCAB)
    rows = [SamplingRow(SamplingParams(), seed, choice, i, (), ()) for seed, choice, i in ((5, 0, 3), (6, 0, 3))]
    rows += [SamplingRow(SamplingParams(), 5, choice, i, (), ()) for choice, i in ((1, 3), (0, 4))]

    first = token_ids(logits.repeat(4, 1), rows)

    assert first == token_ids(logits.repeat(4, 1), rows)
    assert len(set(first)) == 4


MIXED = [
    SamplingParams(),
    GREEDY,
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(top_p=0.9999),
    SamplingParams(top_k=20, min_p=0.1),
    SamplingParams(typical_p=0.5),
    SamplingParams(typical_p=0.9999, top_k=1500),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={7: 2.0}),
    SamplingParams(temperature=1.3, presence_penalty=0.4, min_p=0.02),
]


@pytest.mark.parametrize("vocab", [VOCAB, 50_001])
def test_a_row_is_processed_alike_alone_and_in_any_batch(vocab: int) -> None:
    logits = logits_of(len(MIXED), seed=9, vocab=vocab)
    rows = [row(params, seed=i, output_ids=[3, 3, 5], num_logprobs=i % 4) for i, params in enumerate(MIXED)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()

    alone = [processed(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    together = processed(logits[order], [rows[i] for i in order])

    assert all(torch.equal(together[place], alone[i]) for place, i in enumerate(order))
    tokens = Sampler(vocab).sample(logits[order], [rows[i] for i in order])
    assert tokens == [Sampler(vocab).sample(logits[i : i + 1].clone(), [rows[i]])[0] for i in order]


def test_the_entropy_of_a_row_is_bitwise_the_same_in_any_batch() -> None:
    logits = logits_of(5, seed=9, vocab=200_001)
    logprobs, probs = logits.log_softmax(-1), logits.softmax(-1)

    together = sampling._entropy(logprobs, probs)

    alone = [sampling._entropy(logprobs[i : i + 1], probs[i : i + 1]) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = logits_of(3, seed=3)
    expected = token_ids(logits, [row(), row(), row()])
    logits[1, 17] = torch.nan

    tokens = Sampler(VOCAB).sample(logits, [row(), row(MIXED[2], num_logprobs=2), row()])

    assert [token.token_id for token in tokens] == [expected[0], -1, expected[2]]
    assert tokens[1].error is not None
    assert tokens[1].logprobs is None


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_any_value_that_is_not_finite_is_found(value: float) -> None:
    logits = logits_of(1, seed=3)
    logits[0, -1] = value

    assert Sampler(VOCAB).sample(logits, [row()])[0].error


def test_large_finite_logits_are_no_error() -> None:
    logits = torch.full((1, 8), 3e38)

    assert Sampler(8).sample(logits, [row()])[0].error is None


def test_a_bias_beyond_the_vocabulary_fails_its_row_alone() -> None:
    tokens = Sampler(VOCAB).sample(logits_of(2, seed=1), [row(SamplingParams(logit_bias={VOCAB: 1.0})), row()])

    assert "logit_bias" in str(tokens[0].error)
    assert tokens[1].error is None


ENDLESS: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {3: 1e300}},
    "bias against all others": {"logit_bias": dict.fromkeys([0, 1, 2, *range(4, VOCAB)], -1e300)},
    "penalty": {"repetition_penalty": 1e-300},
    "tiny temperature": {"logit_bias": {3: 1e38}, "temperature": 1.1e-5},
}


@pytest.mark.parametrize("filters", [{"top_p": 0.5}, {"typical_p": 0.5}, {"min_p": 0.1}, {}], ids=str)
@pytest.mark.parametrize("settings", ENDLESS.values(), ids=ENDLESS)
def test_settings_without_bounds_still_leave_the_token_they_favor(
    settings: dict[str, Any], filters: dict[str, Any]
) -> None:
    logits = torch.arange(VOCAB).float().unsqueeze(0)
    assert token_ids(logits, [row(SamplingParams(**settings, **filters), prompt_ids=[0, 3])]) == [3]


def unpacked(rows: LogprobRows | None) -> tuple[list[float], list[int], list[float]]:
    assert rows is not None
    return unpack_floats(rows.chosen), unpack_ints(rows.top_ids), unpack_floats(rows.top)


def test_logprobs_are_those_of_the_unprocessed_logits() -> None:
    logits = logits_of(1, seed=5)
    params = SamplingParams(temperature=3.0, top_k=2, logit_bias={4: 50.0})
    expected = logits.log_softmax(-1)[0]

    [token] = Sampler(VOCAB).sample(logits.clone(), [row(params, num_logprobs=3)])

    chosen, top_ids, top = unpacked(token.logprobs)
    assert (token.token_id, chosen) == (4, [float(expected[4])])
    assert (top_ids, top) == (expected.topk(3).indices.tolist(), expected.topk(3).values.tolist())


def test_logprobs_are_given_only_where_asked_for() -> None:
    tokens = Sampler(VOCAB).sample(logits_of(3, seed=5), [row(), row(num_logprobs=0), row(num_logprobs=2)])

    assert tokens[0].logprobs is None
    assert tokens[1].logprobs is not None
    assert (tokens[1].logprobs.num_tokens, tokens[1].logprobs.num_top) == (1, 0)
    assert len(unpacked(tokens[2].logprobs)[1]) == 2


def test_of_equal_tokens_the_lowest_ids_come_first_among_logprobs() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 1::2] = -0.0

    rows = Sampler(50).logprob_rows(logits, [0], 4)

    assert unpacked(rows)[1] == [0, 1, 2, 3]


def test_logprobs_of_many_rows_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_LOGPROB_CHUNK_ROWS", 4)
    logits, ids = logits_of(10, seed=6), torch.arange(10)
    sampler = Sampler(VOCAB)

    chosen, top_ids, top = unpacked(sampler.logprob_rows(logits, ids, 2))

    parts = [unpacked(sampler.logprob_rows(logits[i : i + 1], [i], 2)) for i in range(10)]
    assert chosen == [value for part in parts for value in part[0]]
    assert top_ids == [value for part in parts for value in part[1]]
    assert top == [value for part in parts for value in part[2]]


def test_logprobs_of_no_rows_are_empty() -> None:
    rows = Sampler(VOCAB).logprob_rows(torch.empty(0, VOCAB), [], 2)

    assert (rows.num_tokens, rows.chosen, rows.top) == (0, b"", b"")
