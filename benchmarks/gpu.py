"""The kernels and steps of an 8B model on a GPU against their floors in bytes and FLOPs, in under 8 minutes.

    python benchmarks/gpu.py

Each op is measured alone, with a cold second-level cache, beside plain torch alternatives. Steps are those of a
Llama-3.1-8B shape with random bfloat16 weights, run as by the engine: decode by CUDA graph, queued without waiting, and
prefill. A floor is the larger of two times: bytes over the bandwidth of a large copy, and FLOPs over the rate of a
large matrix product. Both rates are measured first. A section that fails is reported with its error. Without a CUDA
device, the benchmark prints that there is none and measures nothing. The results go to `benchmarks/results/` as JSON
and Markdown.
"""

from __future__ import annotations

import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from gpu_steps import BLOCK_SIZE, RANK, steps
from gpu_timing import DTYPE, HEADS, Bench, Line, Op, measure_bandwidth, measure_flops, time_op, time_steps
from report import Report, table

from descant.engine.graphs import CudaCapture
from descant.model.arch import DecoderConfig, RopeConfig
from descant_kernels import (
    AttentionBatch,
    LoraTables,
    NodeNoise,
    PairLayout,
    Segments,
    add_lora,
    paged_attention,
    rms_norm,
    rope_write_kv,
    sample_nodes,
    silu_mul,
)

TIME_LIMIT_S = 420.0  # no section is begun after this
LLAMA_8B = DecoderConfig(
    family="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0),
    max_position_embeddings=4096,
    windows=(None,) * 32,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_word_embeddings=False,
    dtype="bfloat16",
    bos_token_id=None,
    eos_token_ids=(),
)


