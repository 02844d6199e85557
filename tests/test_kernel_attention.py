"""CPU paged attention: correct, and with the same bits for any chunking and any batch."""

import pytest
import torch

import descant_kernels as kernels
from descant_kernels import AttentionBatch, cpu_attention, reference
from kernel_workloads import DTYPES, Cache, assert_near, filled_cache, normal, one_sequence, same_bits

SCALE = 0.25
QUERY_LENS = [1, 5, 1, 40, 130, 3, 1]
CONTEXT_LENS = [1, 5, 300, 170, 133, 258, 129]


def packed(block_size: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, head_dim: int = 16):
    """Queries, cache and batch of several sequences at once, each in its own blocks."""
    caches = [filled_cache(n, kv_heads, head_dim, block_size, dtype, seed) for seed, n in enumerate(CONTEXT_LENS)]
    tables, first = [], 0
    for cache in caches:
        tables.append([first + block for block in cache.blocks])
        first += len(cache.k)
    cache = Cache(torch.cat([c.k for c in caches]), torch.cat([c.v for c in caches]), [])
    q = normal(sum(QUERY_LENS), heads, head_dim, dtype=dtype, seed=9)
    return q, cache, AttentionBatch.of(QUERY_LENS, CONTEXT_LENS, tables), tables


@pytest.mark.parametrize("window", [None, 1, 7, 150])
@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [(torch.float32, 1), (torch.float32, 24), (torch.float32, 128), *((dtype, 16) for dtype in DTYPES)],
)
def test_it_equals_the_reference(dtype, block_size, window):
    q, cache, batch, _ = packed(block_size, dtype)

    actual = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE, window)

    assert_near(actual, reference.paged_attention(q, cache.k, cache.v, batch, SCALE, window))


@pytest.mark.parametrize("soft_cap", [0.5, 50.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_soft_cap_bounds_the_scores(dtype, soft_cap):
    q, cache, batch, tables = packed(16, dtype)

    together = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE, None, soft_cap)

    assert_near(together, reference.paged_attention(q, cache.k, cache.v, batch, SCALE, None, soft_cap))
    assert same_bits(together, alone(q, cache, tables, None, soft_cap))
    assert not same_bits(together, kernels.paged_attention(q, cache.k, cache.v, batch, SCALE))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 6), (7, 1, 10), (14, 2, 64), (3, 3, 80), (8, 8, 128), (6, 2, 7)]
)
def test_any_head_layout_works_and_is_invariant(heads, kv_heads, head_dim):
    q, cache, batch, tables = packed(16, torch.float32, heads, kv_heads, head_dim)

    together = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE)

    assert_near(together, reference.paged_attention(q, cache.k, cache.v, batch, SCALE))
    assert same_bits(together, alone(q, cache, tables, None))


def alone(q, cache, tables, window, soft_cap=None):
    """Compute every token as the only decode token of its batch."""
    rows, first = [], 0
    for n, context, table in zip(QUERY_LENS, CONTEXT_LENS, tables, strict=True):
        for j in range(n):
            batch = AttentionBatch.of([1], [context - n + j + 1], [table])
            row = q[first + j : first + j + 1].clone()
            rows.append(kernels.paged_attention(row, cache.k, cache.v, batch, SCALE, window, soft_cap))
        first += n
    return torch.cat(rows)


@pytest.mark.parametrize("window", [None, 7, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_in_any_batch(dtype, window):
    q, cache, batch, tables = packed(16, dtype)

    together = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE, window)

    assert same_bits(together, alone(q, cache, tables, window))


def test_the_order_of_sequences_does_not_matter():
    q, cache, batch, tables = packed(16, torch.float32)
    order = [6, 2, 4, 0, 5, 3, 1]
    parts = q.split(QUERY_LENS)
    shuffled = AttentionBatch.of(*([values[s] for s in order] for values in (QUERY_LENS, CONTEXT_LENS, tables)))

    expected = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE).split(QUERY_LENS)
    actual = kernels.paged_attention(torch.cat([parts[s] for s in order]), cache.k, cache.v, shuffled, SCALE)

    assert same_bits(actual, torch.cat([expected[s] for s in order]))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [[1] * 5 + [400], [128, 128, 149], [7, 200, 1, 1, 196], [33] * 12 + [9]])
def test_chunked_prefill_has_the_bits_of_whole_prefill(cuts, dtype, window):
    cache = filled_cache(405, 2, 32, 16, dtype)
    q = normal(405, 4, 32, dtype=dtype)
    whole = kernels.paged_attention(q, cache.k, cache.v, one_sequence(cache, 405, 405), SCALE, window)

    parts, end = [], 0
    for part in q.split(cuts):
        end += len(part)
        batch = one_sequence(cache, len(part), end)
        parts.append(kernels.paged_attention(part, cache.k, cache.v, batch, SCALE, window))

    assert same_bits(torch.cat(parts), whole)


