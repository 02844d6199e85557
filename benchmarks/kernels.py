"""Each op on this CPU against its floor and against the straightforward alternatives, at the sizes of Qwen2.5-0.5B.

    python benchmarks/kernels.py [--only add_lora linear --dtypes bfloat16 --rows 8]

The floor of an op is the longer of two times, at rates measured on this machine: the bytes it must move (weights and
rows once) at the read bandwidth of a matrix-vector product, and the multiplications it must do at the rate of a square
float32 product. Data that a step of the model reads from memory is read from memory here too: each call takes the next
of several copies, which together do not fit into the last cache. Op and alternatives are first checked to compute the
same, and are then measured in turns. The times of alternatives are multiples of the op's: above 1, the op is faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from random_model import QWEN_05B
from report import RESULTS, Report, figures, median, ratio, stage, table
from torch import Tensor

import descant_kernels as ops
from descant.engine.allocator import keep_freed_memory
from descant_kernels import AttentionBatch, LoraTables, NodeNoise, PairLayout, Segments

RANK = 16
ADAPTERS = (1, 8, 32)
BLOCK_SIZE = 16
CONTEXT = 512
TURNS = 7
TURN_S = 0.008  # a faster op is called repeatedly, until its turn takes as long
LIMIT_S = 0.6  # of one line, once each op has had three turns
HIDDEN, INNER, KV_SIZE = QWEN_05B.hidden_size, QWEN_05B.intermediate_size, QWEN_05B.kv_size
HEADS, KV_HEADS, HEAD_DIM = QWEN_05B.num_attention_heads, QWEN_05B.num_key_value_heads, QWEN_05B.head_dim
GROUPS = {
    "q, k, v": (HIDDEN, (HIDDEN, KV_SIZE, KV_SIZE)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate, up": (HIDDEN, (INNER, INNER)),
    "down": (INNER, (HIDDEN,)),
}
"""Projections that share their input: its size, and the sizes of the outputs."""

Op = Callable[[int], object]
"""An op on the copy of that number."""


@dataclass(frozen=True)
class Machine:
    """The rates of this machine, in bytes per second and multiply-adds per second, and the bytes of its last cache."""

    bandwidth: float
    products: float
    cache_bytes: int

    def floor(self, num_bytes: float, num_products: float = 0.0) -> float:
        """Return the least seconds."""
        return max(num_bytes / self.bandwidth, num_products / self.products)

    def num_copies(self, num_bytes: int) -> int:
        """Return the number of copies of this size that together take at least twice the cache."""
        return max(1, min(-(-2 * self.cache_bytes // num_bytes), 512))


@dataclass
class Line:
    """One measurement: seconds of the op and of each alternative, turn by turn."""

    name: str
    floor_s: float
    seconds: list[float]
    others_s: dict[str, list[float]]

    def cells(self) -> list[str]:
        """Return the line of the table."""
        op = median(self.seconds)
        others = [ratio(median(values), op) for values in self.others_s.values()]
        return [self.name, figures(op * 1e6), figures(self.floor_s * 1e6), f"{self.floor_s / op:.0%}", *others]


Section = Callable[[Machine, torch.dtype, Sequence[int]], Iterator[Line]]
"""What measures an op in a dtype at several numbers of rows."""


def measured(name: str, floor_s: float, op: Op, others: Mapping[str, Op]) -> Line:
    """Measure op and alternatives in turns, and return the time of each."""
    line = Line(name, floor_s, [], {other: [] for other in others})
    contestants = [op, *others.values()]
    for one in contestants:
        one(0)
    calls = [max(1, int(TURN_S / max(seconds_of(one, 1, 1), 1e-7))) for one in contestants]
    started_s = time.perf_counter()
    for turn in range(TURNS):
        for one, times, found in zip(contestants, calls, [line.seconds, *line.others_s.values()], strict=True):
            found.append(seconds_of(one, turn * times, times))
        if turn >= 2 and time.perf_counter() - started_s > LIMIT_S:
            break
    return line


def seconds_of(op: Op, first: int, times: int) -> float:
    """Return the seconds per call. Each call takes the next copy."""
    started_s = time.perf_counter()
    for number in range(first, first + times):
        op(number)
    return (time.perf_counter() - started_s) / times


def main(options: argparse.Namespace) -> None:
    """Measure, print and store."""
    report = Report("kernels", options)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the executor does
    torch.manual_seed(0)
    machine = measure_machine()
    print(report.header())
    print(
        f"{options.threads} threads, reads {machine.bandwidth / 1e9:.1f} GB/s, float32 products "
        f"{2 * machine.products / 1e9:.0f} GFLOP/s, last cache {machine.cache_bytes >> 20} MiB"
    )
    results: dict[str, dict[str, list[dict[str, object]]]] = {}
    for name in options.only:
        for dtype in options.dtypes if name != "sample_nodes" else ["float32"]:
            with torch.inference_mode(), stage(f"\n{name}, {dtype}"):
                lines = list(SECTIONS[name](machine, getattr(torch, dtype), options.rows))
            heads = [name, "µs", "floor µs", "of floor", *lines[0].others_s]
            print(table(heads, [line.cells() for line in lines]), flush=True)
            results.setdefault(name, {})[dtype] = [asdict(line) for line in lines]
    print(f"\nstored: {report.save({'machine': asdict(machine), 'ops': results}, options.results)}")


def measure_machine(turns: int = 7) -> Machine:
    """Measure the rates that floors are computed from."""
    matrix, vector = torch.ones(1 << 15, 1 << 12), torch.ones(1 << 12)
    square = torch.ones(1024, 1024)
    read_s = min(seconds_of(lambda _: torch.mv(matrix, vector), 0, 1) for _ in range(turns))
    product_s = min(seconds_of(lambda _: square @ square, 0, 2) for _ in range(turns))
    return Machine(matrix.nbytes / read_s, 1024**3 / product_s, cache_bytes())


def cache_bytes() -> int:
    """Return the size of the last cache as reported by the system, else 64 MiB."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 << 20)


