"""Triton's attention and cache writes against the reference: run by `test_kernel_triton`."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from descant_kernels import AttentionBatch, attention, kv, reference
from kernel_workloads import DEVICE, assert_near, normal, same_bits

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # not in the interpreter
SCALE = 0.25
QUERY_LENS = [1, 5, 0, 1, 11, 2]
CONTEXT_LENS = [1, 5, 12, 75, 40, 70]

# A tree: node 0 is the last known token; children in any order, two branches of different depth.
PARENTS = [-1, 0, 0, 1, 1, 3, 2]


@pytest.fixture(autouse=True)
def _short_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set splits of two chunks of 16 positions, so that short contexts have many."""
    if "long_contexts" not in request.node.name:
        monkeypatch.setattr(attention, "SPLIT", 32)
        monkeypatch.setattr(attention, "CHUNK_BYTES", 1)


@pytest.fixture
def _even_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `tl.dot` compute every row alike, unlike NumPy's product, and unlike a GPU with tiles of different sizes."""
    if DEVICE == "cuda":
        monkeypatch.setattr(attention, "MAX_ROWS", attention.MIN_ROWS)
    else:
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b[None]).sum(axis=1, dtype=dtype))


class Pages:
    """Caches of several sequences in shuffled blocks. All other positions hold NaN."""

    def __init__(
        self,
        context_lens: list[int],
        kv_heads: int = 2,
        head_dim: int = 16,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.block_size = block_size
        sizes = [-(-length // block_size) for length in context_lens]
        order = random.Random(7).sample(range(sum(sizes) + 3), sum(sizes))
        self.tables = [[order.pop() for _ in range(size)] for size in sizes]
        shape = (sum(sizes) + 3, kv_heads, block_size, head_dim)
        self.k = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        self.v = self.k.clone()
        for sequence, length in enumerate(context_lens):
            heads = normal(length, 2, kv_heads, head_dim, dtype=dtype, seed=sequence)
            self.put(sequence, torch.arange(length), heads[:, 0], heads[:, 1])

    def slots(self, sequence: int, positions: Tensor) -> Tensor:
        """Return the cache slots of positions of a sequence."""
        blocks = torch.tensor(self.tables[sequence])[positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size).to(DEVICE)

    def put(self, sequence: int, positions: Tensor, keys: Tensor | float, values: Tensor | float) -> None:
        """Write keys and values `[N, Hkv, D]`."""
        slots = self.slots(sequence, positions)
        self.k[slots // self.block_size, :, slots % self.block_size] = keys
        self.v[slots // self.block_size, :, slots % self.block_size] = values

    def batch(self, query_lens: list[int], context_lens: list[int], sequences: list[int]) -> AttentionBatch:
        """Return a batch of plain sequences."""
        return AttentionBatch.of(query_lens, context_lens, [self.tables[s] for s in sequences], DEVICE)

    def attend(self, q: Tensor, batch: AttentionBatch, window: int | None = None, soft_cap: float | None = None):
        """Return the kernel's result."""
        return attention.paged_attention(q, self.k, self.v, batch, SCALE, window, soft_cap)

    def assert_right(
        self, q: Tensor, batch: AttentionBatch, window: int | None = None, soft_cap: float | None = None
    ) -> None:
        """Assert that the kernel's result is the reference's."""
        expected = reference.paged_attention(q, self.k, self.v, batch, SCALE, window, soft_cap)
        assert_near(self.attend(q, batch, window, soft_cap), expected)


def mixed(
    dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, block_size: int = 4
):
    """Return queries, cache and batch of prefill, chunked prefill, decode and a sequence without new tokens."""
    pages = Pages(CONTEXT_LENS, kv_heads, head_dim, block_size, dtype)
    q = normal(sum(QUERY_LENS), heads, head_dim, dtype=dtype, seed=9)
    return q, pages, pages.batch(QUERY_LENS, CONTEXT_LENS, list(range(len(CONTEXT_LENS))))


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_equals_the_reference(dtype, block_size, window):
    q, pages, batch = mixed(dtype, block_size=block_size)

    pages.assert_right(q, batch, window)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 6), (7, 1, 10), (10, 2, 80), (6, 2, 7), (3, 3, 24), (18, 1, 16), (2, 1, 256)],
)
def test_any_head_layout_works(heads, kv_heads, head_dim):
    q, pages, batch = mixed(torch.float32, heads, kv_heads, head_dim, 16)

    pages.assert_right(q, batch)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7])