def main() -> None:
    """Measure all sections, print the results, and write both files."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return
    name = torch.cuda.get_device_name()
    report = Report("gpu-" + name.replace(" ", "-"), Namespace(device=name, time_limit_s=TIME_LIMIT_S))
    device = torch.device("cuda")
    bench = Bench(device, LLAMA_8B, time_op, time_steps, CudaCapture(device), bandwidth=1.0, flops=1.0)
    bench.bandwidth, bench.flops = measure_bandwidth(bench), measure_flops(bench)
    head = f"{name}: copy {bench.bandwidth / 1e9:.0f} GB/s, products {bench.flops / 1e12:.0f} TFLOP/s, bf16"
    print(f"{report.header()}\n{head}\n")
    lines, errors = measure_all(bench)
    path = report.save({"device": head, "lines": [asdict(line) for line in lines], "errors": errors})
    path.with_suffix(".md").write_text(markdown(head, lines, errors))
    print(f"\n{path}")


def measure_all(bench: Bench) -> tuple[list[Line], dict[str, str]]:
    """Run every section that the time limit allows. Return the measurements, and the errors by section."""
    lines: list[Line] = []
    errors: dict[str, str] = {}
    started_s = time.perf_counter()
    for section in (lora_ops, norm_ops, cache_ops, attention_ops, other_ops, steps):
        if time.perf_counter() - started_s > TIME_LIMIT_S:
            errors[section.__name__] = "not begun: the time limit was reached"
            continue
        found: list[Line] = []
        try:
            with torch.inference_mode():
                found.extend(section(bench))
        except Exception:  # noqa: BLE001 — the other sections are worth having whatever happened to this one
            errors[section.__name__] = traceback.format_exc()
        lines += found
        print(
            table(HEADS, [line.cells() for line in found]), errors.get(section.__name__, ""), "", sep="\n", flush=True
        )
    return lines, errors


def markdown(head: str, lines: list[Line], errors: dict[str, str]) -> str:
    """Return the table as a Markdown page."""
    rows = [HEADS, ("---",) * len(HEADS), *(line.cells() for line in lines)]
    failed = [f"- `{name}` failed: `{error.strip().splitlines()[-1]}`" for name, error in errors.items()]
    return "\n".join([f"# {head}", "", *("| " + " | ".join(row) + " |" for row in rows), "", *failed]) + "\n"


# ---- ops ----------------------------------------------------------------------------------------------------------


def lora_ops(bench: Bench) -> Iterator[Line]:
    """Measure `add_lora` of one projection of the hidden size, with the rows of each adapter in one run."""
    size = bench.config.hidden_size
    for num_rows in (1, 32, 256, 2048):
        for num_adapters in sorted({1, min(num_rows, 32)}):
            layout = PairLayout.of(RANK, size, size)
            arena = bench.randn(num_adapters * layout.size, std=0.02)
            tables = LoraTables.of(
                arena, [[slot * layout.size] for slot in range(num_adapters)], [[RANK]] * num_adapters
            )
            lengths = [num_rows // num_adapters] * num_adapters
            segments = Segments.of(lengths, list(range(num_adapters)), bench.device)
            x, y = bench.randn(num_rows, size), bench.randn(num_rows, size)
            pairs = [layout.views(arena, slot * layout.size) for slot in range(num_adapters)]
            ranges = list(pairwise(segments.host_indptr))
            owner = torch.repeat_interleave(torch.arange(num_adapters), num_rows // num_adapters).to(bench.device)
            all_a, all_b = torch.stack([a.T for a, _ in pairs]), torch.stack([b.T for _, b in pairs])

            def loop(x=x, y=y, pairs=pairs, ranges=ranges) -> None:
                for (start, end), (a, b) in zip(ranges, pairs, strict=True):
                    y[start:end].addmm_(x[start:end] @ a.T, b.T)

            def gathered(x=x, y=y, owner=owner, all_a=all_a, all_b=all_b) -> None:
                y.add_(torch.bmm(torch.bmm(x.unsqueeze(1), all_a[owner]), all_b[owner]).squeeze(1))

            plain: dict[str, Op] = {"loop": loop}
            if num_rows <= 256:  # for more rows, the gathered matrices alone take gigabytes
                plain["gathered bmm"] = gathered
            seconds = bench.time_op(lambda: add_lora(y, x, tables, segments, 0, (size,)))  # noqa: B023 — called at once
            num_bytes = DTYPE.itemsize * (num_adapters * RANK * 2 * size + x.numel() + 2 * y.numel())
            floor_s = bench.floor(num_bytes, 4.0 * num_rows * RANK * size)
            yield Line(
                name=f"add_lora, {num_rows} rows, {num_adapters} adapters",
                seconds=seconds,
                floor_s=floor_s,
                plain_s={name: bench.time_op(op) for name, op in plain.items()},
                aim="≥ 70 % of floor" if num_adapters > 1 else "",
                reached=f"{floor_s / seconds:.0%}" if num_adapters > 1 else "",
            )


def norm_ops(bench: Bench) -> Iterator[Line]:
    """Measure `rms_norm` with the residual."""
    size = bench.config.hidden_size
    weight = bench.randn(size)
    for num_rows in (1, 32, 4096):
        x, residual = bench.randn(num_rows, size), bench.randn(num_rows, size)
        op, plain = bench.time_op(lambda: rms_norm(x, weight, 1e-5, residual)), {}  # noqa: B023 — called at once
        plain["add_, F.rms_norm"] = bench.time_op(lambda: F.rms_norm(residual.add_(x), (size,), weight, 1e-5))  # noqa: B023
        yield Line(f"rms_norm, {num_rows} rows", op, bench.floor(4 * x.nbytes), plain)


def cache_ops(bench: Bench) -> Iterator[Line]:
    """Measure `rope_write_kv` of rows scattered over the cache."""
    config = bench.config
    half = config.head_dim // 2
    for num_rows in (1, 32, 4096):
        q = bench.randn(num_rows, config.num_heads, config.head_dim)
        k, v = (bench.randn(num_rows, config.num_kv_heads, config.head_dim) for _ in "kv")
        shape = (2 * -(-num_rows // BLOCK_SIZE), config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        keys, values = bench.randn(*shape), bench.randn(*shape)
        cos, sin = torch.rand(2, num_rows, half, device=bench.device)
        slots = torch.randperm(shape[0] * BLOCK_SIZE, device=bench.device)[:num_rows]

        def plain(q=q, k=k, v=v, keys=keys, values=values, cos=cos, sin=sin, slots=slots) -> None:
            for heads in (q, k):
                x1, x2 = heads.float().split(half, dim=-1)
                c, s = cos[:, None], sin[:, None]
                heads.copy_(torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1))
            keys[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = k
            values[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = v

        op = bench.time_op(lambda: rope_write_kv(q, k, v, cos, sin, keys, values, slots))  # noqa: B023 — called at once
        num_bytes = 2 * (q.nbytes + k.nbytes + v.nbytes) + cos.nbytes + sin.nbytes
        plain_s = {"plain torch": bench.time_op(plain)}
        yield Line(f"rope_write_kv, {num_rows} rows", op, bench.floor(num_bytes), plain_s)


def attention_ops(bench: Bench) -> Iterator[Line]:
    """Measure `paged_attention` in decode and prefill. The alternative reads keys that are contiguous already."""
    config = bench.config
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    for num_sequences, num_new, context in (
        (1, 1, 4096),
        (32, 1, 1024),
        (128, 1, 1024),
        (1, 2048, 2048),
        (4, 256, 2048),
    ):
        num_blocks = -(-context // BLOCK_SIZE)
        keys, values = (bench.randn(num_sequences * num_blocks, kv_heads, BLOCK_SIZE, head_dim) for _ in "kv")
        blocks = torch.randperm(num_sequences * num_blocks).view(num_sequences, -1).tolist()
        batch = AttentionBatch.of([num_new] * num_sequences, [context] * num_sequences, blocks, bench.device)
        q = bench.randn(num_sequences * num_new, heads, head_dim)
        op = bench.time_op(lambda: paged_attention(q, keys, values, batch, head_dim**-0.5))  # noqa: B023 — called at once
        dense_q = bench.randn(num_sequences, heads, num_new, head_dim)
        dense_k, dense_v = (bench.randn(num_sequences, kv_heads, context, head_dim) for _ in "kv")
        is_causal = num_new == context
        plain = {}
        if is_causal or num_new == 1:  # with earlier context, torch aligns its causal mask differently
            plain["SDPA"] = bench.time_op(
                lambda: F.scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=is_causal, enable_gqa=True)  # noqa: B023
            )
        num_pairs = num_sequences * num_new * (context - (num_new - 1) / 2)
        floor_s = bench.floor(keys.nbytes + values.nbytes + 2 * q.nbytes, 4.0 * num_pairs * heads * head_dim)
        yield Line(f"paged_attention, {num_sequences} × {num_new} new of {context}", op, floor_s, plain)


def other_ops(bench: Bench) -> Iterator[Line]:
    """Measure `sample_nodes` and `silu_mul`."""
    vocab_size, inner = bench.config.vocab_size, bench.config.intermediate_size
    for num_rows in (1, 32):
        logits = torch.randn(num_rows, vocab_size, device=bench.device)
        noise = NodeNoise.of([7] * num_rows, [0] * num_rows, list(range(num_rows)), [True] * num_rows, bench.device)
        op = bench.time_op(lambda: sample_nodes(logits, noise))  # noqa: B023 — called at once
        plain = {"softmax, multinomial": bench.time_op(lambda: logits.softmax(-1).multinomial(1))}  # noqa: B023
        yield Line(f"sample_nodes, {num_rows} rows", op, bench.floor(logits.nbytes), plain)
    for num_rows in (32, 2048):
        gate_up = bench.randn(num_rows, 2 * inner)
        op = bench.time_op(lambda: silu_mul(gate_up))  # noqa: B023 — called at once
        plain = {"plain torch": bench.time_op(lambda: F.silu(gate_up[:, :inner]) * gate_up[:, inner:])}  # noqa: B023
        yield Line(f"silu_mul, {num_rows} rows", op, bench.floor(1.5 * gate_up.nbytes), plain)


# ---- steps --------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    main()