def check(ours: Tensor, others: dict[str, Tensor]) -> None:
    """Raise SystemExit if an alternative computes a different result."""
    for name, other in others.items():
        distance = float((ours.float() - other.float()).norm() / ours.float().norm())
        if not distance < 0.02:  # bfloat16 results are rounded at different places
            raise SystemExit(f"refused: {name!r} computes something else, relative distance {distance:.3f}")


# ---- ops ----------------------------------------------------------------------------------------------------------


def linear_lines(machine: Machine, dtype: torch.dtype, rows: Sequence[int]) -> Iterator[Line]:
    """Measure `linear` against the plain product."""
    sizes = {name: (in_size, sum(outs)) for name, (in_size, outs) in GROUPS.items()}
    for name, (in_size, out_size) in (sizes | {"head": (HIDDEN, QWEN_05B.vocab_size)}).items():
        copies = machine.num_copies(in_size * out_size * dtype.itemsize)
        weights = [(torch.randn(out_size, in_size) * in_size**-0.5).to(dtype) for _ in range(copies)]
        packed = [ops.pack_linear(weight) for weight in weights]
        for num_rows in rows:
            yield linear_line(machine, f"{name}, {num_rows} rows", num_rows, weights, packed)


def linear_line(
    machine: Machine, name: str, num_rows: int, weights: list[Tensor], packed: list[ops.PackedLinear]
) -> Line:
    """Measure the products of these weights, one after the other."""
    first, copies = weights[0], len(weights)
    x = torch.randn(num_rows, first.shape[1]).to(first.dtype)
    floor_s = machine.floor(first.nbytes + sum(first.shape) * num_rows * first.itemsize, first.numel() * num_rows)
    check(ops.linear(x, packed[0]), {"F.linear": F.linear(x, first)})
    others: dict[str, Op] = {"F.linear": lambda i: F.linear(x, weights[i % copies])}
    return measured(name, floor_s, lambda i: ops.linear(x, packed[i % copies]), others)


