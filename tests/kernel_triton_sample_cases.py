# pyright: reportArgumentType=false
# Triton turns launch arguments into constexpr; its annotations do not allow that.
"""Triton's `sample_nodes` and `walk_tree`, in the interpreter or on a GPU: run by `test_kernel_triton`."""

import random

import pytest
import torch
import triton
import triton.language as tl

from descant_kernels import NodeNoise, reference, sample
from descant_kernels.sample import SPLIT_SIZE, _gumbel, _uniform
from kernel_workloads import DEVICE, normal, same_bits

NEARLY_EQUAL = 1e-5
"""Difference of scores up to which either may win: two logarithms may differ in the last place."""

SEEDS = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


def noise_for(num_rows, sampled=None):
    """Return different seeds, choices and indices in every row; by default two rows of three are sampled."""
    sampled = [row % 3 != 2 for row in range(num_rows)] if sampled is None else sampled
    seeds = [SEEDS[row % len(SEEDS)] for row in range(num_rows)]
    return NodeNoise.of(seeds, range(num_rows), range(100, 100 + 7 * num_rows, 7), sampled, DEVICE)


def gumbel_of(noise, vocab_size):
    return reference.gumbel_noise(noise.seeds, noise.choices, noise.output_indices, vocab_size)


def assert_drawn(tokens, logits, noise):
    """Assert that each token is the reference's, or has practically the same score."""
    scores = torch.where(noise.sampled[:, None], logits + gumbel_of(noise, logits.shape[1]), logits)
    chosen, best = scores.gather(1, tokens[:, None])[:, 0], scores.amax(dim=1)
    is_as_good = noise.sampled & (chosen >= best - NEARLY_EQUAL)
    assert ((tokens == scores.argmax(dim=1)) | is_as_good).all()


@triton.jit
def _noise_kernel(a_ptr, b_ptr, uniform_ptr, gumbel_ptr, vocab_size, block: tl.constexpr):
    """Return the noise of all tokens of one row, before and after the logarithms."""
    row = tl.program_id(0)
    a, b = tl.load(a_ptr + row).to(tl.uint32), tl.load(b_ptr + row).to(tl.uint32)
    token_ids = tl.arange(0, block)
    tl.store(uniform_ptr + row * vocab_size + token_ids, _uniform(token_ids, a, b), mask=token_ids < vocab_size)
    tl.store(gumbel_ptr + row * vocab_size + token_ids, _gumbel(token_ids, a, b), mask=token_ids < vocab_size)


def noise_of_keys(a, b, vocab_size):
    uniform, gumbel = (torch.empty(len(a), vocab_size, device=DEVICE) for _ in range(2))
    _noise_kernel[(len(a),)](a, b, uniform, gumbel, vocab_size, block=triton.next_power_of_2(vocab_size))
    return uniform, gumbel


def test_uniform_numbers_have_the_bits_of_the_reference():
    noise = noise_for(9)

    uniform, gumbel = noise_of_keys(*reference.node_keys(noise.seeds, noise.choices, noise.output_indices), 3000)

    expected = gumbel_of(noise, 3000)
    assert same_bits(-torch.log(-torch.log(uniform)), expected)
    torch.testing.assert_close(gumbel, expected, atol=2e-6, rtol=0)


def test_noise_is_right_at_both_ends_of_the_uniform_numbers():
    # Token 0 of these keys hashes to the lowest and to the highest 23 bits: the mixer run backwards.
    a, b = torch.tensor([0, 0], device=DEVICE), torch.tensor([0, keys_to_highest()], device=DEVICE)

    uniform, gumbel = noise_of_keys(a, b, 1)

    assert uniform[:, 0].tolist() == [2.0**-24, 1 - 2.0**-24]
    torch.testing.assert_close(gumbel[:, 0].cpu(), torch.tensor([-2.8115, 16.6355]), atol=1e-4, rtol=0)


def keys_to_highest():
    x = 0xFFFFFFFF ^ (0xFFFFFFFF >> 16)
    x = x * pow(reference.MIX_2, -1, 2**32) % 2**32
    return x ^ (x >> 15) ^ (x >> 30)


