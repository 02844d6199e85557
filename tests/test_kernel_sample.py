"""Sampling from processed logits with counter-based noise, and the walk down a draft tree."""

import pytest
import torch

import descant_kernels as kernels
from descant_kernels import NodeNoise, reference
from kernel_workloads import normal, same_bits

# Chi-square quantile at 1 - 1e-6 for 15 and 225 degrees of freedom.
CHI_SQUARE_15 = 56.5
CHI_SQUARE_225 = 339.0
NUM_DRAWS = 20_000


def noise_for(n, seed=1, choice=0, first_index=0, sampled=True):
    return NodeNoise.of([seed] * n, [choice] * n, range(first_index, first_index + n), [sampled] * n)


def draws(seed=1, choice=0, first_index=0):
    logits = (normal(16, seed=7) * 1.5).expand(NUM_DRAWS, 16).contiguous()
    return kernels.sample_nodes(logits, noise_for(NUM_DRAWS, seed, choice, first_index)), logits[0].softmax(-1)


@pytest.mark.parametrize("seed", [0, 1, 2**63, -1, 2**64 + 5])
def test_draws_follow_the_softmax(seed):
    tokens, probabilities = draws(seed)
    observed, expected = tokens.bincount(minlength=16), probabilities * NUM_DRAWS

    assert ((observed - expected) ** 2 / expected).sum() < CHI_SQUARE_15


@pytest.mark.parametrize("other", [{"seed": 2}, {"seed": 1 + 2**32}, {"choice": 1}, {"first_index": 1}])
def test_other_seeds_choices_and_indices_give_unrelated_draws(other):
    (tokens, probabilities), (others, _) = draws(), draws(**other)
    joint = torch.bincount(tokens * 16 + others, minlength=256)
    expected = torch.outer(probabilities, probabilities).flatten() * NUM_DRAWS

    assert ((joint - expected) ** 2 / expected).sum() < CHI_SQUARE_225 + 60


def test_noise_is_gumbel_for_every_token():
    noise = reference.gumbel_noise(torch.arange(200), torch.zeros(200).long(), torch.arange(200) % 7, 100)
    uniform = torch.exp(-torch.exp(-noise))

    counts = torch.histc(uniform, bins=16, min=0, max=1)
    assert ((counts - 1250) ** 2 / 1250).sum() < CHI_SQUARE_15
    assert (uniform.mean(dim=0) - 0.5).abs().max() < 0.11
    assert torch.corrcoef(uniform).triu(1).abs().max() < 0.6


def test_the_definition_of_the_noise_is_frozen():
    noise = reference.gumbel_noise(torch.tensor([7, -1]), torch.tensor([0, 3]), torch.tensor([0, 2**20]), 3)

    torch.testing.assert_close(noise, FROZEN, atol=1e-5, rtol=0)


