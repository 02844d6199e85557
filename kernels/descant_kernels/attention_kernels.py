# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# Triton turns launch arguments into constexpr and numbers into tensors; its annotations do not allow that.
"""Triton kernels of `paged_attention`: one kernel for prefill, decode and tree verify, and one that joins splits.

A program takes a tile: consecutive queries of one sequence, with all query heads that share a key-value head as its
rows. A row's positions are cut into splits of SPLIT by absolute position. Each split has a softmax of its own, chunk
by chunk, and the splits are then joined in order (flash decoding, Dao et al. 2023). So the operations on a row are the
same whether one program takes all splits of its tile or each split has its own program, and they do not depend on the
rest of the batch. Only the number of rows in a tile may change how `tl.dot` multiplies.

Positions count along a row's own path. A tree's nodes share the chunks below their tree, as other queries do. Chunks
that reach into the tree are read once per node, through the node's ancestors, and apply to that node's rows only.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # the kernels compute powers of two
_LOWEST = tl.constexpr(-1e38)  # finite, so that all weights of a chunk that is hidden from a row are exactly 0
_BEYOND = tl.constexpr(2**30)  # above every position


@triton.jit
def _find_sequence(cu_seqlens_ptr, num_sequences, tile, TILE: tl.constexpr, SPARE: tl.constexpr):
    """Return the last sequence s with its first tile, cu_seqlens[s] // TILE + SPARE * s, at or before `tile`.

    One spare tile per sequence ensures that no two sequences share a tile, for any lengths, and that the size of the
    grid depends on shapes only.
    """
    count = 0
    for start in range(0, num_sequences, 128):
        s = start + tl.arange(0, 128)
        first_row = tl.load(cu_seqlens_ptr + s, mask=s < num_sequences, other=0)
        count += tl.sum(((s < num_sequences) & (first_row // TILE + SPARE * s <= tile)).to(tl.int32), axis=0)
    return count - 1


@triton.jit
def _path_positions(
    tokens, mask, end, context_len, prefix, ancestors_ptr, max_depth, HAS_TREES: tl.constexpr, BLOCK_DEPTH: tl.constexpr
):
    """Return each query's position along its own path; -1 where masked."""
    positions = context_len - end + tokens
    if HAS_TREES:
        depth = tl.arange(0, BLOCK_DEPTH)[None, :]
        node_mask = mask[:, None] & (depth < tl.where(prefix >= 0, max_depth, 0))
        nodes = tl.load(ancestors_ptr + tokens[:, None] * max_depth + depth, mask=node_mask, other=-1)
        depths = tl.sum((nodes >= 0).to(tl.int32), axis=1)
        positions = tl.where(prefix >= 0, prefix + depths - 1, positions)
    return tl.where(mask, positions, -1)


@triton.jit
def _lowest_seen(positions, WINDOW: tl.constexpr):
    """Return the lowest position that each query sees."""
    return tl.maximum(positions - (WINDOW - 1), 0) if WINDOW else positions * 0


@triton.jit
def _join(m, total, acc, split_m, split_total, split_acc):
    """Add a split to a running softmax; exact where either is empty. `fma` fixes the rounding on every device."""
    new_m = tl.maximum(m, split_m)
    old_factor = tl.exp2(m - new_m)
    new_factor = tl.exp2(split_m - new_m)
    total = tl.fma(total, old_factor, split_total * new_factor)
    acc = tl.fma(acc, tl.expand_dims(old_factor, -1), split_acc * tl.expand_dims(new_factor, -1))
    return new_m, total, acc