class Adapters:
    """Adapters for copies of one group of projections, in the layout of the arena and in those of the alternatives."""

    def __init__(self, machine: Machine, dtype: torch.dtype, num: int, in_size: int, out_sizes: tuple[int, ...]):
        self.dtype, self.num, self.in_size, self.out_sizes = dtype, num, in_size, out_sizes
        layouts = [PairLayout.of(RANK, in_size, out_size) for out_size in out_sizes]
        self.num_bytes = num * dtype.itemsize * RANK * sum(in_size + out_size for out_size in out_sizes)
        self.num_copies = machine.num_copies(self.num_bytes)
        sizes = [layout.size for layout in layouts] * self.num_copies
        starts = list(accumulate(sizes, initial=0))
        arena = torch.empty(num * starts[-1]).normal_(std=RANK**-0.5).to(dtype)
        offsets = [[slot * starts[-1] + start for start in starts[:-1]] for slot in range(num)]
        self.tables = LoraTables.of(arena, offsets, [[RANK] * len(sizes)] * num)
        self.pairs = [  # by copy, slice, slot
            [[layout.views(arena, offsets[slot][first + j]) for slot in range(num)] for j, layout in enumerate(layouts)]
            for first in range(0, len(sizes), len(layouts))
        ]
        a, b = ([[torch.stack([pair[i].T for pair in one]) for one in copy] for copy in self.pairs] for i in (0, 1))
        self.all_a, self.all_b = a, b  # by copy, slice: [num, in, R], [num, R, out]
        self.dense_a = [[one.transpose(0, 1).flatten(1) for one in copy] for copy in a]  # [in, num * R]
        self.dense_b = [[one.flatten(0, 1) for one in copy] for copy in b]  # [num * R, out]

    def contestants(self, y: Tensor, x: Tensor) -> dict[str, Op]:
        """Return the op and its alternatives, all in place on `y`. The rows of each adapter form one run."""
        length, num_slices = x.shape[0] // self.num, len(self.out_sizes)
        segments = Segments.of([length] * self.num, range(self.num))
        columns = list(pairwise(accumulate(self.out_sizes, initial=0)))
        runs = list(pairwise(segments.host_indptr))
        owner = torch.arange(self.num).repeat_interleave(length)
        mask = F.one_hot(owner, self.num).repeat_interleave(RANK, dim=1).to(x.dtype)

        def ours(i: int) -> None:
            ops.add_lora(y, x, self.tables, segments, i % self.num_copies * num_slices, self.out_sizes)

        def loop(i: int) -> None:
            for (left, right), pairs in zip(columns, self.pairs[i % self.num_copies], strict=True):
                for (start, end), (a, b) in zip(runs, pairs, strict=True):
                    y[start:end, left:right].addmm_(x[start:end] @ a.T, b.T)

        def gathered(i: int) -> None:
            copy = i % self.num_copies
            for (left, right), a, b in zip(columns, self.all_a[copy], self.all_b[copy], strict=True):
                y[:, left:right] += torch.bmm(torch.bmm(x[:, None], a[owner]), b[owner])[:, 0]

        def dense(i: int) -> None:
            copy = i % self.num_copies
            for (left, right), a, b in zip(columns, self.dense_a[copy], self.dense_b[copy], strict=True):
                y[:, left:right].addmm_((x @ a).mul_(mask), b)

        return {"add_lora": ours, "loop, addmm": loop, "gathered bmm": gathered, "dense, masked": dense}


def lora_lines(machine: Machine, dtype: torch.dtype, rows: Sequence[int]) -> Iterator[Line]:
    """Measure `add_lora` against a loop over adapters, matrices gathered per row, and all adapters for all rows."""
    for name, (in_size, out_sizes) in GROUPS.items():
        for num_adapters in ADAPTERS:
            fitting = [num for num in rows if num % num_adapters == 0]  # equal numbers of rows for all adapters
            if not fitting:
                continue
            adapters = Adapters(machine, dtype, num_adapters, in_size, out_sizes)
            for num_rows in fitting:
                yield lora_line(machine, f"{name}, {num_rows} rows, adapters: {num_adapters}", num_rows, adapters)