FROZEN = torch.tensor([[0.67348, 0.49461, 1.78508], [0.80025, 1.12441, 1.49313]])


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 32003])
def test_the_fast_path_draws_what_the_reference_draws(vocab_size, spread):
    logits = normal(9, vocab_size) * spread
    logits[3, vocab_size // 2 + 1 :] = -torch.inf
    noise = NodeNoise.of(range(9), [0, 1] * 4 + [0], range(100, 109), [True, True, False] * 3)

    assert torch.equal(kernels.sample_nodes(logits, noise), reference.sample_nodes(logits, noise))


def test_many_tokens_far_below_the_best_may_still_win():
    logits = torch.full((100, 20_000), -10.0)
    logits[:, 0] = 0.0

    tokens = kernels.sample_nodes(logits, noise_for(100))

    assert torch.equal(tokens, reference.sample_nodes(logits, noise_for(100)))
    assert 25 < tokens.count_nonzero() < 75  # 20,000 exp(-10) = 0.91 against 1


def test_fast_noise_has_the_bits_of_the_reference():
    logits = torch.zeros(4, 5000)
    noise = NodeNoise.of([3, 4, 5, 6], [0, 0, 1, 1], [9, 8, 7, 6], [True] * 4)
    gumbel = reference.gumbel_noise(noise.seeds, noise.choices, noise.output_indices, 5000)

    assert torch.equal(kernels.sample_nodes(logits, noise), gumbel.argmax(dim=-1))
    assert same_bits(kernels.gumbel_noise(noise.seeds, noise.choices, noise.output_indices, 5000), gumbel)


def test_a_draw_does_not_depend_on_the_other_rows():
    logits, noise = normal(33, 777), noise_for(33)
    together = kernels.sample_nodes(logits, noise)

    alone = [kernels.sample_nodes(logits[i : i + 1].clone(), noise_for(1, first_index=i)) for i in range(33)]

    assert torch.equal(torch.cat(alone), together)


def test_greedy_rows_take_the_lowest_of_the_best():
    logits = torch.tensor([[1.0, 5.0, 5.0, -torch.inf], [2.0, 2.0, 2.0, 2.0], [-torch.inf] * 3 + [0.0]])

    greedy = kernels.sample_nodes(logits, noise_for(3, sampled=False))
    mixed = kernels.sample_nodes(logits, NodeNoise.of([1] * 3, [0] * 3, [0] * 3, [False, True, False]))

    assert greedy.tolist() == [1, 0, 3]
    assert (mixed[0], mixed[2]) == (1, 3)


def test_excluded_tokens_are_never_drawn():
    logits = torch.full((NUM_DRAWS, 8), -torch.inf)
    logits[:, [2, 5]] = 0.0

    tokens = kernels.sample_nodes(logits, noise_for(NUM_DRAWS))

    assert set(tokens.tolist()) == {2, 5}


def test_no_rows_give_no_tokens():
    assert kernels.sample_nodes(torch.empty(0, 5), noise_for(0)).shape == (0,)


def walk(parents, drafts, sampled, cu_nodes=None):
    bounds = torch.tensor(cu_nodes or [0, len(parents)])
    walked = kernels.walk_tree(torch.tensor(parents), bounds, torch.tensor(drafts), torch.tensor(sampled))
    return [
        (nodes[:n], tokens[:n])
        for n, nodes, tokens in zip(walked.counts.tolist(), walked.nodes.tolist(), walked.tokens.tolist(), strict=True)
    ]


def test_a_root_alone_emits_its_sample():
    assert walk([-1], [4], [9]) == [([0], [9])]


def test_the_walk_goes_on_while_the_sample_is_a_child():
    assert walk([-1, 0, 1, 2], [0, 10, 11, 12], [10, 11, 99, 13]) == [([0, 1, 2], [10, 11, 99])]
    assert walk([-1, 0, 1, 2], [0, 10, 11, 12], [10, 11, 12, 13]) == [([0, 1, 2, 3], [10, 11, 12, 13])]


def test_the_walk_takes_the_branch_that_was_sampled():
    assert walk([-1, 0, 0, 1, 2], [0, 5, 6, 7, 8], [6, 1, 8, 1, 3]) == [([0, 2, 4], [6, 8, 3])]


def test_of_two_children_alike_the_lowest_counts():
    assert walk([-1, 0, 0, 1], [0, 5, 5, 7], [5, 7, 1, 2]) == [([0, 1, 3], [5, 7, 2])]


def test_random_trees_walk_as_in_the_reference():
    generator = torch.Generator().manual_seed(0)
    cu_nodes = torch.tensor([0, 1, 9, 10, 31, 40])
    parents = torch.cat([torch.tensor([-1, *(int(torch.randint(0, i, (), generator=generator)) for i in range(1, n))])
                         for n in cu_nodes.diff().tolist()])  # fmt: skip
    tokens = torch.randint(0, 3, (2, 40), generator=generator)

    actual = kernels.walk_tree(parents, cu_nodes, *tokens)
    expected = reference.walk_tree(parents, cu_nodes, *tokens, int(cu_nodes.diff().max()))

    for name in ("counts", "nodes", "tokens"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))
