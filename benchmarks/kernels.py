"""Each op on this CPU, against the bytes and multiplications it must do and against the straightforward alternatives.

    python benchmarks/kernels.py [--only add_lora --repeats 15]

Shapes are those of Qwen2.5-0.5B. Weights and adapters lie in several copies that are used in turn, more than any cache
holds, as a model's layers are. Floors are the larger of bytes over the measured read bandwidth and multiplications over
the measured rate of a float32 product. (GPUs: `benchmarks/gpu.py`.)
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from report import Report, table
from torch import Tensor

from descant.engine.allocator import keep_freed_memory
from descant_kernels import (
    AttentionBatch,
    LoraTables,
    NodeNoise,
    PairLayout,
    Segments,
    add_lora,
    gumbel_noise,
    linear,
    pack_linear,
    paged_attention,
    reference,
    rms_norm,
    rope_write_kv,
    sample_nodes,
    silu_mul,
)

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 896, 4864, 14, 2, 64, 151_936
RANK, BLOCK_SIZE = 16, 16
COPIES = 12
ROWS = (1, 8, 32)
DTYPES = (torch.float32, torch.bfloat16)
Op = Callable[[int], object]  # of the number of the copy to use


@dataclass(frozen=True, slots=True)
class Case:
    """An op, what it must move and multiply, and the other ways of doing it."""

    name: str
    op: Op
    num_bytes: float
    num_products: float = 0.0
    others: tuple[tuple[str, Op], ...] = ()


def main() -> None:
    """Print the table and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    keep_freed_memory()
    report = Report("kernels", options)
    bandwidth, products = measure_bandwidth(), measure_products()
    print(report.header())
    print(f"{torch.get_num_threads()} threads, read {bandwidth / 1e9:.1f} GB/s, {products / 1e9:.0f} G products/s\n")
    rows, stored = [], []
    with torch.inference_mode():
        for case in all_cases(options.only):
            seconds, *others = interleaved([case.op, *(op for _, op in case.others)], options.repeats)
            floor_s = max(case.num_bytes / bandwidth, case.num_products / products)
            ratios = {name: other / seconds for (name, _), other in zip(case.others, others, strict=True)}
            told = ", ".join(f"{name} {value:.2f}×" for name, value in ratios.items())
            rows.append([case.name, f"{seconds * 1e6:.0f}", f"{floor_s * 1e6:.0f}", f"{floor_s / seconds:.0%}", told])
            stored.append({"case": case.name, "us": seconds * 1e6, "floor_us": floor_s * 1e6, "others": ratios})
            print(".", end="", flush=True)
    print("\n" + table(["op", "µs", "floor", "of floor", "time of alternatives"], rows))
    print(f"\nstored: {report.save(stored).name}")


def interleaved(ops: list[Op], repeats: int) -> list[float]:
    """Median seconds of each op, all in turn, over the copies."""
    times: list[list[float]] = [[] for _ in ops]
    for repeat in range(repeats + 1):  # the first warms up
        for op, taken in zip(ops, times, strict=True):
            started = time.perf_counter()
            for copy in range(COPIES):
                op(copy)
            if repeat:
                taken.append((time.perf_counter() - started) / COPIES)
    return [statistics.median(taken) for taken in times]


def measure_bandwidth() -> float:
    """Bytes per second of a large sum."""
    data = torch.ones(96 << 20)
    return 4 * data.numel() / interleaved([lambda copy: data.sum()], 1)[0]


def measure_products() -> float:
    """Multiplications per second of a float32 product of 768 rows."""
    x, weight = torch.randn(768, 2048), torch.randn(2048, 2048)
    return 768 * 2048 * 2048 / interleaved([lambda copy: F.linear(x, weight)], 2)[0]