@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 5003])
@pytest.mark.parametrize("spread", [0.0, 1.0, 100.0])
def test_sample_nodes_draws_what_the_reference_draws(vocab_size, spread):
    logits, noise = normal(11, vocab_size) * spread, noise_for(11)
    logits[3, vocab_size // 2 + 1 :] = -torch.inf

    tokens = sample.sample_nodes(logits, noise)

    assert tokens.dtype == torch.int64
    assert_drawn(tokens, logits, noise)


def test_equal_logits_leave_the_choice_to_the_noise():
    logits, noise = torch.zeros(9, 2500, device=DEVICE), noise_for(9, [True] * 9)

    tokens = sample.sample_nodes(logits, noise)

    assert torch.equal(tokens, gumbel_of(noise, 2500).argmax(dim=1))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_token_far_above_all_wins_wherever_it_is(sampled):
    best = torch.tensor([0, 1, SPLIT_SIZE - 1, SPLIT_SIZE, 2 * SPLIT_SIZE - 1, 2 * SPLIT_SIZE], device=DEVICE)
    logits = normal(6, 2 * SPLIT_SIZE + 1)
    logits[torch.arange(6, device=DEVICE), best] = 100.0

    tokens = sample.sample_nodes(logits, noise_for(6, [sampled] * 6))

    assert torch.equal(tokens, best)


@pytest.mark.parametrize("ids", [[0, 1], [5, 2500], [SPLIT_SIZE - 1, SPLIT_SIZE], [2100, 2101, 2999]])
def test_ties_go_to_the_lowest_id(ids):
    logits = normal(2, 3000).clamp_(max=3.0)
    logits[:, ids] = 3.0 + 1.0

    assert sample.sample_nodes(logits, noise_for(2, [False] * 2)).tolist() == [ids[0]] * 2


def test_infinite_scores_tie_also_with_noise():
    logits = normal(1, 3000)
    logits[0, [1500, 1501, 2600]] = torch.inf

    assert sample.sample_nodes(logits, noise_for(1, [True])).tolist() == [1500]


def test_excluded_tokens_are_never_drawn():
    logits = torch.full((20, 5003), -torch.inf, device=DEVICE)
    logits[:, [1030, 4000]] = -1000.0

    tokens = sample.sample_nodes(logits, noise_for(20, [True] * 20))

    assert set(tokens.tolist()) == {1030, 4000}


@pytest.mark.parametrize("nothing", [-torch.inf, torch.nan])
def test_a_row_without_any_number_gives_a_valid_id_and_leaves_the_others_alone(nothing):
    logits, noise = normal(6, 1500), noise_for(6)
    logits[1] = logits[2] = nothing

    tokens = sample.sample_nodes(logits, noise)

    others = torch.tensor([0, 3, 4, 5], device=DEVICE)
    assert torch.equal(tokens[others], reference.sample_nodes(logits, noise)[others])
    assert ((tokens >= 0) & (tokens < 1500)).all()


def test_a_nan_never_wins():
    logits = torch.full((2, 1500), torch.nan, device=DEVICE)
    logits[:, 1234] = -5.0

    assert sample.sample_nodes(logits, noise_for(2, [False, True])).tolist() == [1234, 1234]


def test_a_draw_does_not_depend_on_the_other_rows():
    logits, noise = normal(7, 1777), noise_for(7)
    together = sample.sample_nodes(logits, noise)

    for row in range(7):
        fields = (noise.seeds, noise.choices, noise.output_indices, noise.sampled)
        one = NodeNoise(*(field[row : row + 1] for field in fields), any_sampled=True)
        assert torch.equal(sample.sample_nodes(logits[row : row + 1], one), together[row : row + 1])


def test_what_lies_beyond_the_vocabulary_is_not_read():
    wide, noise = normal(5, 1300), noise_for(5)
    wide[:, 1200:] = torch.inf

    tokens = sample.sample_nodes(wide[:, :1200], noise)

    assert_drawn(tokens, wide[:, :1200], noise)


def test_no_rows_give_no_tokens():
    assert sample.sample_nodes(torch.empty(0, 5, device=DEVICE), noise_for(0)).shape == (0,)


def random_trees(sizes, seed, num_tokens):
    """Return trees with random parents. Few distinct tokens make many nodes match and siblings equal."""
    chance = random.Random(seed)
    parents = [parent for size in sizes for parent in (-1, *(chance.randrange(node) for node in range(1, size)))]
    drafts, sampled = ([chance.randrange(num_tokens) for _ in parents] for _ in range(2))
    return sizes, parents, drafts, sampled


TREES = {
    "single nodes": ([1, 1, 1], [-1] * 3, [5, 6, 7], [5, 1, 2]),
    "accept all": ([4, 2], [-1, 0, 1, 2, -1, 0], [9, 1, 2, 3, 9, 4], [1, 2, 3, 9, 4, 4]),
    "accept none": ([4, 2], [-1, 0, 1, 2, -1, 0], [9, 1, 2, 3, 9, 4], [9, 1, 2, 3, 9, 4]),
    "accept part": ([6], [-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [1, 2, 7, 4, 5, 6]),
    "take the branch": ([5], [-1, 0, 0, 1, 2], [0, 5, 6, 7, 8], [6, 1, 8, 1, 3]),
    "children alike": ([5, 4], [-1, 0, 0, 2, 1, -1, 0, 0, 0], [0, 5, 5, 6, 7, 0, 8, 5, 5], [5, 7, 6, 1, 2, 5, 1, 2, 3]),
    "grandchild alike": ([3], [-1, 0, 1], [0, 5, 6], [6, 6, 6]),
    "random": random_trees([1, 8, 1, 21, 9, 33, 2], 0, 3),
    "random, all agree": random_trees([17, 30, 5], 1, 1),
    "random, few agree": random_trees([17, 30, 5], 2, 12),
}


def walk_of(sizes, parents, drafts, sampled, max_nodes):
    parents, drafts, sampled = (torch.as_tensor(t).to(DEVICE) for t in (parents, drafts, sampled))
    cu_nodes = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)
    return sample.walk_tree(parents, cu_nodes, drafts, sampled, max_nodes)


@pytest.mark.parametrize("tree", TREES)
def test_walk_tree_equals_the_reference(tree):
    sizes, *nodes = TREES[tree]
    parents, drafts, sampled = (torch.tensor(t) for t in nodes)
    expected = reference.walk_tree(parents, torch.tensor([0, *sizes]).cumsum(0), drafts, sampled, max(sizes))

    walk = walk_of(*TREES[tree], max(sizes))

    for name in ("counts", "nodes", "tokens"):
        assert torch.equal(getattr(walk, name).cpu(), getattr(expected, name))


def test_a_wider_result_is_padded():
    walk = walk_of([2, 1], [-1, 0, -1], [0, 5, 0], [5, 6, 7], max_nodes=5)

    assert walk.counts.tolist() == [2, 1]
    assert walk.nodes.tolist() == [[0, 1, -1, -1, -1], [0, -1, -1, -1, -1]]
    assert walk.tokens.tolist() == [[5, 6, -1, -1, -1], [7, -1, -1, -1, -1]]


def test_a_padding_sequence_has_no_nodes_and_the_others_are_walked():
    walk = walk_of([2, 0, 1, 0], [-1, 0, -1], [0, 5, 0], [5, 6, 7], max_nodes=2)

    assert walk.counts.tolist() == [2, 0, 1, 0]
    assert walk.nodes.tolist() == [[0, 1], [-1, -1], [0, -1], [-1, -1]]
    assert walk.tokens.tolist() == [[5, 6], [-1, -1], [7, -1], [-1, -1]]


def test_a_walk_ends_whatever_the_parents_are():
    walk = walk_of([3], [0, 2, 1], [5, 5, 5], [5, 5, 5], max_nodes=3)

    assert walk.nodes.tolist() == [[0, -1, -1]]


def test_a_walk_stays_in_its_row_whatever_the_sizes_are():
    walk = walk_of([7, 1], [-1, *range(6), -1], [5] * 8, [5] * 7 + [9], max_nodes=5)

    assert walk.counts.tolist() == [5, 1]
    assert walk.tokens.tolist() == [[5] * 5, [9, -1, -1, -1, -1]]


def test_no_sequences_give_no_walks():
    walk = walk_of([], torch.empty(0).long(), torch.empty(0).long(), torch.empty(0).long(), max_nodes=0)

    assert walk.counts.shape == (0,)
    assert walk.nodes.shape == walk.tokens.shape == (0, 0)