def test_where_work_is_split_to_save_memory_does_not_matter(monkeypatch):
    q, cache, batch, tables = packed(16, torch.float32)
    expected = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE)

    monkeypatch.setattr(cpu_attention, "WAVE_FLOATS", 2**15)
    split = AttentionBatch.of(QUERY_LENS, CONTEXT_LENS, tables)

    assert same_bits(kernels.paged_attention(q, cache.k, cache.v, split, SCALE), expected)


def test_the_plan_is_made_once_per_batch_and_window():
    q, cache, batch, _ = packed(16, torch.float32)

    first = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE)
    second = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE)
    kernels.paged_attention(q, cache.k, cache.v, batch, SCALE, 7)

    assert same_bits(first, second)
    assert len(batch.memo) == 2


# A tree: node 0 is the last known token; children in any order, two branches of different depth.
PARENTS = [-1, 0, 0, 1, 1, 3, 2]


def tree_batch(prefix: int, blocks: list[int]) -> AttentionBatch:
    paths = []
    for node in range(len(PARENTS)):
        path = [node]
        while PARENTS[path[0]] >= 0:
            path.insert(0, PARENTS[path[0]])
        paths.append([prefix + n for n in path] + [-1] * (5 - len(path)))
    n = len(PARENTS)
    return AttentionBatch.of([n], [prefix + n], [blocks], ancestors=torch.tensor(paths), prefix_lens=[prefix])


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("prefix", [0, 1, 20, 126, 300])
def test_tree_verify_equals_the_reference(prefix, window):
    cache = filled_cache(prefix + len(PARENTS), 2, 16, 16, torch.float32)
    q, batch = normal(len(PARENTS), 4, 16), tree_batch(prefix, cache.blocks)

    actual = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE, window)

    assert_near(actual, reference.paged_attention(q, cache.k, cache.v, batch, SCALE, window))


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 20, 126, 300])
def test_a_tree_node_has_the_bits_of_plain_decode_of_its_path(prefix, dtype, window):
    cache = filled_cache(prefix + len(PARENTS), 2, 16, 16, dtype)
    q, batch = normal(len(PARENTS), 4, 16, dtype=dtype), tree_batch(prefix, cache.blocks)
    tree = kernels.paged_attention(q, cache.k, cache.v, batch, SCALE, window)

    for node, path in enumerate(batch.ancestors.tolist()):
        path = torch.tensor([position for position in path if position >= 0])
        plain = Cache(cache.k.clone(), cache.v.clone(), cache.blocks)
        table = torch.tensor(cache.blocks)
        source, target = path, torch.arange(prefix, prefix + len(path))
        slots = [table[p // 16] * 16 + p % 16 for p in (source, target)]
        kernels.move_kv(plain.k, plain.v, *slots)
        decode = one_sequence(cache, 1, prefix + len(path))
        expected = kernels.paged_attention(q[node : node + 1], plain.k, plain.v, decode, SCALE, window)
        assert same_bits(tree[node : node + 1], expected)


def test_trees_and_plain_sequences_share_a_batch():
    cache = filled_cache(140 + len(PARENTS), 2, 16, 16, torch.float32)
    q = normal(20 + len(PARENTS), 4, 16)
    tree = tree_batch(140, cache.blocks)
    ancestors = torch.cat([torch.full((20, 5), -1), tree.ancestors])
    lens = [20, len(PARENTS)], [30, 140 + len(PARENTS)]

    both = AttentionBatch.of(*lens, [cache.blocks[:2], cache.blocks], ancestors=ancestors, prefix_lens=[-1, 140])
    actual = kernels.paged_attention(q, cache.k, cache.v, both, SCALE)

    plain = kernels.paged_attention(q[:20], cache.k, cache.v, one_sequence(cache, 20, 30), SCALE)
    assert same_bits(actual[:20], plain)
    assert same_bits(actual[20:], kernels.paged_attention(q[20:], cache.k, cache.v, tree, SCALE))


def test_sequences_without_new_tokens_and_empty_batches_are_fine():
    cache = filled_cache(40, 2, 16, 16, torch.float32)
    q = normal(1, 4, 16)

    some = AttentionBatch.of([0, 1, 0], [10, 40, 5], [cache.blocks] * 3)
    none = AttentionBatch.of([], [], [])

    assert kernels.paged_attention(q[:0], cache.k, cache.v, none, SCALE).shape == (0, 4, 16)
    expected = kernels.paged_attention(q, cache.k, cache.v, one_sequence(cache, 1, 40), SCALE)
    assert same_bits(kernels.paged_attention(q, cache.k, cache.v, some, SCALE), expected)
