"""Rules of combinations beyond their arithmetic: pruning, truncation and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import merge_fixture as fixture
import peft_fixture
from descant.adapters import prepare
from descant.adapters.merge import combine
from descant.adapters.prepare import AdapterWorker
from descant.adapters.prune import drop_mask, keep_largest
from descant.adapters.truncate import truncated_matrix, truncated_product
from descant.contract.child_config import AdapterLimits
from descant.versions import store
from descant.versions.low_rank import Factors, LowRankAdapter
from descant_client.errors import AdapterInvalid, AdapterTooLarge
from descant_client.lifecycle import Combination


def random_adapter(seed: int, rank: int = 3, modules: tuple[str, ...] = tuple(fixture.MODULES)) -> LowRankAdapter:
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factors] = {}
    for name in modules:
        inner, outer = fixture.MODULES[name]
        a, b = torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator)
        factors[name] = Factors(a, b, 0.5)
    return LowRankAdapter(factors)


def same(one: Factors, other: Factors) -> bool:
    return torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


def test_a_seed_drops_the_same_on_every_machine() -> None:
    mask = drop_mask((4, 8), 0.5, "7/0/model.layers.0.mlp.up_proj/A")

    assert ["".join("x" if kept else "." for kept in row) for row in mask.tolist()] == [
        "xx...x..",
        "xx..xx..",
        "xx.x.xx.",
        ".xxxxx..",
    ]


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_what_dare_drops_in_a_module_does_not_depend_on_other_modules(kind: Any) -> None:
    how = Combination(kind, density=0.5, seed=3)
    members = [(random_adapter(seed), 1.0) for seed in range(2)]
    q_only = [(LowRankAdapter({"q": member.factors["q"]}), weight) for member, weight in members]

    assert same(combine("sum", members, how).factors["q"], combine("sum", q_only, how).factors["q"])


def test_seeds_members_modules_and_sides_are_dropped_apart() -> None:
    keys = ["0/0/q/A", "1/0/q/A", "0/1/q/A", "0/0/k/A", "0/0/q/B", "0/0/q/update"]

    assert len({tuple(drop_mask((64,), 0.5, key).tolist()) for key in keys}) == len(keys)


def test_one_seed_is_one_result_and_another_is_another() -> None:
    members = [(random_adapter(seed), 1.0) for seed in range(2)]
    first, again, other = (combine("sum", members, Combination("dare_linear", density=0.5, seed=s)) for s in (1, 1, 2))

    assert same(first.factors["q"], again.factors["q"])
    assert not same(first.factors["q"], other.factors["q"])


def test_dare_is_linear_in_the_mean() -> None:
    members, density, num_seeds = [(random_adapter(seed), 1.0 - 3 * seed) for seed in range(2)], 0.7, 400
    linear = combine("sum", members, Combination("linear")).factors["q"]
    drawn = [combine("sum", members, Combination("dare_linear", density=density, seed=s)) for s in range(num_seeds)]

    for side in ("a", "b"):
        mean = torch.stack([getattr(adapter.factors["q"], side) for adapter in drawn]).mean(dim=0)
        # each term has the variance (1 / density - 1) * value**2
        squares = [abs(w * 0.5) * getattr(m.factors["q"], side) ** 2 for m, w in members]
        variance = torch.stack(squares).sum(dim=0) * (1 / density - 1)
        assert bool(((mean - getattr(linear, side)).abs() < 5 * (variance / num_seeds).sqrt()).all())


def test_the_share_that_is_kept_is_the_density() -> None:
    assert drop_mask((200, 200), 0.3, "any").float().mean().item() == pytest.approx(0.3, abs=0.012)


def test_of_equal_magnitudes_the_earlier_are_kept() -> None:
    values = torch.tensor([[1.0, -2.0, 2.0], [-2.0, 3.0, 0.5]])

    assert keep_largest(values, 0.5).tolist() == [[0.0, -2.0, 2.0], [0.0, 3.0, 0.0]]
    assert keep_largest(values, 0.1).abs().sum() == 0
    assert torch.equal(keep_largest(values, 1.0), values)


def test_pruning_thins_out_a_single_member_too() -> None:
    member = random_adapter(0)

    pruned = combine("sum", [(member, 2.0)], Combination("magnitude_prune", density=0.4))

    assert torch.equal(pruned.factors["q"].a, keep_largest(member.factors["q"].a, 0.4))
    assert int((pruned.factors["q"].b != 0).sum()) == int(0.4 * 27)


@pytest.mark.parametrize(("kind", "cut"), [("linear", "svd"), ("ties", "ties_svd"), ("dare_ties", "dare_ties_svd")])
def test_unequal_ranks_are_refused_with_what_to_use_instead(kind: Any, cut: str) -> None:
    members = [(random_adapter(0), 1.0), (random_adapter(1, rank=2, modules=("v",)), 1.0)]

    with pytest.raises(AdapterInvalid) as refusal:
        combine("voices", members, Combination(kind, density=0.5))

    assert "'voices'" in str(refusal.value)
    assert f"ranks 3, 2 in v, and {kind} needs equal ones. Use cat, which is exact, or {cut}" in str(refusal.value)


def test_ranks_that_meet_in_no_module_may_differ() -> None:
    members = [(random_adapter(0, modules=("q", "k")), 1.0), (random_adapter(1, rank=2, modules=("v",)), 1.0)]

    combined = combine("sum", members, Combination("linear"))

    assert {name: pair.rank for name, pair in combined.factors.items()} == {"q": 3, "k": 3, "v": 2}


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_what_is_too_large_to_be_decomposed_is_refused(kind: Any) -> None:
    members = [(random_adapter(0), 1e300), (random_adapter(1), 1e308)]
    large = LowRankAdapter({"q": Factors(torch.full((1, 6), 1e30), torch.full((9, 1), 1e30), 1e300)})

    with pytest.raises(AdapterInvalid, match="too large to be decomposed"):
        combine("sum", [*members, (large, 1e300)], Combination(kind, density=0.5))


@pytest.mark.parametrize("rank", [2, 6, 50])
def test_b_carries_the_singular_values_and_a_is_orthonormal(rank: int) -> None:
    matrix = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))

    pair = truncated_matrix(matrix, rank, clamp=None)

    kept = min(rank, 6)
    torch.testing.assert_close(pair.a @ pair.a.T, torch.eye(kept))
    torch.testing.assert_close(pair.b.norm(dim=0), torch.linalg.svdvals(matrix)[:kept])


def test_both_ways_to_decompose_give_the_same_factors() -> None:
    pair = random_adapter(0).factors["q"]

    small, dense = truncated_product(pair.b, pair.a, 2, 0.9), truncated_matrix(pair.b @ pair.a, 2, 0.9)

    torch.testing.assert_close((small.a, small.b), (dense.a, dense.b), rtol=1e-4, atol=1e-5)


def test_a_clamp_that_would_be_below_zero_is_zero() -> None:
    pair = truncated_product(-torch.ones(9, 1), torch.ones(1, 1), 1, clamp=0.6)

    assert not pair.a.any()
    assert not pair.b.any()


def test_svd_has_no_more_ranks_than_the_sum() -> None:
    member = random_adapter(0)

    assert combine("sum", [(member, 1.0), (member, 2.0)], Combination("svd", rank=6)).factors["q"].rank == 3
    assert combine("sum", [(member, 1.0), (member, -1.0)], Combination("svd", rank=6)).factors["q"].rank == 1


def test_members_without_modules_make_an_adapter_without_modules() -> None:
    assert combine("sum", [(LowRankAdapter({}), 1.0)], Combination("svd")).factors == {}


def test_a_sum_too_large_for_the_device_is_refused_before_it_is_built_or_its_other_members_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft_fixture.tiny_base().save_pretrained(tmp_path / "base")
    worker = AdapterWorker(tmp_path / "base", tmp_path / "store", "bfloat16", AdapterLimits(max_extent_bytes=4000))
    members = [(worker.create("new", 8, alpha, ["q_proj"]), 1.0) for alpha in (1.0, 2.0, 3.0, 4.0, 5.0)]
    num_read: list[str] = []

    def count(path: Path, modules: Any, name: str) -> LowRankAdapter:
        num_read.append(name)
        return store.read_version(path, modules, name)

    monkeypatch.setattr(prepare, "read_version", count)
    monkeypatch.setattr(prepare, "combine", lambda *args: pytest.fail("built"))

    with pytest.raises(AdapterTooLarge) as caught:
        worker.compose("sum", members, Combination())

    assert caught.value.adapter == "sum"
    assert caught.value.num_bytes > caught.value.max_bytes == 4000
    assert len(num_read) == 2  # of 2048 bytes each


@pytest.mark.parametrize("kind", ["svd", "linear"])
def test_members_too_large_for_a_sum_may_be_combined_into_less(tmp_path: Path, kind: Any) -> None:
    peft_fixture.tiny_base().save_pretrained(tmp_path / "base")
    worker = AdapterWorker(tmp_path / "base", tmp_path / "store", "bfloat16", AdapterLimits(max_extent_bytes=4000))
    members = [(worker.create("new", 8, alpha, ["q_proj"]), 1.0) for alpha in (1.0, 2.0, 3.0)]

    assert worker.compose("sum", members, Combination(kind)).num_bytes <= 4000