def all_cases(only: str) -> Iterator[Case]:
    """The cases whose name has `only` in it, each made when its turn comes."""
    for dtype, num_rows in itertools.product(DTYPES, ROWS):
        label = f"{num_rows} rows, {str(dtype).removeprefix('torch.')}"
        makers: dict[str, Callable[[], Case]] = {
            f"linear 896→9728, {label}": lambda n=num_rows, d=dtype: linear_case(n, d),
            f"attention 14/2 heads, 100 positions, {label}": lambda n=num_rows, d=dtype: attention_case(n, d, 100),
            f"attention 14/2 heads, 1000 positions, {label}": lambda n=num_rows, d=dtype: attention_case(n, d, 1000),
            f"rms_norm with residual, {label}": lambda n=num_rows, d=dtype: norm_case(n, d),
            f"rope_write_kv, {label}": lambda n=num_rows, d=dtype: rope_case(n, d),
            f"silu_mul, {label}": lambda n=num_rows, d=dtype: silu_case(n, d),
        }
        for num_adapters in {1, num_rows}:
            name = f"add_lora 896→2×4864, r=16, {num_adapters} adapters, {label}"
            makers[name] = lambda n=num_rows, d=dtype, a=num_adapters: lora_case(n, d, a)
        if dtype is torch.float32:
            makers[f"sample_nodes, half of the rows drawn, {label}"] = lambda n=num_rows: sample_case(n)
        for name, make in makers.items():
            if only in name:
                case = make()
                yield Case(name, case.op, case.num_bytes, case.num_products, case.others)


def linear_case(num_rows: int, dtype: torch.dtype) -> Case:
    """Gate and up in one; the alternative is torch's product in the same dtype."""
    weights = [(torch.randn(2 * INNER, HIDDEN) / 30).to(dtype) for _ in range(COPIES)]
    packed = [pack_linear(weight) for weight in weights]
    x = torch.randn(num_rows, HIDDEN).to(dtype)
    num_elements = 2 * INNER * HIDDEN
    return Case(
        "",
        lambda copy: linear(x, packed[copy]),
        num_elements * dtype.itemsize,
        num_rows * num_elements,
        (("F.linear", lambda copy: F.linear(x, weights[copy])),),
    )