def lora_line(machine: Machine, name: str, num_rows: int, adapters: Adapters) -> Line:
    """Measure rows that are divided among these adapters."""
    x = torch.randn(num_rows, adapters.in_size).to(adapters.dtype)
    zeros = torch.zeros(num_rows, sum(adapters.out_sizes), dtype=adapters.dtype)
    results = {each: zeros.clone() for each in adapters.contestants(zeros, x)}
    for each, y in results.items():
        adapters.contestants(y, x)[each](1)
    check(results.pop("add_lora"), results)
    num_products = num_rows * adapters.num_bytes / adapters.num / x.itemsize
    floor_s = machine.floor(adapters.num_bytes + x.nbytes + 2 * zeros.nbytes, num_products)
    contestants = adapters.contestants(zeros, x)
    return measured(name, floor_s, contestants.pop("add_lora"), contestants)


def attention_lines(machine: Machine, dtype: torch.dtype, rows: Sequence[int]) -> Iterator[Line]:
    """Measure `paged_attention` against SDPA on gathered keys and values, expanded to all heads or not."""
    for num_sequences, num_new in [*((num, 1) for num in rows), (1, CONTEXT)]:
        yield attention_line(machine, dtype, num_sequences, num_new)


def attention_line(machine: Machine, dtype: torch.dtype, num_sequences: int, num_new: int) -> Line:
    """Measure a number of sequences with a number of new tokens each, or with a whole prompt."""
    num_blocks = CONTEXT // BLOCK_SIZE
    shape = (num_sequences * num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    copies = machine.num_copies(2 * num_sequences * CONTEXT * KV_SIZE * dtype.itemsize)
    caches = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(copies)]
    blocks = torch.randperm(shape[0]).view(num_sequences, num_blocks)
    batch = AttentionBatch.of([num_new] * num_sequences, [CONTEXT] * num_sequences, blocks.tolist())
    q = torch.randn(num_sequences * num_new, HEADS, HEAD_DIM).to(dtype)

    def ours(i: int) -> Tensor:
        keys, values = caches[i % copies]
        return ops.paged_attention(q, keys, values, batch, HEAD_DIM**-0.5)

    def gathered(i: int, num_repeats: int) -> Tensor:
        keys, values = (
            cache[blocks].transpose(1, 2).reshape(num_sequences, KV_HEADS, CONTEXT, HEAD_DIM)
            for cache in caches[i % copies]
        )
        if num_repeats > 1:
            keys, values = (t.repeat_interleave(num_repeats, dim=1) for t in (keys, values))
        queries = q.view(num_sequences, num_new, HEADS, HEAD_DIM).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=num_new > 1, enable_gqa=num_repeats == 1)
        return out.transpose(1, 2).reshape(q.shape)

    others = {
        "gather, expand, SDPA": lambda i: gathered(i, HEADS // KV_HEADS),
        "gather, SDPA with GQA": lambda i: gathered(i, 1),
    }
    check(ours(0), {name: other(0) for name, other in others.items()})
    num_pairs = num_sequences * num_new * (CONTEXT - (num_new - 1) / 2)
    kv_bytes = sum(cache.nbytes for cache in caches[0])
    floor_s = machine.floor(kv_bytes + 2 * q.nbytes, 2 * num_pairs * HEADS * HEAD_DIM)
    return measured(f"{num_sequences} × {num_new} new of {CONTEXT}", floor_s, ours, others)


def norm_line(machine: Machine, dtype: torch.dtype, num_rows: int) -> Line:
    """Measure `rms_norm` with the residual."""
    weight, x = torch.randn(HIDDEN).to(dtype), torch.randn(num_rows, HIDDEN).to(dtype)
    residual = torch.zeros_like(x)
    check(ops.rms_norm(x, weight, 1e-6, residual), {"F.rms_norm": F.rms_norm(x, (HIDDEN,), weight, 1e-6)})
    return measured(
        f"{num_rows} rows",
        machine.floor(4 * x.nbytes),
        lambda _: ops.rms_norm(x, weight, 1e-6, residual),
        {"add_, F.rms_norm": lambda _: F.rms_norm(residual.add_(x), (HIDDEN,), weight, 1e-6)},
    )


def rope_line(machine: Machine, dtype: torch.dtype, num_rows: int) -> Line:
    """Measure `rope_write_kv` of decode rows scattered over the cache."""
    half = HEAD_DIM // 2
    q, k, v = (torch.randn(num_rows, num, HEAD_DIM).to(dtype) for num in (HEADS, KV_HEADS, KV_HEADS))
    keys, values = torch.zeros(2, 4 * num_rows, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=dtype)
    angles = torch.rand(num_rows, half)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(4 * num_rows * BLOCK_SIZE)[:num_rows]

    def ours(_: int) -> None:
        ops.rope_write_kv(q, k, v, cos, sin, keys, values, slots)

    def plain(_: int) -> None:
        c, s = (torch.cat((t, t), dim=-1)[:, None].to(dtype) for t in (cos, sin))
        for heads in (q, k):
            turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
            heads.copy_(heads * c + turned * s)
        keys[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = k
        values[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = v

    before = q.clone()
    ours(0)
    rotated = q.clone()
    q.copy_(before)
    plain(0)
    check(rotated, {"plain torch": q})
    num_bytes = 2 * (q.nbytes + k.nbytes + v.nbytes) + cos.nbytes + sin.nbytes
    return measured(f"{num_rows} rows", machine.floor(num_bytes), ours, {"plain torch": plain})


def silu_line(machine: Machine, dtype: torch.dtype, num_rows: int) -> Line:
    """Measure `silu_mul`."""
    gate_up = torch.randn(num_rows, 2 * INNER).to(dtype)

    def plain(_: int) -> Tensor:
        return F.silu(gate_up[:, :INNER]) * gate_up[:, INNER:]

    check(ops.silu_mul(gate_up), {"F.silu": plain(0)})
    floor_s = machine.floor(1.5 * gate_up.nbytes)
    return measured(f"{num_rows} rows", floor_s, lambda _: ops.silu_mul(gate_up), {"F.silu, mul": plain})


def sample_lines(machine: Machine, dtype: torch.dtype, rows: Sequence[int]) -> Iterator[Line]:
    """Measure `sample_nodes` on float32 logits: flat ones, where most tokens can win, and a trained model's kind."""
    for num_rows in rows:
        flat = torch.randn(num_rows, QWEN_05B.vocab_size, dtype=dtype) * 2.5
        yield sample_line(machine, f"{num_rows} rows, flat", flat)
        peaked = flat.clone()
        peaked[:, :8] += 22.0
        yield sample_line(machine, f"{num_rows} rows, peaked", peaked)


def sample_line(machine: Machine, name: str, logits: Tensor) -> Line:
    """Measure rows that each have noise of their own."""
    num_rows = logits.shape[0]
    noise = NodeNoise.of(range(num_rows), [0] * num_rows, range(num_rows), [True] * num_rows)
    others: dict[str, Op] = {
        "softmax, multinomial": lambda _: logits.softmax(-1).multinomial(1),
        "argmax alone": lambda _: logits.argmax(-1),
    }
    return measured(name, machine.floor(logits.nbytes), lambda _: ops.sample_nodes(logits, noise), others)


def by_rows(line: Callable[[Machine, torch.dtype, int], Line]) -> Section:
    """Return the section that has a line for each number of rows."""
    return lambda machine, dtype, rows: (line(machine, dtype, num_rows) for num_rows in rows)


SECTIONS: dict[str, Section] = {
    "add_lora": lora_lines,
    "linear": linear_lines,
    "paged_attention": attention_lines,
    "rms_norm": by_rows(norm_line),
    "rope_write_kv": by_rows(rope_line),
    "silu_mul": by_rows(silu_line),
    "sample_nodes": sample_lines,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON file goes")
    main(parser.parse_args())