@triton.jit
def _add_chunk(
    # Running softmax of the split; queries and their positions
    m,
    total,
    acc,
    q,
    positions,
    lowest,
    highest,
    # The chunk: positions along the path, and the same positions in the sequence's cache
    path,
    cached,
    # The cache
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    kv_head,
    # Scores
    scale,
    soft_cap,
    # Meta
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one chunk of keys and values. Positions that no row sees are never loaded."""
    dim = tl.arange(0, BLOCK_D)
    seen = (path >= lowest) & (path <= highest) & (cached >= 0)
    block = tl.load(table_ptr + cached // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    line = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + cached % BLOCK_SIZE) * HEAD_DIM
    mask = seen[:, None] & (dim < HEAD_DIM)[None, :]
    k = tl.load(k_cache_ptr + line[:, None] + dim[None, :], mask=mask, other=0.0)
    v = tl.load(v_cache_ptr + line[:, None] + dim[None, :], mask=mask, other=0.0)

    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_CAP:  # cap * tanh(x) = cap - 2 * cap / (exp(2 * x) + 1), which equals cap from exp2(126) on
        exponential = tl.exp2(tl.minimum(scores * (2.0 / soft_cap), 126.0))
        scores = (soft_cap - 2.0 * soft_cap / (exponential + 1.0)) * LOG2_E
    visible = seen[None, :] & (path[None, :] <= positions[:, None])
    if WINDOW:
        visible = visible & (path[None, :] > positions[:, None] - WINDOW)
    scores = tl.where(visible, scores, -float("inf"))

    new_m = tl.maximum(m, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_m[:, None])
    factor = tl.exp2(m - new_m)
    total = tl.fma(total, factor, tl.sum(weights, axis=1))
    acc = tl.dot(weights.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
    return new_m, total, acc


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "max_depth", "num_tokens"])
def attend_kernel(
    # Pointers
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    partial_ptr,
    partial_m_ptr,
    partial_total_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    tables_ptr,
    ancestors_ptr,
    prefix_lens_ptr,
    # Sizes
    num_sequences,
    num_tokens,
    max_depth,
    scale,
    soft_cap,
    # Strides
    q_token_stride,
    q_head_stride,
    table_stride,
    # Meta
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TREES: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with the rows of one tile and key-value head over all splits; if SPREAD, store one split for joining.

    Grid: (tiles, key-value heads, splits if SPREAD else 1).
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _find_sequence(cu_seqlens_ptr, num_sequences, tile, TILE, 1)
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    first = start + (tile - start // TILE - sequence) * TILE
    if first >= end:
        return
    last = tl.minimum(first + TILE, end)

    row = tl.arange(0, BLOCK_M)
    token = first + row // GROUP
    row_mask = (row < TILE * GROUP) & (token < end)
    prefix = -1
    if HAS_TREES:
        prefix = tl.load(prefix_lens_ptr + sequence)
    context_len = tl.load(context_lens_ptr + sequence)
    positions = _path_positions(
        token, row_mask, end, context_len, prefix, ancestors_ptr, max_depth, HAS_TREES, BLOCK_DEPTH
    )
    highest = tl.max(positions, axis=0)
    lowest = tl.min(tl.where(row_mask, _lowest_seen(positions, WINDOW), _BEYOND), axis=0)
    first_split = lowest // SPLIT
    last_split = highest // SPLIT
    if SPREAD:
        split_index = tl.program_id(2)
        if (split_index < first_split) | (split_index > last_split):
            return
        first_split = split_index
        last_split = split_index

    dim = tl.arange(0, BLOCK_D)
    out_row = token.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
    row_start = token.to(tl.int64) * q_token_stride + (kv_head * GROUP + row % GROUP) * q_head_stride
    mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + row_start[:, None] + dim[None, :], mask=mask, other=0.0)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    tree_start = _BEYOND  # position from which every node has chunks of its own
    if HAS_TREES:
        tree_start = tl.where(prefix >= 0, prefix // CHUNK * CHUNK, _BEYOND)

    m = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(first_split, last_split + 1):
        split_m = tl.full((BLOCK_M,), _LOWEST, tl.float32)
        split_total = tl.zeros((BLOCK_M,), tl.float32)
        split_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        begin = tl.maximum(split * SPLIT, lowest // CHUNK * CHUNK)
        stop = tl.minimum((split + 1) * SPLIT, highest + 1)
        for chunk in range(begin, tl.minimum(stop, tree_start), CHUNK):
            path = chunk + tl.arange(0, CHUNK)
            split_m, split_total, split_acc = _add_chunk(
                *(split_m, split_total, split_acc, q, positions, lowest, highest, path, path),
                *(k_cache_ptr, v_cache_ptr, table_ptr, kv_head, scale, soft_cap),
                *(KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, HAS_CAP, BLOCK_D, PRECISION),
            )
        if HAS_TREES:
            for chunk in range(tl.maximum(begin, tree_start), stop, CHUNK):
                path = chunk + tl.arange(0, CHUNK)
                in_tree = (path >= prefix) & (path < prefix + max_depth)
                for node in range(first, last):
                    nodes = tl.load(ancestors_ptr + node * max_depth + path - prefix, mask=in_tree, other=-1)
                    node_m, node_total, node_acc = _add_chunk(
                        *(split_m, split_total, split_acc, q, positions, lowest, highest),
                        *(path, tl.where(path < prefix, path, nodes)),
                        *(k_cache_ptr, v_cache_ptr, table_ptr, kv_head, scale, soft_cap),
                        *(KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, HAS_CAP, BLOCK_D, PRECISION),
                    )
                    rows = token == node
                    split_m = tl.where(rows, node_m, split_m)
                    split_total = tl.where(rows, node_total, split_total)
                    split_acc = tl.where(rows[:, None], node_acc, split_acc)
        m, total, acc = _join(m, total, acc, split_m, split_total, split_acc)

    if SPREAD:
        out_row += first_split.to(tl.int64) * num_tokens * (KV_HEADS * GROUP)
        tl.store(partial_m_ptr + out_row, m, mask=row_mask)
        tl.store(partial_total_ptr + out_row, total, mask=row_mask)
        tl.store(partial_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], acc, mask=mask)
    else:
        attended = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # the total of a padding row is 0
        tl.store(out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], attended.to(q.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_sequences", "max_depth", "num_tokens"])
def join_splits_kernel(
    # Pointers
    out_ptr,
    partial_ptr,
    partial_m_ptr,
    partial_total_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    ancestors_ptr,
    prefix_lens_ptr,
    # Sizes
    num_sequences,
    num_tokens,
    max_depth,
    # Meta
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_TREES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
):
    """Store out[token, heads of one key-value head], joined from their splits in order."""
    token = tl.program_id(0)
    sequence = _find_sequence(cu_seqlens_ptr, num_sequences, token, 1, 0)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    if token >= end:
        return
    prefix = -1
    if HAS_TREES:
        prefix = tl.load(prefix_lens_ptr + sequence)
    context_len = tl.load(context_lens_ptr + sequence)
    tokens = token + tl.arange(0, 1)
    positions = _path_positions(
        tokens, tokens < end, end, context_len, prefix, ancestors_ptr, max_depth, HAS_TREES, BLOCK_DEPTH
    )
    highest = tl.max(positions, axis=0)
    lowest = tl.max(_lowest_seen(positions, WINDOW), axis=0)

    dim = tl.arange(0, BLOCK_D)
    member = tl.arange(0, BLOCK_GROUP)
    row_mask = member < GROUP
    mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
    rows_per_split = num_tokens * (KV_HEADS * GROUP)
    out_row = (token * KV_HEADS + tl.program_id(1)).to(tl.int64) * GROUP + member
    row = out_row + (lowest // SPLIT).to(tl.int64) * rows_per_split
    m = tl.full((BLOCK_GROUP,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    acc = tl.zeros((BLOCK_GROUP, BLOCK_D), tl.float32)
    for _ in range(lowest // SPLIT, highest // SPLIT + 1):
        split_m = tl.load(partial_m_ptr + row, mask=row_mask, other=_LOWEST)
        split_total = tl.load(partial_total_ptr + row, mask=row_mask, other=1.0)
        split_acc = tl.load(partial_ptr + row[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        m, total, acc = _join(m, total, acc, split_m, split_total, split_acc)
        row += rows_per_split
    attended = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], attended, mask=mask)