def test_decode_equals_the_reference_for_every_group_size(group):
    pages = Pages([50, 3, 33])

    pages.assert_right(normal(3, 2 * group, 16), pages.batch([1, 1, 1], [50, 3, 33], [0, 1, 2]))


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_capped_softly(dtype, soft_cap):
    q, pages, batch = mixed(dtype)

    pages.assert_right(q, batch, 40, soft_cap)
    pages.assert_right(q[:1] * 1e4, pages.batch([1], [40], [4]), None, soft_cap)


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_equal_the_reference(dtype, window):
    pages = Pages([1030, 513], block_size=16, dtype=dtype)

    pages.assert_right(normal(3, 2, 16, dtype=dtype), pages.batch([2, 1], [1030, 513], [0, 1]), window)


@pytest.mark.parametrize("window", [None, 40])
def test_who_takes_the_splits_changes_no_bits(monkeypatch, window):
    q, pages, batch = mixed()
    spread = pages.attend(q, batch, window)

    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", 0)

    assert same_bits(pages.attend(q, batch, window), spread)


@pytest.mark.parametrize("enough", [0, 1000])
def test_a_grid_for_longer_contexts_changes_no_bits(monkeypatch, enough):
    q, pages, batch = mixed()
    expected = pages.attend(q, batch)
    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", enough)

    monkeypatch.setattr(attention, "_max_context_len", lambda batch: 300)

    assert same_bits(pages.attend(q, batch), expected)


def test_rows_and_sequences_that_only_pad_change_nothing():
    q, pages, _ = mixed()
    batch = pages.batch([1, 1], [75, 40], [3, 4])
    expected = pages.attend(q[:2], batch)

    padded = pages.batch([1, 1, 0, 0], [75, 40, 0, 0], [3, 4, 3, 3])

    assert same_bits(pages.attend(q[:4], padded)[:2], expected)


@pytest.mark.usefixtures("_even_dot")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cuts", [[1, 1, 1, 62], [13, 1, 20, 31]])
def test_chunked_prefill_and_decode_have_the_bits_of_whole_prefill(cuts, window):
    pages, q = Pages([65]), normal(65, 4, 16)
    whole = pages.attend(q, pages.batch([65], [65], [0]), window)

    ends = torch.tensor(cuts).cumsum(0).tolist()
    parts = [
        pages.attend(part, pages.batch([len(part)], [end], [0]), window)
        for part, end in zip(q.split(cuts), ends, strict=True)
    ]

    assert same_bits(torch.cat(parts), whole)


@pytest.mark.usefixtures("_even_dot")
def test_a_row_has_the_bits_that_it_has_alone():
    q, pages, _ = mixed()
    together = pages.attend(q[:2].repeat(3, 1, 1), pages.batch([1] * 6, [75, 40, 70, 12, 5, 1], [3, 4, 5, 2, 1, 0]))

    alone = pages.attend(q[1:2], pages.batch([1], [40], [4]))

    assert same_bits(together[1:2], alone)


def test_what_lies_below_the_window_never_matters():
    pages, q = Pages([100]), normal(5, 4, 16)
    batch = pages.batch([5], [100], [0])
    expected = pages.attend(q, batch, 20)

    pages.put(0, torch.arange(76), torch.nan, torch.nan)

    assert same_bits(pages.attend(q, batch, 20), expected)


def test_queries_may_be_columns_of_a_packed_projection():
    q, pages, batch = mixed()
    packed = torch.cat([torch.full((len(q), 8), torch.nan, device=DEVICE), q.flatten(1), q.flatten(1)], dim=1)

    view = packed[:, 8:72].view(len(q), 4, 16)

    assert same_bits(pages.attend(view, batch), pages.attend(q, batch))


def test_empty_batches_are_fine():
    pages = Pages([5])

    assert pages.attend(normal(0, 4, 16), pages.batch([], [], [])).shape == (0, 4, 16)
    assert pages.attend(normal(0, 4, 16), pages.batch([0], [5], [0])).shape == (0, 4, 16)


def paths(prefix: int) -> list[list[int]]:
    """Return each node's path of cache positions."""
    found: list[list[int]] = []
    for node, parent in enumerate(PARENTS):
        found.append([*(found[parent] if parent >= 0 else []), prefix + node])
    return found


def tree_batch(pages: Pages, prefix: int, num_plain: int = 0) -> AttentionBatch:
    """Return the tree over sequence 0, after `num_plain` new tokens of sequence 1."""
    n = len(PARENTS)
    rows = [[-1] * 5] * num_plain + [path + [-1] * (5 - len(path)) for path in paths(prefix)]
    plain = [(num_plain, 30, 1, -1)] if num_plain else []
    lens, contexts, sequences, prefixes = zip(*plain, (n, prefix + n, 0, prefix), strict=True)
    tables = [pages.tables[s] for s in sequences]
    return AttentionBatch.of(lens, contexts, tables, DEVICE, ancestors=torch.tensor(rows), prefix_lens=prefixes)


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("prefix", [0, 1, 30, 48])
def test_tree_verify_equals_the_reference(prefix, window):
    pages = Pages([prefix + len(PARENTS)])

    pages.assert_right(normal(len(PARENTS), 4, 16), tree_batch(pages, prefix), window, 5.0)