def lora_case(num_rows: int, dtype: torch.dtype, num_adapters: int) -> Case:
    """Gate and up of `num_adapters` adapters dealt to rows in runs."""
    layout = PairLayout.of(RANK, HIDDEN, INNER)
    slot_size, out_sizes = 2 * layout.size, (INNER, INNER)
    arena = (torch.randn(COPIES * num_adapters * slot_size) / 30).to(dtype)
    offsets = [
        [(copy * num_adapters + slot) * slot_size + part * layout.size for copy in range(COPIES) for part in (0, 1)]
        for slot in range(num_adapters)
    ]
    tables = LoraTables.of(arena, offsets, [[RANK] * 2 * COPIES] * num_adapters)
    lengths = [num_rows // num_adapters] * num_adapters
    segments = Segments.of(lengths, list(range(num_adapters)))
    x, y = torch.randn(num_rows, HIDDEN).to(dtype), torch.zeros(num_rows, 2 * INNER).to(dtype)
    owner = torch.arange(num_adapters).repeat_interleave(num_rows // num_adapters)

    def matrices(copy: int, slot: int) -> list[tuple[Tensor, Tensor]]:
        return [layout.views(arena, offsets[slot][2 * copy + part]) for part in (0, 1)]

    def loop(copy: int) -> None:
        for slot in range(num_adapters):
            rows = slice(slot * lengths[0], (slot + 1) * lengths[0])
            for part, (a, b) in enumerate(matrices(copy, slot)):
                y[rows, part * INNER : (part + 1) * INNER].addmm_(x[rows] @ a.T, b.T)

    def gathered(copy: int) -> None:
        for part in (0, 1):
            pairs = [matrices(copy, slot)[part] for slot in owner.tolist()]
            all_a, all_b = torch.stack([a.T for a, _ in pairs]), torch.stack([b.T for _, b in pairs])
            update = torch.bmm(torch.bmm(x.unsqueeze(1), all_a), all_b)
            y[:, part * INNER : (part + 1) * INNER] += update.squeeze(1)

    def dense(copy: int) -> None:
        for part in (0, 1):
            pairs = [matrices(copy, slot)[part] for slot in range(num_adapters)]
            h = (x @ torch.cat([a for a, _ in pairs]).T).view(num_rows, num_adapters, RANK)
            h *= (torch.arange(num_adapters) == owner[:, None]).unsqueeze(-1)
            y[:, part * INNER : (part + 1) * INNER] += h.flatten(1) @ torch.cat([b.T for _, b in pairs])

    num_elements = num_adapters * 2 * RANK * (HIDDEN + INNER)
    return Case(
        "",
        lambda copy: add_lora(y, x, tables, segments, 2 * copy, out_sizes),
        num_elements * dtype.itemsize + 2 * y.nbytes,
        num_rows * 2 * RANK * (HIDDEN + INNER),
        (("loop", loop), ("gathered bmm", gathered), ("dense", dense)),
    )


def attention_case(num_rows: int, dtype: torch.dtype, context: int) -> Case:
    """Decode of sequences of one length; the alternative gathers, expands and uses SDPA."""
    num_blocks = -(-context // BLOCK_SIZE)
    shape = (num_rows * num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    caches = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(COPIES)]
    tables = torch.randperm(num_rows * num_blocks).view(num_rows, num_blocks)
    batch = AttentionBatch.of([1] * num_rows, [context] * num_rows, tables.tolist())
    q = torch.randn(num_rows, HEADS, HEAD_DIM).to(dtype)

    def sdpa(copy: int) -> Tensor:
        k, v = (
            cache[tables].transpose(1, 2).flatten(2, 3)[:, :, :context].repeat_interleave(HEADS // KV_HEADS, 1)
            for cache in caches[copy]
        )
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v)

    return Case(
        "",
        lambda copy: paged_attention(q, *caches[copy], batch, HEAD_DIM**-0.5),
        2 * num_rows * context * KV_HEADS * HEAD_DIM * dtype.itemsize,
        2 * num_rows * context * HEADS * HEAD_DIM,
        (("gathered SDPA", sdpa),),
    )


def norm_case(num_rows: int, dtype: torch.dtype) -> Case:
    """The alternative is the reference."""
    x, residual, weight = (torch.randn(num_rows, HIDDEN).to(dtype), torch.randn(num_rows, HIDDEN).to(dtype), None)
    weight = torch.ones(HIDDEN, dtype=dtype)
    return Case(
        "",
        lambda copy: rms_norm(x, weight, 1e-6, residual),
        4 * x.nbytes,
        others=(("reference", lambda copy: reference.rms_norm(x, weight, 1e-6, residual)),),
    )


def rope_case(num_rows: int, dtype: torch.dtype) -> Case:
    """The alternative rotates one head type after the other and writes by index."""
    heads = HEADS + 2 * KV_HEADS
    qkv = torch.randn(num_rows, heads, HEAD_DIM).to(dtype)
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    cos, sin = torch.rand(num_rows, HEAD_DIM // 2), torch.rand(num_rows, HEAD_DIM // 2)
    k_cache, v_cache = (torch.zeros(num_rows, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=dtype) for _ in "kv")
    slots = torch.arange(num_rows) * BLOCK_SIZE

    def plain(copy: int) -> None:
        for part in (q, k):
            reference.rope(part, cos, sin)
        for cache, values in ((k_cache, k), (v_cache, v)):
            cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = values

    return Case(
        "",
        lambda copy: rope_write_kv(q, k, v, cos, sin, k_cache, v_cache, slots),
        2 * qkv.nbytes,
        others=(("plain", plain),),
    )


def silu_case(num_rows: int, dtype: torch.dtype) -> Case:
    """The alternative is torch's silu."""
    gate_up = torch.randn(num_rows, 2 * INNER).to(dtype)
    return Case(
        "",
        lambda copy: silu_mul(gate_up),
        1.5 * gate_up.nbytes,
        others=(("F.silu", lambda copy: F.silu(gate_up[:, :INNER]) * gate_up[:, INNER:]),),
    )


def sample_case(num_rows: int) -> Case:
    """Logits as peaked as a model's; the alternative makes all the noise."""
    logits = torch.randn(num_rows, VOCAB) * 4
    noise = NodeNoise.of(list(range(num_rows)), [0] * num_rows, [5] * num_rows, [i % 2 == 0 for i in range(num_rows)])

    def plain(copy: int) -> Tensor:
        gumbel = gumbel_noise(noise.seeds, noise.choices, noise.output_indices, VOCAB)
        return torch.where(noise.sampled[:, None], logits + gumbel, logits).argmax(-1)

    return Case("", lambda copy: sample_nodes(logits, noise), logits.nbytes, others=(("all noise", plain),))


if __name__ == "__main__":
    main()