@pytest.mark.parametrize("enough", [0, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_trees_and_plain_sequences_share_a_batch(monkeypatch, dtype, enough):
    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", enough)
    pages = Pages([61 + len(PARENTS), 30], dtype=dtype)

    pages.assert_right(normal(9 + len(PARENTS), 4, 16, dtype=dtype), tree_batch(pages, 61, 9))


@pytest.mark.usefixtures("_even_dot")
@pytest.mark.parametrize("window", [None, 20])
def test_a_tree_node_has_the_bits_of_plain_decode_of_its_path(window):
    prefix = 30
    pages, q = Pages([prefix + len(PARENTS)]), normal(len(PARENTS), 4, 16)
    tree = pages.attend(q, tree_batch(pages, prefix), window)

    for node, path in enumerate(paths(prefix)):
        plain = Pages([prefix + len(PARENTS)])
        slots = [plain.slots(0, torch.tensor(p)) for p in (path, range(prefix, prefix + len(path)))]
        reference.move_kv(plain.k, plain.v, *slots)
        decoded = plain.attend(q[node : node + 1], plain.batch([1], [prefix + len(path)], [0]), window)
        assert same_bits(tree[node : node + 1], decoded)


def test_a_node_off_the_path_never_matters():
    pages, q = Pages([30 + len(PARENTS)]), normal(len(PARENTS), 4, 16)
    batch = tree_batch(pages, 30)
    expected = pages.attend(q, batch)

    pages.put(0, torch.tensor([35]), torch.nan, torch.nan)  # node 5, a leaf

    assert same_bits(pages.attend(q, batch)[[0, 1, 2, 3, 4, 6]], expected[[0, 1, 2, 3, 4, 6]])


def packed_heads(num_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k and v as columns of one packed projection."""
    qkv = normal(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    parts = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    return [part.unflatten(1, (-1, head_dim)) for part in parts]


@pytest.mark.parametrize("num_normed", [0, 2, 3])  # of q, k and v: contiguous, like the result of a norm
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "half", "block_size"),
    [(4, 2, 8, 4, 4), (3, 3, 10, 5, 16), (7, 1, 64, 9, 1), (5, 5, 256, 128, 2), (2, 1, 6, 1, 4)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_write_kv_equals_the_reference(dtype, heads, kv_heads, head_dim, half, block_size, num_normed):
    angles = normal(5, half, seed=3)
    slots = torch.tensor([3, -1, 0, 5 * block_size, 6 * block_size - 1 if block_size > 1 else -1], device=DEVICE)
    results = []
    for rope_write_kv in (kv.rope_write_kv, reference.rope_write_kv):
        views = packed_heads(5, heads, kv_heads, head_dim, dtype)
        q, k, v = *(view.contiguous() for view in views[:num_normed]), *views[num_normed:]
        caches = [normal(6, kv_heads, block_size, head_dim, dtype=dtype, seed=seed) for seed in (1, 2)]

        rope_write_kv(q, k, v, angles.cos(), angles.sin(), *caches, slots)

        results.append((q, v, *caches))
    assert all(same_bits(actual, expected) for actual, expected in zip(*results, strict=True))


def test_rope_write_kv_takes_no_tokens():
    q, k, v = packed_heads(0, 4, 2, 8, torch.float32)
    caches = normal(2, 2, 4, 8), normal(2, 2, 4, 8)

    kv.rope_write_kv(q, k, v, normal(0, 4), normal(0, 4), *caches, torch.empty(0, dtype=torch.int64, device=DEVICE))

    assert same_bits(caches[0], normal(2, 2, 4, 8))


@pytest.mark.parametrize(
    ("sources", "targets"), [([1, 2, 9], [2, 1, 3]), ([5, 6, 7], [4, 5, 6]), ([0], [23]), ([], []), ([8, 9], [3, -1])]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_move_kv_reads_all_before_it_writes_any(dtype, sources, targets):
    actual, expected = ([normal(7, 3, 4, 10, dtype=dtype, seed=seed) for seed in (1, 2)] for _ in "ae")

    moves = [torch.tensor(slots, dtype=torch.int64, device=DEVICE) for slots in (sources, targets)]
    kv.move_kv(*(cache[1:] for cache in actual), *moves)  # a view, so that a write before the cache would be seen

    reference.move_kv(*(cache[1:] for cache in expected), *(slots[moves[1] >= 0] for slots in moves))
    assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))
